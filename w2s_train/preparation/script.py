"""Scripts that make a data set when it is missing."""

from pathlib import Path

from w2s_train.errors import UserError


def find_script(name: str) -> Path:
    """A script in the project's ``data/`` folder and nowhere else: a config may not run more.

    Raises:
        UserError: There is none of this name.
    """
    folder = Path(__file__).resolve().parents[2] / "data"
    script = folder / f"{name}.py"
    known = [path for path in sorted(folder.glob("*.py")) if "def prepare(" in path.read_text()]
    if script not in known:
        names = ", ".join(path.stem for path in known) or "none"
        raise UserError(f"prepare={name}: must be one of the scripts in {folder}: {names}")
    return script
