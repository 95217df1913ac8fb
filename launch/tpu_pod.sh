#!/usr/bin/env bash
# A Cloud TPU slice, from your own machine. TPU is its name, TYPE e.g. v5litepod-128, v5p-64 or v6e-32:
#   export TPU=NAME ZONE=ZONE TYPE=TYPE
#   launch/tpu_pod.sh create [--spot | --reserved ...]                  # waits until the slice is there
#   launch/tpu_pod.sh run CONFIG WORKDIR [--config.FIELD=VALUE ...]     # again to resume: an earlier run is ended first
#   launch/tpu_pod.sh logs [WORKER]                                     # last lines of each worker, or of one
#   launch/tpu_pod.sh delete
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] && [ -n "${TYPE:-}" ] || fail "set TPU, ZONE and TYPE; see the head of $0"
case "$TYPE" in
  v5litepod-*) platform=v5e runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) platform=v5p runtime=v2-alpha-tpuv5 ;;
  v6e-*) platform=v6e runtime=v2-alpha-tpuv6e ;;
  *) fail "got TYPE=$TYPE, expected v5litepod-N, v5p-N or v6e-N" ;;
esac

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }

# Runs on each worker: install $1's archive, start the command that follows $3, leave it running.
start() {
  set -euo pipefail
  local platform="$1" coordinator="$2" flags="$3" pid
  shift 3
  mkdir -p di_star_jax && tar xzf di_star_jax.tgz -C di_star_jax && cd di_star_jax
  # TPU machines have an older Python than JAX needs: uv brings its own.
  python3 -m pip install -q --user uv
  test -d .venv || python3 -m uv venv -q --python=3.12 .venv
  python3 -m uv pip install -q --python=.venv -e '.[tpu]'
  # Only one process may hold the chips. One that saves first is given two minutes.
  if pid="$(cat run.pid 2>/dev/null)" && kill -- "-$pid" 2>/dev/null; then
    timeout 120 tail --pid="$pid" -f /dev/null || kill -9 -- "-$pid" || true
  fi
  if [ "$flags" = preset ]; then flags="$(.venv/bin/python -m di_star_jax.xla_flags "$platform")"; fi
  echo "LIBTPU_INIT_ARGS=$flags" | tee -a run.log
  # setsid and nohup: the run outlives this connection.
  LIBTPU_INIT_ARGS="$flags" JAX_COORDINATOR_ADDRESS="$coordinator" \
    nohup setsid .venv/bin/python -m di_star_jax.main "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
}

case "${1:-}" in
  create)
    tpus queued-resources create "$TPU" --node-id="$TPU" --accelerator-type="$TYPE" \
      --runtime-version="$runtime" "${@:2}"
    until state="$(tpus queued-resources describe "$TPU" --format='value(state.state)')" && [ "$state" = ACTIVE ]; do
      if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then fail "the request for $TPU is $state"; fi
      echo "$TPU: $state"
      sleep 30
    done
    ;;
  run)
    [ $# -ge 3 ] || fail "got $(($# - 1)) arguments, expected run CONFIG WORKDIR"
    cd "$(dirname "$0")/.."
    # The first worker's address tells JAX that there are several hosts; the rest it asks of the TPU's metadata.
    first="$(tpus tpu-vm describe "$TPU" --format='value(networkEndpoints[0].ipAddress)')"
    archive="$(mktemp)"
    trap 'rm -f "$archive"' EXIT
    tar czf "$archive" setup.py configs di_star_jax
    tpus tpu-vm scp "$archive" "$TPU:di_star_jax.tgz" --worker=all
    # Your own LIBTPU_INIT_ARGS, an empty one too, goes before the platform's.
    arguments="$(printf '%q ' "$platform" "$first:8476" "${LIBTPU_INIT_ARGS-preset}" \
      "--config=$2" "--workdir=$3" "${@:4}")"
    tpus tpu-vm ssh "$TPU" --worker=all --command="$(declare -f start); start $arguments"
    ;;
  logs) tpus tpu-vm ssh "$TPU" --worker="${2:-all}" --command='tail -n 100 di_star_jax/run.log' ;;
  delete) tpus queued-resources delete "$TPU" --force ;;
  *) fail "got '${1:-}', expected create, run, logs or delete" ;;
esac
