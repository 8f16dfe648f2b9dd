"""Whether a shard is whole, which reading it from its start to its end does not tell."""

import lzma
import zlib
from pathlib import Path

from w2s_train.errors import UserError, one_line
from w2s_train.shards.table import scan_members
from w2s_train.shards.writer import is_written, table_path


def check_whole(shard: Path) -> None:
    """Refuse a shard that has been cut off, or has a member twice.

    Where it is cut between two samples, reading it would end early and say nothing.

    Args:
        shard: A local tar, compressed or not.

    Raises:
        UserError: It has.
    """
    if table_path(shard).is_file() and not is_written(shard):
        raise UserError(f"shard={shard}: must be as long as when it was written, it is not")
    with open(shard, "rb") as file:
        try:
            damage = scan_members(file, {}, str(shard), compressed=True)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            damage = one_line(error)
    if damage:
        raise UserError(f"shard={shard}: must be a whole tar ({damage})")
