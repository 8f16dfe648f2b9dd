"""docs/text2image.md: its lines of Python run as they stand, but for the model's name."""

import re

import pytest
import torch
from conftest import ROOT
from PIL import Image

PAGE = (ROOT / "docs" / "text2image.md").read_text()
NAME = "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.slow
def test_the_page(sd3_folder, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="needs the extra [text2image]")
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert block.count(NAME) == 1 and len(block.splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    block = block.replace(NAME, str(sd3_folder)).replace("(7, 8, 9)", "(2, 3)")
    names: dict = {}
    exec(compile(block, "docs/text2image.md", "exec"), names)
    assert [Image.open(f"{number}.png").size for number in (0, 1)] == [(16, 16)] * 2
    again = type(names["guider"]).from_pretrained("guider")
    assert again.describe() == names["guider"].describe()
