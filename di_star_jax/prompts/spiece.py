# SPDX-License-Identifier: Apache-2.0
"""SentencePiece's model file, as far as T5's tokenizer needs it, read without sentencepiece.

Source: sentencepiece's sentencepiece_model.proto, whose field numbers stand below, in the wire
format of Protocol Buffers.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from di_star_jax.errors import UserError

FILE = "spiece.model"
SPECIALS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
_ADVICE = "take the file of a T5 v1.1 tokenizer, such as PixArt's"
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of the model
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # of the trainer's settings
_CHARSMAP = 2  # of the normaliser's settings, and its switches, which are on unless it says:
_SWITCHES = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
_MODELS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # types of pieces
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SIZES = {_FIXED64: 8, _FIXED32: 4}


class Model(NamedTuple):
    """A Unigram model.

    pieces: (text, logarithm of its probability), by id.
    charsmap: the table by which characters are replaced beforehand, in sentencepiece's own form.
    """

    pieces: list[tuple[str, float]]
    charsmap: bytes


def read(file: Path) -> Model:
    """Raises: UserError for a file that cannot be read, is not whole, or is not T5's kind."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); download it again") from None
    try:
        model = list(_fields(data))
        pieces = [_piece(value) for number, value in model if number == _PIECES]
        settings = dict(model)
        trainer = dict(_fields(settings[_TRAINER]))
        normalizer = dict(_fields(settings[_NORMALIZER]))
        charsmap = bytes(normalizer.get(_CHARSMAP, b""))
    except (ValueError, IndexError, KeyError, TypeError, struct.error):
        raise UserError(
            f"{file} is no whole SentencePiece model ({len(data)} bytes); download it again"
        ) from None
    problem = _problem(pieces, trainer, normalizer)
    if problem:
        raise UserError(f"{file} {problem}; {_ADVICE}")
    return Model([(text, score) for text, score, _ in pieces], charsmap)


def _problem(
    pieces: list[tuple[str, float, int]],
    trainer: dict[int, int | bytes],
    normalizer: dict[int, int | bytes],
) -> str:
    """What a model has that the port does not follow; "" if nothing."""
    kind = trainer.get(_MODEL_TYPE, 1)
    if kind != 1:
        return f"is a {_MODELS.get(kind, kind)} model, expected Unigram"
    first = tuple(text for text, *_ in pieces[:3])
    if first != SPECIALS:
        return f"begins with the pieces {first}, expected {SPECIALS}"
    types = [_CONTROL, _CONTROL, _UNKNOWN] + [_NORMAL] * (len(pieces) - 3)
    other = next((p for p, kind in zip(pieces, types) if p[2] != kind), None)
    if other is not None:
        return f"has the piece {other[0]!r} of type {other[2]}, expected normal pieces only"
    if trainer.get(_BYTE_FALLBACK, 0):
        return "spells unknown characters in bytes, expected one piece for all of them"
    off = [name for number, name in _SWITCHES.items() if not normalizer.get(number, 1)]
    if off:
        return f"has {off[0]}=false, expected true"
    if not normalizer.get(_CHARSMAP):
        return "replaces no characters, expected the table of nmt_nfkc"
    return ""


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, type). Raises: as `_fields`, and ValueError for a score that is no number."""
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
    if not math.isfinite(score):
        raise ValueError("a score that is not finite")
    return bytes(fields[_PIECE]).decode(), score, fields.get(_TYPE, _NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: (number, integer, or bytes of what is longer).

    Raises: ValueError or IndexError for data that end within a field, or are no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire != _BYTES and wire not in _SIZES:
            raise ValueError(f"wire type {wire}")
        size, at = _varint(data, at) if wire == _BYTES else (_SIZES[wire], at)
        if at + size > len(data):
            raise ValueError("data end within a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the integer that begins at a place, the place behind it), seven bits a byte."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("an integer of over ten bytes")
