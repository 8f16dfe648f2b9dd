#!/usr/bin/env bash
# Runs the quick tests, or pytest with the given options; sets up .venv on the first call.
#   bash launch/test.sh              about 3 minutes
#   bash launch/test.sh -m slow      the slow ones; -m fault: the table of faults
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" "[dev]"
[ $# -gt 0 ] || set -- -m "not slow and not gpu"
exec python -m pytest "$@"
