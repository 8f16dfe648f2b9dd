"""docs/python.md runs as it stands, and what it lists is there, with its docstring."""

import inspect
import re
from importlib import import_module

import pytest
import torch
from conftest import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PUBLIC = [
    (module, name)
    for module, names in re.findall(r"^\| `(w2s_train[\w.]*)` \| (.*) \|$", PAGE, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", names)
]


@pytest.mark.slow
def test_the_page(digits: None, tmp_path, monkeypatch):
    """Its losses are what a loop of flow matching and a trainer give; its scores are finite."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert torch.isfinite(names["loss"])
    assert names["module"].images_seen == 12 * 64
    assert sorted(names["scores"]) == ["fd_digits", "precision_digits", "recall_digits"]
    assert all(0 <= value < 1000 for value in names["scores"].values())
    again = names["module"].generate([0, 1, 2, 3], [3, 3, 8, 8])
    assert torch.equal(names["made"], again)


def test_the_loop_is_short():
    """At most 25 lines from the network on."""
    lines = BLOCKS[0].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("network = "))
    assert len(lines[first:]) <= 25


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_names(module: str, name: str):
    """Each has a docstring, which names every argument; records document theirs in the class."""
    value = getattr(import_module(module), name)
    text = inspect.getdoc(value) or ""
    assert text
    own = vars(value).get("__init__") if inspect.isclass(value) else value
    if not inspect.isfunction(own) or hasattr(value, "__dataclass_fields__") or name == "UserError":
        return
    bases = " ".join(inspect.getdoc(base) or "" for base in getattr(value, "__mro__", ()))
    for argument in inspect.signature(own).parameters.keys() - {"self", "args", "kwargs"}:
        assert re.search(rf"^\s*{argument}: ", f"{text}\n{bases}", re.MULTILINE), argument
