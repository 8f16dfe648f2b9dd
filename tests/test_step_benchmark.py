"""benchmarks/step.py: its operations are counted right, its steps are real, its results kept."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from w2s_train.models import DiT

SIZES = {  # of DiT/2, with "Gflops" of the DiT paper (table 4), whose networks predict a variance
    "S": (dict(hidden_size=384, depth=12, num_heads=6), 6.06),
    "B": (dict(hidden_size=768, depth=12, num_heads=12), 23.01),
    "L": (dict(hidden_size=1024, depth=24, num_heads=16), 80.71),
    "XL": (dict(hidden_size=1152, depth=28, num_heads=16), 118.64),
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a file of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def timed(load):
    """A recipe of the tiny network on the CPU."""
    module = load("timed")

    def build(recipe: str, precision: str = "32-true", *options: str):
        device = torch.device("cpu")
        return module.Timed(
            recipe, module.Setting("tiny", precision, False, 10, 2, list(options), device)
        )

    return build


@pytest.mark.parametrize("size", SIZES)
def test_flops_are_the_published_ones(load, size: str):
    sizes, published = SIZES[size]
    with torch.device("meta"):
        network = DiT(**sizes, out_channels=8)
    assert load("flops").forward_flops(network) / 2e9 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(input_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10),
        pytest.param(dict(hidden_size=384, depth=12, num_heads=6), marks=pytest.mark.slow),
    ],
    ids=["tiny", "s2"],
)
def test_flops_are_those_that_torch_counts(load, sizes: dict):
    network = DiT(**sizes)
    x = torch.randn(1, network.in_channels, network.input_size, network.input_size)
    inputs = (x, torch.rand(1), torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    assert counter.get_total_flops() == load("flops").forward_flops(network)


def test_a_step_is_three_forward_passes(load):
    """Not exactly: attention computes its scores again, and data has no gradient."""
    network = DiT(input_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4)
    inputs = (torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        network(*inputs).velocity.sum().backward()
    counted = load("flops").step_flops(network, batch=2)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
def test_a_step_is_the_trainers(timed):
    """Precision, clipping, counting and the average are those of a run."""
    clip = 1e-3
    arm = timed("sgg_reversed", "bf16-mixed", f"--trainer.gradient_clip_val={clip}")
    module, seen = arm.module, set()
    before = [p.clone() for p in (*module.network.parameters(), *module.ema.parameters())]
    module.network.blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    began = module.global_step
    assert began == 1620  # 0.9 of the plan
    arm.step()
    assert module.global_step == began + 1
    assert seen == {torch.bfloat16}
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert module.training_log.read(lambda x, op: x)["gradient_norm"] > clip
    norm = torch.nn.utils.get_total_norm(gradients)
    torch.testing.assert_close(norm, torch.tensor(clip), rtol=1e-3, atol=0)
    after = [*module.network.parameters(), *module.ema.parameters()]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    half = len(changed) // 2
    assert any(changed[:half]) and any(changed[half:])
    assert arm.peak_memory() is None and arm.finite()


@pytest.mark.slow
def test_a_block_is_as_long_as_the_interval_of_a_weak_network(timed):
    """One that learns every fourth step does so in every block."""
    separate = timed("separate")
    assert separate.steps == 4
    (segment,) = separate.module.objective.segments
    before = [p.clone() for p in segment.weak.network.parameters()]
    separate.block()
    after = segment.weak.network.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_recipes_share_memory(timed):
    """Weights, average and the optimizer's state: a step of one is seen by the other."""
    first, second = timed("none"), timed("branch")
    second.share(first)
    for arm in (first, second):
        arm.block(1)
    second.share_optimizer(first)
    mine, theirs = first.trainer.optimizers[0].state, second.trainer.optimizers[0].state
    pairs = zip(first.module.network.parameters(), second.module.network.parameters(), strict=True)
    for a, b in pairs:
        assert a.data_ptr() == b.data_ptr()
        if a.requires_grad:
            assert mine[a]["exp_avg"].data_ptr() == theirs[b]["exp_avg"].data_ptr()
            assert mine[a]["exp_avg_sq"].data_ptr() == theirs[b]["exp_avg_sq"].data_ptr()
    before = [p.clone() for p in first.module.network.parameters()]
    second.block(1)
    after = first.module.network.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--networks=huge"],
            "networks=huge: must be of mnist, cifar10, tiny_imagenet, tiny, small, s2, b2, l2, xl2",
        ),
        (["--precision=16"], "precision=16: must be of 32-true, bf16-mixed"),
        (["--compile=true"], "compile=true: must be of off, on, blocks"),
        (["--rounds=2"], "rounds=2: must be at least 3"),
        (["--threads=0"], "threads=0: must be at least 1"),
        (["--json=nowhere/a.json"], "json=nowhere/a.json: must be in a folder that exists"),
    ],
)
def test_arguments_are_checked_before_any_work(load, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    with pytest.raises(SystemExit) as stop:
        load("step").main()
    assert stop.value.code == f"error: {message}"


@pytest.mark.parametrize(
    "words, message",
    [
        ("sample --samplers=rk4", "samplers=rk4: must be of euler, heun, maruyama"),
        ("sample --json=nowhere/a.json", "json=nowhere/a.json: must be in a folder that exists"),
        ("memory --networks=tiny", "networks=tiny: must be of s2, b2, l2, xl2"),
        ("memory --batch=1", "batch=1: must be at least 2"),
        ("scaling measure --rounds=0", "rounds=0: must be at least 1"),
        ("overhead --steps=0", "steps=0: must be at least 1"),
    ],
)
def test_arguments_of_other_benchmarks(load, monkeypatch, words: str, message: str):
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        load(sys.argv[0]).main()
    assert stop.value.code == f"error: {message}"


def test_unknown_recipes_are_refused(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", "--recipes=head_above,none,gss"])
    with pytest.raises(SystemExit, match="error: recipes=gss: must be of .*branch, "):
        load("step").main()


def test_entries_as_markdown(load, monkeypatch, capsys, tmp_path):
    """A line for each; what is no list of entries is an error of one line."""
    path, main = tmp_path / "a.json", load("as_markdown").main
    about = dict(git_commit="0123456789", machine="M", torch="T", command="C")
    entry = {"recipe": "branch", "ratio": 1.2, "ratio_quartiles": [1.15, 1.254], **about}
    for text, fields in (("[]", ["ratio"]), ("{}", ["ratio"]), (json.dumps([entry]), ["rate"])):
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["as_markdown.py", str(path), *fields])
        with pytest.raises(SystemExit, match="error: .*must be"):
            main()
    monkeypatch.setattr(sys, "argv", ["as_markdown.py", str(path), "recipe", "ratio"])
    main()
    assert capsys.readouterr().out.splitlines() == [
        *("| recipe | ratio |", "|---|---|", "| branch | 1.20 (1.15 to 1.25) |", ""),
        "Commit `0123456`, M, torch T: `C`",
    ]


@pytest.mark.slow
def test_out_of_memory_takes_half_the_batch(load, monkeypatch, capsys):
    """Again and again, and says so."""
    comparison, setting = load("comparison"), load("timed").Setting
    tried = []

    def run(self):
        tried.append(self.setting.batch)
        if tried[-1] > 64:
            raise torch.OutOfMemoryError
        return [{"batch": tried[-1]}]

    monkeypatch.setattr(comparison.Comparison, "run", run)
    asked = setting("xl2", "bf16-mixed", False, 256, 4, [], torch.device("cpu"))
    assert comparison.measure(asked, ["none"], 3, 0) == [{"batch": 64}]
    assert tried == [256, 128, 64]
    assert "xl2: out of memory with batch 128: half of it is taken" in capsys.readouterr().err


def run(*options: object) -> subprocess.Popen:
    command = [sys.executable, "benchmarks/step.py", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_an_option_that_the_command_does_not_know_is_one_line():
    process = run("--recipes=none", "--", "--model.network.init_args.nosuch=1")
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 1
    assert lines[-1].startswith("error: ") and "'nosuch' is not accepted" in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
@pytest.mark.long
def test_results_are_written(tmp_path):
    path = tmp_path / "out.json"
    options = ["--recipes=branch", "--rounds=3", "--batch=10", "--steps=1", f"--json={path}"]
    process = run("--precision=32-true,bf16-mixed", *options)
    progress = process.communicate()[1]
    assert process.returncode == 0, progress
    assert "tiny bf16-mixed compile=False: round 2 of 3, " in progress
    entries = json.loads(path.read_text())
    keys = [(e["network"], e["recipe"], e["precision"], e["compile"]) for e in entries]
    precisions = ("32-true", "bf16-mixed")
    assert keys == [("tiny", r, p, False) for p in precisions for r in ("none", "branch")]
    for e in entries:
        assert (e["batch"], e["rounds"], e["steps_per_round"]) == (10, 3, 1)
        low, high = e["seconds_quartiles"]
        assert 0 < low <= e["seconds"] <= high
        low, high = e["ratio_quartiles"]
        assert low <= e["ratio"] <= high
        assert (e["recipe"] == "none") == (low == e["ratio"] == high == 1)
        assert e["images_per_second"] == pytest.approx(10 / e["seconds"])
        assert e["mfu"] == pytest.approx(e["model_flops_per_second"] / e["peak_flops"])
        assert (e["peak_memory_bytes"] is None) == (not torch.cuda.is_available())
        assert e["recompiles"] == e["graph_breaks"] == e["compile_seconds"] == 0
        assert e["peak_source"] and e["machine"] and e["date"] and e["torch"] == torch.__version__
        assert e["command"].startswith("python benchmarks/step.py --precision=32-true,bf16-mixed")


@pytest.mark.slow
@pytest.mark.long
def test_an_interruption_keeps_what_is_done(tmp_path):
    """Killed in its second network, it leaves the whole results of the first."""
    path = tmp_path / "out.json"
    process = run(
        "--networks=tiny,s2", "--recipes=none", "--rounds=3", "--batch=10", f"--json={path}"
    )
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [e["network"] for e in json.loads(path.read_text())] == ["tiny"]


def run_gpu(tmp_path, *options: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/run_gpu.sh", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_gpu_table_refuses_a_cpu_in_one_line(tmp_path):
    done = run_gpu(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no GPU") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_table_in_tiny_sizes(tmp_path):
    """Every part runs that this checkout has, and one that fails costs the others nothing."""
    done = run_gpu(tmp_path, "--cpu")
    parts = ["step_b2", "step_b2_eager", "step_xl2"]
    parts += [n for n in ("sample", "overhead") if (ROOT / "benchmarks" / f"{n}.py").is_file()]
    for name in parts:
        assert json.loads((tmp_path / f"{name}.json").read_text()), done.stdout
    assert done.returncode == (0 if len(parts) == 5 else 1), done.stdout
    assert f"in {tmp_path}:" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_step_on_a_gpu(load):
    """At least weights, average and Adam's two averages, four bytes each; more with more rows."""
    module, device, peaks = load("timed"), torch.device("cuda"), []
    for rows in (10, 1000):
        arm = module.Timed("none", module.Setting("tiny", "bf16-mixed", False, rows, 1, [], device))
        arm.block()
        peaks.append(arm.peak_memory())
    weights = sum(p.nbytes for p in arm.module.network.parameters())
    assert 4 * weights < peaks[0] < peaks[1]
