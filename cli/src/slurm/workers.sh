# The workers of one node. What they end with says what becomes of the place: 0 the run is finished, 2 they were
# refused and would be again, $again they were asked to stop; all else is a failure, and a few are forgiven.
set -u

# What a child ends with, whatever signals come meanwhile: they end a wait, and bash remembers who has ended.
ended() {
  while wait "$1"; kill -0 "$1" 2>/dev/null; do :; done
  wait "$1"
}

place=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
node=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
address=$(getent ahostsv4 "$node" | awk 'NR == 1 { print $1 }')

children=()
for number in $(seq 0 $((workers_per_node - 1))); do
  device=cpu
  [ -z "$gpus" ] || device=cuda:$number
  "$program" guard --log "$dir" --coordinator-file "$dir/coordinator.address" -- --run "$run" \
    --token-file "$dir/token" --name "$SLURMD_NODENAME-$place-${SLURM_RESTART_COUNT:-0}-$number" \
    --listen "$address:0" --threads "$threads" --device "$device" &
  children+=($!)
done
# USR1: the time is up soon, or Slurm preempts and says so early. TERM: cancelled, requeued or preempted; what becomes
# of the place is decided already.
taken=
trap 'kill -TERM "${children[@]}" 2>/dev/null' USR1 USR2
trap 'taken=yes; kill -TERM "${children[@]}" 2>/dev/null' TERM INT

code=0
for child in "${children[@]}"; do
  ended "$child"
  this=$?
  [ "$this" = 0 ] || [ "$code" = 2 ] || code=$this
done

if [ -n "$taken" ] || [ "$code" = 0 ]; then
  exit "$code"
elif [ "$code" = 2 ]; then
  echo "refused: not requeued" >&2
elif [ "$code" = "$again" ]; then
  scontrol requeue "$place"
elif [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts_max" ]; then
  echo "ended with $code: requeued" >&2
  scontrol requeue "$place"
else
  echo "ended with $code after $SLURM_RESTART_COUNT restarts: not requeued" >&2
fi
exit "$code"
