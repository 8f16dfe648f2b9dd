#!/usr/bin/env bash
# Runs the `lightning` command on this machine; sets up .venv on the first call.
#   bash launch/local.sh                                  the embedded default
#   bash launch/local.sh fit -c configs/dit_b_w2s.yaml    anything else
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" ""
[ $# -gt 0 ] || set -- fit -c configs/digits_w2s.yaml
exec lightning "$@"
