#!/usr/bin/env bash
# One machine, all its devices: launch/local.sh configs/shapes.py runs/shapes [--config.FIELD=VALUE ...]
set -euo pipefail
exec python -m di_star_jax.main --config="$1" --workdir="$2" "${@:3}"
