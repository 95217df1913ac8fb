# SPDX-License-Identifier: Apache-2.0
"""Preference pairs as people have them: a table beside image files, or Pick-a-Pic's parquet files.

A row is a caption, two pictures and which is better. What cannot be used is a `Fault`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from di_star_jax.errors import UserError
from di_star_jax.preference import decode
from di_star_jax.preference.loss import TIE
from di_star_jax.prompts import files
from di_star_jax.prompts.files import Layout

TABLES = ("pairs.csv", "pairs.tsv", "pairs.jsonl")  # of a folder, the first that is there
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGES = ("image_0", "image_1")
COUNT = "num_example_per_prompt"
LABELS = {"0": 1.0, "1": 0.0, "tie": TIE}  # which picture is better: how likely the first is
_ADVICE = (
    "name the columns caption, image_0, image_1 (paths from the table's folder) and label (0, 1 or "
    "tie, which is better)"
)
# Those of Pick-a-Pic v1 and v2 that matter. Source: the card of yuvalkirstain/pickapic_v1.
_PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_HAS_LABEL = "has_label"
_BATCH = 32  # rows of a parquet file that are held at a time, a megabyte each

BROKEN = "broken image"
EQUAL = "equal pair"
UNKNOWN = "unknown label"
UNLABELLED = "no label"  # no fault: Pick-a-Pic says so by has_label


class Pair(NamedTuple):
    """One usable row. num_examples: of its prompt, or 0 where the source does not say."""

    caption: str
    images: tuple[bytes, bytes]
    label_0: float
    num_examples: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row that is left out: its number, and why, by one of the names above and in words."""

    row: int
    kind: str
    what: str


def rows(path: Path) -> Iterator[Pair | Fault]:
    """The rows of a table or of a parquet file, in its order.

    Raises: UserError for a file without the columns, one that is damaged, and image files that are
      not there.
    """
    reader = _of_parquet if path.suffix == ".parquet" else _of_table
    return reader(path)


def _checked(row: int, pair: Pair) -> Pair | Fault:
    """The pair, or what is wrong with its pictures."""
    if pair.images[0] == pair.images[1]:
        return Fault(row, EQUAL, f"both pictures of {pair.caption!r:.80} are the same")
    for name, content in zip(IMAGES, pair.images):
        why = decode.why_broken(content)
        if why:
            return Fault(row, BROKEN, f"{name} of {pair.caption!r:.80}: {why:.120}")
    return pair


# Tables.


def layout_of(table: Path) -> Layout:
    """How a table is read. Raises: UserError for one without the columns."""
    needed = Layout(("caption",), (*IMAGES, "label"), advice=_ADVICE)
    counted = dataclasses.replace(needed, keep=(*needed.keep, COUNT))
    try:
        next(files.read(table, counted), None)
        return counted
    except UserError:
        next(files.read(table, needed), None)
        return needed


def check_images(table: Path) -> list[Path]:
    """The image files of a table, which are all there.

    Raises: UserError that says how many are missing, and the first.
    """
    named = [
        table.parent / prompt.categories[name]
        for prompt in files.read(table, layout_of(table))
        for name in IMAGES
    ]
    missing = [path for path in named if not path.is_file()]
    if missing:
        raise UserError(
            f"{table}: {len(missing)} of its {len(named)} image files are missing, the first is "
            f"{missing[0]}; paths count from the table's folder: put the files there"
        )
    return named


def _of_table(table: Path) -> Iterator[Pair | Fault]:
    for row, caption, cells in files.read(table, layout_of(table)):
        label = LABELS.get(cells["label"].strip())
        if label is None:
            yield Fault(row, UNKNOWN, f"label {cells['label']!r:.40}, expected 0, 1 or tie")
            continue
        images = tuple((table.parent / cells[name]).read_bytes() for name in IMAGES)
        yield _checked(row, Pair(caption, images, label, _count(table, row, cells.get(COUNT))))


def _count(
    table: Path,
    row: int,
    cell: str | None,
) -> int:
    """Raises: UserError for what is no number of pairs."""
    if cell is None:
        return 0
    if not cell.isdecimal() or int(cell) < 1:
        raise UserError(
            f"{table}: row {row} has {COUNT}={cell!r:.40}, expected a whole number from 1; leave "
            "the column out to have the pairs counted"
        )
    return int(cell)


# Pick-a-Pic.


def _of_parquet(path: Path) -> Iterator[Pair | Fault]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names)
            wanted = [name for name in (*_PICKAPIC, _HAS_LABEL, COUNT) if name in names]
            row = 0
            for batch in file.iter_batches(_BATCH, columns=wanted):
                for cells in batch.to_pylist():
                    yield _of_cells(path, row, cells)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as parquet ({reason}); mend the file") from None


def _check_columns(path: Path, names: list[str]) -> None:
    lacking = [name for name in _PICKAPIC if name not in names]
    if lacking:
        raise UserError(
            f"{path} has no column {', '.join(lacking)}, it has {', '.join(names)[:200]}; expected "
            "Pick-a-Pic's, with the pictures inside (pickapic_v1, not pickapic_v1_no_images)"
        )


def _of_cells(
    path: Path,
    row: int,
    cells: dict,
) -> Pair | Fault:
    if not cells.get(_HAS_LABEL, True):
        return Fault(row, UNLABELLED, "")
    images = (cells["jpg_0"], cells["jpg_1"])
    if not all(isinstance(content, bytes) for content in images):
        raise UserError(
            f"{path}: row {row} has no picture in jpg_0 or jpg_1; expected the bytes of an image "
            "file, as in pickapic_v1"
        )
    if not isinstance(cells["caption"], str):
        raise UserError(f"{path}: row {row} has no caption; expected text")
    given = (cells["label_0"], cells["label_1"])
    label = {(1.0, 0.0): 1.0, (0.0, 1.0): 0.0, (0.5, 0.5): TIE}.get(given)
    if label is None:
        return Fault(row, UNKNOWN, f"label_0={given[0]}, label_1={given[1]}")
    return _checked(row, Pair(cells["caption"], images, label, int(cells.get(COUNT) or 0)))
