# SPDX-License-Identifier: Apache-2.0
"""Prompts to token ids."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from di_star_jax.errors import UserError


class Tokenizer:
    """CLIP's tokenizer from a folder, padded and cut to its `model_max_length`.

    Source: transformers `CLIPTokenizer`.

    Args: folder with tokenizer.json, or vocab.json and merges.txt.
    Raises: UserError where they are missing.
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

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, int32 [B, max_length]."""
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length
        )
        return np.array(encoded["input_ids"], np.int32)


def token_batch(texts: list[str], tokenizers: dict[str, Callable]) -> dict[str, Any]:
    """The same texts by every tokenizer: {name: int32 [B, L], or what a reward reads}."""
    return {name: tokenizer(texts) for name, tokenizer in tokenizers.items()}
