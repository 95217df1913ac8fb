# SPDX-License-Identifier: Apache-2.0
"""Prompts to token ids."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from di_star_jax.errors import UserError
from di_star_jax.storage.folders import read_object

CONFIG = "tokenizer_config.json"
_FILES = (CONFIG, "tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")
_ADVICE = "take the files of a CLIP tokenizer, such as openai/clip-vit-large-patch14's"


class Tokenizer:
    """CLIP's tokenizer from a folder, padded and cut to its `model_max_length`.

    Source: transformers `CLIPTokenizer`, which reads the files and follows all of their fields.

    Args: folder with tokenizer.json, or vocab.json and merges.txt.
    Raises: UserError where they are missing or cannot be read.
    """

    cleaning = ""  # none but what the files say

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
            raise UserError(
                f"no tokenizer in {folder}, expected tokenizer.json, or vocab.json and merges.txt; "
                "give a tokenizer's folder"
            )
        file = folder / CONFIG
        config = read_object(file) if file.exists() else {}
        if config.get("tokenizer_class") not in _CLASSES:
            raise UserError(
                f"{file} has tokenizer_class={config['tokenizer_class']!r}, the port implements "
                f"CLIPTokenizer only; {_ADVICE}"
            )
        self.max_length = _max_length(config, file)
        self._tokenizer = read_tokenizer("CLIPTokenizer", folder, self._ids)

    def _ids(self, tokenizer: Any, texts: list[str]) -> np.ndarray:
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length
        )
        return np.array(encoded["input_ids"], np.int32)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, int32 [B, max_length]."""
        return self._ids(self._tokenizer, texts)

    def too_long(self, texts: Iterable[str]) -> None:
        """Nothing: whoever uses CLIP lets it read the first 77 tokens, this family's papers too."""
        del texts

    def check_fits(self, settings: Any, encoder: str) -> None:
        """Raises: UserError for ids or lengths that a text encoder's tables do not have.

        Args: the encoder's settings, with vocab_size and max_position_embeddings; its name, for the
          error.
        """
        vocab_size, positions = settings.vocab_size, settings.max_position_embeddings
        if len(self._tokenizer) > vocab_size or self.max_length > positions:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path} has {len(self._tokenizer)} tokens "
                f"and a model_max_length of {self.max_length}, but {encoder} has "
                f"vocab_size={vocab_size} and max_position_embeddings={positions}; "
                "give files of one model"
            )

    def __len__(self) -> int:
        """The vocabulary's size."""
        return len(self._tokenizer)

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary spells them, without the specials."""
        return self._tokenizer.tokenize(text)


def _max_length(config: dict, file: Path) -> int:
    """Tokens of a prompt. Absent or null, as 10^30 in old files, is no limit: CLIP's is 77."""
    given = config.get("model_max_length")
    length = 77 if given is None else given
    # A prompt of two tokens has a beginning and an end.
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 3:
        raise UserError(
            f"{file} has model_max_length={given!r}, expected a number from 3 on; 77 is CLIP's"
        )
    return int(min(length, 77))


def read_tokenizer(
    class_name: str,
    folder: Path,
    ids: Callable[[Any, list[str]], np.ndarray],
    **settings: Any,
) -> Any:
    """A tokenizer of transformers from a folder, tried once.

    Args:
      class_name: of transformers.
      ids: (tokenizer, texts) -> token ids [B, L] is how it will be called.
      settings: of the class.
    Raises: UserError where transformers cannot read its files, or it cannot be called.
    """
    import transformers

    for name in _FILES:
        if (folder / name).exists():
            read_object(folder / name)
    advice = _ADVICE if class_name == "CLIPTokenizer" else "download it again"
    cls = getattr(transformers, class_name)
    return tried(lambda: cls.from_pretrained(folder, **settings), folder, ids, advice)


def tried(
    build: Callable[[], Any],
    folder: Path,
    ids: Callable[[Any, list[str]], np.ndarray],
    advice: str,
) -> Any:
    """What `build` makes of a folder's files, called once as in `read_tokenizer`.

    Raises: UserError, which ends in the advice, where transformers cannot.
    """
    try:
        tokenizer = build()
        found = ids(tokenizer, ["a cat", ""])
        assert found.ndim == 2, f"token ids of shape {found.shape}"
    except Exception as error:  # tokenizers has no class of its own for its errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"transformers cannot read the tokenizer in {folder} ({type(error).__name__}: "
            f"{reason}); {advice}"
        ) from None
    return tokenizer


def check_lengths(
    tokenizer: Any,
    texts: Iterable[str],
    option: str,
) -> None:
    """Refuses prompts that a tokenizer would cut. Args: option, that they were given as.

    Raises: UserError with their number and the first.
    """
    told = tokenizer.too_long(texts)
    if told:
        raise UserError(f"{option}: {told}; shorten them, or leave them out")


def token_batch(texts: list[str], tokenizers: dict[str, Callable]) -> dict[str, Any]:
    """The same texts by every tokenizer: {name: int32 [B, L], or what a reward reads}."""
    return {name: tokenizer(texts) for name, tokenizer in tokenizers.items()}
