# SPDX-License-Identifier: Apache-2.0
"""DI* on SDXL by low-rank adapters, for one GPU or one TPU chip.

    di-star cache_text --config=sdxl_lora --out=./text_cache
    di-star train --config=sdxl_lora --workdir=runs/sdxl_lora
    di-star train --config=sdxl_lora --config.dry_run=True  # no weights

Two networks are frozen in bfloat16, 5.1 GB each: SDXL, which is the reference and what the
assistant's adapters are added to, and the one-step generator. Only adapters of rank 64 learn, 170 M
numbers for each. By the dry run that is 20.6 GB at 1024 pixels and one image, by the CUDA compiler
21.2 (docs/performance.md), and a checkpoint is 3.4 GB; no card has run it. With lora.int8=True both
are held in 8 bits, 16.3 GB in all; a weights.generator that is a LoRA file, such as DMD2's of four
steps (with generator.steps=4), or empty, SDXL itself, needs no second network: 16.1 GB, and what
the file holds. A sample is 10.9 forward passes of the UNet, 74 TFLOP, for a whole run's
twelve, and decoder and reward as there. Rates are ours and not tuned. To resume, run the same
command again.
"""

import importlib.util
import os

import ml_collections

_HERE = os.path.dirname(os.path.abspath(__file__))
_spec = importlib.util.spec_from_file_location("sdxl", os.path.join(_HERE, "sdxl.py"))
_sdxl = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sdxl)
PRESETS, override = _sdxl.PRESETS, _sdxl.override

# What differs; every other field is as in configs/sdxl.py.
CHANGES = {
    "lora.rank": 64,
    # SDXL's prompts, encoded once: without it the text encoders stay loaded, 1.6 GB
    "data.cache": "./text_cache",
    "data.batch_size": 1,
    "mesh.fsdp": 1,
    # adapters move in larger steps than whole matrices; ours, not tuned
    "optim.generator_lr": 1e-5,
    "optim.assistant_lr": 1e-5,
    "train.steps": 20_000,
    "train.save_every": 1000,
    "eval_every": 1000,
    "eval.batch_size": 1,
    "assistant.warmup_steps": 1000,
}


def get_config(preset: str = "di_star") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/sdxl_lora.py:PRESET."""
    config = _sdxl.get_config()
    config.update_from_flattened_dict(CHANGES)
    return override(config, preset, PRESETS)
