# SPDX-License-Identifier: Apache-2.0
"""What a run does to its generator: reward, diversity and, on the shapes world, attributes on
held-out prompts.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from di_star_jax.log import before_after_table
from di_star_jax.pictures import before_after_grid, save_png
from di_star_jax.shapes import oracle, scenes

PICTURED = 16  # prompts in samples.png

# (token_ids of [B, L], key) -> (images float32 [B, H, W, 3] in [-1, 1], rewards [B] by name)
DrawFn = Callable[[dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def pairwise_distance(images: np.ndarray) -> float:
    """Mean root-mean-square pixel distance over all pairs.

    Args: images [K, H, W, 3] in [-1, 1], K >= 2.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    i, j = np.triu_indices(len(flat), 1)
    return float(np.sqrt(((flat[i] - flat[j]) ** 2).mean(axis=1)).mean())


def measure(
    draw: DrawFn,
    prompts: list[str],
    token_ids: dict[str, np.ndarray],
    *,
    samples_per_prompt: int,
    batch_size: int,
    read_back: str,
) -> tuple[dict[str, float], np.ndarray]:
    """Scores one generator; the same noise for the same prompts, whatever the generator.

    Args:
      draw: makes and rewards a batch.
      prompts: held-out prompts. token_ids: theirs, [N, L] each.
      samples_per_prompt: images of each prompt, for the diversity; at least 2.
      batch_size: prompts drawn at a time.
      read_back: "shapes" reads attributes back from the pixels; "" does not.
    Returns:
      (scores, images [PICTURED, H, W, 3] of the first prompts).
    """
    rewards, distances, attributes, pictured = [], [], [], []
    for start in range(0, len(prompts), batch_size):
        rows = np.arange(start, start + batch_size) % len(
            prompts
        )  # the last batch wraps: one shape, one compile
        used = min(batch_size, len(prompts) - start)
        ids = jax.tree.map(lambda ids: ids[rows], token_ids)
        drawn = [
            jax.device_get(draw(ids, jax.random.fold_in(jax.random.key(start), k)))
            for k in range(samples_per_prompt)
        ]
        images = np.stack([image for image, _ in drawn], axis=1)[:used]  # [used, samples, H, W, 3]
        rewards.append(
            jax.tree.map(
                lambda *scores: np.stack(scores, axis=1)[:used], *(reward for _, reward in drawn)
            )
        )
        distances += [pairwise_distance(samples) for samples in images]
        if read_back == "shapes":
            attributes += [
                oracle.attributes(scenes.parse(prompt), (image + 1.0) / 2.0)
                for prompt, image in zip(prompts[start:], images[:, 0])
            ]
        pictured.append(images[:, 0])
    scores = {}
    for name, values in jax.tree.map(lambda *parts: np.concatenate(parts), *rewards).items():
        scores |= {name: float(values.mean()), f"{name}, std": float(values.std())}
    scores["diversity"] = float(np.mean(distances))
    if attributes:
        right, total = np.sum(attributes, axis=0)
        scores["attributes right"] = float(right / total)
    return scores, np.concatenate(pictured)[:PICTURED]


def keep_before(folder: Path, scores: dict[str, float], images: np.ndarray) -> None:
    """Writes what `compare` needs of the generator before training, so that a resumed run has it."""
    np.save(folder / "before.npy", images)
    (folder / "before.json").write_text(json.dumps(scores))


def compare(
    folder: Path,
    prompts: list[str],
    after: dict[str, float],
    images: np.ndarray,
    *,
    rewards: list[str],
) -> str:
    """Writes `samples.png` and `before_after.json`.

    Args: rewards, their names. Returns: the table as text.
    """
    before = json.loads((folder / "before.json").read_text())
    grid = before_after_grid(np.load(folder / "before.npy"), images, prompts[:PICTURED])
    save_png(folder / "samples.png", grid)
    (folder / "before_after.json").write_text(
        json.dumps({"before": before, "after": after}, indent=1)
    )
    rows = [(name, before[name], after[name]) for name in after]
    rises = [
        f"\n{name} rose by {(after[name] - before[name]) / before[f'{name}, std']:+.2f} standard deviations of the "
        "initial ones"
        for name in rewards
    ]
    return before_after_table(rows) + "".join(rises)
