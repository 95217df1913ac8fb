#!/usr/bin/env bash
# A Cloud TPU slice, from your own machine: TPU=NAME ZONE=ZONE launch/tpu_pod.sh configs/sdxl.py /mnt/bucket/RUN [...]
# Copies this checkout to every worker, installs it, and starts the same command on all; run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
on_all() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --worker=all; }
# The first worker's address tells JAX that there are several hosts; the rest it asks of the TPU's metadata.
first=$(gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(networkEndpoints[0].ipAddress)')
archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT
tar czf "$archive" setup.py configs di_star_jax
on_all scp "$archive" "$TPU:di_star_jax.tgz"
# TPU machines have an older Python than JAX needs: uv brings its own.
on_all ssh "$TPU" --command="
  set -e; mkdir -p di_star_jax; tar xzf di_star_jax.tgz -C di_star_jax; cd di_star_jax
  python3 -m pip install -q --user uv
  test -d .venv || python3 -m uv venv -q --python=3.12 .venv
  python3 -m uv pip install -q --python=.venv -e '.[tpu]'
  JAX_COORDINATOR_ADDRESS=$first:8476 .venv/bin/python -m di_star_jax.main $(printf ' %q' \
    "--config=$1" "--workdir=$2" "${@:3}")"
