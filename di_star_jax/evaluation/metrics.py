# SPDX-License-Identifier: Apache-2.0
"""What can be measured, by name, and how it is printed."""

import dataclasses

from di_star_jax.rewards import REWARDS


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the tables.

    name: key of the scores. label: heading. unit: as printed. digits: after the point.
    higher_is_better: None for what is neither, such as saturation.
    per_image: False for one number a prompt, such as diversity, or a set, such as FID.
    factor: printed numbers are this times the score.
    trained_on: a reward that the evaluated generator was trained on.
    """

    name: str
    label: str
    unit: str
    digits: int
    higher_is_better: bool | None
    per_image: bool = True
    factor: float = 1.0
    trained_on: bool = False


OTHERS = {
    metric.name: metric
    for metric in (
        Metric("oracle", "Attributes right", "share that the oracle reads back", 3, True),
        Metric("saturation", "Saturation", "mean HSV saturation", 3, None),
        Metric("contrast", "Contrast", "RMS of luma", 3, None),
        Metric(
            "diversity",
            "Diversity",
            "mean pairwise cosine distance of a prompt's images",
            4,
            None,
            per_image=False,
        ),
        Metric("frechet", "Frechet distance", "of CLIP features", 4, False, per_image=False),
        Metric("fid", "FID", "clean-fid, Inception", 2, False, per_image=False),
        Metric("clip_fid", "CLIP-FID", "clean-fid, CLIP ViT-B/32", 2, False, per_image=False),
    )
}
BY_FEATURES = ("diversity", "frechet")
BY_CLEAN_FID = ("fid", "clip_fid")
WITH_REFERENCE = ("frechet", *BY_CLEAN_FID)
FEATURES = tuple(name for name, entry in REWARDS.items() if entry.is_clip)


def names() -> tuple[str, ...]:
    """All metrics: the rewards, then others."""
    return (*REWARDS, *OTHERS)


def metric_of(name: str) -> Metric:
    """The metric of a name."""
    if name in OTHERS:
        return OTHERS[name]
    entry = REWARDS[name]
    unit = "as the model gives it" if entry.factor == 1.0 else f"{entry.factor:g} x cosine"
    return Metric(name, entry.title, unit, entry.digits, True, factor=entry.factor)
