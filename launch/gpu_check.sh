#!/usr/bin/env bash
# What one GPU makes of SDXL at 1024 pixels, in nine minutes on an H100 or H200; random weights, nothing is downloaded.
#   launch/gpu_check.sh FOLDER [ITEM ...]        # of: device attention sample1 denoiser lora train1 train2 train4 kept4 sample4 vae torch
#   SMALL=1 JAX_PLATFORMS=cpu launch/gpu_check.sh FOLDER          # the same on the shapes world, to try this script
# In the order of what is wanted most, each in a time limit of its own; FOLDER gets ITEM.json as soon as an item is done, and ITEM.log.
# What is there already is left as it is: the same command again does the rest. lora has as much memory as a card of 24 GB gives;
# trainN is the whole step of N images, kept4 that of four which computes little twice (a card of 141 GB). Both come with what --ops
# predicts, train1 with a profile of three steps in FOLDER/profile.
# torch is the denoiser's work beside PyTorch's, where diffusers is installed too. PYTHON names another python.
# On an H200 sample1, sample4 and vae took 45 to 85 s each, and the step with its networks apart over 370 s to compile.
set -uo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 1 ] || fail "got no arguments, expected FOLDER [ITEM ...]; e.g. launch/gpu_check.sh runs/gpu_check"
mkdir -p "$1" || fail "cannot write in $1; give another folder"
out="$(cd "$1" && pwd)"
items=("${@:2}")
[ ${#items[@]} -gt 0 ] || items=(device attention sample1 denoiser lora train1 train2 train4 kept4 sample4 vae torch)
cd "$(dirname "$0")/.." || exit
python="${PYTHON:-python3}"
deadline=$((SECONDS + ${LIMIT:-540}))  # seconds, of all items

memory="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)"  # MiB
batch=1
[ "${memory:-0}" -lt 120000 ] || batch=4
config=(--config=configs/sdxl.py --config.mesh.fsdp=1 --repeats=10)
lora=configs/sdxl_lora.py
fraction="$(awk "BEGIN { print ${memory:-0} > 23000 ? 23000 / ${memory:-1} : 0.95 }")"
# The looped step compiles in half the time, and takes more than an 80 GB card has.
train=(--config.compute.loop_networks=False)
[ "$batch" = 1 ] || train=()
kept=(--config.compute.loop_networks=False --config.decode.slice=1 --config.compute.remat_denoiser=dots
  --config.compute.remat_vae=none --config.compute.remat_reward=none)
[ -z "${SMALL:-}" ] || { config=(--config=configs/shapes.py --repeats=2); lora=configs/shapes.py:lora; }

# item SECONDS NAME COMMAND...: runs it within its limit and what is left of all.
item() {
  local limit="$1" name="$2" left=$((deadline - SECONDS)) began=$SECONDS status=0
  shift 2
  if [ -e "$out/$name.json" ]; then echo "$name: done before"; return; fi
  if [ "$left" -lt 5 ]; then echo "$name: not begun, the time is up"; return; fi
  [ "$limit" -le "$left" ] || limit="$left"
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "== $name: exit code $status after $((SECONDS - began)) s"
  [ "$status" != 0 ] || [ -e "$out/$name.json" ] || echo '{"passed": true}' >"$out/$name.json"
  grep -v -e '^still' -e '^timing' "$out/$name.log" | tail -n 16
  return "$status"
}

# bench SECONDS NAME WHAT BATCH [--vs=torch]
bench() {
  item "$1" "$2" "$python" -m di_star_jax.benchmark "${config[@]}" --what="$3" --config.data.batch_size="$4" \
    --json="$out/$2.json" "${@:5}"
}

# What a broken driver, card or release of XLA gets wrong, against float64 on the CPU.
known_answers() {
  "$python" - "$out/device.json" <<'EOF'
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

device = jax.devices()[0]
print("Python", sys.version.split()[0], "jax", jax.__version__, "on", device.device_kind)
rng = np.random.default_rng(0)
a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((2048, 2048), (2048, 2048), (64, 32769)))
image, kernel = rng.standard_normal((2, 32, 32, 64), np.float32), rng.standard_normal((3, 3, 64, 64), np.float32)
padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
taps = [padded[:, i : i + 32, j : j + 32] @ kernel[i, j] for i in range(3) for j in range(3)]


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


exact = np.float64(a) @ np.float64(b)
half = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
errors = {
    name: float(np.linalg.norm(np.float64(ours) - right) / np.linalg.norm(right))
    for name, ours, right in (
        ("sum, eager", jnp.asarray(c).sum(1), np.float64(c).sum(1)),
        ("sum of squares", jax.jit(lambda x: (x * x).sum(1))(c), (np.float64(c) ** 2).sum(1)),
        ("product, float32", jnp.matmul(a, b, precision="highest"), exact),
        ("product, bfloat16", jnp.matmul(*half, preferred_element_type=jnp.float32), exact),
        ("convolution, float32", jax.jit(conv)(image, kernel), sum(taps)),
    )
}
limits = {name: 1e-2 if "bfloat16" in name else 2e-3 for name in errors}  # TF32 in the convolution
with open(sys.argv[1], "w") as file:
    json.dump({"device": device.device_kind, "jax": jax.__version__, "errors": errors}, file)
print(*(f"{name}: relative error {error:.1e}" for name, error in errors.items()), sep="\n")
sys.exit(any(not errors[name] < limits[name] for name in errors))
EOF
}
export -f known_answers
export python out

failed=()
for name in "${items[@]}"; do
  case "$name" in
    device)
      nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
      item 60 device bash -c known_answers
      ;;
    attention)
      item 60 attention env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}" "$python" -m pytest -q -p no:cacheprovider \
        tests/test_attention.py -k "${SMALL:+not }cudnn"
      ;;
    sample1) bench 90 sample1 sample 1 ;;
    denoiser) bench 150 denoiser denoiser "$batch" ;;
    lora) XLA_PYTHON_CLIENT_MEM_FRACTION="$fraction" bench 240 lora train 1 --config="$lora" --ops ;;
    train1) XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 bench 400 train1 train 1 "${train[@]}" --ops --profile="$out/profile" ;;
    train[24]) XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 bench 400 "$name" train "${name#train}" "${train[@]}" --ops ;;
    kept4) XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 bench 540 kept4 train 4 "${kept[@]}" --ops ;;
    sample4) bench 90 sample4 sample 4 ;;
    vae) bench 120 vae vae "$batch" ;;
    torch) bench 240 torch denoiser "$batch" --vs=torch ;;
    *) fail "got item $name, expected of: device attention sample1 denoiser lora train1 train2 train4 kept4 sample4 vae torch" ;;
  esac || failed+=("$name")
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
