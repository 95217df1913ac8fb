# SPDX-License-Identifier: Apache-2.0
"""DI++ on PixArt-alpha (arXiv 2410.18881): a transformer of 0.61B parameters, 512 or 1024 pixels.

    di-star train --config=pixart --workdir=/mnt/bucket/di_pp
    di-star train --config=pixart:1024 --workdir=/mnt/bucket/di_pp_1024
    di-star train --config=pixart --config.dry_run=True  # no weights

DI++ publishes no code. What its project page says is below, all else is marked as ours or is as in
configs/sdxl.py. The generator that is given must be of this config's one-step form, sigma_t z at
t = 440 (SIM's, by the same author), or say its own in generator.timesteps and generator.input
(PixArt-DMD: 400, noise). The text encoder is T5-XXL, 9.5 GB in bfloat16; with data.cache a run
needs none (docs/dipp.md). Of 16.9 GB on each of four TPU v5e, four images of 512 pixels take 11.5,
with a cache 8.9 (docs/performance.md). To resume, run the same command again.
"""

import importlib.util
import os

import ml_collections

_HERE = os.path.dirname(os.path.abspath(__file__))
_spec = importlib.util.spec_from_file_location("sd15", os.path.join(_HERE, "sd15.py"))
_sd15 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sd15)

# DI++'s methods, as in configs/sd15.py.
PRESETS = {name: row for name, row in _sd15.PRESETS.items() if "distill" not in name} | {
    "1024": {
        "weights.reference": "PixArt-alpha/PixArt-XL-2-1024-MS",
        "weights.generator": "./weights/pixart-1024-1step",
        "data.resolution": 1024,
    },
}

# One-step pre-training from the teacher alone, as in configs/sd15.py. SIM is the one whose PixArt
# has this config's form; of it only the form is published.
RECIPES = _sd15.RECIPES | {
    # PixArt-DMD without its regression: 512 pixels, z at 400
    "dmd": _sd15.RECIPES["dmd"]
    | {
        "generator.timesteps": (400,),
        "objective.omega": 3.0,
        "objective.t_min": 1,
        "objective.t_max": 999,
        "assistant.t_min": 1,
        "assistant.updates": 1,
        "optim.generator_lr": 1e-6,
        "optim.assistant_lr": 1e-6,
        "data.batch_size": 16,
    },
}
PRESETS |= _sd15.distil(RECIPES, "sim")

# What differs from configs/sd15.py, whose guidance and reward are of PixArt-alpha already; its
# learning rates are PixArt-DMD's, too.
CHANGES = {
    "weights.reference": "PixArt-alpha/PixArt-XL-2-512x512",
    # not published as safetensors by anybody we know: a folder of your own
    "weights.generator": "./weights/pixart-512-1step",
}


def get_config(preset: str = "di_pp") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/pixart.py:PRESET."""
    config = _sd15.get_config()
    config.update_from_flattened_dict(CHANGES)
    return _sd15.override(config, preset, PRESETS)
