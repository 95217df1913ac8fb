# SPDX-License-Identifier: Apache-2.0
"""Numbers of an evaluation: Frechet distance, means over prompts, paired runs, colour, diversity.

NumPy in float64. P prompts with K images each; values are [P, K], or [P] for one image a prompt. A
value NaN is an image that is broken or was not scored: it is left out and counted.
"""

import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from di_star_jax.errors import UserError

_CHUNK = 2**21  # prompts drawn at a time by the bootstrap: some 50 MB


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64: the two moments of a
    Frechet distance.

    Args: features: text that names the extractor and its preprocessing; only statistics of the same
      text are compared.

    Attributes:
      count: rows seen; None where a file does not tell. left_out: rows with a NaN or infinity,
        which are not in.
      mean: float64 [D]. cov: float64 [D, D], divided by count - 1.
    """

    def __init__(self, features: str):
        self.features, self.count, self.left_out = features, 0, 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros(
            (0, 0)
        )  # sum of outer products about the mean; the covariance where count is None

    @property
    def cov(self) -> np.ndarray:
        """Raises: UserError for fewer than two rows."""
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise UserError(
                f"statistics of {self.count} images, expected 2 or more; give more readable images"
            )
        return self._scatter / (self.count - 1)

    def update(self, batch: np.ndarray) -> None:
        """Args: batch [N, D], any float.

        Raises: UserError for another D, or statistics without a count.
        """
        readable = np.isfinite(batch).all(axis=1)
        x = batch[readable].astype(np.float64)
        new = FeatureStatistics(self.features)
        new.left_out = int((~readable).sum())
        if len(x):
            new.count, new.mean = len(x), x.mean(axis=0)
            new._scatter = (x - new.mean).T @ (x - new.mean)
        self.merge(new)

    def merge(self, other: "FeatureStatistics") -> None:
        """Takes in what `other` has seen.

        Source: Chan, Golub and LeVeque 1979, the pairwise update.

        Raises: UserError for other features, another D, or statistics without a count.
        """
        _check_same(self, other)
        if self.count is None or other.count is None:
            raise UserError(
                "statistics from a file with mu and sigma alone cannot grow, for their number of images is "
                "not known; compute them anew from the images"
            )
        self.left_out += other.left_out
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self._scatter = other.count, other.mean, other._scatter
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self._scatter = (
            self._scatter
            + other._scatter
            + np.outer(delta, delta) * (self.count * other.count / total)
        )
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz with mu and sigma, as pytorch-fid reads it, and count, left_out and
        features.
        """
        if self.count is None:
            raise UserError(
                f"statistics without a count are not written to {path}; use the file they came from"
            )
        with open(path, "wb") as file:
            np.savez(
                file,
                mu=self.mean,
                sigma=self.cov,
                count=self.count,
                left_out=self.left_out,
                features=self.features,
            )

    @classmethod
    def load(cls, path: str | os.PathLike, features: str) -> "FeatureStatistics":
        """Statistics from `save`, or from pytorch-fid: mu [D] and sigma [D, D], whose count is not
        known.

        Args: path; features: what they must be of. A file that does not name its features is taken
          at the caller's word.
        Raises: UserError for a file that is not one, or of other features.
        """
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
        except (
            OSError,
            ValueError,
            AttributeError,
            TypeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is not readable as .npz ({reason}); give a file of feature statistics"
            ) from None
        mu, sigma = held.get("mu", np.zeros(0)), held.get("sigma", np.zeros(0))
        numbers = mu.dtype.kind == "f" and sigma.dtype.kind == "f"
        if not numbers or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
            raise UserError(
                f"{path} holds {', '.join(f'{k} {list(v.shape)}' for k, v in held.items()) or 'nothing'}, "
                "expected mu [D] and sigma [D, D] of floats; give a file of feature statistics"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(
                f"{path} holds NaN or infinite statistics, expected finite ones; compute them anew"
            )
        found = cls(str(held.get("features", features)))
        if found.features != features:
            raise UserError(
                f"{path} is of {found.features!r}, expected {features!r}; compute the statistics with the "
                "same extractor"
            )
        found.count = int(held["count"]) if "count" in held else None
        found.left_out = int(held.get("left_out", 0))
        found.mean = mu.astype(np.float64)
        found._scatter = sigma.astype(np.float64) * (1 if found.count is None else found.count - 1)
        return found


def _check_same(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.features != b.features:
        raise UserError(
            f"statistics of {a.features!r} and of {b.features!r}, expected the same features; "
            "compute both with one extractor"
        )
    if a.count != 0 and b.count != 0 and len(a.mean) != len(b.mean):
        raise UserError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions, expected as many; "
            "compute both with one extractor"
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared as FID is, in float64; never
    below 0.

    With fewer images than several times D the covariances are too small in some directions, and the
    distance is biased
    upwards: compare only numbers of equally many images.

    Raises: UserError for statistics of other features, or of fewer than two images.
    Source: Heusel et al. 2017, Eq. 6; the trace of the root from the symmetric C_a^(1/2) C_b
    C_a^(1/2), which has the eigenvalues of C_a C_b.
    """
    cov_a, cov_b = a.cov, b.cov
    _check_same(a, b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0.0)).sum()
    return max(
        float(((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross), 0.0
    )


class Summary(NamedTuple):
    """A mean over prompts; NaN where there is none."""

    mean: float
    stderr: float  # of the mean, over prompts; NaN for one prompt
    prompts: int  # with at least one readable image
    images: int  # readable
    left_out: int  # images


def _by_prompt(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean over the readable images of each prompt, NaN where none is; their number), [P] each."""
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    readable = ~np.isnan(values)
    number = readable.sum(axis=1)
    sums = np.where(readable, values, 0.0).sum(axis=1)
    return np.divide(sums, number, out=np.full(len(values), np.nan), where=number > 0), number


def summary(values: np.ndarray) -> Summary:
    """Mean over prompts of the mean over their images.

    Args: values [P, K] or [P], NaN where left out.

    The standard error is that of P independent means, for the images of one prompt are not
    independent of each other.
    """
    means, number = _by_prompt(values)
    used = means[number > 0]
    mean = float(used.mean()) if len(used) else np.nan
    stderr = float(used.std(ddof=1) / np.sqrt(len(used))) if len(used) > 1 else np.nan
    return Summary(mean, stderr, len(used), int(number.sum()), int(np.size(values) - number.sum()))


def by_group(values: np.ndarray, groups: Sequence[str]) -> dict[str, Summary]:
    """The summary of each category, in order of appearance.

    Args: values [P, K] or [P]; groups: P names, such as the styles of HPSv2.
    Raises: UserError where they are not equally many.
    """
    values, names = np.asarray(values), np.array(groups, dtype=object)
    if len(values) != len(names):
        raise UserError(
            f"{len(values)} prompts and {len(names)} categories, expected one for each; give both lists "
            "in the same order"
        )
    return {name: summary(values[names == name]) for name in dict.fromkeys(groups)}


class Paired(NamedTuple):
    """Run a against run b; low and high bound a 95 % interval, NaN for fewer than two prompts."""

    difference: float  # mean over prompts of a - b
    low: float
    high: float
    win_rate: float  # share of prompts on which a is better; a tie is half of one
    win_low: float
    win_high: float
    prompts: int  # with at least one readable pair
    pairs: int  # of images, both readable
    left_out: int  # pairs


def paired(a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Paired:
    """Compares two runs on the same prompts and noise; a pair counts where both its images are
    readable.

    Args:
      a, b: [P, K] or [P], higher is better; entry by entry of the same prompt and noise.
      seed, resamples: of the bootstrap, which draws prompts.
    Returns: differences, win rate, and the percentile intervals of both.
    Raises: UserError for different shapes. Source: Efron and Tibshirani 1993, chapter 13.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(
            f"scores of shapes {list(a.shape)} and {list(b.shape)}, expected the same; "
            "score both runs on the same prompts and seeds"
        )
    means, number = _by_prompt(a - b)
    difference = means[number > 0]
    wins = (np.sign(difference) + 1.0) / 2.0
    counts = (len(difference), int(number.sum()), int(a.size - number.sum()))
    if not len(difference):
        return Paired(*[np.nan] * 6, *counts)
    low, high = _bootstrap(np.stack([difference, wins]), seed, resamples)
    return Paired(
        float(difference.mean()), low[0], high[0], float(wins.mean()), low[1], high[1], *counts
    )


def _bootstrap(values: np.ndarray, seed: int, resamples: int) -> tuple[list[float], list[float]]:
    """95 % percentile intervals of the means of [V, P], the same prompts drawn for all: ([V] low,
    [V] high).
    """
    prompts = values.shape[1]
    if prompts < 2:
        return [np.nan] * len(values), [np.nan] * len(values)
    rng = np.random.default_rng(seed)
    rows = max(_CHUNK // prompts, 1)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, prompts, (min(rows, resamples - start), prompts), np.int32)
        means.append([value[drawn].mean(axis=1) for value in values])
    low, high = np.percentile(np.concatenate(means, axis=1), [2.5, 97.5], axis=1)
    return low.tolist(), high.tolist()


def _unit(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], clipped as a saved picture is, and which of them are readable [B]."""
    readable = np.isfinite(images).all(axis=(1, 2, 3))
    images = np.where(readable[:, None, None, None], images, 0.0)
    return (np.clip(images.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0, readable


def saturation(images: np.ndarray) -> np.ndarray:
    """Mean over pixels of HSV's saturation (max - min) / max of R, G, B; 0 for black.

    It is 0 for gray, 1 for red.

    Args: images float [B, H, W, 3] in [-1, 1], sRGB as it is. Returns: float64 [B] in [0, 1], NaN
      for a broken image.
    Source: Smith 1978, the hexcone model.
    """
    rgb, readable = _unit(images)
    top = rgb.max(axis=-1)
    saturation = np.divide(
        top - rgb.min(axis=-1), top, out=np.zeros_like(top), where=top > 0
    )  # [B, H, W]
    return np.where(readable, saturation.mean(axis=(1, 2)), np.nan)


def contrast(images: np.ndarray) -> np.ndarray:
    """RMS contrast: standard deviation over pixels of Rec. 709's luma 0.2126 R + 0.7152 G + 0.0722
    B in [0, 1].

    Args: images float [B, H, W, 3] in [-1, 1], sRGB as it is. Returns: float64 [B] in [0, 0.5], NaN
      for a broken image.
    Source: Peli 1990, the RMS definition; ITU-R BT.709, item 3.2.
    """
    rgb, readable = _unit(images)
    luma = rgb @ np.array([0.2126, 0.7152, 0.0722])  # [B, H, W]
    return np.where(readable, luma.std(axis=(1, 2)), np.nan)


def diversity(features: np.ndarray) -> float:
    """Mean over pairs of 1 - cosine, between the images of one prompt: 0 where all are alike.

    Args: features [K, D] of K samples, of any length; a row with a NaN, or of zeros, is left out.
    Returns: NaN for fewer than two readable rows. derived: the sum over pairs is (|sum of u|^2 - K)
      / 2.
    """
    features = np.asarray(features, np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    readable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
    u = features[readable] / norms[readable]
    if len(u) < 2:
        return np.nan
    return float(1.0 - ((u.sum(axis=0) ** 2).sum() - len(u)) / (len(u) * (len(u) - 1)))
