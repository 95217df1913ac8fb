# SPDX-License-Identifier: Apache-2.0
"""What a run does to its generator, on held-out prompts: the same scores as `evaluate` gives.

Rewards, diversity and, on the shapes world, attributes, on the same noise before and after.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from di_star_jax import drawing, log, pictures
from di_star_jax.evaluation.measures import attributes_right, diversity
from di_star_jax.prompts.files import Prompt

PICTURED = 16  # prompts in samples.png
BEFORE = "before.json"  # scores of the initial generator, beside its pictures in before.npy
NOISE = "by seed, row and sample"  # what makes two generators' scores comparable


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

    def first(self, count: int, samples: int) -> "HeldOut":
        """The first prompts alone, with so many images of each."""
        ids = jax.tree.map(lambda ids: ids[:count], self.token_ids)
        return dataclasses.replace(
            self, prompts=self.prompts[:count], token_ids=ids, samples=samples
        )

    def measure(self, generator: Any) -> tuple[dict[str, float], np.ndarray]:
        """Scores, and the images [PICTURED, H, W, 3] of the first prompts."""
        pictured = []
        parts = []
        for start in range(0, len(self.prompts), self.batch_size):
            drawn = [self._batch(generator, start, k) for k in range(self.samples)]
            parts.append(self._scores(self.prompts[start : start + self.batch_size], drawn))
            pictured.append(drawn[0].images)
        values = jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
        scores = {}
        for name, each in values["rewards"].items():
            scores[name] = float(each.mean())
            scores[f"{name}, std"] = float(each.std())
        for name, each in values["others"].items():
            scores[name] = float(each.mean())
        return scores, np.concatenate(pictured)[:PICTURED]

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


def keep_before(
    folder: Path,
    scores: dict[str, float],
    images: np.ndarray,
) -> None:
    """Writes what `compare` needs of the generator before training, for a resumed run."""
    np.save(folder / "before.npy", images)
    (folder / BEFORE).write_text(json.dumps({"noise": NOISE, "scores": scores}), encoding="utf-8")


def compare(
    folder: Path,
    prompts: list[Prompt],
    after: dict[str, float],
    images: np.ndarray,
) -> str:
    """Writes `samples.png` and `before_after.json`. Returns: the table as text."""
    kept = (
        json.loads((folder / BEFORE).read_text(encoding="utf-8"))
        if (folder / BEFORE).exists()
        else {}
    )
    if kept.get("noise") != NOISE:
        return (
            "no table of before and after: this run began without eval.prompts, or with an older "
            "version, which drew with other noise"
        )
    before = kept["scores"]
    texts = [prompt.text for prompt in prompts[:PICTURED]]
    grid = pictures.before_after_grid(np.load(folder / "before.npy"), images, texts)
    pictures.save_png(folder / "samples.png", grid)
    both = {"before": before, "after": after}
    (folder / "before_after.json").write_text(json.dumps(both, indent=1), encoding="utf-8")
    rows = []
    rises = []
    for name, value in after.items():
        if name not in before:  # measured since the run was resumed
            continue
        change = value - before[name]
        rows.append([name, f"{before[name]:.4f}", f"{value:.4f}", f"{change:+.4f}"])
        spread = before.get(f"{name}, std")
        if spread is not None:
            rises.append(
                f"{name} rose by {change / spread:+.2f} standard deviations of the initial ones"
            )
    table = log.markdown_table(["", "before", "after", "change"], rows)
    shown = f"pictures of the same noise before and after: {folder / 'samples.png'}"
    return "\n".join([table, *rises, shown])
