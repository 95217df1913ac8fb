#!/usr/bin/env bash
# One machine: launch/local.sh CONFIG WORKDIR [--config.FIELD=VALUE ...] runs one process with all its devices.
# PROCESSES=2 launch/local.sh ... starts that many over loopback and splits the GPUs among them: a pod in small.
# XLA_FLAGS="$(python -m di_star_jax.xla_flags h100)" launch/local.sh ... for several GPUs.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 2 ] || fail "got $# arguments, expected CONFIG WORKDIR; e.g. launch/local.sh configs/shapes.py runs/shapes"
processes="${PROCESSES:-1}"
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "got PROCESSES=$processes, expected a number from 1"
command=(python -m di_star_jax.main --config="$1" --workdir="$2" "${@:3}")
if [ "$processes" = 1 ]; then exec "${command[@]}"; fi

visible="${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}"
IFS=, read -ra gpus <<<"$visible"
share=$((${#gpus[@]} / processes))
[ $((share * processes)) = "${#gpus[@]}" ] || fail "${#gpus[@]} GPUs do not split into PROCESSES=$processes"
port="${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}"

pids=()
# A process that no longer answers is killed PATIENCE (10) seconds later.
stop() {
  kill "${pids[@]}" 2>/dev/null || true
  for ((i = 0; i < 10 * ${PATIENCE:-10}; i++)); do kill -0 "${pids[@]}" 2>/dev/null || break; sleep 0.1; done
  { kill -9 "${pids[@]}" || true; wait; } 2>/dev/null
}
# Asked to stop from outside, all are alive and may take the time to save. Ctrl-C has reached them by itself.
asked=0
trap 'asked=$((asked + 1)); kill "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  (
    export JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$i"
    if [ "$share" -gt 0 ]; then
      mine=("${gpus[@]:i * share:share}")
      CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${mine[*]}")"
      export CUDA_VISIBLE_DEVICES
    fi
    exec "${command[@]}"
  ) &
  pids+=($!)
done
# Exit codes: docs/clusters.md. 0, 75 (saved), 130 (Ctrl-C) and 76 (lost another process) come from all of them by
# themselves; 76 and 0 never are the cause.
cause=0
left="$processes"
while [ "$left" -gt 0 ]; do
  before="$asked"
  status=0
  wait -n || status=$?
  # 143 and 130 also say that a signal to this script has ended the waiting.
  if [ "$before" != "$asked" ] && { [ "$status" = 143 ] || [ "$status" = 130 ]; }; then continue; fi
  left=$((left - 1))
  case "$status" in
    0 | 76) if [ "$cause" = 0 ]; then cause="$status"; fi ;;
    75 | 130) if [ "$cause" = 0 ] || [ "$cause" = 76 ]; then cause="$status"; fi ;;
    *)
      echo "error: a process ended with exit code $status; ending the others" >&2
      stop
      exit "$status"
      ;;
  esac
done
exit "$cause"
