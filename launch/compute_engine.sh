#!/usr/bin/env bash
# TPU machines of Compute Engine (v5p, v6e, tpu7x), from your own machine. Without TOPOLOGY it is one of them; with it,
# a managed instance group whose machines make up one slice:
#   export NAME=NAME ZONE=ZONE MACHINE=ct6e-standard-4t-tpu [TOPOLOGY=4x8]
#   launch/compute_engine.sh create [FLAGS]                             # of gcloud compute instances (or -templates) create
#   launch/compute_engine.sh run CONFIG WORKDIR [--config.FIELD=VALUE ...]    # again to resume: an earlier run is ended
#   launch/compute_engine.sh logs                                       # last lines of each machine
#   launch/compute_engine.sh delete
# FLAGS for flex-start, one machine: --provisioning-model=FLEX_START --max-run-duration=4h
# --instance-termination-action=DELETE; for a reservation: --provisioning-model=RESERVATION_BOUND
# --reservation-affinity=specific --reservation=NAME --instance-termination-action=DELETE.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ -n "${NAME:-}" ] && [ -n "${ZONE:-}" ] && [ -n "${MACHINE:-}" ] || fail "set NAME, ZONE and MACHINE; see the head of $0"
case "$MACHINE" in
  ct5p-*) platform=v5p image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
  ct6e-*) platform=v6e image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
  tpu7x-*) platform=tpu7x image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
  *) fail "got MACHINE=$MACHINE, expected ct6e-standard-{1,4,8}t-tpu, ct5p-hightpu-4t-tpu or tpu7x-standard-4t-tpu" ;;
esac
[[ "$MACHINE" =~ -([0-9]+)t(-tpu)?$ ]] || fail "got MACHINE=$MACHINE, expected one that names its chips, such as ct6e-standard-4t-tpu"
chips="${BASH_REMATCH[1]}" region="${ZONE%-*}"
if [ -n "${TOPOLOGY:-}" ]; then
  [[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "got TOPOLOGY=$TOPOLOGY, expected chips such as 4x8"
  hosts=$((${TOPOLOGY//x/*} / chips))
  [ $((hosts * chips)) = $((${TOPOLOGY//x/*})) ] && [ "$hosts" -ge 2 ] ||
    fail "TOPOLOGY=$TOPOLOGY is not several machines of $chips chips; leave it out for one"
fi
base=(--machine-type="$MACHINE" --image-family="$image" --image-project=ubuntu-os-accelerator-images
  --boot-disk-size=200GB --maintenance-policy=TERMINATE --scopes=cloud-platform)
managed() { gcloud compute instance-groups managed "$@" --zone="$ZONE"; }
machines() { if [ -n "${TOPOLOGY:-}" ]; then managed list-instances "$NAME" --format='value(name)'; else echo "$NAME"; fi; }
on() { gcloud compute ssh "$1" --zone="$ZONE" --command="$2"; }

case "${1:-}" in
  create)
    if [ -z "${TOPOLOGY:-}" ]; then
      gcloud compute instances create "$NAME" --zone="$ZONE" "${base[@]}" "${@:2}"
      exit
    fi
    gcloud compute resource-policies create workload-policy "$NAME" --region="$region" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$TOPOLOGY"
    gcloud compute instance-templates create "$NAME" "${base[@]}" "${@:2}"
    policy="projects/$(gcloud config get project)/regions/$region/resourcePolicies/$NAME"
    managed create "$NAME" --template="$NAME" --size="$hosts" --workload-policy="$policy" \
      --default-action-on-vm-failure=do-nothing
    managed wait-until "$NAME" --stable
    ;;
  run)
    [ $# -ge 3 ] || fail "got $(($# - 1)) arguments, expected run CONFIG WORKDIR"
    [[ "$3" = gs://* ]] || [ -z "${TOPOLOGY:-}" ] || fail "got WORKDIR=$3, expected gs://BUCKET/FOLDER, which all hosts see"
    cd "$(dirname "$0")/.."
    archive="$(mktemp)"
    trap 'rm -f "$archive"' EXIT
    tar czf "$archive" setup.py configs di_star_jax launch
    # Each machine says its number in the slice and its address.
    # shellcheck disable=SC2016
    ask='m=http://metadata.google.internal/computeMetadata/v1/instance; h="Metadata-Flavor: Google"
      n="$(curl -sf -H "$h" $m/attributes/worker-id || curl -sf -H "$h" $m/attributes/agent-worker-number || echo 0)"
      echo "worker $n $(curl -sf -H "$h" $m/network-interfaces/0/ip)"'
    found=()
    for machine in $(machines); do
      read -r _ number address < <(on "$machine" "$ask" | grep '^worker ') || fail "$machine does not answer"
      found[number]="$machine $address"
    done
    read -r _ first <<<"${found[0]:-}"
    [ -n "$first" ] && [ "${#found[@]}" = "${hosts:-1}" ] || fail "${#found[@]} of ${hosts:-1} machines have told their numbers in the slice"
    # Your own LIBTPU_INIT_ARGS, an empty one too, goes before the platform's.
    arguments="$(printf '%q ' "$platform" "${LIBTPU_INIT_ARGS-preset}" "--config=$2" "--workdir=$3" "${@:4}")"
    pids=()
    for number in "${!found[@]}"; do
      read -r machine _ <<<"${found[number]}"
      together=""
      if [ "${#found[@]}" -gt 1 ]; then
        together="export JAX_COORDINATOR_ADDRESS=$first:8482 JAX_NUM_PROCESSES=${#found[@]} JAX_PROCESS_ID=$number; "
      fi
      (
        gcloud compute scp "$archive" "$machine:di_star_jax.tgz" --zone="$ZONE"
        on "$machine" "mkdir -p di_star_jax && tar xzf di_star_jax.tgz -C di_star_jax && cd di_star_jax && ${together}bash launch/on_worker.sh $arguments"
      ) &
      pids+=($!)
    done
    status=0
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "$status"
    ;;
  logs) for machine in $(machines); do on "$machine" 'tail -n 100 di_star_jax/run.log'; done ;;
  delete)
    if [ -z "${TOPOLOGY:-}" ]; then
      gcloud compute instances delete "$NAME" --zone="$ZONE" --quiet
      exit
    fi
    managed delete "$NAME" --quiet
    gcloud compute instance-templates delete "$NAME" --quiet
    gcloud compute resource-policies delete "$NAME" --region="$region" --quiet
    ;;
  *) fail "got '${1:-}', expected create, run, logs or delete" ;;
esac
