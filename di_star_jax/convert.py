# SPDX-License-Identifier: Apache-2.0
"""Converts weights.

    python -m di_star_jax.convert --to=orbax --input=FOLDER_OR_HUB_NAME --output=DIR
    python -m di_star_jax.convert --to=diffusers --input=WORKDIR --which=ema --output=DIR
    python -m di_star_jax.convert --to=diffusers --input=FILE.safetensors --output=DIR
    python -m di_star_jax.convert --to=single --input=DIR --output=FILE.safetensors
    python -m di_star_jax.convert --to=lora --input=WORKDIR --output=FILE.safetensors
    python -m di_star_jax.convert --to=lora --extract_lora=64 --input=UNET --reference=UNET ...

The first reads a pipeline or a single model in the layout of diffusers, or a FILE.safetensors, and
writes checkpoint 0, with one item per model. The second reads a checkpoint of a run, one written by
the first (--which=denoiser), or the folder of a denoiser (with --reference), and writes a pipeline.
The third makes one of an SDXL or SD 1.5 checkpoint as people download it, the fourth the reverse.
The fifth writes the adapters that a run with lora.rank has learnt, the sixth the low-rank part of
what one denoiser has learnt from another's weights; both in diffusers' names, or by --format=kohya
in those of sd-scripts, which A1111, Forge and ComfyUI read.
With --push_to_hub=OWNER/NAME, what was written is uploaded too, to a private repository.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from di_star_jax import log, record
from di_star_jax.command import run
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.evaluation import held_out, results, table
from di_star_jax.models.unet import V_PREDICTION
from di_star_jax.pipelines import adapters, card, single, trained
from di_star_jax.pipelines.card import PICTURE, About
from di_star_jax.pipelines.export import (
    DTYPES,
    Denoiser,
    calls_by_timesteps,
    check_export,
    denoiser_in,
    export_pipeline,
    form_of_run,
    generator_scheduler,
    weights_name,
)
from di_star_jax.pipelines.families import family_at, is_denoiser
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import (
    abstract_model,
    check_pipeline,
    class_name,
    load_denoiser,
    read_config,
    with_prediction,
)
from di_star_jax.pipelines.scheduler import SchedulerFile
from di_star_jax.storage import buckets, checkpoint, folders, hub, weights
from di_star_jax.storage.files import digest_of, expand, shown, write_text

_PREDICTS = "predicts"  # of a checkpoint's metadata


def _model_folders(folder: Path) -> dict[str, Path]:
    """{name: folder} of the models of a pipeline, or of a single one."""
    if folders.is_pipeline(folder):
        parts = family_at(folder).parts
        there = folders.components(folder)
        return {name: folder / p.folder for name, p in parts.items() if p.folder in there}
    return {DENOISER if is_denoiser(class_name(read_config(folder))) else "model": folder}


def to_orbax(source: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes checkpoint 0 with the float32 parameters of each model in a folder, or on the Hub.

    Raises: UserError for an input that cannot be read, or an output that already holds something.
    """
    _check_checkpoint(output)
    folder = folders.resolve(str(source))
    parts = _model_folders(folder)
    configs = {name: read_config(part) for name, part in parts.items()}
    reference = str(source) if folders.is_pipeline(folder) else None
    if reference:
        configs[DENOISER] = with_prediction(configs[DENOISER], _scheduler_of(folder))
    trees = {name: abstract_model(config).params for name, config in configs.items()}
    state = {name: weights.load(parts[name], tree) for name, tree in trees.items()}
    metadata = {"configs": configs, "reference": reference, "directory": str(Path.cwd())}
    if reference:
        metadata |= folders.identity(folder) | _predicts(configs[DENOISER])
    if DENOISER in configs:
        metadata["denoiser_config"] = configs[DENOISER]
    with checkpoint.Checkpoints(output, keep=None) as checkpoints:
        checkpoints.save(0, state, metadata)


def file_to_orbax(
    file: str | os.PathLike,
    output: str | os.PathLike,
    reference: str | None,
    prediction_type: str | None = None,
) -> None:
    """As `to_orbax`, of one file of the original layout. Args: as of `single.to_params`."""
    _check_checkpoint(output)
    configs, state = single.to_params(file, reference, prediction_type)
    metadata = {
        "configs": configs,
        "reference": None,
        "directory": str(Path.cwd()),
        "denoiser_config": configs[DENOISER],
        **_predicts(configs[DENOISER]),
    }
    with checkpoint.Checkpoints(output, keep=None) as checkpoints:
        checkpoints.save(0, state, metadata)


def _predicts(config: dict) -> dict:
    """What a checkpoint says of its denoiser, {_PREDICTS: betas of its v, or None}."""
    return {_PREDICTS: config.get(V_PREDICTION)}


def _scheduler_of(pipeline: Path) -> SchedulerFile:
    path = pipeline.joinpath(*folders.SCHEDULER)
    return SchedulerFile(folders.read_config(pipeline, *folders.SCHEDULER), str(path))


def _check_predicts(metadata: dict, reference: Path) -> None:
    """Raises: UserError for a reference by whose scheduler a checkpoint's network is misread."""
    if _PREDICTS not in metadata:  # of a run, an older one, or a network that came alone
        return
    scheduler = _scheduler_of(reference)
    ours = metadata[_PREDICTS]
    if with_prediction({}, scheduler).get(V_PREDICTION) != ours:
        what = f"v, by the schedule {ours}" if ours else "noise"
        raise UserError(
            f"the checkpoint's network predicts {what}, which is not what {scheduler.file} says; "
            "give a --reference whose scheduler says it, such as --to=diffusers makes of the "
            "file or folder itself"
        )


def _check_checkpoint(output: str | os.PathLike) -> None:
    """Raises: UserError where no new checkpoint can be written."""
    checkpoint.check_path(output)
    if _is_taken(output):
        raise UserError(
            f"{output} exists and is not empty, so it is not overwritten; give another output"
        )


def _is_taken(output: str | os.PathLike) -> bool:
    """Whether there is anything already."""
    if buckets.is_remote(output):
        return bool(buckets.listing(str(output)))
    output = expand(output)
    return output.exists() and (not output.is_dir() or any(output.iterdir()))


class _Source(NamedTuple):
    """What `to_diffusers` reads.

    metadata: the run's. network: in words; "" of one that no run has trained. params: of its
    denoiser. picture, scores: what the run has found of this network, as of `About`.
    """

    metadata: dict
    network: str
    params: Any
    picture: Path | None = None
    scores: str = ""


def _restored(
    folder: os.PathLike,
    step: int | None,
    which: str,
    reference_of: Callable[[dict], Path | None],
) -> _Source:
    """One of a checkpoint's denoisers.

    Args: step, None for the newest; reference_of, from the metadata to the reference's folder,
      before weights are read.
    """
    with _opened(folder, step) as (checkpoints, step, metadata):
        reference = reference_of(metadata)
        located = checkpoint.located(metadata)
        params = trained.restored_on_host(checkpoints, step, which, located, reference)
        return _Source(metadata, f"{which}, step {step}", params, *_found(folder, which, step))


@contextlib.contextmanager
def _opened(
    folder: os.PathLike, step: int | None
) -> Iterator[tuple[checkpoint.Checkpoints, int, dict]]:
    """Checkpoints with a denoiser, the step that is asked for, and its metadata.

    Args: folder, a workdir, its folder of checkpoints, or one of them; step, None for the newest.
    """
    if step is None and folder.name.isdigit() and (folder / "metadata").is_dir():
        folder, step = folder.parent, int(folder.name)
    with checkpoint.existing(folder) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        metadata = checkpoints.metadata(step)
        if "denoiser_config" not in metadata:
            raise UserError(
                f"checkpoint {step} in {folder} is of {sorted(metadata['configs'])}, "
                "expected one with a denoiser; give the checkpoint of a run or of a pipeline"
            )
        yield checkpoints, step, metadata


def _found(
    folder: os.PathLike,
    which: str,
    step: int,
) -> tuple[Path | None, str]:
    """Picture and scores that a run has of the network at its end; (None, "") of any other."""
    if buckets.is_remote(folder):
        return None, ""
    workdir = folder.parent if folder.name == checkpoint.FOLDER else folder
    try:
        at_end = record.finished(workdir).get("step")
    except UserError:  # a network can be had without the run's notes
        return None, ""
    if which != "ema" or at_end != step:
        return None, ""
    picture = workdir / PICTURE
    return picture if picture.is_file() else None, held_out.for_card(workdir)


def _scores(evaluation: str | None) -> str:
    """The table of an evaluation, for a model card. Args: its --out, or None."""
    if evaluation is None:
        return ""
    folder = buckets.local(evaluation)
    results.check_finished(folder)
    return (folder / table.FILE).read_text(encoding="utf-8").strip()


def _read_denoiser(folder: os.PathLike, reference: str | None) -> _Source:
    """A denoiser's folder."""
    if not reference:
        raise UserError(
            f"{folder} holds a single model; say with --reference=FOLDER which pipeline its text "
            "encoders and VAE are from"
        )
    family, scheduler = check_pipeline(folders.resolve(reference))
    denoiser = load_denoiser(folders.resolve(str(folder)), family, scheduler)
    metadata = {
        "denoiser_config": denoiser.config,
        "reference": reference,
        "initial": str(folder),
    }
    return _Source(metadata, "", denoiser.params)


def to_diffusers(
    folder: str | os.PathLike,
    which: str,
    output: str | os.PathLike,
    *,
    step: int | None,
    dtype: str,
    reference: str | None,
    scores: str = "",
    repository: str = "",
) -> str:
    """Writes one denoiser as a pipeline, the rest of it from the run's reference.

    A generator ("generator" or "ema") gets the scheduler of its steps, the others keep the
    reference's. Without a reference (the checkpoint was made from a single denoiser) only its
    folder is written.

    Args:
      folder: a workdir, its folder of checkpoints, one checkpoint in it, or a denoiser's folder,
        which is a one-step generator's but for "denoiser"; here or in a bucket, as output.
      which: item of the checkpoint: "generator", "ema", "assistant" or "denoiser".
      output: replaced as a whole if it is an earlier export.
      step: of the checkpoint, or None for the newest.
      dtype: of all weights, one of export.DTYPES.
      reference: pipeline folder or Hub name, or None for the one that the checkpoint names.
      scores: as of `About`, in place of the run's own; "" for these.
      repository: on the Hub, where it is to go; "" for nowhere.
    Returns: how diffusers draws with it, as lines of Python; "" for a single denoiser.
    Raises: UserError for anything that is missing or does not fit.
    """
    folder = checkpoint.place(folder) if buckets.is_remote(folder) else expand(folder)
    folders.check_output(output)
    if folders.is_pipeline(folder):
        raise UserError(
            f"{folder} is a pipeline already; give a workdir, or the folder of a denoiser"
        )
    sources = []

    def checked(metadata) -> Path | None:  # before weights are read
        if not reference and not metadata["reference"]:
            return None
        sources.append(checkpoint.reference_of(checkpoint.located(metadata), reference))
        check_export(sources[0], output)
        _check_predicts(metadata, sources[0])
        return sources[0]

    if folders.is_model(folder):
        read = _read_denoiser(folder, reference)
        checked(read.metadata)
    else:
        read = _restored(folder, step, which, checked)
    metadata = read.metadata | ({"reference": reference} if reference else {})
    config = metadata["denoiser_config"]
    if not sources:
        file_name = weights_name(folders.DIFFUSERS, dtype)
        weights.save(output, read.params, config=config, file_name=file_name, dtype=dtype)
        return ""
    is_generator = which in ("generator", "ema")
    form = _form(metadata, sources[0]) if is_generator else None
    return export_pipeline(
        Denoiser(read.params, config, form),
        About.of_run(
            checkpoint.located(metadata), read.network, read.picture, scores or read.scores
        ),
        reference_folder=sources[0],
        output=output,
        dtype=dtype,
        repository=repository,
    )


def _form(metadata: dict, reference: Path) -> FewStep:
    """Of a generator; of one that no run made, its family's."""
    if "generator_timesteps" in metadata:
        return form_of_run(metadata)
    return family_at(reference).one_step


def _to_single(
    folder: str,
    file: str,
    dtype: str,
    scores: str = "",
    repository: str = "",
) -> tuple[str, dict[str, Path]]:
    """What is said of the file that was written, and all files, as of `single.Written`."""
    if single.is_file(folder):
        raise UserError(
            f"{folder} is a file already; give the folder of a pipeline, or the workdir of a run"
        )
    written = single.from_folder(folder, file, dtype=dtype, scores=scores, repository=repository)
    times = "" if written.form is None else ", ".join(map(str, written.form.timesteps))
    elsewhere = f"; in other programs: LCM sampler, times {times}, guidance 1" if times else ""
    said = f"wrote {file}{elsewhere}; to draw with it in diffusers:\n{written.usage}"
    return said, written.files


def _check_push(
    name: str,
    to: str,
    output: str,
) -> None:
    """Raises: UserError for what cannot be pushed, before it is made."""
    if to == "orbax":
        raise UserError(
            f"--push_to_hub={name} with --to={to}, which writes no model card; give "
            "--to=diffusers, --to=single or --to=lora"
        )
    if buckets.is_remote(output):
        raise UserError(
            f"--push_to_hub={name} with --output={output}, expected a path on this machine; give "
            "one"
        )
    hub.check(name)


def _to_lora(args: flags.FlagValues) -> str:
    """What is said of the file of adapters that was written, with its model card beside it."""
    file = expand(args.output)
    weights.check_new_file(file)
    if _card_beside(file).exists():
        raise UserError(
            f"{_card_beside(file)} is there, so it is not overwritten; give another output"
        )
    if single.is_file(args.input) and args.extract_lora is None:
        raise UserError(
            f"{args.input} is a file, expected the workdir of a run; give one, or --extract_lora "
            "with the --reference that the file was trained from"
        )
    how = {"kind": args.format or "diffusers", "dtype": args.dtype or "float16"}
    if args.extract_lora is None:
        return _write_learnt(args, file, how)
    if not args.reference_pipeline:
        raise UserError(
            "--extract_lora without --reference=FOLDER, the denoiser that --input was trained from"
        )
    return _write_extracted(args, file, how)


def _write_learnt(
    args: flags.FlagValues,
    file: Path,
    how: dict,
) -> str:
    """The adapters that a run has learnt. Args: how, of `adapters.write`."""
    which = args.which
    if which not in ("generator", "ema"):
        raise UserError(f"--which={which} with --to=lora, expected generator or ema")
    folder = checkpoint.place(args.input) if buckets.is_remote(args.input) else expand(args.input)
    with _opened(folder, args.step) as (checkpoints, step, metadata):
        low_rank = trained.lora_in(metadata)
        if low_rank is None or not low_rank.adapts(which):
            raise UserError(
                f"checkpoint {step} in {folder} has no adapters, for whole networks have learnt "
                "(lora.rank=0); give --to=diffusers, and to take a low-rank part of that "
                "--extract_lora"
            )
        adapters.check_format(metadata["denoiser_config"], how["kind"])
        learnt = trained.restored_adapters(checkpoints, step, which, metadata)
    config, form = metadata["denoiser_config"], form_of_run(metadata)
    about = {
        "base": shown(metadata["initial"]),
        "base_digest": metadata[trained.LORA]["base"],
        "rank": low_rank.rank,
        "alpha": low_rank.alpha,
        "network": f"{which}, step {step}",
        "timesteps": form.timesteps,
        "input": form.input,
    }
    located = checkpoint.located(metadata)
    use = _lora_use(located, args, file)
    found = adapters.of_run(learnt, low_rank)
    adapters.write(file, found, config, about=about, **how)
    network = f"{which}, step {step}"
    picture, scores = _found(folder, which, step)
    run = About.of_run(located, network, picture, scores)
    _write_lora_card(file, run, use.goes_on, use.card, how)
    return f"{_written(file, found, how)}\n{use.said}"


def _card_beside(file: Path) -> Path:
    return file.with_suffix(".md")


def _write_lora_card(
    file: Path,
    about: About,
    goes_on: str,
    use: str,
    how: dict,
) -> None:
    """The model card of a file of adapters. Args: as of `card.text_of_adapters`."""
    stored = f"Numbers are {how['dtype']}, names those of {how['kind']}."
    text = card.text_of_adapters(about, file.name, goes_on, use, stored, digest_of(file))
    write_text(_card_beside(file), text)


class _Use(NamedTuple):
    """How diffusers draws with a run's adapters. said: by this machine's folders, for the terminal.
    goes_on, card: for a model card, by names that others know.
    """

    said: str
    goes_on: str
    card: str


def _lora_use(
    metadata: dict,
    args: flags.FlagValues,
    file: Path,
) -> _Use:
    """On what a run's adapters go, and how to draw with it. Args: metadata, located."""
    initial, given = metadata["initial"], metadata["reference"]
    is_reference = initial == given
    said = (
        f"it goes on {initial}, the generator that the run began with"
        f"{'' if is_reference else f', not on the reference {given}'}"
    )
    names = [" with ".join(base.name for base in card.bases_of(s)) for s in (initial, given)]
    goes_on = names[0] + ("" if is_reference else f", the generator, not on {names[1]}")
    reference = checkpoint.reference_of(metadata, args.reference_pipeline)
    family, form = family_at(reference), form_of_run(metadata)
    scheduler = generator_scheduler(reference, form, keeps_offset=family.keeps_offset)
    if not adapters.has_readers(metadata["denoiser_config"]):
        none = "diffusers has no load_lora_weights for it, see docs/convert.md"
        return _Use(f"{said}; {none}", goes_on, f"{none} of di_star_jax.")
    times = form.timesteps if calls_by_timesteps(scheduler) else ()
    call = card.Call(args.dtype or "float16", len(form.timesteps), times, family.call)
    base = None if is_reference else str(denoiser_in(Path(initial), family))
    lines = card.usage_of_adapters(str(reference), base, str(file), scheduler, call)
    pipeline = card.bases_of(given)[0]
    of_pipeline = "path/to/the/reference" if pipeline.sha256 else pipeline.name
    of_base = base and "path/to/the/generator"
    named = card.usage_of_adapters(of_pipeline, of_base, file.name, scheduler, call)
    return _Use(
        f"{said}; to draw with it in diffusers:\n{lines}", goes_on, f"```python\n{named}\n```"
    )


def _write_extracted(
    args: flags.FlagValues,
    file: Path,
    how: dict,
) -> str:
    """The low-rank part of what a denoiser has learnt. Args: how, of `adapters.write`."""
    rank = args.extract_lora
    reference = single.as_folder(args.reference_pipeline)
    settings = reference if folders.is_pipeline(reference) else None
    given = single.as_folder(args.input, settings)
    finetuned = adapters.denoiser_folder(given)
    base = adapters.denoiser_folder(reference)
    config = read_config(base)
    adapters.check_format(config, how["kind"])
    with log.waiting("taking the difference of two denoisers apart", "20 minutes for SDXL"):
        found = adapters.extracted(finetuned, base, rank)
    about = {
        "base": shown(args.reference_pipeline),
        "base_digest": folders.digest(base),
        "rank": rank,
        "alpha": rank,
        "network": f"extracted from {shown(args.input)}",
    }
    adapters.write(file, found.adapters, config, about=about, **how)
    bases = (*card.bases_of(reference), *card.bases_of(given))
    name = bases[0].name
    use = f'In diffusers, on a pipeline with {name}: `pipe.load_lora_weights("{file.name}")`.'
    made = About("", bases, lora=f"rank {rank}, alpha {rank}")
    _write_lora_card(file, made, name, use, how)
    return (
        f"{_written(file, found.adapters, how)}\nit keeps {found.kept:.1%} of the squared norm of "
        f"the difference in these, which have {found.adapted:.1%} of that of the whole network; it "
        f"goes on {args.reference_pipeline}"
    )


def _written(
    file: Path,
    found: adapters.Adapters,
    how: dict,
) -> str:
    rank = next(iter(found.values())).rank
    return (
        f"wrote {file}: adapters of rank {rank} in {len(found)} modules, {how['dtype']}, in the "
        f"names of {how['kind']}"
    )


def _define_flags() -> None:  # not at import: other commands have flags of the same names
    flags.DEFINE_enum(
        "to", None, ["orbax", "diffusers", "single", "lora"], "What to convert to.", required=True
    )
    flags.DEFINE_string(
        "input",
        None,
        "Folder or Hub name (to orbax); workdir or checkpoint (to diffusers); or a gs:// address; "
        "or SDXL or SD 1.5 in one FILE.safetensors.",
        required=True,
    )
    flags.DEFINE_string(
        "output", None, "Folder or file to write, or a gs:// address.", required=True
    )
    flags.DEFINE_enum(
        "which",
        "ema",
        ["generator", "ema", "assistant", "denoiser"],
        "Network of the checkpoint; denoiser is that of a converted folder.",
    )
    flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES,
        'Numbers of what is written; float16 is diffusers\' variant "fp16". If not given, float32 '
        "of a run's networks, float16 in a file, and of a single file what each tensor is stored "
        "as.",
    )
    flags.DEFINE_string(
        "reference_pipeline",
        None,
        "Pipeline of the other networks: of a denoiser's folder, or of a run where it has moved; "
        "of a single file, that of its tokenizers, scheduler and settings; with --extract_lora the "
        "denoiser that --input was trained from, or its pipeline.",
    )
    flags.DEFINE_enum(
        "format",
        None,
        adapters.FORMATS,
        "Names in a file of adapters: diffusers (PEFT's) if not given; kohya, which A1111, Forge "
        "and ComfyUI read.",
    )
    flags.DEFINE_integer(
        "extract_lora",
        None,
        "With --to=lora: rank of the part of the difference of two denoisers that is written.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "prediction_type",
        None,
        single.PREDICTION_TYPES,
        "What the denoiser of a single file predicts; if not given, what the file says.",
    )
    flags.DEFINE_alias("reference", "reference_pipeline")
    flags.DEFINE_string(
        "evaluation",
        None,
        "--out of an evaluation, whose table the model card shows; if not given, the run's own "
        "scores.",
    )
    flags.DEFINE_string(
        "push_to_hub",
        None,
        "OWNER/NAME of a repository on the Hub, to which what was written is uploaded.",
    )
    flags.DEFINE_bool("public", False, "Whether all may see that repository; else it is private.")


def main() -> None:
    args = flags.FLAGS
    if args.to != "lora":
        for name in ("format", "extract_lora"):
            if args[name].value is not None:
                raise UserError(f"--{name}={args[name].value} with --to={args.to}, give --to=lora")
    of_file = args.to in ("orbax", "diffusers") and single.is_file(args.input)
    if args.prediction_type and not of_file:
        raise UserError(
            f"--prediction_type={args.prediction_type} with --to={args.to} and "
            f"--input={args.input}, whose scheduler says what it predicts; leave it out, or give a "
            "single file as --input and --to=diffusers or --to=orbax"
        )
    if args.public and not args.push_to_hub:
        raise UserError("--public without --push_to_hub; give both, or none")
    if args.push_to_hub:
        _check_push(args.push_to_hub, args.to, args.output)
    files = _convert(args, args.push_to_hub or "")
    if args.push_to_hub:
        kind = "public" if args.public else "private"
        written = expand(args.output)
        address = hub.push(args.push_to_hub, written, files, public=args.public)
        print(f"pushed to {address}, which is {kind}")


def _convert(args: Any, repository: str) -> dict[str, Path]:
    """Converts, and says so. Returns: the files, where they are not those of a folder."""
    if args.to == "lora":
        print(_to_lora(args))
        file = expand(args.output)
        return {file.name: file, card.FILE: _card_beside(file)}
    is_file = single.is_file(args.input)
    scores = _scores(args.evaluation)
    if args.to == "single":
        dtype = args.dtype or "float16"
        said, files = _to_single(args.input, args.output, dtype, scores, repository)
        print(said)
        return files
    if args.to == "orbax":
        if is_file:
            reference = args.reference_pipeline
            file_to_orbax(args.input, args.output, reference, args.prediction_type)
        else:
            to_orbax(args.input, args.output)
        print(f"wrote {args.output}")
        return {}
    if is_file:
        settings = single.to_folder(
            args.input,
            args.output,
            dtype=args.dtype,
            reference=args.reference_pipeline,
            prediction_type=args.prediction_type,
            repository=repository,
        )
        print(f"wrote {args.output}; tokenizers, scheduler and settings are those of {settings}")
        return {}
    given = args.reference_pipeline
    usage = to_diffusers(
        args.input,
        args.which,
        args.output,
        step=args.step,
        dtype=args.dtype or "float32",
        reference=single.as_folder(given) if given else None,
        scores=scores,
        repository=repository,
    )
    print(f"wrote {args.output}; to draw with it:\n{usage}" if usage else f"wrote {args.output}")
    return {}


if __name__ == "__main__":
    _define_flags()
    run(main)
