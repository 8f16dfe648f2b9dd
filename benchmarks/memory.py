"""What a training step keeps in the memory of a GPU, counted from the architecture.

    python benchmarks/memory.py [--batch 256] [--networks b2,xl2] [--weak_copies 0] [--json FILE]

For latents 4x32x32 and SGG (a head in the middle, a null pass without gradients), with AdamW, one
running average, and recomputation of blocks in groups of k (0: none):

    parameters, gradients, two moments and averages: 4 bytes each per parameter
    half-precision weights of autocast, and weak copies: 2 bytes per parameter each
    a block: T D (16 + s (8 + 2 r)) + 9 B D s,    kept where it is not recomputed
    a group of recomputed blocks: its input, 4 T D, and the blocks of one group at a time

with B rows, T = B N tokens of width D, MLP ratio r, and s = 2 bytes (4 in float32). Of these, the
16 are inputs and outputs of two layer norms, which stay float32, and 8 + 2 r are: input, q, k, v
and output of the attention, output of its projection, input and output of the MLP, and two times
its inside. The attention matrix is never stored (flash). `tests/test_memory.py` compares with the
tensors that autograd saves. What lives within one block only ("work") is an estimate.
"""

import argparse
from typing import Any, NamedTuple

from common import OVERLAYS, about, on_paper, parse, write_json
from torch import nn

from w2s_train.models import DiT

CARD = 80e9  # bytes
GROUPS = (0, 1, 2, 4, 7)


class Memory(NamedTuple):
    """Bytes by what they are for."""

    parameters: float
    gradients: float
    optimizer: float
    averages: float
    weak_copies: float
    half_weights: float
    kept: float  # activations of the strong pass
    recomputed: float  # activations of one group of blocks, in the backward pass
    work: float  # the largest tensors of one block, in the null pass or the backward pass

    @property
    def total(self) -> float:
        """All of it: the height of the backward pass."""
        return sum(self)


def activations(
    network: DiT, rows: int, group: int = 0, item: int = 2, heads: int = 0
) -> tuple[float, float]:
    """Bytes kept for the backward pass, and those that one group is recomputed into.

    Args:
        network: Sizes are read only.
        rows: B.
        group: Blocks that are recomputed at a time; 0 keeps all.
        item: s, bytes of a number in matrix products.
        heads: Further last layers, such as that of `IntermediateHead`.
    """
    width, blocks = network.hidden_size, len(network.blocks)
    tokens = rows * (network.input_size // network.patch_size) ** 2 * width
    ratio = network.arguments["mlp_ratio"]
    block = tokens * (16 + item * (8 + 2 * ratio)) + 9 * rows * width * item
    last = (1 + heads) * tokens * (8 + item)
    if group == 0:
        return blocks * block + last, 0.0
    groups = -(-blocks // group)
    return groups * 4 * tokens + last, min(group, blocks) * block


def memory(
    network: DiT,
    rows: int,
    group: int = 0,
    *,
    item: int = 2,
    averages: int = 1,
    weak_copies: float = 0.0,
    heads: int = 1,
) -> Memory:
    """Bytes of a training step.

    Args:
        network: May be on the meta device.
        rows: Rows per process at a time.
        group: Blocks that are recomputed at a time; 0 keeps all.
        item: Bytes of a number in matrix products: 2 under bf16-mixed.
        averages: Running averages, an `EMA` as weak source included.
        weak_copies: Frozen copies in float32; one in bfloat16 is half of one.
        heads: Trained heads of weak sources.
    """
    numbers = 4 * sum(p.numel() for p in network.parameters())
    matrices = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    kept, recomputed = activations(network, rows, group, item, heads)
    tokens = rows * (network.input_size // network.patch_size) ** 2 * network.hidden_size
    work = tokens * (8 + item * (2 + 2 * network.arguments["mlp_ratio"]))
    return Memory(
        parameters=numbers,
        gradients=numbers,
        optimizer=2 * numbers,
        averages=averages * numbers,
        weak_copies=weak_copies * numbers,
        half_weights=item * matrices if item < 4 else 0,
        kept=kept,
        recomputed=recomputed,
        work=work,
    )


def table(names: list[str], rows: int, weak_copies: float) -> list[dict[str, Any]]:
    """One entry per network, rows at a time and group."""
    entries = []
    for name in names:
        network = on_paper(name)
        for at_a_time in (rows, rows // 2):
            for group in GROUPS:
                parts = memory(network, at_a_time, group, weak_copies=weak_copies)
                sizes = {key: round(value / 1e9, 2) for key, value in parts._asdict().items()}
                entry = {"network": name, "rows": at_a_time, "group": group, **sizes}
                entries.append(entry | {"total": round(parts.total / 1e9, 1)})
                entries[-1]["fits"] = parts.total < 0.9 * CARD
    return entries


def print_table(entries: list[dict[str, Any]]) -> None:
    """One line per network and rows, with what depends on the group at the end."""
    fixed = ("parameters", "gradients", "optimizer", "averages", "weak_copies", "half_weights")
    names = ("network", "rows", *fixed, "work")
    print("| " + " | ".join(names) + "".join(f" | k = {group}" for group in GROUPS) + " |")
    print("|" + "---|" * (len(names) + len(GROUPS)))
    for first in range(0, len(entries), len(GROUPS)):
        groups = entries[first : first + len(GROUPS)]
        cells = [str(groups[0][name]) for name in names]
        cells += [
            f"{e['kept']} + {e['recomputed']}: {e['total']}" + ("" if e["fits"] else ", too much")
            for e in groups
        ]
        print("| " + " | ".join(cells) + " |")
    print(
        "\nGB; k: kept + recomputed: total of the line. More than 90 % of 80 GB are too much: the"
    )
    print("rest is for CUDA itself and for fragments.")


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weak_copies", type=float, default=0.0, help="frozen ones, in float32")
    lists = {"networks": ("b2,xl2", OVERLAYS)}
    given = parse(parser, lists, {"batch": (256, 2, "rows per process")})
    entries = table(given.networks, given.batch, given.weak_copies)
    print_table(entries)
    if given.json:
        write_json(given.json, [entry | about() for entry in entries])


if __name__ == "__main__":
    main()
