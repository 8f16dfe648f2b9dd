"""Lists of prompts: what each kind of file says, and what is refused, in one line."""

from pathlib import Path

import pytest
from conftest import ROOT

from w2s_train.errors import UserError
from w2s_train.text2image.prompts import Prompt, read_prompts


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_three_kinds_say_the_same(tmp_path: Path):
    """In the order of the file, whatever ends its lines and wherever columns stand."""
    plain = written(tmp_path, "a.txt", '# ours\na red cube\r\n\n  Dalí\'s "clock"  \n')
    table = (
        'Note\tCategory\tChallenge\tPrompt\r\n\tArts\t\ta red cube \r\n\r\n-\t\t\tDalí\'s "clock"'
    )
    lines = '\ufeff{"prompt": "a red cube", "category": "Arts", "tag": 1}\n\n'
    lines += '{"prompt": " Dalí\'s \\"clock\\""}'
    texts = ["a red cube", 'Dalí\'s "clock"']
    assert read_prompts(plain) == [Prompt(text, None) for text in texts]
    expected = [Prompt(texts[0], "Arts"), Prompt(texts[1], None)]
    assert read_prompts(written(tmp_path, "a.tsv", table)) == expected
    assert read_prompts(written(tmp_path, "a.jsonl", lines)) == expected


def test_as_published(tmp_path: Path):
    """PartiPrompts: notes may be missing, quotation marks are the prompt's own."""
    table = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n"
    table += '"G I G G L E" on a wall\tIllustrations\tWriting & Symbols\nthe word "A\tArts\tX\t'
    prompts = read_prompts(written(tmp_path, "p.tsv", table))
    assert [prompt.text for prompt in prompts] == ["bond", '"G I G G L E" on a wall', 'the word "A']


def test_a_prompt_counts_once(tmp_path: Path):
    with pytest.warns(UserWarning, match="line 3: the prompt of line 1 again, which counts once"):
        prompts = read_prompts(written(tmp_path, "b.txt", "a\nb\n a\n"))
    assert [prompt.text for prompt in prompts] == ["a", "b"]


def test_ours():
    prompts = read_prompts(ROOT / "configs" / "text2image" / "prompts.txt")
    assert 28 <= len(prompts) <= 34
    assert all(prompt.text.isascii() and len(prompt.text) < 90 for prompt in prompts)


HEAD = "Prompt\tCategory\n"
BAD = {
    "a.csv": ("x", "must be a file that ends in .txt, .tsv, .jsonl"),
    "a.txt": ("# only\n\n", "must hold at least one prompt"),
    "c.txt": (b"a\nb\xff\n", "line 2: must be UTF-8"),
    "a.tsv": ("Prompt\tChallenge\nx\ty", "line 1: must name the columns Prompt and Category; "),
    "b.tsv": (HEAD + "a\tb\nc\n", "line 3: must have a prompt and a category"),
    "c.tsv": (HEAD + " \tb\n", "line 2: must have a prompt and a category"),
    "d.tsv": (HEAD, "must hold at least one prompt"),
    "a.jsonl": ('{"prompt": "a"}\n{"prompt"\n', "line 2: must be a JSON object"),
    "b.jsonl": ("[1]", 'line 1: must be a JSON object with a text under the key "prompt"'),
    "c.jsonl": ('{"prompt": 3}', "line 1: must be a JSON object with a text under the key"),
    "d.jsonl": ('{"prompt": "a", "category": 3}', 'line 1: must have a text under the key "cat'),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str, tmp_path: Path):
    text, message = BAD[name]
    path = written(tmp_path, name, text)
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    line = str(refused.value)
    assert line.startswith(f"prompts={path}") and message in line and "\n" not in line


def test_missing(tmp_path: Path):
    with pytest.raises(UserError, match=r"prompts=.*no\.txt: must be an existing file$"):
        read_prompts(tmp_path / "no.txt")
