#!/usr/bin/env bash
# A Cloud TPU slice, from your own machine: TPU=NAME ZONE=ZONE launch/tpu_pod.sh configs/sdxl.py /mnt/bucket/RUN [...]
# Copies this checkout to every worker, installs it, and starts the same command on all; run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
tar czf /tmp/di_star_jax.tgz --exclude=.git --exclude=.venv --exclude=runs .
gcloud compute tpus tpu-vm scp /tmp/di_star_jax.tgz "$TPU:" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  mkdir -p di_star_jax && tar xzf di_star_jax.tgz -C di_star_jax && cd di_star_jax &&
  python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]' &&
  .venv/bin/python -m di_star_jax.main --config='$1' --workdir='$2' ${*:3}"
