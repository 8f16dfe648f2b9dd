"""Who may import whom, and how large all is: CONTRIBUTING.md, "Layout"."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "w2s_train"
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = ("__init__", "__main__")  # of the package
CONTRACT = ("base", "randomness")  # what files outside weak/, and sources, import of it
METHOD = """
    interpolant timesteps schedule segment objective weak/base weak/null_class
    weak/intermediate_head models/dit sampler module log optim
"""
LAYOUT = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
ROOMS, LIBRARIES = re.findall(r"```\n(.*?)```", LAYOUT, re.DOTALL)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def below(arrows: str) -> dict[str, set[str]]:
    """What each room may import: what an arrow leads to, and what that may import."""
    edges: dict[str, set[str]] = {name: set() for name in words(arrows)}
    for line in arrows.splitlines():
        groups = [words(group) for group in line.split("->")]
        for upper, lower in zip(groups, groups[1:], strict=False):
            for name in upper:
                edges[name] |= lower
    return closure(edges)


def closure(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """All that one comes to by one arrow or more."""
    reached = {name: set(lower) for name, lower in edges.items()}
    for _ in edges:
        for lower in reached.values():
            lower.update(*(reached[name] for name in tuple(lower)))
    return reached


BELOW = below(ROOMS)
ONLY_IN = {words.pop(0): set(words) for words in map(str.split, LIBRARIES.splitlines())}


def room(path: Path) -> str:
    """The first part below the package: a folder or a module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


@functools.cache
def imported(path: Path) -> list[str]:
    """Modules, and names in them, that a file imports anywhere."""
    names = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", [path for path in FILES if room(path) not in DOORS], ids=module)
def test_imports(path: Path):
    here = room(path)
    for name in imported(path):
        library, there, *rest = [*name.split("."), ""]
        assert here in ONLY_IN.get(library, {here}), f"{path} imports {name}"
        if library == "w2s_train" and there not in (here, "__version__"):
            assert there in BELOW[here], f"{path} imports {name}"
        if there == "weak":  # neither another source nor anything else: each can be deleted
            assert rest[0] in CONTRACT, f"{path} imports {name}"
        assert library != "torch" or here not in ("compare", "scores"), f"{path} imports {name}"


def test_the_layout_names_everything_once():
    """And nothing else; no arrow leads back."""
    assert {room(path) for path in FILES} - set(DOORS) == BELOW.keys()
    assert not [name for name, lower in BELOW.items() if name in lower]
    for libraries in ONLY_IN.values():
        assert libraries <= BELOW.keys()


def test_files_import_in_no_circle():
    """Not within a room either; a package's face counts as a file."""
    known = {module(path) for path in FILES}
    edges = {module(path): set[str]() for path in FILES}
    for path in FILES:
        for name in imported(path):
            found = name if name in known else name.rpartition(".")[0]
            edges[module(path)] |= {found} & known
    assert [name for name, reached in closure(edges).items() if name in reached] == []


def test_nothing_happens_at_import():
    """Module level holds imports, definitions, constants and docstrings."""
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    for path in FILES:
        if path.stem == "__main__":
            continue
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, allowed) or docstring, f"{path}:{node.lineno}"


def test_gradients_stop_in_one_file():
    for path in FILES:
        if room(path) in ("segment", "models", "module", "features", "sampler"):
            continue
        text = path.read_text()
        assert "set_grad_enabled" not in text, path
        # It detaches the numbers that it reports, nothing else.
        assert ".detach()" not in text or path.stem == "log", path


def test_functions_fit_on_a_screen():
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"


def test_the_house_stays_small():
    """Who needs more room says so here, and why in the commit."""

    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 46
    assert len(FILES) <= 200
    assert sum(map(lines, FILES)) <= 28_500
    assert sum(lines(PACKAGE / f"{name}.py") for name in METHOD.split()) <= 1_900
    assert lines(ROOT / "README.md") <= 220


OTHERS = ("__init__", *CONTRACT)
WEAK_FILES = [p.stem for p in FILES if room(p) == "weak" and p.stem not in OTHERS]
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


@pytest.mark.slow
def test_a_weak_source_can_be_deleted():
    """Every other file imports without it; that none names it, `test_imports` shows."""
    command = [sys.executable, "-c", WITHOUT_A_SOURCE, *WEAK_FILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == WEAK_FILES


def test_every_room_is_installed():
    """Those that pyproject.toml lists are those that are there."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert {*listed} == there and len(listed) == len(there)
