#!/usr/bin/env bash
# On each TPU machine, called by compute_engine.sh and tpu_pod.sh from the folder of the archive that they copied:
#   launch/on_worker.sh PLATFORM FLAGS ARGUMENTS OF di_star_jax.main
# It installs, ends an earlier run, starts this one and its supervisor in the background, and watches it for a minute.
# FLAGS are LIBTPU_INIT_ARGS, or "preset" for the platform's.
set -euo pipefail

# Starts the run again where its exit code says so (docs/clusters.md).
supervise() {
  local restarts=0 status run
  trap 'asked=yes; kill -TERM "$run" 2>/dev/null || true' TERM
  while true; do
    .venv/bin/python -m di_star_jax.main "$@" &
    run=$!
    while true; do
      status=0
      wait "$run" || status=$?
      kill -0 "$run" 2>/dev/null || break  # else a signal ended the wait, and not the run
    done
    echo "$status" >run.status
    case "$status" in 75 | 76 | 134 | 135 | 136 | 137 | 139 | 143) ;; *) exit "$status" ;; esac
    if [ -n "${asked:-}" ] || [ "$((restarts += 1))" -gt 20 ]; then exit "$status"; fi
    echo "exit code $status: started again ($restarts of 20)"
    sleep "${PAUSE:-10}"
  done
}
if [ "$1" = supervise ]; then
  supervise "${@:2}"
fi

platform="$1" flags="$2"
shift 2
# JAX asks for it at each start on v5e and newer.
echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true
# These machines' Python is older than JAX needs, or not to be installed into: uv brings its own.
if ! test -x .uv/uv; then
  curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$PWD/.uv" UV_NO_MODIFY_PATH=1 sh -s -- -q
fi
test -d .venv || .uv/uv venv -q --python=3.12 .venv
.uv/uv pip install -q --python=.venv -e '.[tpu,gcs]'
# Only one process may hold the chips. One that saves first is given ten minutes.
if pid="$(cat run.pid 2>/dev/null)" && kill "$pid" 2>/dev/null; then
  timeout 600 tail --pid="$pid" -f /dev/null || kill -9 -- "-$pid" || true
fi
if [ "$flags" = preset ]; then flags="$(.venv/bin/python -m di_star_jax.xla_flags "$platform")"; fi
echo "LIBTPU_INIT_ARGS=$flags" | tee -a run.log
rm -f run.status
# setsid and nohup: the run outlives this connection.
LIBTPU_INIT_ARGS="$flags" nohup setsid bash "$0" supervise "$@" >>run.log 2>&1 </dev/null &
echo $! >run.pid
for ((i = 0; i < 5 * ${WATCH:-60}; i++)); do
  if ! kill -0 "$(cat run.pid)" 2>/dev/null; then
    status="$(cat run.status 2>/dev/null || echo 1)"
    tail -n 5 run.log
    exit "$status"
  fi
  sleep 0.2
done
