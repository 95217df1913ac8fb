# SPDX-License-Identifier: Apache-2.0
"""Scores as they come, in one file, so that an evaluation that was killed continues.

Each addition is one transaction of SQLite: it is kept whole or not at all, however the process
ends.
"""

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_TABLES = """
CREATE TABLE IF NOT EXISTS scores
    (metric TEXT, prompt INT, sample INT, value REAL, PRIMARY KEY (metric, prompt, sample))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS features
    (model TEXT, prompt INT, sample INT, vector BLOB, PRIMARY KEY (model, prompt, sample));
CREATE TABLE IF NOT EXISTS distances (metric TEXT PRIMARY KEY, value REAL, note TEXT);
"""
Place = tuple[int, int]  # (prompt, sample) of an image


class Store(contextlib.AbstractContextManager):
    """The numbers of P prompts with K images each.

    Args: file, made where it is missing; shape, (P, K).
    """

    def __init__(self, file: Path, shape: tuple[int, int]):
        self._shape = shape
        self._connection = sqlite3.connect(file)
        self._connection.executescript(_TABLES)

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def holds_other_than(self, metric: str) -> bool:
        """Whether anything else than one metric is kept."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM scores WHERE metric <> ?)"
            " OR EXISTS (SELECT 1 FROM features) OR EXISTS (SELECT 1 FROM distances)"
        )
        return bool(self._connection.execute(query, [metric]).fetchone()[0])

    def clear(self) -> None:
        """Forgets everything."""
        with self._connection as transaction:
            for table in ("scores", "features", "distances"):
                transaction.execute(f"DELETE FROM {table}")

    def scores(self, metric: str) -> np.ndarray:
        """float64 [P, K], NaN where there is none."""
        found = np.full(self._shape, np.nan)
        query = "SELECT prompt, sample, value FROM scores WHERE metric = ?"
        for prompt, sample, value in self._connection.execute(query, [metric]):
            found[prompt, sample] = value
        return found

    def add_scores(
        self,
        metric: str,
        places: list[Place],
        values: Iterable[float],
    ) -> None:
        """Keeps scores, one a place; those that are not finite are none."""
        rows = (
            (metric, *place, float(value))
            for place, value in zip(places, values)
            if np.isfinite(value)
        )
        with self._connection as transaction:
            transaction.executemany("REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)

    def features(self, model: str, width: int) -> np.ndarray:
        """float32 [P, K, width], NaN where there are none."""
        found = np.full((*self._shape, width), np.nan, np.float32)
        query = "SELECT prompt, sample, vector FROM features WHERE model = ?"
        for prompt, sample, vector in self._connection.execute(query, [model]):
            found[prompt, sample] = np.frombuffer(vector, "<f4")
        return found

    def add_features(
        self,
        model: str,
        places: list[Place],
        vectors: np.ndarray,
    ) -> None:
        """Keeps one row of vectors, float32 [len(places), width], a place."""
        rows = (
            (model, *place, vector.astype("<f4").tobytes())
            for place, vector in zip(places, vectors)
        )
        with self._connection as transaction:
            transaction.executemany("REPLACE INTO features VALUES (?, ?, ?, ?)", rows)

    def distance(self, metric: str) -> tuple[float, str] | None:
        """A number over all images, and its note."""
        query = "SELECT value, note FROM distances WHERE metric = ?"
        return self._connection.execute(query, [metric]).fetchone()

    def add_distance(
        self,
        metric: str,
        value: float,
        note: str,
    ) -> None:
        """Keeps such a number."""
        with self._connection as transaction:
            transaction.execute("REPLACE INTO distances VALUES (?, ?, ?)", [metric, value, note])
