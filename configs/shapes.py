# SPDX-License-Identifier: Apache-2.0
"""DI* on the shapes world that the package ships: the same code as SDXL, for two CPU cores.

    di-star train --config=shapes --workdir=runs/shapes
    di-star train --config=shapes:lora --workdir=runs/shapes_lora  # adapters alone learn

To resume, run the same command again.
"""

import importlib.util
import os

import ml_collections

import di_star_jax

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(os.path.abspath(di_star_jax.__file__))
_CHECKPOINT = os.path.join(_PACKAGE, "shapes", "checkpoint")
_spec = importlib.util.spec_from_file_location("sdxl", os.path.join(_HERE, "sdxl.py"))
_sdxl = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sdxl)
override = _sdxl.override

# The rows of configs/sdxl.py with this world's scales: guidance 2 for the paper's 7.5 and 1.5 for
# its 4.5, 0.15 of its rewards, 1000 steps for its long run.
PRESETS = _sdxl.PRESETS | {
    "di_star_outside": {
        "objective.name": "di_star_outside",
        "objective.omega": 1.0,
        "objective.alpha_cfg": 2.0,
    },
    "inside_1_7.5": {"reward.pickscore": 0.15},
    "inside_10_7.5": {"reward.pickscore": 1.5},
    "inside_100_4.5": {"objective.omega": 1.5},
    "inside_100_7.5_long": {"train.steps": 1000},
}

# The teacher's one-step generator from nothing but the teacher, as it is shipped, and by other
# losses in the same time.
_DISTIL = {
    "objective.omega": 3.0,  # as the teacher is drawn
    "eval.teacher": "",
    "assistant.first": False,
    "assistant.updates": 1,
    "assistant.t_min": 0,
    "assistant.t_max": 999,
    "objective.t_max": 980,
    "data.batch_size": 32,
    "optim.generator_lr": 1e-4,
    "optim.assistant_lr": 2e-4,
    "optim.lr_warmup_steps": 50,
    "optim.weight_decay": 0.0,
    "optim.b2": 0.99,
    "ema.half_life_samples": 1100,
    "eval_every": 100,
    "train.steps": 800,
    "train.save_every": 100,
}
PRESETS |= {name: row | _DISTIL for name, row in _sdxl.distil(_sdxl.RECIPES, "dmd").items()}

# Adapters with a tenth of the networks' numbers, on frozen ones.
PRESETS["lora"] = {
    "lora.rank": 16,
    "lora.alpha": 16.0,
    # adapters begin at zero, and a step of Adam's moves their product by less than a whole matrix
    "optim.generator_lr": 1e-3,
    "optim.assistant_lr": 2e-3,
}

# What the small world changes; every other field is as in configs/sdxl.py.
SMALL = {
    "weights.reference": _CHECKPOINT,
    "weights.generator": os.path.join(_CHECKPOINT, "generator"),
    "weights.pickscore": os.path.join(_CHECKPOINT, "reward"),
    "weights.tiny_vae": "",  # nobody has made one of this world's latents
    "weights.reward_tokenizer": os.path.join(_CHECKPOINT, "tokenizer"),
    "data.prompts": os.path.join(_CHECKPOINT, "prompts.txt"),
    "data.resolution": 64,
    "data.batch_size": 32,
    "mesh.fsdp": 1,
    # less than the 3 that the small generator was distilled with: more of the variety stays
    "objective.omega": 2.0,
    "reward.pickscore": 15.0,  # the small reward's cosine varies six times as much as PickScore's
    "assistant.warmup_steps": 40,
    # a small net from a short distillation moves in larger steps than SDXL
    "optim.generator_lr": 1e-4,
    "optim.assistant_lr": 2e-4,
    "optim.lr_warmup_steps": 10,
    "ema.half_life_samples": 500,
    "compute.dtype": "float32",
    # on CPU a convolution's gradient is 15 times slower inside of a loop
    "compute.loop_networks": False,
    "compute.remat_denoiser": "none",
    "compute.remat_vae": "none",
    "compute.remat_reward": "none",
    "decode.resolution": 64,
    "eval_every": 50,
    "train.steps": 200,
    "train.save_every": 50,
    "train.keep": 1,
    "eval.prompts": os.path.join(_CHECKPOINT, "prompts_held_out.txt"),
    "eval.batch_size": 100,
    "eval.teacher": os.path.join(_CHECKPOINT, "teacher"),
    "eval.oracle": "shapes",
}


def get_config(preset: str = "di_star") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/shapes.py:PRESET."""
    config = _sdxl.get_config()
    config.update_from_flattened_dict(SMALL)
    return override(config, preset, PRESETS)
