# SPDX-License-Identifier: Apache-2.0
"""Prompts to T5's token ids."""

import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from di_star_jax.errors import UserError
from di_star_jax.prompts import spiece
from di_star_jax.prompts.tokens import CONFIG, read_tokenizer, tried
from di_star_jax.storage.folders import read_object

LENGTH = 120  # of PixArt-alpha, which its pipeline has by itself, whatever the files say
JSON = "tokenizer.json"
_CLASSES = (None, "T5Tokenizer", "T5TokenizerFast")
_EXTRA = 100  # sentinels `<extra_id_N>` behind the pieces, which no prompt needs
_ADVICE = "take the files of a T5 v1.1 tokenizer, such as PixArt's"


class T5Tokenizer:
    """T5's tokenizer from a folder; prompts are cleaned, then padded with 0 or cut to 120 tokens.

    The ids say which of them count, see models.t5.mask_of.

    Source: transformers `T5Tokenizer`; the cleaning is diffusers' `PixArtAlphaPipeline`'s without
    clean_caption.

    Args: folder with tokenizer.json, or else spiece.model, as it is published.
    Raises: UserError where they are missing, cannot be read or are not T5's.
    """

    max_length = LENGTH
    cleaning = "lower case, no blanks around"

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        file = folder / CONFIG
        config = read_object(file) if file.exists() else {}
        if config.get("tokenizer_class") not in _CLASSES:
            raise UserError(
                f"{file} has tokenizer_class={config['tokenizer_class']!r}, expected T5Tokenizer; "
                f"{_ADVICE}"
            )
        self._folder = folder
        self._tokenizer = _read(folder)
        (empty,) = _ids(self._tokenizer, [""])
        if empty.tolist() != [1] + [0] * (LENGTH - 1):
            raise UserError(
                f"the tokenizer in {folder} makes tokens {empty[:3].tolist()}... of an empty "
                f"prompt, expected the end of text, 1, and pads, 0; {_ADVICE}"
            )
        _say_cleaning()

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, int32 [B, 120]."""
        return _ids(self._tokenizer, [_cleaned(text) for text in texts])

    def too_long(self, texts: Iterable[str]) -> str | None:
        """What is wrong with prompts that would be cut: how many, and the first. None for none."""
        texts = list(texts)
        # A letter of ASCII is one token at most; the first blank and the end are two more.
        doubtful = [text for text in texts if len(text) + 2 > LENGTH or not text.isascii()]
        lengths = [len(ids) for ids in self._all_ids(doubtful)]
        long = [i for i, length in enumerate(lengths) if length > LENGTH]
        if not long:
            return None
        first = doubtful[long[0]]
        shown = first if len(first) <= 60 else first[:57] + "..."
        return (
            f"{len(long)} of {len(texts)} prompts have over {LENGTH} tokens of T5's, which takes "
            f"no more; the first, with {lengths[long[0]]}, is {shown!r}"
        )

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        """Of prompts that are not cut."""
        if not texts:
            return []
        return self._tokenizer([_cleaned(text) for text in texts], verbose=False)["input_ids"]

    def check_fits(self, settings: Any, encoder: str) -> None:
        """Raises: UserError for ids that a text encoder's table does not have.

        Args: the encoder's settings, with vocab_size; its name, for the error.
        """
        if len(self) > settings.vocab_size:
            raise UserError(
                f"the tokenizer {self._folder} has {len(self)} tokens, but {encoder} has "
                f"vocab_size={settings.vocab_size}; give files of one model"
            )

    def __len__(self) -> int:
        """The vocabulary's size, with the sentinels."""
        return len(self._tokenizer)

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary spells them, without the end."""
        return self._tokenizer.tokenize(_cleaned(text))


@functools.cache
def _say_cleaning() -> None:
    logging.getLogger(__name__).info(
        "T5 reads prompts in lower case, without blanks around them, as diffusers' PixArt pipeline "
        "does where it has no beautifulsoup4"
    )


def _cleaned(text: str) -> str:
    return text.lower().strip()


def _ids(tokenizer: Any, texts: list[str]) -> np.ndarray:
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH)
    return np.array(encoded["input_ids"], np.int32)


def _read(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises: UserError."""
    if (folder / JSON).is_file():
        return read_tokenizer("T5Tokenizer", folder, _ids)
    if not (folder / spiece.FILE).is_file():
        raise UserError(
            f"no T5 tokenizer in {folder}, expected {spiece.FILE} or {JSON}; give the tokenizer's "
            "folder of a PixArt pipeline"
        )
    model = spiece.read(folder / spiece.FILE)
    return tried(lambda: _built(model), folder, _ids, _ADVICE)


def _built(model: spiece.Model) -> Any:
    """As transformers makes it of a SentencePiece model, for which it would need sentencepiece."""
    import transformers

    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(_EXTRA))]
    return transformers.T5Tokenizer(
        vocab=[*model.pieces, *sentinels],
        extra_ids=_EXTRA,
        _spm_precompiled_charsmap=model.charsmap,
    )


def write_json(source: Path, target: Path) -> None:
    """Writes the tokenizer.json that `source`, a folder with a spiece.model, lacks: whoever reads
    it then needs no sentencepiece.

    Raises: UserError for a model that cannot be read.
    """
    _read(source).backend_tokenizer.save(str(target / JSON))
