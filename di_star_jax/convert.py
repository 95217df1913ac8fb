# SPDX-License-Identifier: Apache-2.0
"""Converts weights.

    python -m di_star_jax.convert --to=orbax --input=FOLDER_OR_HUB_NAME --output=DIR
    python -m di_star_jax.convert --to=diffusers --input=WORKDIR --which=ema --output=DIR

The first reads a pipeline or a single model in the layout of diffusers and writes checkpoint 0,
with one item per model. The second reads a checkpoint of a run, or one written by the first
(--which=unet), and writes a pipeline.
"""

from pathlib import Path

from absl import flags

from di_star_jax.errors import UserError
from di_star_jax.errors import run as run_command
from di_star_jax.models.unet import UNet2DConditionModel
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import checkpoint, weights

_MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")  # what a pipeline has that is ported


def _model_folders(folder: Path) -> dict[str, Path]:
    """{name: folder} of the models of a pipeline, or of a single one."""
    if (folder / "model_index.json").is_file():
        return {name: folder / name for name in weights.components(folder) if name in _MODELS}
    cls, _ = pipeline.model_class(weights.read_config(folder))
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
    configs = {name: weights.read_config(part) for name, part in parts.items()}
    trees = {name: pipeline.abstract_model(config).params for name, config in configs.items()}
    state = {name: weights.load(parts[name], tree) for name, tree in trees.items()}
    is_pipeline = (folder / "model_index.json").is_file()
    metadata = {"configs": configs, "reference": str(folder.absolute()) if is_pipeline else None}
    if "unet" in configs:
        metadata["unet_config"] = configs["unet"]
    checkpoints = checkpoint.Checkpoints(output, keep=None)
    checkpoints.save(0, state, metadata)
    checkpoints.close()


def to_diffusers(
    folder: Path, which: str, output: Path, *, step: int | None, dtype: str, reference: str | None
) -> None:
    """Writes one UNet of a checkpoint as a pipeline, with the other parts of the reference that it
    began from.

    A generator gets the scheduler of one-step sampling, the others keep the reference's. Without a
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
    weights.check_output(output)
    if step is None and folder.name.isdigit() and (folder / "metadata").is_dir():
        folder, step = folder.parent, int(folder.name)
    checkpoints = checkpoint.existing(folder)
    step = checkpoints.latest_step() if step is None else step
    metadata = checkpoints.metadata(step)
    if "unet_config" not in metadata:
        raise UserError(
            f"checkpoint {step} in {folder} is of {sorted(metadata['configs'])}, expected one with a UNet; "
            "give the checkpoint of a run or of a pipeline"
        )
    reference = metadata["reference"] if reference is None else reference
    source = None if reference is None else weights.resolve(reference)
    config = metadata["unet_config"]
    params = checkpoints.restore_item(step, which, pipeline.abstract_model(config).params)
    checkpoints.close()
    if source is None:
        weights.save(
            output,
            params,
            config=config,
            file_name="diffusion_pytorch_model.safetensors",
            dtype=dtype,
        )
        return
    one_step = which in ("generator", "ema")
    scheduler = (
        weights.one_step_scheduler(source)
        if one_step
        else weights.read_config(source, "scheduler", "scheduler_config.json")
    )
    weights.export_pipeline(
        params,
        unet_config=config,
        reference_folder=source,
        output=output,
        scheduler=scheduler,
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
        to_orbax(weights.resolve(args.input), Path(args.output))
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
    run_command(main)
