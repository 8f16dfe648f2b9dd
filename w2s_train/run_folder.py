"""Where a run lives, and what it goes on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from w2s_train.checkpointing import check_local, damage, newest_first
from w2s_train.errors import UserError


def run_folder(config: Any) -> Path:
    """Where a run lives: as configured, or with its checkpoint, or ``runs/CONFIG+OVERLAY``."""
    if config.trainer.default_root_dir:
        return Path(config.trainer.default_root_dir)
    checkpoint = Path(getattr(config, "ckpt_path", None) or "")
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    names = [Path(str(path)).stem for path in config.config or []]
    return Path("runs") / ("+".join(names) or "unnamed")


def find_checkpoint(ckpt_path: str | None, folder: Path, subcommand: str) -> str | None:
    """The checkpoint to start from; says which it is when asked for the last one.

    A damaged last one is passed over, with a warning, for the newest that is whole.

    Raises:
        UserError: No such file, or a damaged one; or nothing to score.
    """
    if ckpt_path is None:
        if subcommand != "fit":
            raise UserError(f"ckpt_path=null: {subcommand} needs a checkpoint file, or last")
        return None
    check_local(ckpt_path, "ckpt_path")
    if ckpt_path == "last":
        return _last(folder / "checkpoints", subcommand)
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: must be an existing file, or last")
    if problem := damage(Path(ckpt_path)):
        other = next((p for p in newest_first(Path(ckpt_path).parent) if not damage(p)), None)
        whole = f"; {other} is whole" if other else ""
        raise UserError(f"ckpt_path={ckpt_path}: must be a whole checkpoint; {problem}{whole}")
    return ckpt_path


def _last(folder: Path, subcommand: str) -> str | None:
    """The newest checkpoint that is whole."""
    newest = folder / "last.ckpt"
    problems = []
    for path in newest_first(folder):
        if problem := damage(path):
            problems.append(f"{path}: {problem}")
            continue
        name = newest if newest.exists() and newest.resolve() == path.resolve() else path
        if problems:
            rank_zero_warn(f"{'; '.join(problems)}; an earlier one is used: {name}")
        rank_zero_info(f"going on from {name} ({path.name})")
        return str(path)
    if problems:
        # To begin anew would overwrite what may still be of use.
        raise UserError(f"ckpt_path=last: none is whole; {'; '.join(problems)}")
    if subcommand != "fit":
        raise UserError(f"ckpt_path=last: there is no {newest}")
    rank_zero_info(f"no {newest} yet: starting from the beginning")
    return None
