# SPDX-License-Identifier: Apache-2.0
"""A person's choices between two pictures of a caption: pairs.csv, and the pictures beside it.

The table has the columns caption, image_0, image_1 (paths from its folder) and label: 0, 1 or tie,
which of the two is better. A picture is named by the sha256 of the file that it was, so that it is
known again.
"""

import collections
import contextlib
import csv
import fcntl
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from di_star_jax.errors import UserError
from di_star_jax.pictures import save_png
from di_star_jax.storage.files import digest_of, whole, writable_folder, write_text
from di_star_jax.storage.images import LISTED, broken_among, fault_of, listed_images, read_image

TABLE, IMAGES = "pairs.csv", "images"
LABELS = ("0", "1", "tie")
_SCORES = "scores.parquet"  # of an evaluation, which says of which prompt its images are
_DRAW = (
    "draw first: di-star sample --checkpoint=RUN --prompt=... --num=2 --out=FOLDER, or for a file "
    "of prompts di-star evaluate --checkpoint=RUN --prompts=FILE --samples=2 --metrics=saturation "
    "--out=FOLDER"
)


class Pair(NamedTuple):
    """Two pictures of a caption, by their names in a collection; the first is shown first."""

    caption: str
    image_0: str
    image_1: str

    def turned(self) -> "Pair":
        """The same with its sides exchanged."""
        return Pair(self.caption, self.image_1, self.image_0)


class Choice(NamedTuple):
    """A row of the table: a pair, and which is better, one of LABELS."""

    pair: Pair
    label: str


# Samples.


def read_samples(folder: Path) -> dict[str, list[Path]]:
    """Pictures by caption, as `sample` or `evaluate` leave them in a folder; captions in one line.

    Raises: UserError where there are none, or one cannot be read.
    """
    if (folder / LISTED).is_file():
        found = listed_images(folder)
    elif (folder / _SCORES).is_file():
        found = _of_evaluation(folder / _SCORES)
    else:
        what = f"has no {LISTED} and no {_SCORES}" if folder.is_dir() else "is no folder"
        raise UserError(f"--samples={folder} {what}; {_DRAW}")
    broken = broken_among([file for files in found.values() for file in files])
    if broken:
        raise UserError(
            f"--samples={folder}: {len(broken)} of its pictures cannot be read, the first is "
            f"{broken[0]} ({fault_of(broken[0])}); draw again"
        )
    samples = collections.defaultdict(list)
    for text, files in found.items():
        samples[" ".join(text.split())] += files
    return dict(samples)


def _of_evaluation(table: Path) -> dict[str, list[Path]]:
    """Raises: UserError for a table that is damaged, or names pictures that are not there."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(table, columns=["prompt", "file"]).to_pydict()
        rows = list(zip(columns["prompt"], columns["file"], strict=True))
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{table} is not readable ({reason}); evaluate again") from None
    found = collections.defaultdict(list)
    for text, name in rows:
        file = Path(os.path.normpath(table.parent.absolute() / name))
        if not file.is_file():
            raise UserError(f"{table} names {name}, which is not there; evaluate again")
        found[text].append(file)
    return dict(found)


def named(samples: dict[str, list[Path]]) -> dict[str, dict[str, Path]]:
    """caption -> {name in a collection: file}. Files of the same bytes have one name."""
    return {
        caption: {f"{IMAGES}/{digest_of(file)[:16]}.png": file for file in files}
        for caption, files in samples.items()
    }


def pairs_of(pictures: dict[str, dict[str, Path]], seed: int) -> list[Pair]:
    """Pictures of a caption two by two, each once, in random order and on random sides.

    The first pair of each caption comes before the second of any.

    Args: pictures, as of `named`. Raises: UserError where no caption has two.
    """
    rng = random.Random(seed)
    rounds = collections.defaultdict(list)
    for caption, files in pictures.items():
        names = list(files)
        for k in range(0, len(names) - 1, 2):
            sides = rng.sample(names[k : k + 2], 2)
            rounds[k].append(Pair(caption, *sides))
    if not rounds:
        raise UserError(
            f"--samples has {len(pictures)} captions and no two different pictures of one; {_DRAW}"
        )
    for found in rounds.values():
        rng.shuffle(found)
    return [pair for k in sorted(rounds) for pair in rounds[k]]


# The table.


def read_table(file: Path) -> list[Choice]:
    """Its rows; [] where there is no file. Raises: UserError for a table that is another one's."""
    if not file.exists():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            header, *rows = list(csv.reader(lines, strict=True)) or [[]]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not readable as CSV ({error}); give another --out") from None
    columns = [*Pair._fields, "label"]
    if header != columns:
        raise UserError(
            f"{file} has the columns {', '.join(header)}, expected {', '.join(columns)}; give "
            "another --out"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns) or row[-1] not in LABELS:
            raise UserError(
                f"{file}: row {number} is {row!r:.200}, expected caption, two pictures and "
                f"{', '.join(LABELS[:-1])} or {LABELS[-1]}; mend it, or give another --out"
            )
    return [Choice(Pair(*row[:-1]), row[-1]) for row in rows]


def table_of(choices: list[Choice]) -> str:
    """As the file has it."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*Pair._fields, "label"])
    rows.writerows([*choice.pair, choice.label] for choice in choices)
    return text.getvalue()


# Both.


class Collection:
    """Choices that are made one by one, each in its folder at once; see `opened`.

    Not for several threads at a time.

    Args: folder, which is held, new or one to go on with; pictures, as of `named`; pairs, to choose
      in, of which those that are there are left out.
    Raises: UserError for a folder of other pictures or other things.

    Attributes:
      folder. choices: all that were made. skipped: pairs that come no more before the next start.
      turn: how often something was done, by which a page sees whether it shows what is.
    """

    def __init__(
        self,
        folder: Path,
        pictures: dict[str, dict[str, Path]],
        pairs: list[Pair],
    ):
        _check_ours(folder)
        self.folder = folder
        self.choices = read_table(self.folder / TABLE)
        self._pictures = pictures
        self._files = {name: file for of_one in pictures.values() for name, file in of_one.items()}
        self._check_same_pictures()
        judged = [choice.pair for choice in self.choices]
        self._waiting = collections.deque(_without(pairs, judged))
        self.skipped: list[Pair] = []
        self._skips: list[bool] = []  # what was done since the start
        self.turn = 0
        (self.folder / IMAGES).mkdir(exist_ok=True)
        for pair in judged:
            self.picture(pair.image_0)
            self.picture(pair.image_1)
        self._keep(self.choices)

    @property
    def total(self) -> int:
        """How many pairs there are, those that were judged too."""
        return len(self.choices) + len(self.skipped) + len(self._waiting)

    def coming(self) -> list[Pair]:
        """The pair to choose in and the one after it, as far as there are."""
        return list(self._waiting)[:2]

    def choose(self, label: str) -> None:
        """Keeps a choice in the present pair. Args: label, one of LABELS."""
        pair = self._waiting[0]
        self.picture(pair.image_0)
        self.picture(pair.image_1)
        self._keep([*self.choices, Choice(pair, label)])
        self._waiting.popleft()
        self._did(skip=False)

    def skip(self) -> None:
        """Leaves the present pair for another time."""
        self.skipped.append(self._waiting.popleft())
        self._did(skip=True)

    def undo(self) -> None:
        """Takes back what was done last, and shows that pair again; also of an earlier start.

        Nothing where nothing was done.
        """
        if self._skips and self._skips[-1]:
            self._waiting.appendleft(self.skipped.pop())
        elif self.choices:
            last = self.choices[-1]
            self._keep(self.choices[:-1])
            self._waiting.appendleft(last.pair)
        self._skips = self._skips[:-1]
        self.turn += 1

    @property
    def can_undo(self) -> bool:
        """Whether there is something."""
        return bool(self.choices or self.skipped)

    def picture(self, name: str) -> Path | None:
        """The file of a picture, which is copied here where it is not yet; None for another name.

        RGB in a PNG, as `read_image` has it: what is judged is what is trained on.
        """
        if name not in self._files:
            return None
        file = self.folder / name
        if not file.exists():
            with whole(file) as partial:
                save_png(partial, read_image(self._files[name]))
        return file

    def _did(self, *, skip: bool) -> None:
        self._skips.append(skip)
        self.turn += 1

    def _keep(self, choices: list[Choice]) -> None:
        """The table is written anew each time: it is small, and never seen half written."""
        write_text(self.folder / TABLE, table_of(choices))
        self.choices = choices

    def _check_same_pictures(self) -> None:
        for pair, _ in self.choices:
            if not {pair.image_0, pair.image_1} <= set(self._pictures.get(pair.caption, ())):
                raise UserError(
                    f"--out={self.folder} holds choices between other pictures than those of "
                    f"--samples, the first is of {pair.caption!r:.200}; give another --out, or the "
                    "--samples of then"
                )


def _without(pairs: list[Pair], judged: list[Pair]) -> list[Pair]:
    known = {*judged, *(pair.turned() for pair in judged)}
    return [pair for pair in pairs if pair not in known]


def _check_ours(folder: Path) -> None:
    """Raises: UserError for a folder with other things than a collection."""
    if not (folder / TABLE).exists() and any(folder.iterdir()):
        raise UserError(
            f"--out={folder} holds other things than choices, it has no {TABLE}; give another "
            "folder"
        )


@contextlib.contextmanager
def opened(
    out: str,
    pictures: dict[str, dict[str, Path]],
    pairs: list[Pair],
) -> Iterator[Collection]:
    """A collection in a folder, which is made where it is missing, and is in nobody else's hands: a
    second command would write over the first one's choices.

    Args: out, the folder; pictures, pairs: as of `Collection`. Raises: UserError as that, and for a
      folder that is in use or cannot be written.
    """
    folder = writable_folder(out, "--out")
    held = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder, held)
        yield Collection(folder, pictures, pairs)
    finally:
        os.close(held)


def _lock(folder: Path, held: int) -> None:
    """Until `held`, which has it open, is closed."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--out={folder} is in use by another collect; end that one first, or give another "
            "folder"
        ) from None
