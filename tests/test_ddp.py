"""The options of DDP change how gradients travel, and no digit of them."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from recipes import OVERLAYS
from test_align import classifier, online, overlay
from test_resume import assert_same, checkpoint

from w2s_train.running.guard import Guard
from w2s_train.running.watched_ddp import WatchedDDP

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.max_steps=8"]
DDP += ["--trainer.val_check_interval=100", "--data.num_generated=8"]
DDP += ["--model.objective.init_args.total_steps=8"]
CHECKPOINTED = "--model.network.init_args.gradient_checkpointing=2"
BAD = 3  # the step that is skipped


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch):
    """Let fits use DDP's own options; or ours, of which one depends on the accumulation."""
    inner = DDPStrategy._setup_model

    def use(*, ours: bool, static: bool = True, unused: bool = False) -> None:
        def setup(self: WatchedDDP, model: torch.nn.Module) -> torch.nn.Module:
            expected = {"gradient_as_bucket_view": True, "static_graph": static}
            assert self._ddp_kwargs == expected | {"find_unused_parameters": unused}
            self._ddp_kwargs = self._ddp_kwargs if ours else {}
            return inner(self, model)

        monkeypatch.setattr(DDPStrategy, "_setup_model", setup)

    return use


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard drops the gradients of one step."""
    judge = Guard.judge
    monkeypatch.setattr(
        Guard,
        "judge",
        lambda self, trainer, *numbers: (
            judge(self, trainer, *numbers) and trainer.global_step != BAD
        ),
    )


CASES = [pytest.param(recipe, 1, id=recipe, marks=pytest.mark.long) for recipe in OVERLAYS]
CASES += [
    pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in (("drawn", 1), ("sgg_reversed", 2))
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe, parts", CASES)
def test_options_change_no_digit(command, options_of, bad_step, tmp_path, recipe: str, parts: int):
    """With recomputed blocks, a skipped step, and a resume; and with accumulation."""
    options = [*DDP, "-c", f"configs/weak/{recipe}.yaml", CHECKPOINTED]
    options += [f"--trainer.accumulate_grad_batches={parts}", "--checkpoint.every_n_train_steps=5"]
    runs = {}
    for name in ("plain", "ours"):
        options_of(ours=name == "ours", static=parts == 1)
        runs[name] = checkpoint(command("fit", *options, folder=name))
    assert_same(runs["plain"], runs["ours"])
    fifth = f"--ckpt_path={tmp_path}/ours/checkpoints/step-000005.ckpt"
    assert_same(checkpoint(command("fit", *options, fifth, folder="resumed")), runs["ours"])


@pytest.mark.slow
def test_learned_guidance(command, options_of):
    """A frozen network, and a small one that learns."""
    path = command("fit") / "checkpoints" / "last.ckpt"
    options = ["-c", "configs/guidance/learned_fit.yaml", *DDP[:-1]]
    options.append(f"--model.network.init_args.path={path}")
    states = []
    for ours in (False, True):
        options_of(ours=ours)
        states.append(checkpoint(command("fit", *options, folder=f"ours-{ours}")))
    assert_same(*states)


@pytest.mark.slow
def test_alignment(command, options_of, bad_step, tmp_path):
    """Projectors beside a head; DDP's own options refuse a parameter that is not used."""
    options = [*DDP, "-c", "configs/weak/sgg_reversed.yaml", "--checkpoint.every_n_train_steps=5"]
    options += overlay(tmp_path, online(classifier(tmp_path)))
    states = []
    for ours in (False, True):
        options_of(ours=ours)
        states.append(checkpoint(command("fit", *options, folder=f"ours-{ours}")))
    assert_same(*states)
    fifth = f"--ckpt_path={tmp_path}/ours-True/checkpoints/step-000005.ckpt"
    assert_same(checkpoint(command("fit", *options, fifth, folder="resumed")), states[1])


@pytest.mark.slow
def test_a_changing_graph_has_a_name(command, options_of):
    """Strategies that look for unused parameters take no graph for granted."""
    options_of(ours=True, static=False, unused=True)
    name = "--trainer.strategy=ddp_fork_find_unused_parameters_true"
    assert checkpoint(command("fit", "--trainer.devices=2", name))["global_step"] == 6
