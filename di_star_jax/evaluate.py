# SPDX-License-Identifier: Apache-2.0
"""Scores a generator, or a folder of images, on a set of prompts.

    python -m di_star_jax.evaluate --checkpoint=WORKDIR --prompts=FILE --metrics=pickscore,saturation --out=evals/after
    python -m di_star_jax.evaluate --images=FOLDER --prompts=parti --prompts_file=PartiPrompts.tsv \
        --metrics=imagereward,aesthetic,pickscore,clipscore --name=FLUX-dev --baseline=evals/after --out=evals/flux

Leaves results.json, scores.parquet, table.md and page.html in --out. Stopped, the same command continues.
"""

import importlib.metadata
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from di_star_jax import checkpoint, measures, metrics, prompt_sets, results, rewards, sample, scoring, sharding
from di_star_jax.config import UserError, exit_on_user_error, suggest
from di_star_jax.results import Evaluation
from di_star_jax.scoring import Scores, Shot
from di_star_jax.shapes import scenes

IMAGES, SCORES, STATE, DRAWN, PROMPTS = "images", "scores", "settings.json", "drawn.json", "prompts"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_READABLE = "readable"  # kept as if it were a metric: which images can be read
_BY_FEATURES, _BY_CLEANFID = ("diversity", "frechet"), ("fid", "clip_fid")


class Job(NamedTuple):
    """What is to be done. shots: all images, prompt after prompt, samples of one prompt together."""
    out: Path
    prompts: prompt_sets.Prompts
    texts: list[prompt_sets.Prompt]
    samples: int
    shots: list[Shot]
    metrics: list[str]
    sources: dict[str, str]  # folder or Hub name of the rewards' weights
    features: str  # the reward whose CLIP gives the features
    reference: Path | None
    tokenizer: str
    trained_on: dict[str, float]

    @property
    def shape(self) -> tuple[int, int]:
        """(P, K)."""
        return len(self.texts), self.samples


# What is asked for.

def metric_names(given: list[str]) -> list[str]:
    """The names, checked. Raises: UserError for an unknown one, or none."""
    known = (*scoring.PER_IMAGE, *scoring.ON_SETS)
    if not given:
        raise UserError(f"--metrics is empty, expected some of {', '.join(known)}; name at least one")
    for name in given:
        if name not in known:
            raise UserError(f"--metrics={name}, expected some of {', '.join(known)}{suggest(name, known)}")
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
    """Where the weights of each reward are: from --weights, else from the run's config, else as published."""
    sources = {name: entry.weights for name, entry in rewards.REWARDS.items()}
    sources |= {name: source for name, source in metadata.get("weights", {}).items() if name in sources}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or name not in sources:
            raise UserError(f"--weights={text}, expected METRIC=FOLDER with a metric of {', '.join(sources)}"
                            f"{suggest(name, list(sources))}")
        sources[name] = source
    return sources


def _open_out(out: Path) -> None:
    """Makes the folder. Raises: UserError where that fails, and for one with other things in it than an evaluation."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out={out} ({error.strerror}); give another folder") from None
    if not (out / STATE).exists() and any(path.name != PROMPTS for path in out.iterdir()):
        raise UserError(f"--out={out} holds other things than an evaluation; give another folder")


def _job(args, metadata: dict) -> Job:
    """Prompts, files and settings, checked. Raises: UserError."""
    out = Path(args.out)
    _open_out(out)
    loaded = prompt_sets.load(args.prompts, out / PROMPTS, args.prompts_file or "")
    for note in loaded.notes:
        metrics.say(f"prompts: {note}")
    texts = [loaded[i] for i in range(min(args.num_prompts or len(loaded), len(loaded)))]
    if args.images:
        files = scoring.find_images(Path(args.images), texts, args.samples, len(loaded))
    else:
        files = [[out / IMAGES / f"{prompt.row:05d}_{k}.png" for k in range(args.samples)] for prompt in texts]
    shots = [Shot(p, k, texts[p].text, file) for p, row in enumerate(files) for k, file in enumerate(row)]
    trained_on = metadata.get("trained_on", {}) if args.which != "initial" else {}
    return Job(out, loaded, texts, args.samples, shots, metric_names(args.metrics),
               weight_sources(args.weights, metadata), args.features, Path(args.reference) if args.reference else None,
               args.tokenizer or metadata.get("weights", {}).get("reward_tokenizer") or TOKENIZER,
               trained_on | dict.fromkeys(args.trained_on, 1.0))


def asked(args, job: Job, metadata: dict) -> dict:
    """What the images depend on, as given; an evaluation that is continued must have the same."""
    prompts = {"name": job.prompts.name, "digest": job.prompts.digest, "verified": job.prompts.verified,
               "notes": list(job.prompts.notes), "count": len(job.texts)}
    given = {"checkpoint": args.checkpoint, "images": args.images, "prompts": prompts, "samples": job.samples}
    if args.images:
        base = Path(args.images)
        base = base if base.is_dir() else base.parent
        return given | {"images_digest": scoring.listing_digest([shot.file for shot in job.shots], base)}
    if metadata:
        given |= {"checkpoint_step": metadata["step"], "which": args.which}
    names = ("sampler", "steps", "guidance_scale", "timestep", "resolution", "dtype", "seed")
    return given | {name: getattr(args, name) for name in names}


def keep_asked(out: Path, given: dict) -> None:
    """Writes what is asked for, or compares it with what the evaluation that is continued was asked for.

    Raises: UserError where they differ.
    """
    kept = _read_json(out / STATE)
    started = (out / DRAWN).exists() or (out / SCORES).exists()  # else a mistake of the first call may be mended
    given = json.loads(json.dumps(given))
    if started and kept and kept["asked"] != given:
        name = next(name for name in kept["asked"] | given if kept["asked"].get(name) != given.get(name))
        was, now = (results.short(which.get(name)) for which in (kept["asked"], given))
        raise UserError(f"--out={out} holds an evaluation with {name}={was}, this one has {now}; give another --out")
    results.write_text(out / STATE, json.dumps(
        {"asked": given, "metrics": kept["metrics"] if started and kept else {}}, indent=1) + "\n")


def keep_metrics(out: Path, given: dict[str, dict]) -> None:
    """As `keep_asked`, for what each metric depends on; others may be added. Args: given, as of `check_metrics`."""
    kept = _read_json(out / STATE)
    for name, now in given.items():
        was = kept["metrics"].get(name, now)
        if was != now:
            key = next(key for key in was | now if was.get(key) != now.get(key))
            raise UserError(f"--out={out} holds scores of {name} with {key}={results.short(was.get(key))}, this "
                            f"evaluation has {results.short(now.get(key))}; give another --out")
    results.write_text(out / STATE, json.dumps(kept | {"metrics": kept["metrics"] | given}, indent=1) + "\n")


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


# Images.

def draw(job: Job, args, mesh: Mesh) -> dict:
    """Makes the images that are not there yet, as PNG.

    Returns: what drawn.json holds: how the images were made, by which weights, and at what cost.
    Raises: UserError where images are there that other weights or settings made.
    """
    kept = _read_json(job.out / DRAWN)
    missing = [shot for shot in job.shots if not shot.file.exists()]
    if kept and not missing:
        return kept
    loaded, times = sample.load(args.checkpoint, args.which, mesh, jnp.dtype(args.dtype))
    sampling = sample.sampling_of(args, loaded, times)
    record = _continued(job.out, kept, _how(loaded, sampling), _where(mesh, args.batch_size))
    (job.out / IMAGES).mkdir(exist_ok=True)
    results.write_text(job.out / DRAWN, json.dumps(record))
    make = sample.make_draw(loaded, sampler=sampling.sampler, timesteps=sampling.timesteps,
                            guidance_scale=sampling.guidance_scale, mesh=mesh)
    metrics.say(f"drawing {len(missing)} images of {record['how']['resolution']} pixels; the first {args.batch_size} "
                "wait for the compiler")
    done = len(job.shots) - len(missing)
    progress = metrics.Progress(len(job.shots), done, unit="image")
    for start in range(0, len(missing), args.batch_size):
        part = missing[start:start + args.batch_size]
        padded = part + part[-1:] * (args.batch_size - len(part))  # one shape, one compilation
        began = time.time()
        images = make([shot.text for shot in padded], noise(job, args.seed, padded, sampling.noise_shape))
        seconds = (time.time() - began) / args.batch_size
        _save(part, images)
        record["seconds"] += [seconds] if start else []  # the first has waited for the compiler
        record["peak_memory_gb"] = max(record["peak_memory_gb"], _peak_memory_gb(mesh))
        results.write_text(job.out / DRAWN, json.dumps(record))
        progress.update(done + start + len(part), f"{1 / seconds:.1f} images/s")
    progress.close()
    return record


def _save(shots: list[Shot], images: np.ndarray) -> None:
    for shot, image in zip(shots, images):
        partial = shot.file.with_suffix(".partial")
        metrics.save_png(partial, metrics.to_uint8(image))
        partial.rename(shot.file)


def _how(loaded, sampling: sample.Sampling) -> dict:
    """What an image depends on besides prompt and noise, as it is and not as it was asked for."""
    return {"unet_sha256": scoring.params_digest(loaded.models["unet"].params), "sampler": sampling.sampler,
            "timesteps": sampling.timesteps.tolist(), "guidance_scale": sampling.guidance_scale,
            "resolution": sampling.latent_shape[0] * loaded.vae_scale, "latent_shape": list(sampling.latent_shape)}


def _where(mesh: Mesh, batch_size: int) -> dict:
    device = mesh.devices.flat[0]
    return {"device": f"{mesh.size} x {device.device_kind}", "batch_size": batch_size,
            "memory_of": "device" if device.memory_stats() else "process"}


def _continued(out: Path, kept: dict, how: dict, where: dict) -> dict:
    """The record to go on with; what was timed elsewhere is dropped. Raises: UserError for images made otherwise."""
    for name, now in how.items():
        if kept and kept["how"][name] != now:
            raise UserError(f"--out={out} holds images drawn with {name}={results.short(kept['how'][name])}, this "
                            f"generator has {results.short(now)}; give another --out")
    if kept and kept["where"] == where:
        return kept
    return {"how": how, "where": where, "seconds": [], "peak_memory_gb": 0.0}


def _peak_memory_gb(mesh: Mesh) -> float:
    stats = mesh.devices.flat[0].memory_stats()
    return (stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def noise(job: Job, seed: int, shots: list[Shot], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, of seed, prompt's row and sample alone.

    Args: shots, B; shape, [h, w, C], or [steps, h, w, C] for few_step, whose first step has the noise of the others.
    Returns: float32 [B, h, w, C] or [steps, B, h, w, C].
    """
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), job.texts[shot.prompt].row), shot.sample)
            for shot in shots]
    z = jax.vmap(lambda key: jax.random.normal(key, shape))(jnp.stack(keys))
    return np.asarray(z if len(shape) == 3 else jnp.moveaxis(z, 1, 0))


def cost_of(drawn: dict) -> dict:
    """As results.json holds it: median seconds an image, transfers included and compilation not. Args: drawn, or {}."""
    if not drawn:
        return {"seconds_per_image": None, "timed_batches": 0, "peak_memory_gb": None, "steps": None}
    seconds, peak = drawn["seconds"], drawn["peak_memory_gb"]
    return {"seconds_per_image": statistics.median(seconds) if seconds else None, "timed_batches": len(seconds),
            "peak_memory_gb": peak or None, "steps": len(drawn["how"]["timesteps"]), **drawn["where"]}


def find_broken(job: Job, batch_size: int) -> list[Path]:
    """Files that cannot be read as images, each said once. Raises: UserError where none can be read."""
    scores = _scores(job, _READABLE)
    scoring.score(_READABLE, lambda shots, images: np.ones(len(shots)), job.shots, scores, batch_size)
    broken = list(dict.fromkeys(shot.file for shot in scores.missing(job.shots)))
    if np.isnan(scores.values).all():
        raise UserError(f"none of the {len(job.shots)} images can be read, the first is {broken[0]}; give PNG, JPEG or "
                        "WebP files")
    for file in broken:
        metrics.say(f"no readable image: {file}; it is left out")
    return broken


# Scores.

def _scores(job: Job, name: str) -> Scores:
    return Scores(job.out / SCORES / f"{name}.jsonl", job.shape)


def load_reward(job: Job, name: str, mesh: Mesh):
    """One reward, its weights over the mesh."""
    return rewards.load_rewards({name: job.sources[name]}, job.tokenizer,
                                shardings=lambda tree: sharding.params_sharding(mesh, tree))[name]


def load_features(job: Job, mesh: Mesh, batch_size: int) -> scoring.Features:
    """The CLIP of --features, its weights over the mesh."""
    return scoring.Features(rewards.resolve(job.features, job.sources[job.features]), mesh, batch_size)


def check_metrics(job: Job, mesh: Mesh) -> dict[str, dict]:
    """Loads what will score, one after the other, so that what is missing or wrong is said before anything compiles.

    Returns: what each metric depends on besides images and prompts: weights and their sha256, features, reference.
    Raises: UserError.
    """
    if "frechet" in job.metrics and len(job.shots) < 2:
        raise UserError("--metrics=frechet of one image, expected 2 or more; give more prompts or --samples")
    found = {name: {} for name in job.metrics}
    for name in job.metrics:
        if name in rewards.REWARDS:
            rewards.resolve(name, job.sources[name])  # before the tokenizer, which is the lesser thing to miss
            reward = load_reward(job, name, mesh)
            found[name] = {"weights": job.sources[name], "sha256": scoring.params_digest(reward.params)}
    by_features = [name for name in _BY_FEATURES if name in job.metrics]
    if by_features:
        model = load_features(job, mesh, mesh.size)
        used = {"features": job.features, "weights": job.sources[job.features], "sha256": model.digest}
        found |= {name: used for name in by_features}
        if "frechet" in by_features and job.reference.is_file():
            measures.FeatureStatistics.load(job.reference, _features_name(job, model))
    if set(_BY_CLEANFID) & set(job.metrics):
        _cleanfid()
    for name in ("frechet", *_BY_CLEANFID):
        if name in job.metrics:
            found[name] = found[name] | {"reference": str(job.reference), "reference_digest": _reference_digest(job)}
    if "oracle" in job.metrics:
        for prompt in job.texts:
            scenes.parse(prompt.text)
    return found


def _reference_digest(job: Job) -> str:
    if job.reference.is_file():
        return results.digest_of(job.reference)
    return scoring.listing_digest(scoring.images_in(job.reference), job.reference)


def score_images(job: Job, mesh: Mesh, batch_size: int) -> dict[str, np.ndarray]:
    """Printed numbers [P, K] for each metric that has one an image; kept in `scores/` as they come."""
    found = {}
    names = [name for name in job.metrics if name in scoring.PER_IMAGE]
    for name in sorted(names, key=lambda name: name in rewards.REWARDS):  # what needs no compiler first
        scores = _scores(job, name)
        if name in scoring.ON_IMAGES:
            scoring.score(name, scoring.ON_IMAGES[name], job.shots, scores, batch_size)
        elif scores.missing(job.shots):
            scoring.score(name, scoring.by_reward(load_reward(job, name, mesh), mesh, batch_size), job.shots, scores,
                          batch_size)
        found[name] = scores.values * results.factor(name)
    return {name: found[name] for name in names}


def _features_name(job: Job, model: scoring.Features) -> str:
    return f"unit CLIP embeddings of {job.sources[job.features]} ({model.digest[:8]}), bicubic resize"


def score_features(job: Job, mesh: Mesh, batch_size: int) -> tuple[dict[str, np.ndarray], dict, dict[str, str]]:
    """Returns: diversity [P, 1]; Frechet distance; notes; each by metric, for those asked for."""
    values, whole, notes = {}, {}, {}
    if set(_BY_FEATURES) & set(job.metrics):
        model = load_features(job, mesh, batch_size)
        features = model.of(job.shots, job.shape, job.out / SCORES / f"features_{job.features}.npy")
        if "diversity" in job.metrics:
            values["diversity"] = np.array([measures.diversity(f) for f in features])[:, None]
            notes["diversity"] = f"over {job.samples} images a prompt; {_features_name(job, model)}"
        if "frechet" in job.metrics:
            whole["frechet"], notes["frechet"] = frechet(job, features, model)
    return values, whole, notes


def frechet(job: Job, features: np.ndarray, model: scoring.Features) -> tuple[float, str]:
    """(distance, note) to a folder of images or a file of statistics. Args: features [P, K, D], NaN where broken."""
    name, kept = _features_name(job, model), job.out / SCORES / f"reference_{job.features}.npz"
    ours = measures.FeatureStatistics(name)
    ours.update(features.reshape(-1, features.shape[-1]))
    if job.reference.is_file() or kept.exists():
        theirs = measures.FeatureStatistics.load(job.reference if job.reference.is_file() else kept, name)
    else:
        shots = [Shot(i, 0, "", file) for i, file in enumerate(scoring.images_in(job.reference))]
        theirs = measures.FeatureStatistics(name)
        theirs.update(model.of(shots, (len(shots), 1), None)[:, 0])
        partial = kept.with_suffix(".partial")
        theirs.save(partial)
        partial.rename(kept)
    count = "an unknown number of" if theirs.count is None else f"{theirs.count:,}"
    left_out = f", {theirs.left_out} more not readable" if theirs.left_out else ""
    return measures.frechet_distance(ours, theirs), (
        f"{ours.count:,} images against {count} of {job.reference}{left_out}; {name}; float64, in this package")


def _cleanfid():
    try:
        from cleanfid import fid
    except ImportError as error:
        raise UserError(f"--metrics=fid needs clean-fid ({error}); pip install -e '.[fid]', or leave fid and clip_fid "
                        "out: frechet is this package's own, of another feature extractor") from None
    return fid


def clean_fid(name: str, files: list[Path], reference: Path, out: Path) -> tuple[float, str]:
    """(FID or CLIP-FID, note) by the clean-fid package, mode clean.

    Args: name, "fid" or "clip_fid"; files, readable images; reference, a folder; out, where a folder of links may be.
    Raises: UserError for a reference with images that cannot be read.
    """
    model = {"fid": "inception_v3", "clip_fid": "clip_vit_b_32"}[name]
    theirs = scoring.images_in(reference)
    broken = scoring.broken_among(theirs)
    if broken:
        raise UserError(f"{len(broken)} of the {len(theirs)} images of --reference={reference} cannot be read, the "
                        f"first is {broken[0]}; clean-fid takes whole folders: take them out")
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{name}_") as folder:  # of exactly the images that are scored
        for i, file in enumerate(files):
            (Path(folder) / f"{i:06d}{file.suffix.lower()}").symlink_to(file.absolute())
        value = _cleanfid().compute_fid(folder, str(reference), mode="clean", model_name=model)
    kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
    return float(value), (f"clean-fid, mode clean (bicubic, antialiased, not rounded), {model}, {len(files):,} images "
                          f"({kinds}) against {len(theirs):,} of {reference}")


def score_by_cleanfid(job: Job, broken: list[Path]) -> tuple[dict, dict[str, str]]:
    """Returns: FID and CLIP-FID; notes; each by metric, for those asked for. Kept, for they take long."""
    whole, notes, left_out = {}, {}, set(broken)
    for name in _BY_CLEANFID:
        if name in job.metrics:
            kept = job.out / SCORES / f"{name}.json"
            if not kept.exists():
                files = [shot.file for shot in job.shots if shot.file not in left_out]
                results.write_text(kept, json.dumps(clean_fid(name, files, job.reference, job.out)))
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
    left_out = sum(shot.file in set(broken) for shot in job.shots)
    counts = {"prompts": len(job.texts), "images": len(job.shots) - left_out, "left_out": left_out}
    found = {}
    for name in job.metrics:
        summary = results.whole(whole[name], counts) if name in whole else results.summarise(values[name])
        if name == "diversity":  # one number a prompt, of all its images
            summary |= {"images": counts["images"], "left_out": left_out}
        found[name] = summary | {"label": _label(name, job), "trained_on": name in job.trained_on,
                                 "note": _note(name, settings["metrics"][name], notes)}
    known = prompt_sets.PROMPT_SETS[job.prompts.name].groups if job.prompts.name in prompt_sets.PROMPT_SETS else ()
    files = [[_relative(shot.file, job.out) for shot in job.shots[i:i + job.samples]]
             for i in range(0, len(job.shots), job.samples)]
    return Evaluation(job.out, {
        "name": args.name or _name(args, settings), "settings": settings, "made": _made(), "comparison": None,
        "metrics": found, "groups": results.by_categories(job.texts, values, known or _own_groups(job)),
        "broken": [str(file) for file in broken]}, job.texts, files, values)


def settings_of(given: dict, of_metrics: dict[str, dict], job: Job, drawn: dict) -> dict:
    """What the numbers depend on, with hashes. Args: as of `asked`, `check_metrics`, and `draw` or {}."""
    used = dict(given)
    if drawn:
        for name in ("sampler", "steps", "guidance_scale", "timestep", "resolution"):  # as asked; some do not apply
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
    return {"di_star_jax": version, "jax": jax.__version__, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _own_groups(job: Job) -> tuple[str, ...]:
    """Columns of a user's file that name at most a hundred categories."""
    names = dict.fromkeys(name for prompt in job.texts for name in prompt.categories)
    return tuple(name for name in names
                 if len({prompt.categories[name] for prompt in job.texts if name in prompt.categories}) <= 100)


def _relative(file: Path, out: Path) -> Path:
    return Path(os.path.relpath(file, out)) if file.is_relative_to(out) else file.absolute()


def _name(args, settings: dict) -> str:
    name = Path(args.images or args.checkpoint).absolute().name
    return f"{name} ({args.which})" if "which" in settings else name


def _label(name: str, job: Job) -> str:
    """CLIPScore means little without its model's name."""
    if not name.startswith("clipscore"):
        return ""
    config = rewards.REWARDS[name].file.read_config(rewards.resolve(name, job.sources[name]))
    return f"CLIPScore ({rewards.clipscore.model_name(config)})"


def _note(name: str, of_metric: dict, notes: dict[str, str]) -> str:
    if name in notes:
        return notes[name]
    return f"weights {of_metric['weights']} (sha256 {of_metric['sha256'][:8]})" if "weights" in of_metric else ""


# The command.

def _check(args) -> None:
    """Raises: UserError for flags that do not go together."""
    if (args.checkpoint is None) == (args.images is None):
        raise UserError("give one of --checkpoint (a run's workdir, a pipeline folder or a Hub name) and --images (a "
                        "folder)")
    metric_names(args.metrics)
    _check_reference(args)
    if "diversity" in args.metrics and args.samples < 2:
        raise UserError(f"--metrics=diversity with --samples={args.samples}, expected 2 or more; 8 is usual")
    for flag, names in (("trained_on", args.trained_on), ("features", [args.features])):
        for name in names:
            if name not in rewards.REWARDS:
                raise UserError(f"--{flag}={name}, expected one of {', '.join(rewards.REWARDS)}"
                                f"{suggest(name, list(rewards.REWARDS))}")
    shares = jax.device_count()
    if args.batch_size % shares:
        raise UserError(f"--batch_size={args.batch_size} is not divisible by the {shares} devices; use "
                        f"{-(-args.batch_size // shares) * shares}")
    if shares % args.fsdp:
        raise UserError(f"--fsdp={args.fsdp} does not divide the {shares} devices; use 1")
    if args.baseline and Path(args.baseline).absolute() == Path(args.out).absolute():
        raise UserError(f"--baseline={args.baseline} is --out too; give the --out of another evaluation")
    sample.check_flags(args)


def _check_reference(args) -> None:
    users = [name for name in ("frechet", *_BY_CLEANFID) if name in args.metrics]
    if users and not args.reference:
        raise UserError(f"--metrics={users[0]} without --reference; give a folder of real images"
                        + (", or an .npz of their statistics" if users == ["frechet"] else ""))
    if not args.reference:
        return
    reference = Path(args.reference)
    if not reference.exists():
        raise UserError(f"--reference={reference} does not exist; give a folder of images or an .npz of statistics")
    if reference.is_file() and users and users != ["frechet"]:
        raise UserError(f"--reference={reference} is a file, {users[-1]} takes a folder of images; give that")
    if reference.is_dir() and len(found := scoring.images_in(reference)) < 2:
        raise UserError(f"--reference={reference} holds {len(found)} images, expected 2 or more; give a folder of PNG, "
                        "JPEG or WebP files")


def run(args) -> Evaluation:
    """The whole command. Args: flags, as of `define_flags`. Returns: the evaluation, written. Raises: UserError."""
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
        drawn = draw(job, args, mesh)
        broken = find_broken(job, args.batch_size)
    evaluation = evaluate(args, job, mesh, settings_of(given, of_metrics, job, drawn), broken)
    evaluation.results["cost"] = cost_of(drawn)
    if baseline:
        evaluation.results["comparison"] = {
            "baseline": baseline.results["name"], "folder": str(baseline.folder),
            "same_noise": results.same_noise(evaluation, baseline), "metrics": results.compare(evaluation, baseline)}
    results.write(evaluation, baseline, max_prompts=args.max_prompts)
    return evaluation


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    out = run(flags.FLAGS).folder
    print((out / results.TABLE).read_text())
    print(f"wrote {results.FILE}, {results.SCORES}, {results.TABLE} and {results.PAGE} in {out}")


def define_flags() -> None:  # not at import: other commands have flags of the same names
    sample.define_flags()
    flags.DEFINE_string("images", None, "Folder of images in the prompts' order, or .json of prompt to file, in place "
                        "of --checkpoint.")
    flags.DEFINE_string("prompts", None, f"One of {', '.join(prompt_sets.PROMPT_SETS)}, or a file.", required=True)
    flags.DEFINE_string("prompts_file", None, "Path or URL of a named set's published file.")
    flags.DEFINE_integer("num_prompts", None, "The first so many; all if not given.", lower_bound=1)
    flags.DEFINE_integer("samples", 1, "Images of each prompt.", lower_bound=1)
    flags.DEFINE_list("metrics", ["pickscore", "saturation", "contrast"],
                      f"Some of {', '.join((*scoring.PER_IMAGE, *scoring.ON_SETS))}.")
    flags.DEFINE_multi_string("weights", [], "METRIC=FOLDER, where they are not the run's or the published ones.")
    flags.DEFINE_string("tokenizer", None, "Folder or Hub name of CLIP's tokenizer, for the metrics.")
    flags.DEFINE_string("features", "clipscore", "Metric whose CLIP gives the features of diversity and frechet.")
    flags.DEFINE_string("reference", None, "Folder of real images, or .npz of their statistics, of frechet and FID.")
    flags.DEFINE_list("trained_on", [], "Rewards that the generator was trained on, where its run does not say so.")
    flags.DEFINE_string("name", None, "Of the generator, in table and page.")
    flags.DEFINE_string("baseline", None, "--out of an earlier evaluation to compare with.")
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_integer("batch_size", 16, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("max_prompts", 200, "Whose images the page shows.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(flags.FLAGS))
