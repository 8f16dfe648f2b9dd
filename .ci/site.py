"""Hooks of mkdocs: a first page, links that lead out of docs/, the API of python.md's table."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "w2s_train"
NAMES = re.compile(r"^\| `(w2s_train[\w.]*)` \| (.*) \|$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page, and a page with every public name."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def api() -> str:
    """The names that docs/python.md lists, by module."""
    lines = ["# API", ""]
    for module, names in NAMES.findall((ROOT / "docs" / "python.md").read_text()):
        lines += [f"## {module}", ""]
        lines += [f"::: {defined(module, name)}" for name in re.findall(r"`(\w+)`", names)]
        lines += [""]
    return "\n".join(lines)


def defined(module: str, name: str) -> str:
    """Where a public name is defined: in its module, or in a file that the module takes it from."""
    pattern = re.compile(rf"^(class|def) {name}\b", re.MULTILINE)
    path = ROOT / module.replace(".", "/")
    for file in [
        path.with_suffix(".py"),
        *sorted(path.glob("*.py")),
        *sorted(PACKAGE.rglob("*.py")),
    ]:
        if file.is_file() and pattern.search(file.read_text()):
            return ".".join([*file.relative_to(ROOT).with_suffix("").parts, name])
    raise LookupError(f"docs/python.md: {module} has no {name}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Files of the repository that are no pages are named, and not linked."""

    def named(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = target.partition("#")[0]
        if re.match(r"\w+:|#", target) or files.get_file_from_path(path) or not path:
            return match.group(0)
        source = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"
        if not (source / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {target}")
        return text if text.startswith("`") else f"`{text}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", named, markdown)
