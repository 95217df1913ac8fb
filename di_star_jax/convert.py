# SPDX-License-Identifier: Apache-2.0
"""Converts weights.

    python -m di_star_jax.convert --to=orbax --input=FOLDER_OR_HUB_NAME --output=DIR
    python -m di_star_jax.convert --to=diffusers --input=WORKDIR --which=ema --output=DIR

The first reads a pipeline or a single model in the layout of diffusers and writes checkpoint 0,
with one item per model. The second reads a checkpoint of a run, or one written by the first
(--which=unet), and writes a pipeline.
"""

from pathlib import Path
from typing import Any

from absl import flags

from di_star_jax.errors import UserError, run
from di_star_jax.models.unet import UNet2DConditionModel
from di_star_jax.pipelines.export import export_pipeline, generator_scheduler
from di_star_jax.pipelines.folder import abstract_model, model_class, read_config
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.storage import checkpoint, folders, weights


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _model_folders(folder: Path) -> dict[str, Path]:
    """{name: folder} of the models of a pipeline, or of a single one."""
    if _is_pipeline(folder):
        return {name: folder / name for name in folders.components(folder) if name in SDXL.parts}
    cls, _ = model_class(read_config(folder))
    return {"unet" if cls is UNet2DConditionModel else "model": folder}


def to_orbax(folder: Path, output: Path) -> None:
    """Writes checkpoint 0 with the float32 parameters of each model in a folder.

    Raises: UserError for an input that cannot be read, or an output that already holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} exists and is not empty, so it is not overwritten; give another output"
        )
    parts = _model_folders(folder)
    configs = {name: read_config(part) for name, part in parts.items()}
    trees = {name: abstract_model(config).params for name, config in configs.items()}
    state = {name: weights.load(parts[name], tree) for name, tree in trees.items()}
    reference = str(folder.absolute()) if _is_pipeline(folder) else None
    metadata = {"configs": configs, "reference": reference}
    if "unet" in configs:
        metadata["unet_config"] = configs["unet"]
    with checkpoint.Checkpoints(output, keep=None) as checkpoints:
        checkpoints.save(0, state, metadata)


def _restored(
    folder: Path,
    step: int | None,
    which: str,
) -> tuple[dict, Any]:
    """A checkpoint's metadata, and one of its UNets. Args: step, None for the newest."""
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
        abstract = abstract_model(metadata["unet_config"]).params
        return metadata, checkpoints.restore_item(step, which, abstract)


def _scheduler(
    which: str,
    metadata: dict,
    reference_folder: Path,
) -> dict:
    if which not in ("generator", "ema"):
        return folders.read_config(reference_folder, *folders.SCHEDULER)
    times = metadata.get("generator_timesteps", [SDXL.one_step])
    return generator_scheduler(reference_folder, times)


def to_diffusers(
    folder: Path,
    which: str,
    output: Path,
    *,
    step: int | None,
    dtype: str,
    reference: str | None,
) -> None:
    """Writes one UNet of a checkpoint as a pipeline, the rest of it from the run's reference.

    A generator gets the scheduler of its few steps, the others keep the reference's. Without a
    reference (the checkpoint was made from a single UNet) only the UNet's folder is written.

    Args:
      folder: a workdir, its folder of checkpoints, or one checkpoint in it.
      which: item of the checkpoint: "generator", "ema", "assistant" or "unet".
      output: replaced as a whole if it is an earlier export.
      step: of the checkpoint, or None for the newest.
      dtype: "float32" or "float16", of the UNet's weights.
      reference: pipeline folder or Hub name, or None for the one that the checkpoint names.
    Raises: UserError for anything that is missing or does not fit.
    """
    folders.check_output(output)
    metadata, params = _restored(folder, step, which)
    reference = metadata["reference"] if reference is None else reference
    config = metadata["unet_config"]
    if reference is None:
        file_name = f"{folders.DIFFUSERS}.safetensors"
        weights.save(output, params, config=config, file_name=file_name, dtype=dtype)
        return
    source = folders.resolve(reference)
    export_pipeline(
        params,
        unet_config=config,
        reference_folder=source,
        output=output,
        scheduler=_scheduler(which, metadata, source),
        dtype=dtype,
    )


def _define_flags() -> None:  # not at import: other commands have flags of the same names
    flags.DEFINE_enum("to", None, ["orbax", "diffusers"], "What to convert to.", required=True)
    flags.DEFINE_string(
        "input",
        None,
        "Folder or Hub name (to orbax); workdir or checkpoint (to diffusers).",
        required=True,
    )
    flags.DEFINE_string("output", None, "Folder to write.", required=True)
    flags.DEFINE_enum(
        "which",
        "ema",
        ["generator", "ema", "assistant", "unet"],
        "Network of the checkpoint; unet is that of a converted folder.",
    )
    flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the exported UNet.")
    flags.DEFINE_string(
        "reference", None, "Pipeline folder, where it has moved since the checkpoint was written."
    )


def main() -> None:
    args = flags.FLAGS
    if args.to == "orbax":
        to_orbax(folders.resolve(args.input), Path(args.output))
    else:
        to_diffusers(
            Path(args.input),
            args.which,
            Path(args.output),
            step=args.step,
            dtype=args.dtype,
            reference=args.reference,
        )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    _define_flags()
    run(main)
