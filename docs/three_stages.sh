#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Diff-Instruct++'s three stages in the shapes world, from nothing but a teacher: a one-step generator, a reward
# from pairs of its own pictures, alignment. Run in a checkout: docs/three_stages.sh [FOLDER]; the log of one such
# run is docs/three_stages.log. Stopped, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/three_stages}
world=di_star_jax/shapes/checkpoint

stage() {
    echo "+ $*"
    SECONDS=0
    "$@"
    echo "= $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

# 1. A one-step generator that begins as a copy of the teacher.
stage di-star train --config=shapes:distill --workdir="$runs/distilled"

# 2. A reward: two of its pictures for each of 2,000 captions, judged by the world's taste as a person would.
[ -e "$runs/drawn" ] || stage di-star evaluate --checkpoint="$runs/distilled" --prompts="$world/prompts.txt" \
    --num_prompts=2000 --samples=2 --metrics=saturation --batch_size=100 --out="$runs/drawn"
[ -e "$runs/pairs" ] || stage python -m di_star_jax.shapes.pairs --samples="$runs/drawn" --out="$runs/pairs"
stage di-star reward --config=reward:shapes --config.data.pairs="$runs/pairs" --workdir="$runs/reward"

# 3. Alignment with that reward.
stage di-star train --config=shapes --config.weights.generator="$runs/distilled" \
    --config.weights.pickscore="$runs/reward/reward" --workdir="$runs/aligned"

# What came of it, on held-out captions, by the reward that the package ships and no stage here has seen.
scores() {
    stage di-star evaluate --prompts="$world/prompts_held_out.txt" --samples=4 --batch_size=100 --features=pickscore \
        --metrics=pickscore,oracle,diversity,saturation,contrast --weights=pickscore="$world/reward" \
        --tokenizer="$world/tokenizer" "$@"
}
scores --checkpoint="$runs/distilled" --name=distilled --out="$runs/scores/distilled"
scores --checkpoint="$runs/aligned" --name=aligned --baseline="$runs/scores/distilled" --out="$runs/scores/aligned"

# In diffusers.
stage python - "$runs" <<'PYTHON'
import sys
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/aligned/diffusers")
caption = "two small red circles above a striped blue square on a green background"
image = pipe(caption, num_inference_steps=1, guidance_scale=0).images[0]
image.save(f"{sys.argv[1]}/diffusers.png")
PYTHON
