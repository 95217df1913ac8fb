# SPDX-License-Identifier: Apache-2.0
"""What a run does to its generator, on held-out prompts: the same scores as `evaluate` gives.

Rewards, diversity, saturation and, on the shapes world, attributes and its taste, on the same noise
before and after.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from di_star_jax import drawing, log, pictures
from di_star_jax.evaluation.measures import attributes_right, diversity, liked, saturation
from di_star_jax.prompts.files import Prompt
from di_star_jax.storage import files

PICTURED = 12  # prompts in samples.png
FEW = 2  # images of each prompt that are scored in the course of a run
BEFORE = "before"  # scores of the initial generator in before.json, its pictures in before.npy
TEACHER = "teacher"  # the same of the teacher, in a folder of its own
AFTER = "before_after.json"  # scores of all of them and of the trained generator
# Between which shares of the initial generator's they stay while a reward is not gamed: with ten
# times the reward, or no regulariser, runs of the shapes world leave them (docs/ablation.md).
SIGNALS = {
    "saturation": (0.95, 1.15),
    "diversity": (0.7, math.inf),
    "attributes right": (0.97, math.inf),
}
TASTE = "warm light from above"  # of the shapes world, in its own units
NOISE = "by seed, row and sample"  # what makes two generators' scores comparable


class Measured(NamedTuple):
    """What `HeldOut.measure` finds.

    scores: by name, of all prompts. first: of the first batch alone, FEW images of each, as in the
    course of a run. images: [PICTURED, H, W, 3] of the first prompts. seconds: of a usual batch; 0
    where only one was drawn, for the first may wait for the compiler, as may the first scores.
    """

    scores: dict[str, float]
    first: dict[str, float]
    images: np.ndarray
    seconds: float


class Kept(NamedTuple):
    """What `keep` has written: scores and first as of `Measured`, and the images, uint8."""

    scores: dict[str, float]
    first: dict[str, float]
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Prompts, and what draws and scores them.

    draw: (the generator's parameters, token ids [B, L], noise) -> drawing.Scored.
    sampling: of the generator. token_ids: of the prompts, [N, L] each.
    samples: images of each prompt. batch_size: prompts drawn at a time. seed: of the noise.
    reads_attributes: whether the oracle of the shapes world reads them back from the pixels, and
      how much that world's taste likes the light.
    teacher: its scores and pictures on the same prompts, where they are known.
    """

    draw: Callable[[Any, dict, np.ndarray], drawing.Scored]
    sampling: drawing.Sampling
    prompts: list[Prompt]
    token_ids: dict[str, Any]
    samples: int
    batch_size: int
    seed: int
    reads_attributes: bool
    teacher: Kept | None = None

    @property
    def batches(self) -> int:
        """That `measure` draws."""
        return self.samples * -(-len(self.prompts) // self.batch_size)

    def first(self) -> "HeldOut":
        """The first batch of prompts alone, with FEW images of each."""
        ids = jax.tree.map(lambda ids: ids[: self.batch_size], self.token_ids)
        return dataclasses.replace(
            self, prompts=self.prompts[: self.batch_size], token_ids=ids, samples=FEW
        )

    def measure(self, generator: Any, what: str = "") -> Measured:
        """Draws and scores. Args: what is scored, for the lines of progress; "" for none."""
        starts = range(0, len(self.prompts), self.batch_size)
        pictured = []
        parts = []
        first = {}
        with contextlib.ExitStack() as stack:
            progress = None
            if what:
                total = len(self.prompts) * self.samples
                progress = stack.enter_context(log.Progress(total, 0, f"{what}: image"))
            began = time.monotonic()
            timed = []
            for start in starts:
                drawn = []
                prompts = self.prompts[start : start + self.batch_size]
                for k in range(self.samples):
                    drawn.append(self._batch(generator, start, k))
                    timed.append(time.monotonic() - began)
                    began = time.monotonic()
                    if progress is not None:
                        done = start * self.samples + len(prompts) * (k + 1)
                        progress.update(done, "")
                parts.append(self._scores(prompts, drawn))
                if start == 0:
                    first = self._scores(prompts, drawn[:FEW])
                pictured.append(drawn[0].images)
        values = jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
        images = np.concatenate(pictured)[:PICTURED]
        seconds = statistics.median(timed[1:]) if len(timed) > 1 else 0.0
        return Measured(_means(values), _means(first), images, seconds)

    def _batch(
        self,
        generator: Any,
        start: int,
        sample: int,
    ) -> drawing.Scored:
        """One image of each prompt from `start` on; the last batch wraps, for one shape."""
        count = len(self.prompts)
        taken = np.arange(start, start + self.batch_size) % count
        ids = jax.tree.map(lambda ids: ids[taken], self.token_ids)
        rows = [self.prompts[i].row for i in taken]
        z = drawing.noise(self.seed, rows, [sample] * len(rows), self.sampling)
        drawn = jax.device_get(self.draw(generator, ids, z))
        return jax.tree.map(lambda x: x[: count - start], drawn)

    def _scores(self, prompts: list[Prompt], drawn: list[drawing.Scored]) -> dict:
        """Numbers [B, samples], or [B] of all samples together. Args: drawn, a batch by sample."""
        stack = functools.partial(np.stack, axis=1)
        rewards = jax.tree.map(lambda *samples: stack(samples), *[one.rewards for one in drawn])
        features = jax.tree.map(lambda *samples: stack(samples), *[one.features for one in drawn])
        others = {}
        for each in list(features.values())[:1]:  # of the first reward that is a CLIP
            others["diversity"] = np.array([diversity(row) for row in each])
        others["saturation"] = stack([saturation(one.images) for one in drawn])
        if self.reads_attributes:
            captions = [prompt.text for prompt in prompts]
            as_files = [pictures.to_uint8(one.images) for one in drawn]
            others["attributes right"] = stack([attributes_right(captions, im) for im in as_files])
            others[TASTE] = stack([liked(images) for images in as_files])
        return {"rewards": rewards, "others": others}


def settings_of(
    prompts: list[Prompt],
    samples: int,
    seed: int,
    **others: Any,
) -> dict[str, Any]:
    """What two scores must share to be compared. Args: others, such as metrics and times."""
    return {"noise": NOISE, "prompts": _digest(prompts), "samples": samples, "seed": seed} | others


def of_teacher(prompts: list[Prompt], rewards: dict[str, str]) -> dict[str, Any]:
    """What a teacher's scores depend on. Args: rewards, digests of their weights by name."""
    return {"prompts": _digest(prompts), "rewards": rewards}


def _digest(prompts: list[Prompt]) -> str:
    texts = json.dumps([[prompt.row, prompt.text] for prompt in prompts])
    return hashlib.sha256(texts.encode()).hexdigest()


def keep(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    measured: Measured,
) -> None:
    """Writes what `compare` needs of a generator or teacher. Args: name, BEFORE or TEACHER."""
    np.save(folder / f"{name}.npy", pictures.to_uint8(measured.images))
    content = {"settings": settings, "scores": measured.scores, "first": measured.first}
    files.write_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")


def kept(
    folder: Path,
    name: str,
    settings: dict[str, Any],
) -> Kept | None:
    """What `keep` wrote, if it is there and comparable with scores of these `settings`."""
    try:
        content = files.read_json(folder / f"{name}.json")
        found = Kept(content["scores"], content["first"], np.load(folder / f"{name}.npy"))
    except (OSError, ValueError, EOFError, KeyError):  # KeyError: an older version's
        return None
    of_kept = content["settings"]
    return found if {key: of_kept.get(key) for key in settings} == settings else None


def gone_astray(now: dict[str, float], initial: dict[str, float]) -> list[str]:
    """Which SIGNALS have left their band, in words: what shows that a reward is gamed.

    Args: scores of the same few images, of a generator and of the initial one.
    """
    told = []
    for name, (lowest, highest) in SIGNALS.items():
        if name not in now or not initial.get(name):
            continue
        share = now[name] / initial[name]
        if not lowest <= share <= highest:
            told.append(f"{name} {now[name]:.4f}, {share:.2f} of the initial {initial[name]:.4f}")
    return told


def compare(
    folder: Path,
    prompts: list[Prompt],
    before: Kept,
    after: Measured,
    teacher: Kept | None,
) -> None:
    """Writes `samples.png` and `before_after.json`."""
    images = {"before": before.images, "after": pictures.to_uint8(after.images)}
    scores = {"before": before.scores, "after": after.scores}
    if teacher is not None:
        images["teacher"] = teacher.images
        scores["teacher"] = teacher.scores
    texts = [prompt.text for prompt in prompts[:PICTURED]]
    pictures.save_png(folder / "samples.png", pictures.compared_grid(images, texts))
    files.write_text(folder / AFTER, json.dumps(scores, indent=1))


def table(folder: Path) -> str:
    """What `compare` has written, as text."""
    rows, rises = _compared(folder)
    shown = f"pictures of the same noise before and after: {folder / 'samples.png'}"
    return "\n".join([rows, *rises, shown])


def for_card(folder: Path) -> str:
    """What `compare` has written, for a model card; "" where it has not."""
    if not (folder / AFTER).is_file():
        return ""
    rows, rises = _compared(folder)
    head = "Means over held-out prompts, before and after the training, on the same noise:"
    return "\n\n".join([head, rows, *(f"{each[0].upper()}{each[1:]}." for each in rises)])


def _compared(folder: Path) -> tuple[str, list[str]]:
    """A table, and sentences without their stops."""
    scores = files.read_json(folder / AFTER)
    before, after, teacher = scores["before"], scores["after"], scores.get("teacher")
    rows = []
    rises = []
    for name, value in after.items():
        change = value - before[name]
        row = [name, f"{before[name]:.4f}", f"{value:.4f}", f"{change:+.4f}"]
        if teacher:
            row.append(f"{teacher[name]:.4f}")
        rows.append(row)
        spread = before.get(f"{name}, std")
        if spread:
            rises.append(
                f"{name} rose by {change / spread:+.2f} standard deviations of the initial ones"
            )
    head = ["", "before", "after", "change"] + ["teacher"] * bool(teacher)
    return log.markdown_table(head, rows), rises


def _means(values: dict) -> dict[str, float]:
    """Means by name, and of rewards the standard deviation too. Args: as of `HeldOut._scores`."""
    scores = {}
    for name, each in values["rewards"].items():
        scores[name] = float(each.mean())
        scores[f"{name}, std"] = float(each.std())
    for name, each in values["others"].items():
        scores[name] = float(each.mean())
    return scores
