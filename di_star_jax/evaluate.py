# SPDX-License-Identifier: Apache-2.0
"""Scores a generator, or a folder of images, on a set of prompts.

    python -m di_star_jax.evaluate --checkpoint=WORKDIR --prompts=FILE
    --metrics=pickscore,saturation --out=evals/after python -m di_star_jax.evaluate --images=FOLDER
    --name=FLUX-dev --prompts=FILE --metrics=pickscore,saturation \
        --baseline=evals/after --out=evals/flux

Leaves results.json, scores.parquet, table.md and page.html in --out. Stopped, the same command
continues.
"""

import functools
import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from di_star_jax import log as metrics
from di_star_jax import rewards, sample, sharding
from di_star_jax.errors import UserError, suggest
from di_star_jax.errors import run as run_command
from di_star_jax.evaluation import drawn as drawing
from di_star_jax.evaluation import frechet, measures, results
from di_star_jax.evaluation import scores as scoring
from di_star_jax.evaluation.results import Evaluation
from di_star_jax.evaluation.scores import Scores, Shot
from di_star_jax.pipelines.folder import Options
from di_star_jax.prompts import source as prompt_source
from di_star_jax.prompts.files import Prompt
from di_star_jax.prompts.sets import PROMPT_SETS
from di_star_jax.shapes import scenes
from di_star_jax.storage import checkpoint
from di_star_jax.storage.files import digest_of, read_json, write_text

SCORES, STATE, PROMPTS = "scores", "settings.json", "prompts"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_READABLE = "readable"  # kept as if it were a metric: which images can be read
_BY_FEATURES = ("diversity", "frechet")
FEATURES = tuple(name for name, entry in rewards.REWARDS.items() if entry.is_clip)


class Job(NamedTuple):
    """What is to be done. shots: all images, prompt after prompt, samples of one prompt together."""

    out: Path
    prompts: prompt_source.Source
    texts: list[Prompt]
    samples: int
    shots: list[Shot]
    metrics: list[str]
    sources: dict[str, str]  # folder or Hub name of the rewards' weights
    features: str  # the reward whose CLIP gives the features
    reference: str  # folder, file, or a name of clean-fid's statistics
    tokenizer: str
    trained_on: dict[str, float]

    def was_trained_on(self, metric: str) -> bool:
        """Also by another name of the same weights."""
        trained = {self.sources[name] for name in self.trained_on if name in self.sources}
        return metric in self.trained_on or (
            metric in self.sources and self.sources[metric] in trained - {""}
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(P, K)."""
        return len(self.texts), self.samples


# What is asked for.


def metric_names(given: list[str]) -> list[str]:
    """The names, checked. Raises: UserError for an unknown one, or none."""
    known = (*scoring.PER_IMAGE, *scoring.ON_SETS)
    if not given:
        raise UserError(
            f"--metrics is empty, expected some of {', '.join(known)}; name at least one"
        )
    for name in given:
        if name not in known:
            raise UserError(
                f"--metrics={name}, expected some of {', '.join(known)}{suggest(name, known)}"
            )
    return list(dict.fromkeys(given))


def run_metadata(source: str | None) -> dict:
    """What a run's newest checkpoint says of it; {} for anything else."""
    if source is None or not Path(source).is_dir() or (Path(source) / "model_index.json").exists():
        return {}
    checkpoints = checkpoint.existing(source)
    step = checkpoints.latest_step()
    metadata = checkpoints.metadata(step)
    checkpoints.close()
    return metadata | {"step": step}


def weight_sources(given: list[str], metadata: dict) -> dict[str, str]:
    """Where the weights of each reward are: from --weights, else from the run's config, else as
    published.
    """
    sources = {name: entry.weights for name, entry in rewards.REWARDS.items()}
    sources |= {
        name: source for name, source in metadata.get("weights", {}).items() if name in sources
    }
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or name not in sources:
            raise UserError(
                f"--weights={text}, expected METRIC=FOLDER with a metric of {', '.join(sources)}"
                f"{suggest(name, list(sources))}"
            )
        sources[name] = source
    return sources


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
    if not (out / STATE).exists() and any(path.name != PROMPTS for path in out.iterdir()):
        raise UserError(f"--out={out} holds other things than an evaluation; give another folder")


def _job(args, metadata: dict) -> Job:
    """Prompts, files and settings, checked. Raises: UserError."""
    out = Path(args.out)
    _open_out(out)
    loaded = prompt_source.load(args.prompts, out / PROMPTS, file=args.prompts_file or "")
    for note in loaded.notes:
        metrics.say(f"prompts: {note}")
    texts = [loaded[i] for i in range(min(args.num_prompts or len(loaded), len(loaded)))]
    if args.images:
        files = scoring.find_images(Path(args.images), texts, args.samples, len(loaded))
    else:
        files = [
            [out / drawing.IMAGES / f"{prompt.row:05d}_{k}.png" for k in range(args.samples)]
            for prompt in texts
        ]
    shots = [
        Shot(p, k, texts[p].text, file) for p, row in enumerate(files) for k, file in enumerate(row)
    ]
    trained_on = metadata.get("trained_on", {}) if args.which != "initial" else {}
    return Job(
        out,
        loaded,
        texts,
        args.samples,
        shots,
        metric_names(args.metrics),
        weight_sources(args.weights, metadata),
        args.features,
        args.reference or "",
        args.tokenizer or metadata.get("weights", {}).get("reward_tokenizer") or TOKENIZER,
        trained_on | dict.fromkeys(args.trained_on, 1.0),
    )


def asked(args, job: Job, metadata: dict) -> dict:
    """What the images depend on, as given; an evaluation that is continued must have the same."""
    prompts = {"name": job.prompts.name, "digest": job.prompts.digest, "count": len(job.texts)}
    given = {
        "checkpoint": args.checkpoint,
        "images": args.images,
        "prompts": prompts,
        "samples": job.samples,
    }
    if args.images:
        base = Path(args.images)
        base = base if base.is_dir() else base.parent
        return given | {
            "images_digest": scoring.listing_digest([shot.file for shot in job.shots], base)
        }
    if metadata:
        given |= {"checkpoint_step": metadata["step"], "which": args.which}
    names = ("sampler", "steps", "guidance_scale", "timestep", "resolution", "dtype", "seed")
    return given | {name: getattr(args, name) for name in names}


def keep_asked(out: Path, given: dict) -> None:
    """Writes what is asked for, or compares it with what the evaluation that is continued was asked
    for.

    Raises: UserError where they differ.
    """
    kept = read_json(out / STATE)
    # Before there is an image or a score, a mistake may be mended.
    started = (out / drawing.DRAWN).exists() or any(
        file.stem != _READABLE for file in (out / SCORES).glob("*")
    )
    given = json.loads(json.dumps(given))
    if not started and (out / SCORES).is_dir():
        shutil.rmtree(out / SCORES)
    if started and kept and kept["asked"] != given:
        name = next(
            name for name in kept["asked"] | given if kept["asked"].get(name) != given.get(name)
        )
        was, now = (results.short(which.get(name)) for which in (kept["asked"], given))
        raise UserError(
            f"--out={out} holds an evaluation with {name}={was}, this one has {now}; give another --out"
        )
    write_text(
        out / STATE,
        json.dumps(
            {"asked": given, "metrics": kept["metrics"] if started and kept else {}}, indent=1
        )
        + "\n",
    )


def keep_metrics(out: Path, given: dict[str, dict]) -> None:
    """As `keep_asked`, for what each metric depends on; others may be added.

    Args: given, as of `check_metrics`.
    """
    kept = read_json(out / STATE)
    for name, now in given.items():
        was = kept["metrics"].get(name, now)
        if was != now:
            key = next(key for key in was | now if was.get(key) != now.get(key))
            raise UserError(
                f"--out={out} holds scores of {name} with {key}={results.short(was.get(key))}, this "
                f"evaluation has {results.short(now.get(key))}; give another --out"
            )
    write_text(
        out / STATE, json.dumps(kept | {"metrics": kept["metrics"] | given}, indent=1) + "\n"
    )


def find_broken(job: Job, batch_size: int) -> list[Path]:
    """Files that cannot be read as images, each said once.

    Raises: UserError where none can be read.
    """
    scores = _scores(job, _READABLE)
    scoring.score(
        _READABLE, lambda shots, images: np.ones(len(shots)), job.shots, scores, batch_size
    )
    broken = list(dict.fromkeys(shot.file for shot in scores.missing(job.shots)))
    if np.isnan(scores.values).all():
        raise UserError(
            f"none of the {len(job.shots)} images can be read, the first is {broken[0]}; give PNG, JPEG or "
            "WebP files"
        )
    for file in broken:
        metrics.say(f"no readable image: {file}; it is left out")
    return broken


# Scores.


def _scores(job: Job, name: str) -> Scores:
    return Scores(job.out / SCORES / f"{name}.jsonl", job.shape)


def load_reward(job: Job, name: str, mesh: Mesh):
    """One reward, its weights over the mesh."""
    options = Options(shardings=functools.partial(sharding.params_sharding, mesh))
    return rewards.load_rewards({name: job.sources[name]}, job.tokenizer, options)[name]


def load_features(job: Job, mesh: Mesh, batch_size: int) -> scoring.Features:
    """The CLIP of --features, its weights over the mesh."""
    folder = rewards.resolve(job.features, job.sources[job.features])
    return scoring.Features(
        folder, rewards.REWARDS[job.features].read_config(folder), mesh, batch_size
    )


def check_metrics(job: Job, mesh: Mesh) -> dict[str, dict]:
    """Loads what will score, one after the other, so that what is missing or wrong is said before
    anything compiles.

    Returns: what each metric depends on besides images and prompts: weights and their sha256,
      features, reference.
    Raises: UserError.
    """
    if "frechet" in job.metrics and len(job.shots) < 2:
        raise UserError(
            "--metrics=frechet of one image, expected 2 or more; give more prompts or --samples"
        )
    found = {name: {} for name in job.metrics}
    for name in job.metrics:
        if name in rewards.REWARDS:
            rewards.resolve(
                name, job.sources[name]
            )  # before the tokenizer, which is the lesser thing to miss
            digest = scoring.params_digest(load_reward(job, name, mesh).params)
            found[name] = {"weights": job.sources[name], "sha256": digest}
            if rewards.REWARDS[name].uses_tokenizer:
                found[name]["tokenizer"] = job.tokenizer
    by_features = [name for name in _BY_FEATURES if name in job.metrics]
    if by_features:
        model = load_features(job, mesh, mesh.size)
        used = {
            "features": job.features,
            "weights": job.sources[job.features],
            "sha256": model.digest,
        }
        found |= {name: used for name in by_features}
        if "frechet" in by_features and Path(job.reference).is_file():
            measures.FeatureStatistics.load(job.reference, _features_name(job, model))
    by_clean_fid = [name for name in frechet.CLEAN_FID if name in job.metrics]
    if by_clean_fid:
        frechet.check_clean_fid(by_clean_fid, job.reference)
    for name in ("frechet", *by_clean_fid):
        if name in job.metrics:
            found[name] = found[name] | {
                "reference": job.reference,
                "reference_digest": _reference_digest(job.reference),
            }
    if "oracle" in job.metrics:
        for prompt in job.texts:
            scenes.parse(prompt.text)
    return found


def _reference_digest(reference: str) -> str:
    if reference.startswith(frechet.STATISTICS):
        return reference
    path = Path(reference)
    return (
        digest_of(path) if path.is_file() else scoring.listing_digest(scoring.images_in(path), path)
    )


def score_images(job: Job, mesh: Mesh, batch_size: int) -> dict[str, np.ndarray]:
    """Printed numbers [P, K] for each metric that has one an image; kept in `scores/` as they come."""
    found = {}
    names = [name for name in job.metrics if name in scoring.PER_IMAGE]
    for name in sorted(
        names, key=lambda name: name in rewards.REWARDS
    ):  # what needs no compiler first
        scores = _scores(job, name)
        if name in scoring.ON_IMAGES:
            scoring.score(name, scoring.ON_IMAGES[name], job.shots, scores, batch_size)
        elif scores.missing(job.shots):
            scoring.score(
                name,
                scoring.by_reward(load_reward(job, name, mesh), mesh, batch_size),
                job.shots,
                scores,
                batch_size,
            )
        found[name] = scores.values * results.factor(name)
    return {name: found[name] for name in names}


def _features_name(job: Job, model: scoring.Features) -> str:
    return f"unit CLIP embeddings of {job.features} (weights' sha256 {model.digest[:8]}), bicubic resize"


def score_features(
    job: Job, mesh: Mesh, batch_size: int
) -> tuple[dict[str, np.ndarray], dict, dict[str, str]]:
    """Returns: diversity [P, 1]; Frechet distance; notes; each by metric, for those asked for."""
    values, whole, notes = {}, {}, {}
    if set(_BY_FEATURES) & set(job.metrics):
        model = load_features(job, mesh, batch_size)
        features = model.of(
            job.shots, job.shape, job.out / SCORES / f"features_{model.digest[:8]}.npy"
        )
        if "diversity" in job.metrics:
            values["diversity"] = np.array([measures.diversity(f) for f in features])[:, None]
            notes["diversity"] = f"over {job.samples} images a prompt; {_features_name(job, model)}"
        if "frechet" in job.metrics:
            whole["frechet"], notes["frechet"] = frechet.of_features(
                features,
                _features_name(job, model),
                model,
                Path(job.reference),
                job.out / SCORES / f"reference_{model.digest[:8]}.npz",
            )
    return values, whole, notes


def score_by_cleanfid(job: Job, broken: list[Path]) -> tuple[dict, dict[str, str]]:
    """Returns:

    FID and CLIP-FID; notes; each by metric, for those asked for. Kept, for they take long.
    """
    whole, notes, left_out = {}, {}, set(broken)
    for name in frechet.CLEAN_FID:
        if name in job.metrics:
            kept = job.out / SCORES / f"{name}.json"
            if not kept.exists():
                files = [shot.file for shot in job.shots if shot.file not in left_out]
                write_text(kept, json.dumps(frechet.clean_fid(name, files, job.reference, job.out)))
            whole[name], notes[name] = json.loads(kept.read_text())
    return whole, notes


# The whole.


def evaluate(args, job: Job, mesh: Mesh, settings: dict, broken: list[Path]) -> Evaluation:
    """Scores what is missing. Returns: the evaluation, not written yet."""
    values = score_images(job, mesh, args.batch_size)
    more, whole, notes = score_features(job, mesh, args.batch_size)
    values |= more
    by_cleanfid, more_notes = score_by_cleanfid(job, broken)
    whole, notes = whole | by_cleanfid, notes | more_notes
    unreadable = set(broken)
    left_out = sum(shot.file in unreadable for shot in job.shots)
    counts = {"prompts": len(job.texts), "images": len(job.shots) - left_out, "left_out": left_out}
    found = {}
    for name in job.metrics:
        summary = (
            results.whole(whole[name], counts) if name in whole else results.summarise(values[name])
        )
        if name == "diversity":  # one number a prompt, of all its images
            summary |= {"images": counts["images"], "left_out": left_out}
        found[name] = summary | {
            "label": _label(name, job),
            "trained_on": job.was_trained_on(name),
            "note": _note(name, settings["metrics"][name], notes),
        }
    named = PROMPT_SETS.get(job.prompts.name)
    groups = named.groups if named else _own_groups(job)
    files = [
        [_relative(shot.file, job.out) for shot in job.shots[i : i + job.samples]]
        for i in range(0, len(job.shots), job.samples)
    ]
    return Evaluation(
        job.out,
        {
            "name": args.name or _name(args, settings),
            "settings": settings,
            "made": _made(),
            "comparison": None,
            "metrics": found,
            "groups": results.by_categories(job.texts, values, groups),
            "broken": [str(file) for file in broken],
        },
        job.texts,
        files,
        values,
    )


def settings_of(given: dict, of_metrics: dict[str, dict], job: Job, drawn: dict) -> dict:
    """What the numbers depend on, with hashes.

    Args: as of `asked`, `check_metrics`, and `draw` or {}.
    """
    used = given | {
        "prompts": given["prompts"]
        | {"verified": job.prompts.verified, "notes": list(job.prompts.notes)}
    }
    if drawn:
        for name in (
            "sampler",
            "steps",
            "guidance_scale",
            "timestep",
            "resolution",
        ):  # as asked; some do not apply
            del used[name]
        used |= drawn["how"]
        used["noise"] = {"seed": given["seed"], "latent_shape": drawn["how"]["latent_shape"]}
    else:
        used["noise"] = None
    return used | {"metrics": of_metrics, "trained_on": job.trained_on}


def _made() -> dict[str, str]:
    try:
        version = importlib.metadata.version("di_star_jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "not installed"
    return {
        "di_star_jax": version,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _own_groups(job: Job) -> tuple[str, ...]:
    """Columns of a user's file that name at most a hundred categories, and fewer than there are
    prompts.
    """
    names = dict.fromkeys(name for prompt in job.texts for name in prompt.categories)
    counts = {
        name: len({prompt.categories[name] for prompt in job.texts if name in prompt.categories})
        for name in names
    }
    return tuple(name for name, count in counts.items() if count <= min(100, len(job.texts) - 1))


def _relative(file: Path, out: Path) -> Path:
    return Path(os.path.relpath(file, out)) if file.is_relative_to(out) else file.absolute()


def _name(args, settings: dict) -> str:
    name = Path(args.images or args.checkpoint).absolute().name
    return f"{name} ({args.which})" if "which" in settings else name


def _label(name: str, job: Job) -> str:
    """With its model's name, without which CLIPScore means little; "" for the usual one."""
    entry = rewards.REWARDS.get(name)
    if entry is None or entry.model_name is None:
        return ""
    config = entry.read_config(rewards.resolve(name, job.sources[name]))
    return f"{entry.title} ({entry.model_name(config)})"


def _note(name: str, of_metric: dict, notes: dict[str, str]) -> str:
    if name in notes:
        return notes[name]
    if "weights" not in of_metric:
        return ""
    weights = Path(of_metric["weights"])
    shown = (
        os.path.relpath(weights)
        if weights.absolute().is_relative_to(Path.cwd()) and weights.exists()
        else weights
    )
    return f"weights {shown} (sha256 {of_metric['sha256'][:8]})"


# The command.


def _check(args) -> None:
    """Raises: UserError for flags that do not go together."""
    if (args.checkpoint is None) == (args.images is None):
        raise UserError(
            "give one of --checkpoint (a run's workdir, a pipeline folder or a Hub name) and --images (a "
            "folder)"
        )
    metric_names(args.metrics)
    _check_reference(args)
    if "diversity" in args.metrics and args.samples < 2:
        raise UserError(
            f"--metrics=diversity with --samples={args.samples}, expected 2 or more; 8 is usual"
        )
    for flag, names, known in (
        ("trained_on", args.trained_on, rewards.REWARDS),
        ("features", [args.features], FEATURES),
    ):
        for name in names:
            if name not in known:
                raise UserError(
                    f"--{flag}={name}, expected one of {', '.join(known)}{suggest(name, list(known))}"
                )
    shares = jax.device_count()
    if args.batch_size % shares:
        raise UserError(
            f"--batch_size={args.batch_size} is not divisible by the {shares} devices; use "
            f"{-(-args.batch_size // shares) * shares}"
        )
    if shares % args.fsdp:
        raise UserError(f"--fsdp={args.fsdp} does not divide the {shares} devices; use 1")
    if args.baseline and Path(args.baseline).absolute() == Path(args.out).absolute():
        raise UserError(
            f"--baseline={args.baseline} is --out too; give the --out of another evaluation"
        )
    sample.check_flags(args)


def _check_reference(args) -> None:
    users = [name for name in ("frechet", *frechet.CLEAN_FID) if name in args.metrics]
    if users and not args.reference:
        raise UserError(
            f"--metrics={users[0]} without --reference; give a folder of real images"
            + (", or an .npz of their statistics" if users == ["frechet"] else "")
        )
    if not args.reference:
        return
    if args.reference.startswith(frechet.STATISTICS) and "frechet" not in users:
        return
    reference = Path(args.reference)
    if not reference.exists():
        raise UserError(
            f"--reference={reference} does not exist; give a folder of images or an .npz of statistics"
        )
    if reference.is_file() and users and users != ["frechet"]:
        raise UserError(
            f"--reference={reference} is a file, {users[-1]} takes a folder of images; give that"
        )
    if reference.is_dir() and len(found := scoring.images_in(reference)) < 2:
        raise UserError(
            f"--reference={reference} holds {len(found)} images, expected 2 or more; give a folder of PNG, "
            "JPEG or WebP files"
        )


def run(args) -> Evaluation:
    """The whole command.

    Args: flags, as of `define_flags`. Returns: the evaluation, written. Raises: UserError.
    """
    _check(args)
    baseline = results.read(Path(args.baseline)) if args.baseline else None
    metadata = run_metadata(args.checkpoint)
    job, mesh = _job(args, metadata), sharding.make_mesh(-1, args.fsdp)
    given = asked(args, job, metadata)
    if baseline:
        results.check_comparable(given, baseline)
    keep_asked(job.out, given)
    broken = find_broken(job, args.batch_size) if args.images else []
    of_metrics = check_metrics(job, mesh)
    if baseline:
        results.check_same_scores(of_metrics, baseline)
    keep_metrics(job.out, of_metrics)
    drawn = {}
    if args.checkpoint:
        drawn = drawing.draw(job.out, job.shots, [prompt.row for prompt in job.texts], args, mesh)
        broken = find_broken(job, args.batch_size)
    evaluation = evaluate(args, job, mesh, settings_of(given, of_metrics, job, drawn), broken)
    evaluation.results["cost"] = drawing.cost_of(drawn)
    if baseline:
        evaluation.results["comparison"] = {
            "baseline": baseline.results["name"],
            "folder": str(baseline.folder),
            "same_noise": results.same_noise(evaluation, baseline),
            "metrics": results.compare(evaluation, baseline),
        }
    results.write(evaluation, baseline, max_prompts=args.max_prompts)
    return evaluation


def main() -> None:
    out = run(flags.FLAGS).folder
    print((out / results.TABLE).read_text())
    print(f"wrote {results.FILE}, {results.SCORES}, {results.TABLE} and {results.PAGE} in {out}")


def define_flags() -> None:  # not at import: other commands have flags of the same names
    sample.define_flags()
    flags.DEFINE_string(
        "images",
        None,
        "Folder of images in the prompts' order, or .json of prompt to file, in place "
        "of --checkpoint.",
    )
    flags.DEFINE_string(
        "prompts", None, f"One of {', '.join(PROMPT_SETS)}, or a file.", required=True
    )
    flags.DEFINE_string("prompts_file", None, "Path or URL of a named set's published file.")
    flags.DEFINE_integer("num_prompts", None, "The first so many; all if not given.", lower_bound=1)
    flags.DEFINE_integer("samples", 1, "Images of each prompt.", lower_bound=1)
    flags.DEFINE_list(
        "metrics",
        ["pickscore", "saturation", "contrast"],
        f"Some of {', '.join((*scoring.PER_IMAGE, *scoring.ON_SETS))}.",
    )
    flags.DEFINE_multi_string(
        "weights", [], "METRIC=FOLDER, where they are not the run's or the published ones."
    )
    flags.DEFINE_string(
        "tokenizer", None, "Folder or Hub name of CLIP's tokenizer, for the metrics."
    )
    flags.DEFINE_string(
        "features", FEATURES[0], "Metric whose CLIP gives the features of diversity and frechet."
    )
    flags.DEFINE_string(
        "reference",
        None,
        "Folder of real images of frechet and FID; or .npz of statistics (frechet), or "
        "cleanfid:NAME (FID).",
    )
    flags.DEFINE_list(
        "trained_on",
        [],
        "Rewards that the generator was trained on, where its run does not say so.",
    )
    flags.DEFINE_string("name", None, "Of the generator, in table and page.")
    flags.DEFINE_string("baseline", None, "--out of an earlier evaluation to compare with.")
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_integer("batch_size", 16, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("max_prompts", 200, "Whose images the page shows.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    run_command(main)
