# Sourced by the scripts beside it: makes .venv in the checkout, installs the project into it with
# the extras in $1 (such as "[dev]"), and puts it on the PATH. Does nothing that is done already.
# Needs Python 3.11 or newer and access to a package index. Uses uv where it is there.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3 python3.12 python3.11 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || { echo "error: python: must be 3.11 or newer, none found" >&2; exit 1; }
    if command -v uv >/dev/null; then
        uv venv --quiet --seed --python "$python" .venv || exit 1
    else
        "$python" -m venv .venv || exit 1
    fi
fi

# One stamp per set of extras and state of pyproject.toml.
stamp=.venv/installed-$(cat pyproject.toml - <<<"$1" | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    echo "installing into .venv (once; a few minutes on a slow network)"
    uv=$(command -v uv || echo .venv/bin/uv)
    [ -x "$uv" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv \
        || echo "uv cannot be installed; going on with pip"
    if [ -x "$uv" ]; then
        "$uv" pip install --quiet --python .venv/bin/python --editable ".$1" || exit 1
    else
        .venv/bin/python -m pip install --quiet --editable ".$1" || exit 1
    fi
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# Containers often set it; then each command compiles the 5,000 files that it imports, for 20 seconds.
unset PYTHONDONTWRITEBYTECODE
