# Sourced by train.sbatch and evaluate.sbatch, from the copy of the code that belongs to the job.
# shellcheck shell=bash

# Run one process per task of the job, and leave in rc the status of the first one that failed.
#   run_ranks LOGS PROJECT RUN CODE COMMAND OPTION ...    LOGS: first word of the logs' names
run_ranks() {
    local logs=$1 project=$2 run=$3 code=$4
    cd "$project" && mkdir -p "$run/logs" && source "$code/launch/site.sh" && setup || exit 1
    export MASTER_ADDR=${master_addr:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000)) # below the ports that systems hand out
    # The copy comes before an installed package, and the current folder, where data lies, is no
    # place for code.
    export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    # A name of this start alone: shared file systems remember for a while that a file was missing.
    rm -f "$run/logs/.status-$SLURM_JOB_ID"-* # of starts that SLURM ended: their scripts could not
    export W2S_FIRST_STATUS=$run/logs/.status-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    echo "$(date -Is) job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $run"
    before=$(begun "$run")
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --open-mode=append --output="$run/logs/$logs-%t.log" "${srun_options[@]}" \
        bash "$code/launch/rank.sh" "${launcher[@]}" python -m w2s_train "${@:5}" \
        --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" \
        --trainer.strategy=ddp
    rc=$?
    # srun gives the highest status. Processes that it ended because of the first one have 137 or
    # 143, which would hide the reason.
    if [ -f "$W2S_FIRST_STATUS" ]; then
        rc=$(<"$W2S_FIRST_STATUS")
        rm "$W2S_FIRST_STATUS"
    fi
    echo "$(date -Is) job $SLURM_JOB_ID ended with status $rc"
}

# Turn the third start in a row that ended before training began into "no progress": with a time limit
# shorter than a start, or too little memory for one, it would go round for ever. What ends later is
# counted by the command itself. A start that begins to train writes environment.json.
#   limit_unbegun RUN    (reads rc and before; sets rc)
limit_unbegun() {
    local count=$1/logs/.unbegun-$SLURM_JOB_ID
    case $rc in
    76 | 137 | 138)
        if [ "$before" = "$(begun "$1")" ]; then
            echo "$rc" >>"$count"
            [ "$(wc -l <"$count")" -lt 3 ] && return
            echo "ended three times before training began: see the logs of the processes"
            rc=78
        fi
        ;;
    esac
    rm -f "$count"
}

# When training began last; nothing if it never did.
#   begun RUN
begun() {
    stat -c %y "$1/environment.json" 2>/dev/null
}

# Put this job, or this task of an array, back into the queue if the status is one of the given ones.
#   requeue_on STATUS ...    (reads rc)
requeue_on() {
    local id=$SLURM_JOB_ID status
    [ -z "$SLURM_ARRAY_JOB_ID" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    for status in "$@"; do
        if [ "$rc" = "$status" ]; then
            echo "status $rc: back into the queue"
            scontrol requeue "$id"
        fi
    done
}
