# SPDX-License-Identifier: Apache-2.0
"""Prompts: a file to a tfds data source (ArrayRecord, never TensorFlow), a step to a batch, text to
token ids.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from di_star_jax.errors import UserError

COLUMNS = (
    "prompt",
    "Prompt",
    "caption",
    "text",
)  # looked for, in this order, where the user names none
MAX_LENGTH = 10_000  # characters; longer lines are no prompts
FORMATS = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet")


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


def read_prompts(path: str | os.PathLike, column: str = "") -> Iterator[tuple[int, str]]:
    """Prompts of a file with their row numbers, in the file's order; blank ones left out, outer
    blanks stripped.

    Args:
      path: .txt (one a line), .tsv (not quoted), .csv (quoted), .json (a list), .jsonl or .parquet.
      column: of a table, or field of JSON objects; "" takes the first of COLUMNS that is there.
    Yields: (row, prompt); rows count from 0 and leave out a header.
    Raises: UserError for a file, column, byte or length that cannot be used.
    """
    for row, prompt, _ in read_records(path, Layout(columns=(column,) if column else COLUMNS)):
        yield row, prompt


def read_records(
    path: str | os.PathLike, layout: Layout
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Prompts of a file as `read_prompts` gives them, each with the columns kept beside it.

    Args: path, as in `read_prompts`; layout.
    Yields: (row, prompt, {column: value}); a .txt has no columns.
    Raises: UserError as `read_prompts`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no prompt file {path}; give the path of a {', '.join(FORMATS)} file")
    if path.suffix not in FORMATS:
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'}, expected one of {', '.join(FORMATS)}"
        )
    for row, (prompt, kept) in enumerate(_rows(path, layout)):
        if not isinstance(prompt, str):
            raise UserError(
                f"{path}: row {row} holds {prompt!r}, expected text; give another column"
            )
        if "\0" in prompt:
            raise UserError(
                f"{path}: row {row} holds a NUL character; save the file as plain UTF-8 text"
            )
        if len(prompt) > MAX_LENGTH:
            raise UserError(
                f"{path}: row {row} has {len(prompt)} characters, expected at most {MAX_LENGTH}; "
                "is it one prompt a line?"
            )
        if prompt.strip():
            yield row, prompt.strip(), kept


def _rows(path: Path, layout: Layout) -> Iterator[tuple[Any, dict[str, str]]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, layout)
        return
    text = _decode(path)
    if path.suffix == ".txt":
        yield from ((line, {}) for line in text.split("\n"))
    elif path.suffix in (".tsv", ".csv"):
        yield from _table_rows(path, text, layout)
    else:
        yield from _json_rows(path, text, layout)


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


def _choose(path: Path, names: Sequence[str], layout: Layout) -> tuple[str, tuple[str, ...]]:
    """The prompt's column, and the columns kept."""
    prompt = next((name for name in layout.columns if name in names), None)
    if prompt is None or not set(layout.keep or ()) <= set(names):
        wanted = ", ".join([" or ".join(layout.columns), *(layout.keep or ())])
        raise UserError(
            f"{path} has the columns {', '.join(map(str, names))[:200]}, expected {wanted}; "
            f"{layout.advice}"
        )
    return prompt, tuple(
        name for name in names if name != prompt
    ) if layout.keep is None else layout.keep


def _table_rows(path: Path, text: str, layout: Layout) -> Iterator[tuple[str, dict[str, str]]]:
    if path.suffix == ".tsv":  # unquoted, as published lists are: a '"' is part of the prompt
        rows = (line.split("\t") for line in text.split("\n") if line)
    else:
        csv.field_size_limit(2**30)
        rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    prompt, keep = _choose(path, header, layout)
    for row in rows:
        cells = dict(zip(header, row))
        yield cells.get(prompt, ""), {name: cells.get(name, "") for name in keep}


def _json_rows(path: Path, text: str, layout: Layout) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        entries = (
            json.loads(text)
            if path.suffix == ".json"
            else [json.loads(x) for x in text.split("\n") if x.strip()]
        )
    except ValueError as error:
        raise UserError(
            f"{path} is not {path.suffix[1:].upper()} ({error}); mend the file"
        ) from None
    if layout.records and isinstance(entries, dict):
        entries = entries.get(layout.records)
    if not isinstance(entries, list):
        raise UserError(
            f"{path} holds a {type(entries).__name__}, expected a list of prompts or of objects"
        )
    for entry in entries:
        if not isinstance(entry, dict):
            if layout.keep:
                raise UserError(
                    f"{path} holds {str(entry)[:40]!r}, expected objects with {', '.join(layout.keep)}; "
                    f"{layout.advice}"
                )
            yield entry, {}
            continue
        prompt, keep = _choose(path, list(entry), layout)
        if layout.keep is None:
            keep = tuple(name for name in keep if isinstance(entry[name], str))
        yield entry[prompt], {name: _text(entry[name]) for name in keep}


def _parquet_rows(path: Path, layout: Layout) -> Iterator[tuple[Any, dict[str, str]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            prompt, keep = _choose(path, schema.names, layout)
            if layout.keep is None:
                keep = tuple(name for name in keep if _holds_text(schema.field(name).type))
            for batch in file.iter_batches(
                columns=[prompt, *keep]
            ):  # a batch at a time: files of millions
                for row in batch.to_pylist():
                    yield (
                        "" if row[prompt] is None else row[prompt],
                        {name: _text(row[name]) for name in keep},
                    )
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not readable as parquet ({str(error).splitlines()[0]}); mend the file"
        ) from None


def _holds_text(kind) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


class Source(Sequence):
    """Prompts by index, from a tfds data source.

    `source[i]` is a str, `source.row(i)` its row in the file.
    """

    def __init__(self, data_source):
        self._data_source = data_source

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):  # what ends an iteration; the data source raises ValueError
            raise IndexError(f"prompt {index} of {len(self)}")
        return self._data_source[int(index)]["prompt"].decode("utf-8")

    def row(self, index: int) -> int:
        """Row number of prompt `index` in the file it came from."""
        return int(self._data_source[int(index)]["row"])


def load(path: str | os.PathLike, data_dir: str | os.PathLike, *, column: str = "") -> Source:
    """The prompts of a file as a data source, built once: a changed file or column is built anew.

    Args:
      path, column: as in `read_prompts`.
      data_dir: where the ArrayRecord files go; every host builds its own or finds the same.
    Raises: UserError as `read_prompts`, and for a file without prompts.
    """
    if next(read_prompts(path, column), None) is None:
        raise UserError(
            f"{path} holds no prompts, expected at least one; put one prompt on each line"
        )
    digest = hashlib.sha256(
        Path(path).read_bytes() + f"\0{column}\0{Path(path).suffix}".encode()
    ).hexdigest()[:16]
    return Source(
        build(
            lambda: ({"row": row, "prompt": prompt} for row, prompt in read_prompts(path, column)),
            ("prompt",),
            Path(data_dir) / digest,
        )
    )


def build(
    examples: Callable[[], Iterator[dict[str, Any]]],
    text: Sequence[str],
    data_dir: str | os.PathLike,
):
    """A tfds data source of numbered texts, written by the first call and found again by later
    ones.

    Args:
      examples: gives {"row": distinct int, name: str for each name in text}, in the order to keep.
      text: names of the text features.
      data_dir: of this data alone: name it after the content.
    Returns: random access to {"row": int64, name: UTF-8 bytes}.
    """
    import tensorflow_datasets as tfds

    with (
        tfds.core.registered.skip_registration()
    ):  # tfds knows a builder by its name; here the folder tells them apart

        class Prompts(tfds.core.GeneratorBasedBuilder):
            """Prompts of one source, in its order."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                texts = {name: tfds.features.Text() for name in text}
                features = tfds.features.FeaturesDict({"row": np.int64, **texts})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                del dl_manager
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for example in examples():
                    yield example["row"], example

    builder = Prompts(data_dir=str(data_dir), file_format="array_record")
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # tfds's own bars
        builder.download_and_prepare()
    return builder.as_data_source(split="train")


class PromptStream:
    """An endless, reshuffled stream of prompts: what step k sees is a pure function of (source,
    seed, k).

    Args:
      source: prompts by index.
      seed: of the shuffles, one for each pass over the source.
      batch_size: prompts per step, over all hosts.
    """

    def __init__(self, source: Sequence[str], *, seed: int, batch_size: int):
        import grain

        self._stream = grain.MapDataset.source(source).shuffle(seed).repeat()
        self._batch_size = batch_size

    def at(self, step: int, rows: Sequence[int] | None = None) -> list[str]:
        """A step's prompts, or those of some rows of its batch."""
        first = step * self._batch_size
        return [self._stream[first + row] for row in rows or range(self._batch_size)]


class Tokenizer:
    """CLIP's tokenizer from a folder, padded and cut to its `model_max_length`.

    Source: transformers `CLIPTokenizer`.

    Args: folder with tokenizer.json, or vocab.json and merges.txt. Raises: UserError where they are
      missing.
    """

    def __init__(self, folder: str | os.PathLike):
        from transformers import CLIPTokenizer

        folder = Path(folder)
        if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
            raise UserError(
                f"no tokenizer in {folder}, expected tokenizer.json, or vocab.json and merges.txt; "
                "give a tokenizer's folder"
            )
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.max_length = min(self._tokenizer.model_max_length, 77)  # old files say 10^30

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Token ids, int32 [B, max_length]."""
        encoded = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length
        )
        return np.array(encoded["input_ids"], np.int32)

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts lose words to the limit."""
        return sum(len(ids) > self.max_length for ids in self._tokenizer(prompts)["input_ids"])


def token_batch(prompts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, np.ndarray]:
    """Token ids of the same prompts by every tokenizer: {name: int32 [B, L]}."""
    return {name: tokenizer(prompts) for name, tokenizer in tokenizers.items()}
