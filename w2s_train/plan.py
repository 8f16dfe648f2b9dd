"""What to generate: seeds and labels, dealt out to processes, without what is done already."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset, DistributedSampler


class GenerationPlan(Dataset):
    """Item i is the i-th seed, with the i-th of the labels, which repeat.

    Args:
        seeds: One per image.
        labels: Of the first images; then they start over.
        setting: Which of the module's settings generates them.
    """

    def __init__(self, seeds: Sequence[int], labels: Sequence[int], setting: int = 0) -> None:
        self.seeds, self.labels, self.setting = seeds, labels, setting

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, int]:
        label = self.labels[index % len(self.labels)]
        seed, setting = self.seeds[index], self.setting
        return {"index": index, "seed": seed, "label": label, "setting": setting}


class Remaining(DistributedSampler):
    """This process's share of what a plan has left: nothing padded, nothing twice.

    A `DistributedSampler` by type, so that Lightning puts none of its own in its place.

    Args:
        plan: The plan.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
    """

    def __init__(self, plan: GenerationPlan, rank: int, world_size: int) -> None:
        super().__init__(plan, world_size, rank, shuffle=False)
        self.plan, self.done = plan, set[int]()  # indices that need no image any more

    def __iter__(self) -> Iterator[int]:  # a generator: looks at `done` when the first is asked for
        left = [i for i in range(len(self.plan)) if i not in self.done]
        yield from left[self.rank :: self.num_replicas]

    def __len__(self) -> int:
        """Of the whole plan; fewer come where some are done."""
        return len(range(self.rank, len(self.plan), self.num_replicas))
