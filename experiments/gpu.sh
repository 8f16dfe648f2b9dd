#!/usr/bin/env bash
# A study on a machine with a GPU, less than nine minutes a call; the next call goes on where this one
# stopped. The run_gpu.sh of the studies call it.
#   bash experiments/gpu.sh STUDY RUNS_AT_A_TIME [--cpu]
# Scores come back in $OUT/records (copy them to experiments/STUDY/runs), unfinished runs as tar files
# in parts of 16 MiB in $OUT/unfinished (copied to gpu_state/STUDY, they go on on a fresh machine).
# $OUT is runs/gpu/STUDY if not set. --cpu tries it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

study=${1:?study} at_a_time=${2:?runs at a time} mode=${3:-} limit=${LIMIT:-420}
case "$mode" in
    "" | --cpu) ;;
    *) echo "error: option=$mode: must be --cpu or nothing" >&2; exit 1 ;;
esac
source launch/gpu.sh
out=${OUT:-runs/gpu/$study}
mkdir -p "$out" "runs/$study"

for first in "gpu_state/$study"/*.tar.aa; do
    name=$(basename "$first" .tar.aa)
    [ -e "$first" ] && [ ! -e "runs/$study/$name" ] || continue
    echo "taking up $name"
    cat "${first%aa}"?? | tar -x -C "runs/$study" || exit 1
done

status=0
"$python" experiments/run.py "$study" --jobs "$at_a_time" --limit "$limit" || status=$?

mkdir -p "$out/records" "$out/unfinished"
cp -r "experiments/$study/runs/." "$out/records/" 2>/dev/null || echo "no run is finished yet"
cp "runs/$study"/*.log "$out/"
for checkpoints in "runs/$study"/*/checkpoints; do
    name=$(basename "$(dirname "$checkpoints")")
    [ -d "$checkpoints" ] && [ ! -e "experiments/$study/runs/$name/scores.json" ] || continue
    tar -c -C "runs/$study" "$name" | split -b 16M - "$out/unfinished/$name.tar." || status=1
done
echo "results, after $SECONDS s, in $out; status $status (75: call again)"
exit $status
