"""README.md stays true: its commands run as they are printed, in a fresh copy."""

import os
import re
import shlex
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")  # the first line of a block that is a file
SETUP = ["bash launch/local.sh", "bash launch/test.sh"]
SUBCOMMANDS = {"fit", "validate", "sample", "compare", "export", "reference", "tune"}

# Stands where `lightning` does and adds what makes a run short; what needs GPUs is parsed only.
CUT = """#!{python}
import os, sys
words = sys.argv[1:]
short = ["--data.num_generated", "20", "--data.num_workers", "0", "--model.generation_block", "20"]
short += ["--model.sampler.init_args.steps", "5"]
few = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--data.batch_size", "8"]
more = {{
    "fit": [*few, *short],
    "validate": short,
}}.get(words[0], [])
if any("dit_b" in word for word in words):
    more = ["--print_config"]
os.execv(sys.executable, [sys.executable, "-m", "w2s_train", *words, *more])
"""


def commands(language: str = "bash") -> list[str]:
    """The commands of all blocks, in order, without comments; continued lines are joined."""
    found = []
    for kind, body in BLOCK.findall(TEXT):
        lines = body.replace("\\\n", " ").splitlines() if kind == language else []
        found += [" ".join(line.partition(" #")[0].split()) for line in lines]
    return [line for line in found if line]


def files() -> dict[str, str]:
    """The blocks that are files, by their paths."""
    bodies = [body for _, body in BLOCK.findall(TEXT)]
    return {match[1]: body for body in bodies if (match := NAMED.match(body))}


def shortened(command: str) -> str:
    """A command that runs to its end anywhere: SLURM is not asked, and few tests are run."""
    if command == SETUP[1]:
        return f"{command} -q tests/test_interpolant.py"
    if command.startswith("launch/submit") and "--dry-run" not in command:
        return f"{command} --dry-run"
    return command.replace("--images 20000", "--images 600 --set_images 40")


def test_the_two_commands_of_a_clone_come_first():
    assert commands()[:2] == SETUP
    assert TEXT.index(SETUP[0]) < 300
    assert len(TEXT.splitlines()) <= 220


def test_every_command_is_found_and_names_what_is_there():
    """Every block of a shell is read to its end; files that no command makes are in the clone."""
    found = commands()
    assert len(found) == len([w for line in found for w in [shlex.split(line)] if w])  # all parse
    assert TEXT.count("\n```bash\n") == 7 and "..." not in "".join(found)
    run = [words for line in found if "lightning" in (words := shlex.split(line))]
    assert len(run) >= 12
    assert {words[words.index("lightning") + 1] for words in run} <= SUBCOMMANDS
    made = set(files())
    assert made == {"mine/blurred.py", "mine/blurred.yaml"}
    for words in map(shlex.split, found):
        for option, name in zip(words, words[1:], strict=False):
            if option in ("-c", "--data") and "{" not in name and name not in made:
                assert (ROOT / name).is_file(), name


def test_the_overlays_that_it_lists_are_those_that_are_there():
    listed = TEXT.partition("Overlays in `configs/weak/`")[2].partition("`configs/guidance/`")[0]
    there = {path.stem for path in (ROOT / "configs" / "weak").glob("*.yaml")}
    assert set(re.findall(r"`(\w+)`", listed)) == there


@pytest.mark.parametrize("study", ["mnist", "cifar10", "digits"])
def test_its_table_says_what_those_of_the_studies_say(study: str):
    """Mean and interval of each recipe, and the least mean of guidance at sampling."""
    rows = {row[0]: row[1:] for row in table(ROOT / "experiments" / "table.md")}
    column = ["mnist", "cifar10", "digits"].index(study) + 1
    theirs = {row[0]: row[1] for row in table(ROOT / "experiments" / study / "table.md")}
    assert list(rows) == [
        "none",
        "branch",
        "head_above",
        "sgg_reversed",
        "sgg_paper",
        "none, guided",
    ]
    for recipe, cells in list(rows.items())[:-1]:
        value = cells[column].replace("*", "").removesuffix(", worse")
        assert value == theirs.get(recipe, "–")
    guidance = ROOT / "experiments" / f"{study}_guidance" / "table.md"
    best = "–"
    if guidance.is_file():
        best = min((row[-1] for row in table(guidance)), key=lambda cell: float(cell.split()[0]))
    assert rows["none, guided"][column].replace("*", "") == best


def table(path: Path) -> list[list[str]]:
    """The rows of a Markdown table, less its head."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines[1:]]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what git tracks or does not ignore, as a repository, with a .venv that is done."""
    folder = tmp_path / "clone"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        if (ROOT / name).is_file() and "/runs/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@test"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    venv.create(folder / ".venv", symlinks=True)
    (packages,) = (folder / ".venv").glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join([str(folder), *site.getsitepackages()]))
    for extras in ("", "[dev]"):  # as launch/env.sh marks what it has installed
        stamp = (
            f"touch .venv/installed-$(cat pyproject.toml - <<<'{extras}' | cksum | cut -d' ' -f1)"
        )
        subprocess.run(["bash", "-c", stamp], cwd=folder, check=True)
    shim = folder / ".venv" / "bin" / "lightning"
    shim.write_text(CUT.format(python=folder / ".venv" / "bin" / "python"))
    shim.chmod(0o755)
    return folder


@pytest.mark.slow
def test_every_command_runs_as_it_is_printed(clone: Path):
    """In one shell, in their order; each says what it is, so that a failure names it."""
    for name, body in files().items():
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(body)
    (config,) = (body for kind, body in BLOCK.findall(TEXT) if body.startswith("model:  "))
    (clone / "configs/mine.yaml").write_text(config)
    script, parse = ["set -e"], "lightning fit -c configs/mine.yaml --print_config"
    for command in [*map(shortened, commands()), parse]:
        script += [f"printf '\\n== %s\\n' {shlex.quote(command)}", command]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=clone,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("\n== ") == len(commands()) + 1
    runs = {path.parent.name for path in (clone / "runs").glob("*/scores.json")}
    overlays = {"branch", "drawn", "head_above", "blurred"}
    assert runs >= {"digits_baseline", "digits_w2s", *(f"digits_w2s+{name}" for name in overlays)}
    weak = yaml.safe_load((clone / "runs/digits_w2s+blurred/config.yaml").read_text())
    (segment,) = weak["model"]["objective"]["init_args"]["segments"]
    assert segment["init_args"]["weak"]["class_path"] == "blurred.Blurred"
    assert (clone / "comparison" / "comparison.html").is_file()
    assert len(list((clone / "images").glob("*.png"))) == 64
    assert len(list((clone / "chosen").glob("*.png"))) == 64
    assert (clone / "runs/digits_w2s+drawn/tune/inbuilt/winner.yaml").is_file()
    assert (clone / "data/images/classes.txt").read_text().split() == ["eight", "three"]
    assert (clone / "runs/images_w2s/checkpoints/last.ckpt").exists()
    assert (clone / "exported" / "model.safetensors").is_file()
    assert "hidden_size: 1152" in done.stdout  # of the XL that was parsed only
