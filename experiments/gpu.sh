#!/usr/bin/env bash
# A study on a machine with a GPU, less than nine minutes a call; on the same machine, the next call
# goes on where this one stopped. The run_gpu.sh of the studies call it.
#   bash experiments/gpu.sh STUDY DATA RUNS_AT_A_TIME [--cpu]
# A fresh machine needs, beside the checkout: wheels/ (launch/gpu.sh); the data, data/DATA or packed,
#   mkdir -p gpu && tar -czhf gpu/DATA.tar.gz data/DATA
# and the commit in $COMMIT where git cannot tell it. In $OUT (gpu/out if not set) come back
#   records.tar     of runs that were finished in this call: tar -xf records.tar in the checkout
#   unfinished.*    runs with their newest checkpoint in parts of 15 MiB, if they have $LARGEST MiB
#                   together (56) or less; as gpu/unfinished.* they are taken up by a call on another
#                   machine
#   logs.tar.gz
# so few and small that they fit what such machines give back. --cpu tries all that without a GPU:
# one seed, a few steps of a few images, in runs/cpu.
set -uo pipefail
cd "$(dirname "$0")/.."

study=${1:?study} data=${2:?data} at_a_time=${3:?runs at a time} mode=${4:-} limit=${LIMIT:-420}
source launch/gpu.sh
if [ ! -e "data/$data" ] && [ -e "gpu/$data.tar.gz" ]; then tar -xzf "gpu/$data.tar.gz" || exit 1; fi
if [ ! -e "data/$data" ]; then
    echo "error: data/$data: must be there, or packed as gpu/$data.tar.gz" >&2
    exit 1
fi
if [ -n "${REFERENCE:-}" ] && [ ! -e "data/$data/$REFERENCE" ]; then # of configs that the study names
    timeout "$limit" "$python" -m w2s_train reference $REFERENCE_OF || exit 1
fi
runs=runs/$study records=experiments/$study/runs trial=()
[ "$mode" != --cpu ] || { runs=runs/cpu/$study records=runs/cpu/$study/records trial=(--cpu); }
if [ ! -e "$runs" ] && [ -e gpu/unfinished.aa ]; then cat gpu/unfinished.?? | tar -x || exit 1; fi
out=${OUT:-gpu/out}
mkdir -p "$out" "$runs" "$records"
touch "$runs/.began"

status=0
left=$((limit > SECONDS + 1 ? limit - SECONDS : 1)) # less what packages, data and reference took
"$python" experiments/run.py "$study" "${trial[@]}" --jobs "$at_a_time" --limit "$left" || status=$?

packed=0
recorded=$(find "$records" -name scores.json -newer "$runs/.began" -printf '%h\n')
[ -z "$recorded" ] || tar -cf "$out/records.tar" $recorded || packed=1
tar -czf "$out/logs.tar.gz" --ignore-failed-read "$runs/"*.log || packed=1
rm -f "$out"/unfinished.??
unfinished=()
for newest in "$runs"/*/checkpoints/last.ckpt; do
    run=$(dirname "$(dirname "$newest")")
    [ -e "$newest" ] && [ ! -e "$records/$(basename "$run")/scores.json" ] || continue
    named=$(basename "$(readlink -f "$newest")")
    unfinished+=("$newest" "$run/checkpoints/$named" "$run/checkpoints/$named".*)
    for other in "$run"/*; do [ "$other" = "$run/checkpoints" ] || unfinished+=("$other"); done
done
if [ ${#unfinished[@]} != 0 ]; then
    if [ "$(du -cm "${unfinished[@]}" | tail -n 1 | cut -f 1)" -le "${LARGEST:-56}" ]; then
        tar -c "${unfinished[@]}" | split -b 15M - "$out/unfinished." || packed=1
    else
        echo "unfinished runs are too large to come back: they go on on this machine only"
    fi
fi
echo "after $SECONDS s, in $out: $(ls "$out" | tr '\n' ' '); status $status (75: call again)"
[ $packed = 0 ] || exit 1
exit $status
