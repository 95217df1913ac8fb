# SPDX-License-Identifier: Apache-2.0
"""A reward of your own: PickScore's recipe (arXiv 2305.01569) on preference pairs.

    di-star reward --config=reward --workdir=runs/reward --config.data.pairs=my_pairs
    di-star reward --config=reward:shapes --workdir=runs/reward

One H100 takes mesh.fsdp=1 and the batch of 128 pairs with compute.remat=full. Facts of the
recipes are read in the authors' code: yuvalkirstain/PickScore (`conf/experiment/clip_h.yaml`,
`trainer/`), THUDM/ImageReward (`train/`). To resume, run the same command again.
"""

import os

import ml_collections

import di_star_jax
from di_star_jax.errors import UserError, nearest

_PACKAGE = os.path.dirname(os.path.abspath(di_star_jax.__file__))
_CHECKPOINT = os.path.join(_PACKAGE, "shapes", "checkpoint")

# One row per recipe; every field named here overrides the default below.
PRESETS = {
    "pickscore": {},
    # THUDM/ImageReward: Adam 1e-5, cosine without warm-up, 70 % of the blocks fixed, batch 64, the
    # lowest held-out loss; how many steps its 10 epochs at most are, depends on the pairs
    "imagereward": {
        "loss": "imagereward",
        "weights.model": "./weights/imagereward",
        "optim.lr": 1e-5,
        "optim.lr_warmup_steps": 0,
        "optim.decay": "cosine",
        "optim.weight_decay": 0.0,
        "optim.fixed_blocks": 0.7,
        "data.batch_size": 64,
    },
    # the small world: its own CLIP as contrastive training leaves it, and rendered pairs, which
    # python -m di_star_jax.shapes.pairs --out=runs/pairs makes
    "shapes": {
        "weights.model": os.path.join(_CHECKPOINT, "clip"),
        "weights.tokenizer": os.path.join(_CHECKPOINT, "tokenizer"),
        "data.pairs": "runs/pairs",
        "data.batch_size": 48,
        "data.workers": 0,
        "mesh.fsdp": 1,
        "optim.lr": 3e-4,
        "optim.lr_warmup_steps": 50,
        "optim.weight_decay": 1e-3,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "train.steps": 1000,
    },
}


def get_config(preset: str = "pickscore") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/reward.py:PRESET."""
    config = ml_collections.ConfigDict()
    # of the order of the pairs and of the split; PickScore's
    config.seed = 42
    # "pickscore": cross-entropy of the two scores, every prompt weighs the same, ties are learnt
    # from; "imagereward": -log sigma(r_better - r_worse), without ties
    config.loss = "pickscore"
    # steps between two looks at the held-out pairs; PickScore's. The best parameters are kept: the
    # highest accuracy, of imagereward the lowest loss, as their authors do
    config.eval_every = 100

    config.weights = ml_collections.ConfigDict()
    # what training begins with: CLIPModel folder, gs:// or Hub name (PickScore's), or a folder with
    # ImageReward's model.safetensors, med_config.json and vocab.txt
    config.weights.model = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    # of a CLIP: folder, gs:// or Hub name
    config.weights.tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    config.data = ml_collections.ConfigDict()
    # folder with pairs.csv (or .tsv, .jsonl: caption, image_0, image_1, label) and its images, or
    # with Pick-a-Pic's .parquet files, or FOLDER/train-*.parquet; here or at gs:// or s3://
    config.data.pairs = ""
    # the same of the pairs to measure by, such as FOLDER/validation_unique-*.parquet; empty holds
    # out some of data.pairs
    config.data.validation = ""
    # share of the prompts of data.pairs that are held out, where data.validation is empty; ours
    config.data.held_out = 0.1
    # of the held-out pairs, how many are used at most; PickScore's validation_unique has 500
    config.data.validation_pairs = 500
    # share of the rows that may be left out for a broken image, two equal ones or an unknown label
    config.data.left_out = 0.1
    # folder of the pairs as they are read from, once more as large as they are; empty is
    # WORKDIR/pairs, or the user's cache where the workdir is in a bucket
    config.data.records = ""
    # pairs a step, over all devices; PickScore's 16 on each of 8
    config.data.batch_size = 128
    # processes of each host that read and decode pairs; 0 is a thread of the run itself
    config.data.workers = 8

    config.mesh = ml_collections.ConfigDict()
    # copies of the parameters; -1 is what fsdp leaves
    config.mesh.data = -1
    # devices that share one copy: ViT-H/14 has 16 GB of parameters, moments and gradients
    config.mesh.fsdp = 1

    config.optim = ml_collections.ConfigDict()
    # AdamW rate at the end of the rise; PickScore's
    config.optim.lr = 3e-6
    # of a linear rise from 0; PickScore's
    config.optim.lr_warmup_steps = 500
    # how it then falls to 0 at the last step: "linear" (PickScore's) or "cosine"
    config.optim.decay = "linear"
    # AdamW; PyTorch's defaults
    config.optim.b1 = 0.9
    # AdamW
    config.optim.b2 = 0.999
    # AdamW
    config.optim.eps = 1e-8
    # AdamW, of all parameters; PickScore's
    config.optim.weight_decay = 0.3
    # of the global gradient norm; PickScore's
    config.optim.clip_norm = 1.0
    # share of each tower's blocks, from the pixels and the words on, that stay as they are;
    # PickScore trains all, ImageReward fixes 0.7
    config.optim.fixed_blocks = 0.0

    config.compute = ml_collections.ConfigDict()
    # bfloat16 or float32; masters and moments are float32 always
    config.compute.dtype = "bfloat16"
    # what the towers recompute in the backward pass, by block: full, dots (all but
    # products with weights, convolutions and flash attention), none
    config.compute.remat = "full"

    config.train = ml_collections.ConfigDict()
    # PickScore's
    config.train.steps = 4000
    # steps between scalars
    config.train.log_every = 10
    # steps between checkpoints, 12 GB each for ViT-H/14
    config.train.save_every = 100

    if preset not in PRESETS:
        near = nearest(preset, list(PRESETS), 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {preset!r}, {hint}")
    config.update_from_flattened_dict(PRESETS[preset])
    return config
