# SPDX-License-Identifier: Apache-2.0
"""What a run does to its generator, on held-out prompts: the same scores as `evaluate` gives.

Rewards, diversity and, on the shapes world, attributes, on the same noise before and after.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from di_star_jax import drawing, log, pictures
from di_star_jax.evaluation.measures import attributes_right, diversity
from di_star_jax.prompts.files import Prompt
from di_star_jax.storage import files

PICTURED = 16  # prompts in samples.png
FEW = 2  # images of each prompt that are scored in the course of a run
BEFORE = "before.json"  # scores of the initial generator, beside its pictures in before.npy
AFTER = "before_after.json"  # those and the trained one's
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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Prompts, and what draws and scores them.

    draw: (the generator's parameters, token ids [B, L], noise) -> drawing.Scored.
    sampling: of the generator. token_ids: of the prompts, [N, L] each.
    samples: images of each prompt. batch_size: prompts drawn at a time. seed: of the noise.
    reads_attributes: whether the oracle of the shapes world reads them back from the pixels.
    """

    draw: Callable[[Any, dict, np.ndarray], drawing.Scored]
    sampling: drawing.Sampling
    prompts: list[Prompt]
    token_ids: dict[str, Any]
    samples: int
    batch_size: int
    seed: int
    reads_attributes: bool

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
        if self.reads_attributes:
            captions = [prompt.text for prompt in prompts]
            shares = [attributes_right(captions, pictures.to_uint8(one.images)) for one in drawn]
            others["attributes right"] = stack(shares)
        return {"rewards": rewards, "others": others}


def settings_of(
    prompts: list[Prompt],
    samples: int,
    seed: int,
    **others: Any,
) -> dict[str, Any]:
    """What two scores must share to be compared. Args: others, such as metrics and times."""
    texts = json.dumps([[prompt.row, prompt.text] for prompt in prompts])
    digest = hashlib.sha256(texts.encode()).hexdigest()
    return {"noise": NOISE, "prompts": digest, "samples": samples, "seed": seed} | others


def keep_before(
    folder: Path,
    settings: dict[str, Any],
    measured: Measured,
) -> None:
    """Writes what `compare` needs of the generator before training, for a resumed run."""
    np.save(folder / "before.npy", measured.images)
    content = {"settings": settings, "scores": measured.scores}
    files.write_text(folder / BEFORE, json.dumps(content))


def has_before(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the initial generator's scores are there, comparable with those of `settings`."""
    try:
        kept = files.read_json(folder / BEFORE)
        np.load(folder / "before.npy")
    except (OSError, ValueError, EOFError):
        return False
    return kept.get("settings") == settings


def compare(
    folder: Path,
    prompts: list[Prompt],
    after: Measured,
) -> None:
    """Writes `samples.png` and `before_after.json`."""
    before = files.read_json(folder / BEFORE)["scores"]
    texts = [prompt.text for prompt in prompts[:PICTURED]]
    grid = pictures.before_after_grid(np.load(folder / "before.npy"), after.images, texts)
    pictures.save_png(folder / "samples.png", grid)
    both = {"before": before, "after": after.scores}
    files.write_text(folder / AFTER, json.dumps(both, indent=1))


def table(folder: Path) -> str:
    """What `compare` has written, as text."""
    both = files.read_json(folder / AFTER)
    before, after = both["before"], both["after"]
    rows = []
    rises = []
    for name, value in after.items():
        change = value - before[name]
        rows.append([name, f"{before[name]:.4f}", f"{value:.4f}", f"{change:+.4f}"])
        spread = before.get(f"{name}, std")
        if spread:
            rises.append(
                f"{name} rose by {change / spread:+.2f} standard deviations of the initial ones"
            )
    shown = f"pictures of the same noise before and after: {folder / 'samples.png'}"
    return "\n".join([log.markdown_table(["", "before", "after", "change"], rows), *rises, shown])


def _means(values: dict) -> dict[str, float]:
    """Means by name, and of rewards the standard deviation too. Args: as of `HeldOut._scores`."""
    scores = {}
    for name, each in values["rewards"].items():
        scores[name] = float(each.mean())
        scores[f"{name}, std"] = float(each.std())
    for name, each in values["others"].items():
        scores[name] = float(each.mean())
    return scores
