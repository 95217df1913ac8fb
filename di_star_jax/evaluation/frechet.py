# SPDX-License-Identifier: Apache-2.0
"""Frechet distance of features, in float64: statistics that come in batches, and files of them."""

import os
import zipfile
import zlib

import numpy as np

from di_star_jax.errors import UserError

_UNREADABLE = (  # what NumPy's reader raises
    OSError,
    ValueError,
    AttributeError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)


class FeatureStatistics:
    """Mean and covariance of features that come in batches: the two moments of the distance.

    Args: features: text that names the extractor and its preprocessing; only statistics of the same
      text are compared.

    Attributes:
      count: rows seen; None where a file does not tell. left_out: rows with a NaN or infinity,
        which are not in.
      mean: float64 [D]. cov: float64 [D, D], divided by count - 1.
    """

    def __init__(self, features: str):
        self.features = features
        self.count: int | None = 0
        self.left_out = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of outer products about the mean
        self._cov_of_file = np.zeros((0, 0))  # where the count is not known

    @property
    def cov(self) -> np.ndarray:
        """Raises: UserError for fewer than two rows."""
        if self.count is None:
            return self._cov_of_file
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
            new.count = len(x)
            new.mean = x.mean(axis=0)
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
                "statistics from a file with mu and sigma alone cannot grow, for their number of "
                "images is not known; compute them anew from the images"
            )
        self.left_out += other.left_out
        if other.count == 0:
            return
        if self.count == 0:
            self.mean = np.zeros_like(other.mean)
            self._scatter = np.zeros_like(other._scatter)
        total = self.count + other.count
        delta = other.mean - self.mean
        between = np.outer(delta, delta) * (self.count * other.count / total)
        self._scatter = self._scatter + other._scatter + between
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz with mu and sigma, as pytorch-fid reads it, count, left_out, features."""
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
        """Statistics from `save`, or from pytorch-fid: mu [D] and sigma [D, D], count not known.

        Args: path; features: what they must be of. A file that does not name its features is taken
          at the caller's word.
        Raises: UserError for a file that is not one, or of other features.
        """
        held = _read_npz(path)
        found = cls(str(held.get("features", features)))
        if found.features != features:
            raise UserError(
                f"{path} is of {found.features!r}, expected {features!r}; compute the statistics "
                "with the same extractor"
            )
        found.left_out = int(held.get("left_out", 0))
        found.mean = held["mu"].astype(np.float64)
        cov = held["sigma"].astype(np.float64)
        if "count" in held:
            found.count = int(held["count"])
            found._scatter = cov * (found.count - 1)
        else:
            found.count = None
            found._cov_of_file = cov
        return found


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What a file holds, with mu and sigma that fit each other. Raises: UserError."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not readable as .npz ({reason}); give a file of feature statistics"
        ) from None
    mu = held.get("mu", np.zeros(0))
    sigma = held.get("sigma", np.zeros(0))
    numbers = mu.dtype.kind == "f" and sigma.dtype.kind == "f"
    if not numbers or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in held.items())
        raise UserError(
            f"{path} holds {shapes or 'nothing'}, expected mu [D] and sigma [D, D] of floats; "
            "give a file of feature statistics"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(
            f"{path} holds NaN or infinite statistics, expected finite ones; compute them anew"
        )
    return held


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
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared as FID is; never below 0.

    With fewer images than several times D the covariances are too small in some directions, and the
    distance is biased upwards: compare only numbers of equally many images.

    Raises: UserError for statistics of other features, or of fewer than two images.
    Source: Heusel et al. 2017, Eq. 6; the trace of the root from the symmetric C_a^(1/2) C_b
    C_a^(1/2), which has the eigenvalues of C_a C_b.
    """
    cov_a = a.cov
    cov_b = b.cov
    _check_same(a, b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0.0)).sum()
    means = ((a.mean - b.mean) ** 2).sum()
    return max(float(means + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross), 0.0)
