# The coordinator of the run. Requeued, it goes on under the name of the one before, which so is known to be dead.
set -u

# What a child ends with, whatever signals come meanwhile: they end a wait, and bash remembers who has ended.
ended() {
  while wait "$1"; kill -0 "$1" 2>/dev/null; do :; done
  wait "$1"
}

node=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
address=$(getent ahostsv4 "$node" | awk 'NR == 1 { print $1 }')

"$program" coordinator --run-dir "$dir" --recipe "$dir/recipe.toml" --workers "$workers" --standby \
  --listen "$address:0" --addr-file "$dir/coordinator.address" --holder "Slurm job $SLURM_JOB_ID" &
child=$!
# USR1: the time is up soon. TERM: cancelled, requeued or preempted; what becomes of the job is decided already.
expired=
trap 'expired=yes; kill -TERM "$child" 2>/dev/null' USR1 USR2
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
ended "$child"
code=$?

if [ "$code" = 0 ]; then
  # The workers that run end by themselves; those that wait for a node are not needed.
  scancel --state=PENDING "$(cat "$dir/slurm/workers.job")"
elif [ -n "$expired" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
