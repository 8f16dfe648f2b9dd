"""The schema of scores.json: what is read, what is refused, and that the documentation is true."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import ENTRY

from w2s_train.errors import UserError
from w2s_train.scores import (
    HIGHER,
    LOWER,
    Protocol,
    Score,
    higher_is_better,
    read_scores,
)

DOCUMENT = (ROOT / "docs" / "scores.md").read_text()


def documented(heading: str) -> list[str]:
    """The keys of the table under a heading of docs/scores.md, in its order."""
    part = DOCUMENT.split(f"### {heading}\n")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]


def changed(key: str, value: object) -> dict:
    entry = copy.deepcopy(ENTRY)
    place = entry
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return entry


def test_an_entry_is_read_as_it_stands():
    score = Score.from_json(ENTRY)
    assert (score.metric, score.value, score.step) == ("fd_digits", 2.43, 1800)
    assert score.protocol.seeds == (0, 999)
    assert score.protocol.training_seconds == 58.0
    assert score.protocol.reference == {"dataset": "digits", "split": "train", "n": 1497}


def test_the_document_lists_the_keys_that_are_read():
    assert documented("Entry") == [key.name for key in fields(Score)]
    assert documented("Protocol") == [key.name for key in fields(Protocol)]
    for key in [key.name for key in fields(Score)]:
        with pytest.raises(UserError, match=f"^{key}=null: must be"):
            Score.from_json(changed(key, KeyError))


@pytest.mark.parametrize("key", [key.name for key in fields(Protocol)])
def test_the_document_says_which_keys_may_be_null(key: str):
    row = next(
        line
        for line in DOCUMENT.split("### Protocol\n")[1].splitlines()
        if line.startswith(f"| `{key}` ")
    )
    entry = changed(f"protocol.{key}", KeyError)
    if "or null" in row.split("|")[2]:
        assert getattr(Score.from_json(entry).protocol, key) is None
    else:
        with pytest.raises(UserError, match=f"^{key}=null: must be"):
            Score.from_json(entry)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("schema", 2, "schema=2: must be 1, for this w2s_train"),
        ("schema", 0, "schema=0: must be 1, for this w2s_train"),
        ("value", float("nan"), "value=NaN: must be a finite number"),
        ("value", "2.4", 'value="2.4": must be a finite number'),
        ("value", True, "value=true: must be a finite number"),
        ("step", -1, "step=-1: must be a whole number of at least 0"),
        ("step", 600, "step=600: must equal protocol.step"),
        ("weights", "raw", "weights=raw: must equal protocol.weights"),
        ("protocol.n", 1000.5, "n=1000.5: must be a whole number of at least 0"),
        ("protocol.seeds", [0], "seeds=[0]: must be [first, last], whole numbers, last not below"),
        ("protocol.seeds", [9, 0], "seeds=[9, 0]: must be [first, last]"),
        ("protocol.wall_clock_seconds", -1.0, "wall_clock_seconds=-1.0: must be seconds, at least"),
        ("protocol.reference", {}, "reference={}: must be a fingerprint"),
        ("protocol.reference", {"n": 9}, 'reference={"n": 9}: must be a fingerprint'),
        ("protocol.reference", "", 'reference={"dataset": ""}: must be a fingerprint'),
    ],
)
def test_bad_entries_are_named(key: str, value: object, message: str):
    with pytest.raises(UserError) as caught:
        Score.from_json(changed(key, value))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "scores.json: there is none"),
        ("[{", "scores.json: cannot be read; Expecting"),
        ("[]", "scores.json: must be a list with at least one score"),
        ('{"metric": "fid"}', "scores.json: must be a list with at least one score"),
        ("[7]", "scores.json[0]: entry=7: must be an object"),
        (json.dumps([ENTRY, changed("value", None)]), "scores.json[1]: value=null: must be"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_scores(tmp_path)
    assert str(caught.value).startswith(message)


def test_training_time_is_never_made_up(tmp_path: Path):
    entry = changed("protocol.training_seconds", KeyError)
    (tmp_path / "scores.json").write_text(json.dumps([entry]))
    (score,) = read_scores(tmp_path)
    assert score.protocol.training_seconds is None


def test_the_table_at_the_end_of_a_fit_says_what_it_lacks(tmp_path: Path, capsys):
    from w2s_train.running.record import Record

    run = Record(tmp_path, config=None)
    run.print_scores()  # not scored
    assert capsys.readouterr().out == f"run folder: {tmp_path}\n"
    bad = changed("protocol.reference", {})
    (tmp_path / "scores.json").write_text(json.dumps([bad]))
    run.print_scores()
    line = "not in the table: scores.json[0]: reference={}: must be a fingerprint"
    assert capsys.readouterr().out.startswith(line)
    (tmp_path / "scores.json").write_text(json.dumps([ENTRY, bad]))
    run.print_scores()
    said = capsys.readouterr().out
    assert re.search(r"1800 .*fd_digits .*2\.4300 .*ema .*none .*1000 .*79 s", said)
    assert "not in the table: scores.json[1]: " in said


def test_all_scores_of_the_repository_can_be_read():
    files = sorted((ROOT / "experiments").glob("*/runs/*/scores.json"))
    assert files
    for file in files:
        scores = read_scores(file.parent)
        times = [score.protocol.training_seconds for score in scores]
        assert [score.value for score in scores] == [
            e["value"] for e in json.loads(file.read_text())
        ]
        assert times == sorted(times), file


def test_directions():
    assert not any(map(higher_is_better, ["fid", "fd_digits", "kid", "sfid", "energy_distance"]))
    assert all(map(higher_is_better, ["inception_score", "precision", "recall", "coverage"]))
    for prefix in HIGHER + LOWER:
        assert f"`{prefix}`" in DOCUMENT
    with pytest.raises(UserError, match="^metric=loveliness: must begin with one of"):
        higher_is_better("loveliness")
