# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is to do: the request as the command has it, and the job that it makes."""

import dataclasses
from pathlib import Path

import jax

from di_star_jax import log
from di_star_jax.drawing import Asked, is_run
from di_star_jax.errors import UserError, suggest
from di_star_jax.evaluation import cleanfid, metrics
from di_star_jax.evaluation.images import Shot, find_images, images_in
from di_star_jax.prompts.files import Prompt
from di_star_jax.prompts.source import Source
from di_star_jax.prompts.source import load as load_prompts
from di_star_jax.rewards import REWARDS
from di_star_jax.storage import checkpoint

STATE, PROMPTS, IMAGES = "settings.json", "prompts", "images"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclasses.dataclass(frozen=True)
class Request:
    """An evaluation as it is asked for. Fields are the flags of `evaluate`, which explain them.

    One of checkpoint and images is None. sampling: of the checkpoint's images.
    """

    checkpoint: str | None
    reference_pipeline: str | None
    which: str
    sampling: Asked
    dtype: str
    seed: int
    images: str | None
    prompts: str
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
    out: str
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
    source = load_prompts(request.prompts, out / PROMPTS, file=request.prompts_file or "")
    for note in source.notes:
        log.say(f"prompts: {note}")
    count = min(request.num_prompts or len(source), len(source))
    prompts = [source[i] for i in range(count)]
    files = _files(request, prompts, len(source))
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


def _files(
    request: Request,
    prompts: list[Prompt],
    total: int,
) -> list[list[Path]]:
    """[P][K] images: those that are given, or those that will be drawn."""
    if request.images:
        return find_images(Path(request.images), prompts, request.samples, total)
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
            "give one of --checkpoint (a run's workdir, a pipeline folder or a Hub name) and "
            "--images (a folder)"
        )
    if not request.metrics:
        known = ", ".join(metrics.names())
        raise UserError(f"--metrics is empty, expected some of {known}; name at least one")
    _check_names("metrics", request.metrics, metrics.names(), "some")
    _check_reference(request)
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


def _check_reference(request: Request) -> None:
    given = request.reference
    users = [name for name in metrics.WITH_REFERENCE if name in request.metrics]
    if users and not given:
        statistics = ", or an .npz of their statistics" if users == ["frechet"] else ""
        raise UserError(
            f"--metrics={users[0]} without --reference; give a folder of real images{statistics}"
        )
    if not given or given.startswith(cleanfid.STATISTICS) and "frechet" not in users:
        return
    reference = Path(given)
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
