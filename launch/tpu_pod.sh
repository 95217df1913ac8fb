#!/usr/bin/env bash
# Legacy: a slice of the Cloud TPU API (v4, v5e, v5p, v6e), which is maintained only; newer: compute_engine.sh, GKE.
# From your own machine. TPU is its name, TYPE e.g. v5litepod-128, v5p-64 or v6e-32; SLICES for several of them:
#   export TPU=NAME ZONE=ZONE TYPE=TYPE [SLICES=2]
#   launch/tpu_pod.sh create [--spot | --reserved ...]                  # waits until the slice is there
#   GCLOUD_TRACK=alpha launch/tpu_pod.sh create --provisioning-model=flex-start --max-run-duration=4h
#   launch/tpu_pod.sh run CONFIG WORKDIR [--config.FIELD=VALUE ...]     # again to resume: an earlier run is ended first
#   launch/tpu_pod.sh logs [WORKER]                                     # last lines of each worker, or of one
#   launch/tpu_pod.sh delete
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] && [ -n "${TYPE:-}" ] || fail "set TPU, ZONE and TYPE; see the head of $0"
case "$TYPE" in
  v4-*) platform=v4 runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) platform=v5e runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) platform=v5p runtime=v2-alpha-tpuv5 ;;
  v6e-*) platform=v6e runtime=v2-alpha-tpuv6e ;;
  tpu7x-*) fail "got TYPE=$TYPE, which this API does not have; use launch/compute_engine.sh or GKE" ;;
  *) fail "got TYPE=$TYPE, expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
[[ "${SLICES:=1}" =~ ^[1-9][0-9]*$ ]] || fail "got SLICES=$SLICES, expected a number from 1"
nodes=("$TPU") named=(--node-id="$TPU")
if [ "$SLICES" -gt 1 ]; then
  nodes=() named=(--node-count="$SLICES" --node-prefix="$TPU")
  for ((i = 0; i < SLICES; i++)); do nodes+=("$TPU-$i"); done
fi

tpus() { gcloud ${GCLOUD_TRACK:+"$GCLOUD_TRACK"} compute tpus "$@" --zone="$ZONE"; }

case "${1:-}" in
  create)
    if [[ " ${*:2} " = *" --provisioning-model"* ]] && [ "${GCLOUD_TRACK:-}" != alpha ]; then
      fail "--provisioning-model is of gcloud alpha here; set GCLOUD_TRACK=alpha"
    fi
    tpus queued-resources create "$TPU" "${named[@]}" --accelerator-type="$TYPE" \
      --runtime-version="$runtime" "${@:2}"
    until state="$(tpus queued-resources describe "$TPU" --format='value(state.state)')" && [ "$state" = ACTIVE ]; do
      if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then fail "the request for $TPU is $state"; fi
      echo "$TPU: $state"
      sleep 30
    done
    ;;
  run)
    [ $# -ge 3 ] || fail "got $(($# - 1)) arguments, expected run CONFIG WORKDIR"
    [[ "$3" = gs://* ]] || fail "got WORKDIR=$3, expected gs://BUCKET/FOLDER, which all hosts see"
    cd "$(dirname "$0")/.."
    archive="$(mktemp)"
    trap 'rm -f "$archive"' EXIT
    tar czf "$archive" setup.py configs di_star_jax launch
    # Your own LIBTPU_INIT_ARGS, an empty one too, goes before the platform's. How many hosts there are, and which one
    # it is, each asks of the TPU's metadata.
    arguments="$(printf '%q ' "$platform" "${LIBTPU_INIT_ARGS-preset}" "--config=$2" "--workdir=$3" "${@:4}")"
    unpack='mkdir -p di_star_jax && tar xzf di_star_jax.tgz -C di_star_jax && cd di_star_jax'
    pids=()
    for node in "${nodes[@]}"; do
      (
        tpus tpu-vm scp "$archive" "$node:di_star_jax.tgz" --worker=all
        tpus tpu-vm ssh "$node" --worker=all --command="$unpack && bash launch/on_worker.sh $arguments"
      ) &
      pids+=($!)
    done
    status=0
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "$status"
    ;;
  logs) for node in "${nodes[@]}"; do tpus tpu-vm ssh "$node" --worker="${2:-all}" --command='tail -n 100 di_star_jax/run.log'; done ;;
  delete) tpus queued-resources delete "$TPU" --force --quiet ;;
  *) fail "got '${1:-}', expected create, run, logs or delete" ;;
esac
