"""Where a run lives, and what it goes on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import UserError
from w2s_train.models.saved import check_local


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

    Raises:
        UserError: No such file; or nothing to score.
    """
    if ckpt_path is None:
        if subcommand != "fit":
            raise UserError(f"ckpt_path=null: {subcommand} needs a checkpoint file, or last")
        return None
    check_local(ckpt_path, "ckpt_path")
    if ckpt_path == "last":
        last = folder / "checkpoints" / "last.ckpt"
        if last.is_file():
            rank_zero_info(f"going on from {last}")
            return str(last)
        if subcommand != "fit":
            raise UserError(f"ckpt_path=last: there is no {last}")
        rank_zero_info(f"no {last} yet: starting from the beginning")
        return None
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: must be an existing file, or last")
    return ckpt_path
