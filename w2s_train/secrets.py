"""Passwords, tokens and keys stay out of everything that is written or printed.

Where they belong is the environment, or the files of credentials that fsspec's file systems read.
"""

from __future__ import annotations  # launch/submit runs this file with older Pythons

import re
import sys
import traceback
from types import TracebackType
from typing import Any

HIDDEN = "***"
KEY = r"(?:api|access|private|signing|account)[_-]?key"
NAME = rf"{KEY}|secret|token(?!s)|passw(?:or)?d|passphrase|credential|signature"
SECRET_NAME = re.compile(rf"{NAME}|(?:^|[_-])(?:auth|pwd)(?:$|[_-])", re.IGNORECASE)
# In URLs, a few names more: Azure signs with sig, others ask for key or auth.
PARAMETER = rf"[?&;][\w.%-]*(?:{NAME}|sig|key|auth|pwd)[\w.%-]*="
IN_TEXT = [
    (r"(?<=://)[^\s/?#'\"]+@", f"{HIDDEN}@"),  # user:password@
    (rf"({PARAMETER})[^\s&;#'\",]+", rf"\1{HIDDEN}"),
    (rf"((?<![\w/])[\w.-]*(?:{NAME})[\w-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\",]+", rf"\1{HIDDEN}"),
    (r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer |basic )?)[^\s'\",]+", rf"\1{HIDDEN}"),
    (r"(bearer )[^\s'\",]+", rf"\1{HIDDEN}"),
    (r"\b(?:hf_|gh[a-z]_|github_pat_|glpat-)\w{16,}", HIDDEN),  # tokens by their form
    (rf"(--[\w.-]*(?:{NAME})[\w-]*\s+)[^\s'\",]+", rf"\1{HIDDEN}"),
]


def redacted(value: Any) -> Any:
    """Text, or lists and dicts of it, with secrets replaced by ``***``.

    Secret are, in URLs, what stands before an @ and the values of parameters such as token, sig and
    key; and values whose option or key looks like one, such as ``--logger.api_key VALUE``.
    """
    if isinstance(value, str):
        for pattern, instead in IN_TEXT:
            value = re.sub(pattern, instead, value, flags=re.IGNORECASE)
        return value
    if isinstance(value, dict):
        return {key: _named(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        before = ["", *value]
        options = [isinstance(each, str) and each.startswith("-") for each in before]
        pairs = zip(before, options, value, strict=False)
        return [_named(name if option else "", each) for name, option, each in pairs]
    return value


def _named(name: str, value: Any) -> Any:
    if SECRET_NAME.search(name.rsplit(".", 1)[-1]) and "=" not in name:
        return value if value is None or isinstance(value, bool) else HIDDEN
    return redacted(value)


def show_no_secrets(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """As ``sys.excepthook``: the traceback of an error that nobody expected."""
    lines = traceback.format_exception(kind, error, trace)
    print(redacted("".join(lines)), end="", file=sys.stderr)
