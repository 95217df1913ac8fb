# SPDX-License-Identifier: Apache-2.0
"""Converts weights.

    python -m di_star_jax.convert --to=orbax --input=FOLDER_OR_HUB_NAME --output=DIR
    python -m di_star_jax.convert --to=diffusers --input=WORKDIR --which=ema --output=DIR

The first reads a pipeline or a single model in the layout of diffusers and writes checkpoint 0,
with one item per model. The second reads a checkpoint of a run, one written by the first
(--which=unet), or the folder of a UNet (with --reference), and writes a pipeline.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from di_star_jax.command import run
from di_star_jax.errors import UserError
from di_star_jax.models.unet import UNet2DConditionModel
from di_star_jax.pipelines.card import About
from di_star_jax.pipelines.export import (
    DTYPES,
    Unet,
    check_export,
    export_pipeline,
    weights_name,
)
from di_star_jax.pipelines.folder import abstract_model, load_unet, model_class, read_config
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.storage import buckets, checkpoint, folders, weights
from di_star_jax.storage.files import expand


def _model_folders(folder: Path) -> dict[str, Path]:
    """{name: folder} of the models of a pipeline, or of a single one."""
    if folders.is_pipeline(folder):
        return {name: folder / name for name in folders.components(folder) if name in SDXL.parts}
    cls, _ = model_class(read_config(folder))
    return {"unet" if cls is UNet2DConditionModel else "model": folder}


def to_orbax(source: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes checkpoint 0 with the float32 parameters of each model in a folder, or on the Hub.

    Raises: UserError for an input that cannot be read, or an output that already holds something.
    """
    checkpoint.check_path(output)
    if _is_taken(output):
        raise UserError(
            f"{output} exists and is not empty, so it is not overwritten; give another output"
        )
    folder = folders.resolve(str(source))
    parts = _model_folders(folder)
    configs = {name: read_config(part) for name, part in parts.items()}
    trees = {name: abstract_model(config).params for name, config in configs.items()}
    state = {name: weights.load(parts[name], tree) for name, tree in trees.items()}
    reference = str(source) if folders.is_pipeline(folder) else None
    metadata = {"configs": configs, "reference": reference, "directory": str(Path.cwd())}
    if reference:
        metadata |= folders.identity(folder)
    if "unet" in configs:
        metadata["unet_config"] = configs["unet"]
    with checkpoint.Checkpoints(output, keep=None) as checkpoints:
        checkpoints.save(0, state, metadata)


def _is_taken(output: str | os.PathLike) -> bool:
    """Whether there is anything already."""
    if buckets.is_remote(output):
        return bool(buckets.listing(str(output)))
    output = expand(output)
    return output.exists() and (not output.is_dir() or any(output.iterdir()))


class _Source(NamedTuple):
    """What `to_diffusers` reads. metadata: the run's. network: in words. params: of its UNet."""

    metadata: dict
    network: str
    params: Any


def _restored(
    folder: os.PathLike,
    step: int | None,
    which: str,
    check: Callable[[dict], None],
) -> _Source:
    """One of a checkpoint's UNets. Args: step, None for the newest; check, of the metadata."""
    if step is None and folder.name.isdigit() and (folder / "metadata").is_dir():
        folder, step = folder.parent, int(folder.name)
    with checkpoint.existing(folder) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        metadata = checkpoints.metadata(step)
        if "unet_config" not in metadata:
            raise UserError(
                f"checkpoint {step} in {folder} is of {sorted(metadata['configs'])}, "
                "expected one with a UNet; give the checkpoint of a run or of a pipeline"
            )
        check(metadata)
        abstract = abstract_model(metadata["unet_config"]).params
        params = checkpoints.restore_item(step, which, abstract)
        return _Source(metadata, f"{which}, step {step}", params)


def _read_unet(folder: os.PathLike, reference: str | None) -> _Source:
    """A UNet's folder."""
    if not reference:
        raise UserError(
            f"{folder} holds a single model; say with --reference=FOLDER which pipeline its text "
            "encoders and VAE are from"
        )
    unet = load_unet(folders.resolve(str(folder)))
    metadata = {"unet_config": unet.config, "reference": reference}
    return _Source(metadata, folder.resolve().name, unet.params)


def to_diffusers(
    folder: str | os.PathLike,
    which: str,
    output: str | os.PathLike,
    *,
    step: int | None,
    dtype: str,
    reference: str | None,
) -> str:
    """Writes one UNet as a pipeline, the rest of it from the run's reference.

    A generator ("generator" or "ema") gets the scheduler of its steps, the others keep the
    reference's. Without a reference (the checkpoint was made from a single UNet) only the UNet's
    folder is written.

    Args:
      folder: a workdir, its folder of checkpoints, one checkpoint in it, or the folder of a UNet,
        which is a one-step generator's but for "unet"; here or in a bucket, as output.
      which: item of the checkpoint: "generator", "ema", "assistant" or "unet".
      output: replaced as a whole if it is an earlier export.
      step: of the checkpoint, or None for the newest.
      dtype: of all weights, one of export.DTYPES.
      reference: pipeline folder or Hub name, or None for the one that the checkpoint names.
    Returns: how diffusers draws with it, as lines of Python; "" for a single UNet.
    Raises: UserError for anything that is missing or does not fit.
    """
    folder = checkpoint.place(folder) if buckets.is_remote(folder) else expand(folder)
    folders.check_output(output)
    if folders.is_pipeline(folder):
        raise UserError(f"{folder} is a pipeline already; give a workdir, or the folder of a UNet")
    sources = []

    def check(metadata) -> None:  # before weights are read
        if reference or metadata["reference"]:
            sources.append(checkpoint.reference_of(checkpoint.located(metadata), reference))
            check_export(sources[0], output)

    if folders.is_model(folder):
        read = _read_unet(folder, reference)
        check(read.metadata)
    else:
        read = _restored(folder, step, which, check)
    metadata = read.metadata | ({"reference": reference} if reference else {})
    config = metadata["unet_config"]
    if not sources:
        file_name = weights_name(folders.DIFFUSERS, dtype)
        weights.save(output, read.params, config=config, file_name=file_name, dtype=dtype)
        return ""
    is_generator = which in ("generator", "ema")
    times = metadata.get("generator_timesteps", [SDXL.one_step]) if is_generator else ()
    return export_pipeline(
        Unet(read.params, config, tuple(times)),
        About.of_run(metadata, read.network),
        reference_folder=sources[0],
        output=output,
        dtype=dtype,
    )


def _define_flags() -> None:  # not at import: other commands have flags of the same names
    flags.DEFINE_enum("to", None, ["orbax", "diffusers"], "What to convert to.", required=True)
    flags.DEFINE_string(
        "input",
        None,
        "Folder or Hub name (to orbax); workdir or checkpoint (to diffusers); or a gs:// address.",
        required=True,
    )
    flags.DEFINE_string("output", None, "Folder to write, or a gs:// address.", required=True)
    flags.DEFINE_enum(
        "which",
        "ema",
        ["generator", "ema", "assistant", "unet"],
        "Network of the checkpoint; unet is that of a converted folder.",
    )
    flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        DTYPES,
        'Numbers of the export; float16 is diffusers\' variant "fp16".',
    )
    flags.DEFINE_string(
        "reference_pipeline",
        None,
        "Pipeline of the other networks: of a UNet's folder, or of a run where it has moved.",
    )
    flags.DEFINE_alias("reference", "reference_pipeline")


def main() -> None:
    args = flags.FLAGS
    if args.to == "orbax":
        to_orbax(args.input, args.output)
        print(f"wrote {args.output}")
        return
    usage = to_diffusers(
        args.input,
        args.which,
        args.output,
        step=args.step,
        dtype=args.dtype,
        reference=args.reference_pipeline,
    )
    print(f"wrote {args.output}; to draw with it:\n{usage}" if usage else f"wrote {args.output}")


if __name__ == "__main__":
    _define_flags()
    run(main)
