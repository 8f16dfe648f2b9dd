"""Who may import whom: CONTRIBUTING.md, "Layout"."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "w2s_train"
# A file may import files of lower levels, and its own folder.
LEVELS = {
    "secrets": -1,
    "errors": 0,
    "imports": 1,
    "loading": 3,
    "export": 3,
    "scores": 1,
    "compare": 2,
    "checks": 1,
    "interpolant": 1,
    "schedule": 1,
    "timesteps": 2,
    "models": 2,
    "latents": 3,
    "autoencoder": 4,
    "frechet": 2,
    "leaves": 2,
    "files": 0,
    "checkpointing": 1,
    "checkpoint_io": 8,
    "fingerprint": 0,
    "allocator": 0,
    "gradients": 0,
    "readback": 0,
    "rows": 0,
    "spikes": 0,
    "global_batch": 1,
    "signals": 0,
    "peers": 0,
    "watch": 1,
    "shards": 2,
    "clock": 1,
    "plan": 1,
    "features": 3,
    "metrics": 4,
    "weak": 3,
    "preparation": 3,
    "segment": 4,
    "objective": 5,
    "statistics": 5,
    "guidance": 6,
    "sampler": 7,
    "generation": 8,
    "module": 9,
    "datamodule": 9,
    "reference_images": 10,
    "callbacks": 9,
    "run_folder": 11,
    "trainer": 11,
    "command": 12,
    "cli": 13,
}
# Libraries, and the only places where they are imported.
ONLY_IN = {
    "lightning": {
        "checkpoint_io",
        "command",
        "run_folder",
        "trainer",
        "module",
        "datamodule",
        "reference_images",
        "callbacks",
    },
    "webdataset": {"shards"},
    "cleanfid": {"features"},
    "timm": {"features", "models"},
    "torch_fidelity": {"features"},
    "diffusers": {"latents", "export"},
    "jsonargparse": {"command", "imports"},
    "scipy": {"compare"},
}
# What the comparison may import of the package: it reads folders, and runs nothing.
BESIDE = {"errors", "scores", "compare"}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The first part below the package: a folder or a module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path: Path):
    here = place(path)
    if here in ("__init__", "__main__"):
        return
    for name in imported(path):
        library, *rest = name.split(".")
        if library in ONLY_IN:
            assert here in ONLY_IN[library], f"{path} imports {library}"
        if library == "w2s_train" and rest and rest[0] != here:
            assert LEVELS[rest[0]] < LEVELS[here], f"{path} imports {name}"
        if here == "compare" and library == "w2s_train":
            assert rest[0] in BESIDE, f"{path} imports {name}"
        assert library != "torch" or here not in BESIDE, f"{path} imports {name}"
        if here == "weak" and path.stem not in ("__init__", "base"):
            assert rest[:1] != ["weak"] or rest[1:] == ["base"], f"{path} imports {name}"


def test_the_layout_names_everything():
    layout = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n- ")[0]
    assert LEVELS.keys() - set(re.findall(r"\w+", layout)) == set()
    assert {place(path) for path in FILES} - {"__init__", "__main__"} == LEVELS.keys()


def test_nothing_happens_at_import():
    """Module level holds imports, definitions, constants and docstrings."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for path in FILES:
        if path.stem == "__main__":
            continue
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, allowed) or docstring, f"{path}:{node.lineno}"


def test_gradients_stop_in_one_file():
    for path in FILES:
        if place(path) in ("segment", "models", "module", "features", "sampler"):
            continue
        text = path.read_text()
        assert "set_grad_enabled" not in text, path
        # These detach the numbers that they report, nothing else.
        assert ".detach()" not in text or path.stem in ("objective", "learned"), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path):
    """Files stay readable at one sitting, functions on one screen."""
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{path}: {node.name} has {lines} lines"


WEAK_FILES = [p.stem for p in FILES if place(p) == "weak" and p.stem not in ("__init__", "base")]
WITHOUT_A_SOURCE = """
import importlib, importlib.abc, pkgutil, sys
import w2s_train

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

finder = Missing()
sys.meta_path.insert(0, finder)
for source in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("w2s_train")]:
        del sys.modules[name]
    finder.name = f"w2s_train.weak.{source}"
    import w2s_train
    names = [m.name for m in pkgutil.walk_packages(w2s_train.__path__, "w2s_train.")]
    for name in names:
        if name not in (finder.name, "w2s_train.__main__"):
            importlib.import_module(name)
    assert finder.name not in sys.modules
    print(source, len(names))
"""


def test_a_weak_source_can_be_deleted():
    """Nothing imports one: neither another source, nor any other file of the package."""
    for path in FILES:
        for name in imported(path):
            found = [file for file in WEAK_FILES if name.startswith(f"w2s_train.weak.{file}")]
            assert not found, f"{path} imports {name}"
            assert name != "w2s_train.weak" or place(path) == "weak", f"{path} imports {name}"
    command = [sys.executable, "-c", WITHOUT_A_SOURCE, *WEAK_FILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == WEAK_FILES
