# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is to do: the request as the command has it, and the job that it makes."""

import dataclasses
import json
from pathlib import Path

import jax

from di_star_jax import log
from di_star_jax.drawing import Asked, is_run
from di_star_jax.errors import UserError, suggest
from di_star_jax.evaluation import cleanfid, metrics, results
from di_star_jax.evaluation.images import Shot, check_given, evenly_listed, find_images
from di_star_jax.pipelines import single
from di_star_jax.prompts import sets
from di_star_jax.prompts.files import Prompt
from di_star_jax.prompts.sets import PROMPT_SETS
from di_star_jax.prompts.source import Source
from di_star_jax.prompts.source import load as load_prompts
from di_star_jax.rewards import REWARDS, resolve
from di_star_jax.storage import buckets, checkpoint, folders
from di_star_jax.storage.buckets import is_remote, local
from di_star_jax.storage.files import expand, write_text
from di_star_jax.storage.images import LISTED, images_in

# Stages, beside the metrics.
READ, LOAD, DRAW = "reading the images", "loading the metrics' weights", "drawing the images"
EMBED, WRITE = "embedding the images", "writing the tables and the page"
STATE, PROMPTS, IMAGES = "settings.json", "prompts", "images"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclasses.dataclass(frozen=True)
class Request:
    """An evaluation as it is asked for. Fields are the flags of `evaluate`, which explain them.

    One of checkpoint and images is None. sampling: of the checkpoint's images. prompts: None takes
    those of the prompts.json in the folder of images.
    """

    checkpoint: str | None
    reference_pipeline: str | None
    which: str
    sampling: Asked
    dtype: str
    seed: int
    images: str | None
    prompts: str | None
    prompts_file: str | None
    num_prompts: int | None
    samples: int
    metrics: tuple[str, ...]
    weights: tuple[str, ...]
    tokenizer: str | None
    features: str
    reference: str | None
    trained_on: tuple[str, ...]
    name: str | None
    baseline: str | None
    out: str | None
    batch_size: int
    fsdp: int
    max_prompts: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A request with all that it names found.

    source: of the prompts. prompts: the P of them that are asked for.
    shots: all images, prompt after prompt, samples of one prompt together.
    sources: folder or Hub name of the weights by reward. tokenizer: CLIP's.
    trained_on: scales by reward. metadata: of the run's checkpoint, {} for anything else.
    """

    request: Request
    source: Source
    prompts: list[Prompt]
    shots: list[Shot]
    sources: dict[str, str]
    tokenizer: str
    trained_on: dict[str, float]
    metadata: dict

    @property
    def out(self) -> Path:
        """The evaluation's folder."""
        return Path(self.request.out)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What to measure."""
        return self.request.metrics

    @property
    def shape(self) -> tuple[int, int]:
        """(P, K)."""
        return len(self.prompts), self.request.samples

    @property
    def scored(self) -> list[str]:
        """Metrics that have a number an image; first those that need no compiler."""
        names = [name for name in self.metrics if metrics.metric_of(name).per_image]
        return sorted(names, key=lambda name: name in REWARDS)

    def stage(self, name: str) -> str:
        """A line that says how far the evaluation is. Args: name, of a stage or metric."""
        stages = [READ, LOAD] if self.request.images else [LOAD, DRAW, READ]
        stages += self.scored
        stages += [EMBED] if set(metrics.BY_FEATURES) & set(self.metrics) else []
        stages += [name for name in metrics.BY_CLEAN_FID if name in self.metrics]
        stages += [WRITE]
        return f"stage {stages.index(name) + 1} of {len(stages)}: {name}"

    def was_trained_on(self, metric: str) -> bool:
        """Also by another name of the same weights."""
        trained = {self.sources.get(name, "") for name in self.trained_on} - {""}
        return metric in self.trained_on or self.sources.get(metric) in trained


def job_of(request: Request) -> Job:
    """Finds prompts, images and weights.

    Args: request, checked. Raises: UserError for what is not there or does not fit.
    """
    metadata = run_metadata(request.checkpoint)
    out = Path(request.out)
    _open_out(out)
    listed = evenly_listed(local(request.images)) if request.prompts is None else None
    where = request.prompts or _write_prompts(out, list(listed))
    source = load_prompts(where, out / PROMPTS, file=request.prompts_file or "")
    for note in source.notes:
        log.say(f"prompts: {note}")
    count = min(request.num_prompts or len(source), len(source))
    prompts = [source[i] for i in range(count)]
    files = list(listed.values())[:count] if listed else _files(request, prompts, len(source))
    trained_on = metadata.get("trained_on", {}) if request.which != "initial" else {}
    of_run = metadata.get("weights", {}).get("reward_tokenizer")
    return Job(
        request=request,
        source=source,
        prompts=prompts,
        shots=[
            Shot(p, k, prompts[p].text, file)
            for p, row in enumerate(files)
            for k, file in enumerate(row)
        ],
        sources=weight_sources(request.weights, metadata),
        tokenizer=request.tokenizer or of_run or TOKENIZER,
        trained_on=trained_on | dict.fromkeys(request.trained_on, 1.0),
        metadata=metadata,
    )


def completed(request: Request) -> Request:
    """With as many samples as the prompts.json of the images has, where no prompts are given.

    Raises: UserError for prompts that are nowhere, and for another number of samples.
    """
    if request.prompts is not None:
        return request
    if request.images is None or not (local(request.images) / LISTED).is_file():
        raise UserError(
            f"no --prompts; give one of {', '.join(PROMPT_SETS)} or a file, or --images of a "
            f"folder with {LISTED}, as `sample` writes it"
        )
    counts = [len(files) for files in evenly_listed(local(request.images)).values()]
    if request.samples not in (1, counts[0]):
        raise UserError(
            f"--samples={request.samples}, but {local(request.images) / LISTED} has {counts[0]} "
            "images a prompt; leave --samples out"
        )
    return dataclasses.replace(request, samples=counts[0])


def _write_prompts(out: Path, texts: list[str]) -> Path:
    """A prompt file of its own for prompts that came with their images."""
    file = out / PROMPTS / LISTED
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(texts, indent=1) + "\n")
    return file


def _files(
    request: Request,
    prompts: list[Prompt],
    total: int,
) -> list[list[Path]]:
    """[P][K] images: those that are given, or those that will be drawn."""
    if request.images:
        return find_images(local(request.images), prompts, request.samples, total)
    folder = Path(request.out) / IMAGES
    return [
        [folder / f"{prompt.row:05d}_{k}.png" for k in range(request.samples)] for prompt in prompts
    ]


def _open_out(out: Path) -> None:
    """Makes the folder.

    Raises: UserError where that fails, and for one with other things in it than an evaluation.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --out={out} ({error.strerror}); give another folder"
        ) from None
    ours = (PROMPTS, *(path.name for path in out.glob("scores.sqlite*")))  # written before STATE
    if not (out / STATE).exists() and any(path.name not in ours for path in out.iterdir()):
        raise UserError(f"--out={out} holds other things than an evaluation; give another folder")


def run_metadata(source: str | None) -> dict:
    """What a run's newest checkpoint says of it; {} for anything else."""
    if source is None or not is_run(source):
        return {}
    with checkpoint.existing(source) as checkpoints:
        step = checkpoints.latest_step()
        return checkpoint.located(checkpoints.metadata(step)) | {"step": step}


def weight_sources(given: tuple[str, ...], metadata: dict) -> dict[str, str]:
    """Where each reward's weights are: as given, else as the run has them, else as published.

    Args: given, of METRIC=FOLDER. Raises: UserError.
    """
    sources = {name: entry.weights for name, entry in REWARDS.items()}
    for name, source in metadata.get("weights", {}).items():
        if name in sources:
            sources[name] = source
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or name not in sources:
            raise UserError(
                f"--weights={text}, expected METRIC=FOLDER with a metric of {', '.join(sources)}"
                f"{suggest(name, list(sources))}"
            )
        sources[name] = source
    return sources


# Checks.


def check(request: Request) -> None:
    """Raises: UserError for what does not go together."""
    if (request.checkpoint is None) == (request.images is None):
        raise UserError(
            "give one of --checkpoint (a run's workdir, a pipeline's folder, file or Hub name) and "
            "--images (a folder)"
        )
    if request.out is None:
        raise UserError("no --out; give a folder for the results")
    if not request.metrics:
        known = ", ".join(metrics.names())
        raise UserError(f"--metrics is empty, expected some of {known}; name at least one")
    _check_names("metrics", request.metrics, metrics.names(), "some")
    if "diversity" in request.metrics and request.samples < 2:
        raise UserError(
            f"--metrics=diversity with --samples={request.samples}, expected 2 or more; 8 is usual"
        )
    _check_names("trained_on", request.trained_on, tuple(REWARDS), "one")
    _check_names("features", (request.features,), metrics.FEATURES, "one")
    _check_devices(request.batch_size, request.fsdp)
    if request.baseline and Path(request.baseline).absolute() == Path(request.out).absolute():
        raise UserError(
            f"--baseline={request.baseline} is --out too; give the --out of another evaluation"
        )
    request.sampling.check()


def check_inputs(request: Request) -> None:
    """Looks for all that a request names on this machine, before any of it is read.

    Args: request, checked. Raises: UserError that names everything which is missing.
    """
    missing = []
    for look in _INPUTS:
        try:
            look(request)
        except UserError as error:
            missing.append(str(error))
        except OSError as error:  # a name that is too long, a folder that may not be read
            missing.append(f"cannot read {error.filename} ({error.strerror}); check its name")
    if len(missing) > 1:
        each = "; ".join(f"({i}) {text}" for i, text in enumerate(missing, 1))
        raise UserError(f"{len(missing)} inputs are missing: {each}")
    if missing:
        raise UserError(missing[0])


def _find_baseline(request: Request) -> None:
    if request.baseline:
        results.check_finished(local(request.baseline))


def _find_checkpoint(request: Request) -> None:
    if request.checkpoint and single.is_file(request.checkpoint):
        single.as_folder(request.checkpoint, request.reference_pipeline)
    elif request.checkpoint and _is_path(request.checkpoint):
        if not is_remote(request.checkpoint) or not is_run(request.checkpoint):
            folders.resolve(request.checkpoint)
        run_metadata(request.checkpoint)


def _find_prompts(request: Request) -> None:
    if request.prompts is None:
        return
    name, where = sets.resolve(request.prompts, request.prompts_file or "")
    if not where.startswith(("http://", "https://")):
        sets.find(PROMPT_SETS[name] if name else sets.own_file(), local(where))


def _find_images(request: Request) -> None:
    if request.images:
        check_given(local(request.images))


def _find_out(request: Request) -> None:
    """Nothing is drawn for a place that cannot be written."""
    if is_remote(request.out):
        buckets.check_output(request.out)
    else:
        expand(request.out)


def _find_packages(request: Request) -> None:
    cleanfid.check_packages([name for name in metrics.BY_CLEAN_FID if name in request.metrics])


def _find_weights(request: Request) -> None:
    """Those of the Hub are asked for later, which takes a network."""
    try:
        metadata = run_metadata(request.checkpoint)
    except UserError:  # said already
        metadata = {}
    sources = weight_sources(request.weights, metadata)
    names = [name for name in request.metrics if name in REWARDS]
    if set(metrics.BY_FEATURES) & set(request.metrics):
        names.append(request.features)
    absent = []
    for name in dict.fromkeys(names):
        try:
            if sources[name] and _is_path(sources[name]):
                resolve(name, sources[name])
        except UserError as error:
            absent.append(str(error))
    tokenizer = request.tokenizer or metadata.get("weights", {}).get("reward_tokenizer", "")
    used = any(name in REWARDS and REWARDS[name].uses_tokenizer for name in request.metrics)
    if used and is_remote(tokenizer):
        folders.resolve_tokenizer(tokenizer)
    elif used and tokenizer and _is_path(tokenizer) and not Path(tokenizer).is_dir():
        absent.append(f"no folder {tokenizer} for --tokenizer")
    if absent:
        raise UserError("; ".join(absent))


def _find_reference(request: Request) -> None:
    given = request.reference
    users = [name for name in metrics.WITH_REFERENCE if name in request.metrics]
    if users and not given:
        statistics = ", or an .npz of their statistics" if users == ["frechet"] else ""
        raise UserError(
            f"--metrics={users[0]} without --reference; give a folder of real images{statistics}"
        )
    if not given or given.startswith(cleanfid.STATISTICS) and "frechet" not in users:
        return
    reference = local(given)
    if not reference.exists():
        raise UserError(
            f"--reference={given} does not exist; give a folder of images or an .npz of statistics"
        )
    if reference.is_file():
        if users and users != ["frechet"]:
            raise UserError(
                f"--reference={given} is a file, {users[-1]} takes a folder of images; give that"
            )
        return
    count = len(images_in(reference))
    if count < 2:
        raise UserError(
            f"--reference={given} holds {count} images, expected 2 or more; give a folder of PNG, "
            "JPEG or WebP files"
        )


_INPUTS = (
    _find_baseline,
    _find_checkpoint,
    _find_images,
    _find_prompts,
    _find_packages,
    _find_out,
    _find_reference,
    _find_weights,
)


def _is_path(source: str) -> bool:
    """Whether it cannot be a name on the Hub."""
    return is_remote(source) or Path(source).exists() or source.startswith((".", "/", "~"))


def _check_names(
    flag: str,
    given: tuple[str, ...],
    known: tuple[str, ...],
    some: str,
) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"--{flag}={name}, expected {some} of {', '.join(known)}{suggest(name, known)}"
            )


def _check_devices(batch_size: int, fsdp: int) -> None:
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"--batch_size={batch_size} is not divisible by the {devices} devices; use "
            f"{-(-batch_size // devices) * devices}"
        )
    if devices % fsdp:
        raise UserError(f"--fsdp={fsdp} does not divide the {devices} devices; use 1")
