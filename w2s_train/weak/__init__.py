"""Weak sources: where the weak prediction of a segment comes from, one file each.

``w2s_train.weak.NAME`` finds a source in whichever file of this folder defines it: nothing in the
package changes when one is added or deleted.
"""

import pkgutil
from importlib import import_module
from typing import Any

from w2s_train.weak.base import Step, WeakSource

__all__ = ["Step", "WeakSource"]


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for file in pkgutil.iter_modules(__path__):
            found = getattr(import_module(f"{__name__}.{file.name}"), name, None)
            if isinstance(found, type) and issubclass(found, WeakSource):
                return found
    raise AttributeError(f"no file of {__name__} defines {name}")
