#!/usr/bin/env bash
# TPU slices on GKE by Cluster Toolkit (gcluster 1.103 or newer), which writes the JobSet and knows Kueue:
#   gcluster job config set project PROJECT; the same for cluster and location                 # once
#   export NAME=di-star IMAGE=IMAGE COMPUTE_TYPE=ct6e-standard-4t TOPOLOGY=8x16 [SLICES=2]
#   launch/gcluster.sh CONFIG WORKDIR [--config.FIELD=VALUE ...] [-- FLAGS OF gcluster]        # again to resume
# IMAGE is of launch/Dockerfile.tpu, WORKDIR a gs:// address.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
for variable in NAME IMAGE COMPUTE_TYPE TOPOLOGY; do
  [ -n "${!variable:-}" ] || fail "set NAME, IMAGE, COMPUTE_TYPE and TOPOLOGY; see the head of $0"
done
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] ||
  fail "got NAME=$NAME, expected at most 28 of a-z, 0-9 and hyphens, a letter first"
[[ "${SLICES:=1}" =~ ^[1-9][0-9]*$ ]] || fail "got SLICES=$SLICES, expected a number from 1"
case "$COMPUTE_TYPE" in
  ct5lp-* | v5litepod-*) platform=v5e ;;
  ct5p-* | v5p-*) platform=v5p ;;
  ct6e-* | v6e-*) platform=v6e ;;
  tpu7x-*) platform=tpu7x ;;
  ct4p-* | v4-*) platform=v4 ;;
  *) fail "got COMPUTE_TYPE=$COMPUTE_TYPE, expected a TPU's such as ct6e-standard-4t, ct5lp-hightpu-4t or tpu7x-standard-4t" ;;
esac
[ $# -ge 2 ] || fail "got $# arguments, expected CONFIG WORKDIR"
[[ "$2" = gs://* ]] || fail "got WORKDIR=$2, expected gs://BUCKET/FOLDER, which all hosts see"
arguments=("--config=$1" "--workdir=$2")
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  arguments+=("$1")
  shift
done
[ $# -eq 0 ] || shift

# gcluster forwards no variable of this shell.
flags="\"\$(python -m di_star_jax.xla_flags $platform)\""
if [ -n "${LIBTPU_INIT_ARGS+set}" ]; then flags="$(printf '%q' "$LIBTPU_INIT_ARGS")"; fi
gcluster job submit --name="$NAME" --image="$IMAGE" --compute-type="$COMPUTE_TYPE" --topology="$TOPOLOGY" \
  --num-slices="$SLICES" --restarts=20 --grace-period=600s --restart-on-exit-codes=75,76,134,135,136,137,139,143 \
  --command="LIBTPU_INIT_ARGS=$flags exec python -m di_star_jax.main$(printf ' %q' "${arguments[@]}")" "$@"
