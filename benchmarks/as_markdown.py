"""The entries of a benchmark as a Markdown table.

    python benchmarks/as_markdown.py benchmarks/step_s2.json network recipe compile seconds ratio

Columns are names of the entries' fields; of numbers that have quartiles, these follow in brackets.
"""

import json
import sys
from pathlib import Path
from typing import Any

DIGITS = {"seconds": 3, "ratio": 2, "mfu": 3, "compile_seconds": 0, "images_per_second": 1}


def cell(entry: dict[str, Any], name: str) -> str:
    """One value as text."""
    value = entry[name]
    if not isinstance(value, float):
        return str(value)
    digits = DIGITS.get(name, 3)
    text = f"{value:.{digits}f}"
    if quartiles := entry.get(f"{name}_quartiles"):
        text += " ({:.{d}f} to {:.{d}f})".format(*quartiles, d=digits)
    return text


def main() -> None:
    """Print it."""
    if len(sys.argv) < 3:
        raise SystemExit("error: must be called with a file and names of fields")
    path, names = Path(sys.argv[1]), sys.argv[2:]
    entries = json.loads(path.read_text()) if path.is_file() else None
    if not entries or not isinstance(entries, list):
        raise SystemExit(f"error: {path}: must be a file with a list of entries")
    if unknown := [name for name in names if name not in entries[0]]:
        raise SystemExit(f"error: {','.join(unknown)}: must be of {', '.join(entries[0])}")
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for entry in entries:
        print("| " + " | ".join(cell(entry, name) for name in names) + " |")
    about = {(e["git_commit"], e["machine"], e["torch"], e["command"]) for e in entries}
    for commit, machine, torch, command in sorted(about):
        print(f"\nCommit `{commit[:7]}`, {machine}, torch {torch}: `{command}`")


if __name__ == "__main__":
    main()
