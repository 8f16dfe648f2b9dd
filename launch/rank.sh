# One process of a job: runs the given command and notes the status of the first one that fails.
trap : USR1 TERM INT # the command's affair; this shell must live to see its status
"$@"
rc=$?
if [ $rc != 0 ]; then
    (set -o noclobber && echo $rc >"$W2S_FIRST_STATUS") 2>/dev/null # unless another was first
    sleep 5 # srun ends the others when this one ends, and they may be about to end by themselves
fi
exit $rc
