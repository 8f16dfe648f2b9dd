# Sourced, in the root of the checkout, by scripts for a machine with a GPU: sets $python. That is
# .venv's if there is one, else python3 as it is. Without a package index, packages that it lacks are
# taken from wheels/, which is made elsewhere by
#   python -m pip download --no-deps -d wheels webdataset braceexpand jsonargparse \
#       docstring-parser typeshed-client clean-fid
# Where git cannot tell the commit, $COMMIT must; it is kept beside the checkout, where runs look.
# With mode=--cpu no GPU and no commit are needed, and no GPU is used.
case "$mode" in
    "" | --cpu) ;;
    *) echo "error: option=$mode: must be --cpu or nothing" >&2; exit 1 ;;
esac
python=python3
[ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
if [ -d wheels ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl \
        || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ "$mode" = --cpu ]; then
    export CUDA_VISIBLE_DEVICES=
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no GPU that torch can use; --cpu tries the commands without one" >&2
    exit 1
fi
if [ "$mode" != --cpu ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    if [ -z "${COMMIT:-}" ]; then
        echo "error: COMMIT=: must be that of the checkout, which git cannot tell here" >&2
        exit 1
    fi
    echo "$COMMIT" >../COMMIT || exit 1
fi
