# SPDX-License-Identifier: Apache-2.0
"""A trained UNet as a pipeline folder that diffusers loads."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from di_star_jax.errors import UserError
from di_star_jax.storage import folders
from di_star_jax.storage.weights import whole_on_each_host, write_model

# Where a generator's times stand in its scheduler's config. diffusers passes over what begins with
# an underscore, and has no place for times that a pipeline is not called with.
TIMESTEPS = "_generator_timesteps"
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def generator_scheduler(reference_folder: str | os.PathLike, timesteps: Sequence[int]) -> dict:
    """Content of scheduler_config.json: LCMScheduler with the reference's noise schedule.

    Args:
      reference_folder: a local pipeline folder.
      timesteps: of the generator's steps, falling, in [0, 999].
    """
    reference = folders.read_config(reference_folder, *folders.SCHEDULER)
    return {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "timestep_spacing": "leading",
        "clip_sample": False,
        "steps_offset": 1,
        TIMESTEPS: list(timesteps),
        **{name: reference[name] for name in _SCHEDULE if name in reference},
    }


def export_pipeline(
    unet_params: Any,
    *,
    unet_config: dict,
    reference_folder: str | os.PathLike,
    output: str | os.PathLike,
    scheduler: dict,
    dtype: Any = None,
) -> None:
    """Writes a pipeline folder: a trained UNet, with all else copied from the reference.

    Args:
      unet_params: tree of arrays; if they are spread over several hosts, all must call this.
      unet_config: content of the UNet's config.json.
      reference_folder: a local pipeline folder; components with .fp16 files only get plain names.
      output: replaced as a whole if it is an earlier export.
      scheduler: content of scheduler_config.json.
      dtype: of the UNet's weights, or None to keep them.
    Raises: UserError for a reference that lacks a component, or an output that cannot be written.
    """
    reference_folder, output = Path(reference_folder), Path(output)
    index = folders.read_config(reference_folder, name="model_index.json")
    unet_params = whole_on_each_host(unet_params)
    if jax.process_index() != 0:
        return
    with folders.new_folder(output) as partial:
        for name in folders.components(reference_folder):
            (partial / name).mkdir()
            if name not in ("unet", "scheduler"):
                _copy_component(reference_folder / name, partial / name)
        folders.write_object(partial.joinpath(*folders.SCHEDULER), scheduler)
        write_model(
            partial / "unet",
            unet_params,
            config=unet_config,
            file_name=f"{folders.DIFFUSERS}.safetensors",
            dtype=dtype,
        )
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        folders.write_object(partial / "model_index.json", index)


def _copy_component(source: Path, target: Path) -> None:
    """Copies data files (never code) of a pipeline's component."""
    if not source.is_dir():
        raise UserError(
            f"the reference has no folder {source}, but its model_index.json names it; "
            "download it again"
        )
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)
    if (source / "config.json").is_file():  # a model; a tokenizer has no weights
        _copy_weights(source, target)


def _copy_weights(source: Path, target: Path) -> None:
    files, index = folders.weight_files(source)
    for file in files:
        shutil.copyfile(file, target / _plain(file.name))
    if index is None:
        return
    content = folders.read_object(index)
    content["weight_map"] = {key: _plain(name) for key, name in content["weight_map"].items()}
    folders.write_object(target / _plain(index.name), content)


def _plain(name: str) -> str:
    return name.replace(".fp16", "")
