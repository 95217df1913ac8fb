# SPDX-License-Identifier: Apache-2.0
"""A prompt file as numbered prompts: .txt, .tsv, .csv, .json, .jsonl or .parquet.

Strict: a row that is damaged is refused with its number, and never a shorter or a missing prompt.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from di_star_jax.errors import UserError

COLUMNS = ("prompt", "Prompt", "caption", "text")  # looked for where the user names none
MAX_LENGTH = 10_000  # characters; longer lines are no prompts


class Prompt(NamedTuple):
    """One prompt: its row in the file, its text, and columns beside it by name.

    Rows count from 0 and leave out a header.
    """

    row: int
    text: str
    categories: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a table, or a list of JSON objects, holds prompts and what belongs to them.

    Args:
      columns: of the prompt; the first that is there.
      keep: further columns, which must be there; None keeps every other column that holds text.
      records: field of a JSON object that holds the list; "" for a file that is a list.
      advice: what to do about missing columns, for the error.
    """

    columns: tuple[str, ...] = COLUMNS
    keep: tuple[str, ...] | None = ()
    records: str = ""
    advice: str = "set data.column to one of them"


# What a reader yields for each row: what should be the prompt, and the columns kept.
Entry = tuple[Any, dict[str, str]]


def read(path: Path, layout: Layout) -> Iterator[Prompt]:
    """Prompts of a file in its order; blank ones left out, outer blanks stripped.

    Args:
      path: .txt (one a line), .tsv (not quoted), .csv (quoted), .json (a list), .jsonl or .parquet.
      layout: of all but .txt.
    Raises: UserError for a column, row, byte or length that cannot be used.
    """
    for row, (text, kept) in enumerate(READERS[path.suffix](path, layout)):
        _check(path, row, text, kept)
        if text.strip():
            yield Prompt(row, text.strip(), kept)


def _check(
    path: Path,
    row: int,
    text: Any,
    kept: dict[str, str],
) -> None:
    where = f"{path}: row {row}"
    if not isinstance(text, str):
        raise UserError(f"{where} holds {text!r:.80}, expected text; give another column")
    for held in (text, *kept.values()):
        if "\0" in held:
            raise UserError(f"{where} holds a NUL character; save the file as plain UTF-8 text")
        if not held.isascii() and any("\ud800" <= character <= "\udfff" for character in held):
            raise UserError(
                f"{where} holds half of a surrogate pair, {held!a:.80}; write the whole character"
            )
    if len(text) > MAX_LENGTH:
        raise UserError(
            f"{where} has {len(text)} characters, expected at most {MAX_LENGTH}; "
            "is it one prompt a line?"
        )


def _decoded(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, which are "\\n", one at a time: it may have millions.

    Raises: UserError for bytes that are not UTF-8, and for the ends of lines of old Macs.
    """
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x} is not UTF-8; save it "
                    "as UTF-8"
                ) from None
            line = line.replace("\r\n", "\n")
            if "\r" in line:
                raise UserError(
                    f"{path}, line {number} holds a carriage return that ends no line; save the "
                    'file with "\\n" at the ends of its lines'
                )
            yield line.removeprefix("\ufeff") if number == 1 else line


def _columns(
    where: str,
    names: Sequence[str],
    layout: Layout,
) -> tuple[str, tuple[str, ...]]:
    """The prompt's column, and the columns kept. Args: where, the file or its row."""
    needed = layout.keep or ()
    prompt = next((name for name in layout.columns if name in names), None)
    if prompt is None or not set(needed) <= set(names):
        there = ", ".join(map(str, names))[:200]
        wanted = ", ".join([" or ".join(layout.columns), *needed])
        raise UserError(f"{where} has the columns {there}, expected {wanted}; {layout.advice}")
    if layout.keep is None:
        return prompt, tuple(name for name in names if name not in (prompt, ""))
    return prompt, layout.keep


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raises: UserError for a name that two columns have."""
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{path} has two columns {twice!r}, expected one; rename or remove one")


def _entry(
    cells: dict[str, Any],
    prompt: str,
    keep: Sequence[str],
) -> Entry:
    values = {name: cells[name] for name in keep}
    return cells[prompt], {
        name: "" if value is None else str(value) for name, value in values.items()
    }


_CELLS = {
    ".csv": "quote a prompt that has commas, and write every cell",
    ".tsv": "write every cell, and no tab in a prompt",
}


# The standard library's csv and json, since pyarrow's readers guess types, leave out blank lines
# (and so count other rows) and read no list of strings.


def _lines(path: Path, layout: Layout) -> Iterator[Entry]:
    del layout
    for line in _decoded(path):
        yield line.removesuffix("\n"), {}


def _tsv(path: Path, layout: Layout) -> Iterator[Entry]:
    # Unquoted, as published lists are: a '"' is part of the prompt.
    lines = (line.removesuffix("\n") for line in _decoded(path))
    return _table(path, (line.split("\t") for line in lines if line), layout)


def _csv(path: Path, layout: Layout) -> Iterator[Entry]:
    csv.field_size_limit(2**30)
    return _table(path, _csv_rows(path), layout)


def _csv_rows(path: Path) -> Iterator[list[str]]:
    reader = csv.reader(_decoded(path), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; close each quote, and double those inside "
            "of a quoted prompt"
        ) from None


def _table(
    path: Path,
    rows: Iterable[list[str]],
    layout: Layout,
) -> Iterator[Entry]:
    rows = iter(rows)
    header = next(rows, [])
    _check_header(path, header)
    prompt, keep = _columns(str(path), header, layout)
    place = header.index(prompt)
    # A column of row numbers has no name; behind the prompt such a cell is a part of it.
    nameless = [i for i, name in enumerate(header) if not name and i > place]
    for row, cells in enumerate(rows):
        if not cells:  # a blank line of a .csv
            yield "", {}
            continue
        if len(cells) != len(header) or any(cells[i].strip() for i in nameless):
            raise UserError(
                f"{path}: row {row} has {len(cells)} cells, {' | '.join(cells)!r:.120}, expected "
                f"{len(header)}, one for each of {', '.join(header)[:120]}; {_CELLS[path.suffix]}"
            )
        yield _entry(dict(zip(header, cells)), prompt, keep)


def _json(path: Path, layout: Layout) -> Iterator[Entry]:
    entries = _parse(path, "".join(_decoded(path)), str(path))
    if layout.records and isinstance(entries, dict):
        entries = entries.get(layout.records)
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"{path} holds a {kind}, expected a list of prompts or of objects")
    return _json_entries(path, entries, layout)


def _jsonl(path: Path, layout: Layout) -> Iterator[Entry]:
    lines = enumerate(_decoded(path), 1)
    entries = (
        _parse(path, line, f"{path}, line {number},") for number, line in lines if line.strip()
    )
    return _json_entries(path, entries, layout)


def _parse(
    path: Path,
    text: str,
    where: str,
) -> Any:
    kind = path.suffix[1:].upper()
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply for a list of prompts") from None
    except ValueError as error:
        raise UserError(f"{where} is not {kind} ({error}); mend the file") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ. Raises: ValueError."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice in one object")
    return held


def _json_entries(
    path: Path,
    entries: Iterable[Any],
    layout: Layout,
) -> Iterator[Entry]:
    """Strings, or objects which all have the prompt under the name that the first has it under."""
    for row, entry in enumerate(entries):
        if isinstance(entry, dict):
            prompt, keep = _columns(f"{path}: row {row}", list(entry), layout)
            layout = dataclasses.replace(layout, columns=(prompt,))
            if layout.keep is None:
                keep = tuple(name for name in keep if isinstance(entry[name], str))
            yield _entry(entry, prompt, keep)
            continue
        if layout.keep:
            raise UserError(
                f"{path}: row {row} holds {str(entry)[:40]!r}, expected objects with "
                f"{', '.join(layout.keep)}; {layout.advice}"
            )
        yield entry, {}


def _parquet(path: Path, layout: Layout) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_header(path, schema.names)
            prompt, keep = _columns(str(path), schema.names, layout)
            if layout.keep is None:
                keep = [name for name in keep if _holds_text(schema.field(name).type)]
            # A batch at a time, for files of millions.
            for batch in file.iter_batches(columns=[prompt, *keep]):
                for cells in batch.to_pylist():
                    text, kept = _entry(cells, prompt, keep)
                    yield "" if text is None else text, kept
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as parquet ({reason}); mend the file") from None


def _holds_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


READERS = {
    ".txt": _lines,
    ".tsv": _tsv,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
