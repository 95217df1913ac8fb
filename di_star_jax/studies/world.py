# SPDX-License-Identifier: Apache-2.0
"""What all runs of the ablation are measured with: captions, noise, a judge, the teacher."""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from di_star_jax import assembly, drawing, log, samplers, sharding
from di_star_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from di_star_jax.evaluation.measures import diversity, saturation
from di_star_jax.pictures import to_uint8
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import load_pipeline
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import similarity
from di_star_jax.samplers import generator_form
from di_star_jax.shapes import datasets, oracle, pretrain, scenes
from di_star_jax.shapes.taste import taste
from di_star_jax.storage import files

MEASURES = (
    "reward",
    "taste",
    "attributes",
    "prompt score",
    "Frechet distance",
    "saturation",
    "diversity",
)
CURVE_CAPTIONS = 100  # of a point of the curve, the first ones
PER_CAPTION = 2
BATCH = 50
TEACHER_STEPS = 50
JUDGE_IMAGES = 20_000


class Judge:
    """A CLIP that no row trains on: its prompt score, and features for distance and diversity."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: dict,
        tokenizer: pathlib.Path,
    ):
        """Trains it, if `workdir` does not have it yet.

        Args: config of the reward's shape; tokenizer folder.
        """
        images, captions = datasets.render_dataset(workdir / "data", JUDGE_IMAGES)
        self._tokenizer = Tokenizer(tokenizer)
        self._graphdef, self._params = pretrain.train_clip(
            workdir / "judge", pretrain.CLIP, images, self._tokenizer(captions), config, seed=30
        )
        self._image = jax.jit(functools.partial(similarity.image_embeddings, self._graphdef))
        self._text = jax.jit(functools.partial(similarity.text_embeddings, self._graphdef))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors [N, 64] of images [N, 64, 64, 3] in [-1, 1]."""
        starts = range(0, len(images), BATCH)
        return np.concatenate([self._image(self._params, images[i : i + BATCH]) for i in starts])

    def texts(self, captions: list[str]) -> np.ndarray:
        """Unit vectors [N, 64]."""
        return np.asarray(self._text(self._params, self._tokenizer(captions)))


class Drawn(NamedTuple):
    """Pictures of the first captions: images [N, PER_CAPTION, H, W, 3] in [-1, 1], their rewards.

    rewards: [N, PER_CAPTION].
    """

    images: np.ndarray
    rewards: np.ndarray

    def first(self, count: int) -> "Drawn":
        """Those of fewer captions."""
        return Drawn(self.images[:count], self.rewards[:count])


def statistics(features: np.ndarray) -> FeatureStatistics:
    """Args: the judge's features [N, 64]."""
    found = FeatureStatistics("the judge of the ablation")
    found.update(features)
    return found


class World:
    """Frozen networks, held-out captions, judge and the teacher's pictures."""

    def __init__(self, workdir: pathlib.Path, config):
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
        self.parts = assembly.load_parts(config, self.mesh)
        self.captions = captions_of(config)
        reward_file = pathlib.Path(config.weights.pickscore, "config.json")
        reward_config = reward_file.read_text(encoding="utf-8")
        tokenizer = pathlib.Path(config.weights.reward_tokenizer)
        self.judge = Judge(workdir, json.loads(reward_config), tokenizer)
        self._texts = self.judge.texts(self.captions)
        self._ids = self.parts.tokenize(self.captions)
        family = self.parts.pipeline.family
        form = generator_form(config.generator, family.one_step)
        shape = self.parts.latent_shape(config.data.resolution)
        self._sampling = drawing.few_step(form, shape)
        drawer = drawing.Drawer(self.parts.pipeline, self._sampling)
        self._draw = drawing.make_scored_draw(drawer, self.parts.rewards, self.mesh)
        self.teacher = self._teacher(workdir / "teacher.npz", config.objective.omega)
        self._teacher_statistics = statistics(self.judge.features(_flat(self.teacher.images)))

    def _teacher(self, file: pathlib.Path, omega: float) -> Drawn:
        """The teacher's pictures of the held-out captions in guided steps, made once."""
        if not file.exists():
            times = samplers.leading_timesteps(TEACHER_STEPS)
            sampling = drawing.Sampling("euler", times, omega, self._sampling.latent_shape)
            loaded = load_pipeline(self.parts.pipeline.folder)
            drawer = drawing.Drawer(loaded, sampling)
            draw = drawing.make_scored_draw(drawer, self.parts.rewards, self.mesh)
            frozen = self.parts.frozen() | {DENOISER: loaded.models[DENOISER].params}
            count = len(self.captions)
            with log.Progress(count * PER_CAPTION, 0, "teacher: picture") as progress:
                drawn = self._drawn(
                    draw, frozen, sampling, count, lambda done: progress.update(done, "")
                )
            with files.whole(file) as partial, partial.open("wb") as opened:
                np.savez(opened, images=to_uint8(drawn.images), rewards=drawn.rewards)
        with np.load(file) as kept:
            return Drawn(datasets.to_image(kept["images"]), kept["rewards"])

    def pictures(self, params, count: int) -> Drawn:
        """A generator's, of the first captions; the noise is fixed."""
        frozen = self.parts.frozen() | {DENOISER: params}
        return self._drawn(self._draw, frozen, self._sampling, count)

    def _drawn(
        self,
        draw: Callable,
        params: dict,
        sampling: drawing.Sampling,
        count: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Drawn:
        """Args: count, of captions; progress, is told how many pictures are done."""
        images, rewards, done = [], [], 0
        for start, k in itertools.product(range(0, count, BATCH), range(PER_CAPTION)):
            ids = {name: v[start : min(start + BATCH, count)] for name, v in self._ids.items()}
            shape = list(sampling.noise_shape)
            shape.insert(sampling.noise_axis, min(BATCH, count - start))
            key = jax.random.fold_in(jax.random.key(start), k)
            drawn = jax.device_get(draw(params, ids, jax.random.normal(key, shape)))
            images.append(drawn.images)
            rewards.append(drawn.rewards["pickscore"])
            done += len(drawn.images)
            progress(done)
        return Drawn(_by_caption(images), _by_caption(rewards))

    def measure(self, drawn: Drawn) -> dict[str, float]:
        """All MEASURES of pictures of the first captions."""
        count, flat = len(drawn.images), _flat(drawn.images)
        features = self.judge.features(flat)
        each = features.reshape(count, PER_CAPTION, -1)
        return {
            "reward": float(drawn.rewards.mean()),
            "taste": float(np.mean([taste((image + 1.0) / 2.0) for image in flat])),
            "attributes": attributes_right(self.captions[:count], drawn.images),
            "prompt score": float((each * self._texts[:count, None]).sum(-1).mean()),
            "Frechet distance": frechet_distance(statistics(features), self._teacher_statistics),
            "saturation": float(saturation(flat).mean()),
            "diversity": float(np.mean([diversity(of_caption) for of_caption in each])),
        }


def captions_of(config) -> list[str]:
    """The held-out captions. Raises: UserError for one that the oracle cannot read."""
    captions = pathlib.Path(config.eval.prompts).read_text(encoding="utf-8").splitlines()
    for caption in captions:
        scenes.parse(caption)
    return captions


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[2:])


def _by_caption(drawn: list[np.ndarray]) -> np.ndarray:
    """[captions, PER_CAPTION, ...] of batches [BATCH, ...], PER_CAPTION of each captions."""
    batches = [drawn[i : i + PER_CAPTION] for i in range(0, len(drawn), PER_CAPTION)]
    return np.concatenate([np.stack(batch, axis=1) for batch in batches])


def attributes_right(captions: list[str], images: np.ndarray) -> float:
    """The share of all that the captions state that the pictures show.

    Args: images [N, PER_CAPTION, H, W, 3] in [-1, 1], of N captions.
    """
    counted = [
        oracle.attributes(scenes.parse(caption), (image + 1.0) / 2.0)
        for caption, of_caption in zip(captions, images, strict=True)
        for image in of_caption
    ]
    right, stated = np.sum(counted, axis=0)
    return float(right / stated)


def measured(
    world: World,
    averages: dict[int, Any],
) -> tuple[dict, Drawn]:
    """What a run's generators are worth.

    Args: averages, parameters by the step they are of, rising; the last one is measured in full.
    Returns: {"scores", "curve"} of a result, and the last one's pictures.
    """
    curve = {"step": list(averages)} | {name: [] for name in MEASURES}
    for step, params in averages.items():
        is_last = step == max(averages)
        count = len(world.captions) if is_last else CURVE_CAPTIONS
        drawn = world.pictures(params, min(count, len(world.captions)))
        for name, value in world.measure(drawn.first(CURVE_CAPTIONS)).items():
            curve[name].append(value)
    return {"scores": world.measure(drawn), "curve": curve}, drawn
