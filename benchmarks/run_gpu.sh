#!/usr/bin/env bash
# All measurements that need a GPU, in one command of less than nine minutes.
#   bash benchmarks/run_gpu.sh          writes JSON and a log into $OUT, benchmarks/gpu if not set
#   bash benchmarks/run_gpu.sh --cpu    the same commands in tiny sizes on a CPU, to try them out
# Each part has a share of the time and what those before it left, and ends with it: one that hangs
# costs the others nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
source launch/gpu.sh
out=${OUT:-benchmarks/gpu}
mkdir -p "$out"
failed=() spare=0

# part NAME SECONDS COMMAND...: "LIMIT" in the command becomes the seconds that it may measure for,
# which leaves some for starting and writing.
part() {
    local name=$1 share=$2 began=$SECONDS status=0
    local seconds=$((share + spare))
    shift 2
    set -- "${@//LIMIT/$((seconds - 30))}"
    printf '\n== %s, at most %s s: %s\n' "$name" "$seconds" "$*"
    timeout --kill-after=5 "$seconds" "$@" || status=$?
    spare=$((seconds - SECONDS + began))
    [ $status = 0 ] || failed+=("$name (status $status, 124 is out of time)")
}

everything() {
    local step="$python benchmarks/step.py" bf16="--precision bf16-mixed --limit LIMIT"
    local recipes=none,head_above,sgg_reversed,sgg_paper,mg,ema,drawn
    local b2="--networks b2 --compile blocks" xl2="--networks xl2 --compile blocks"
    local sampled="b2 --precision 32-true,bf16-mixed --compile off,on" rounds=100
    if [ "$mode" = --cpu ]; then
        recipes=none,head_above,drawn
        b2="--networks tiny --rounds 3 --batch 10" xl2=$b2
        sampled="tiny --compile off" rounds=10
    fi
    # No quotes: these are lists of words.
    part tests 100 "$python" -m pytest -q -m gpu $(grep -l 'mark\.gpu' tests/test_*.py)
    part step_b2 160 $step $b2 $bf16 --recipes $recipes --json "$out/step_b2.json"
    part step_b2_eager 45 $step ${b2/--compile blocks/} $bf16 --recipes none --json "$out/step_b2_eager.json"
    part sample 85 "$python" benchmarks/sample.py --networks $sampled --json "$out/sample.json"
    part overhead 40 "$python" benchmarks/overhead.py --rounds $rounds --json "$out/overhead.json"
    part step_xl2 95 $step $xl2 $bf16 --recipes none,head_above --json "$out/step_xl2.json"
    printf '\nresults, after %s s, in %s:\n' "$SECONDS" "$out"
    ls "$out"
    [ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}"; return 1; }
}

everything 2>&1 | tee "$out/log.txt"
