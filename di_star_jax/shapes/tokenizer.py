# SPDX-License-Identifier: Apache-2.0
"""A CLIP tokenizer for a small world: byte-pair merges under which each of its words is one token."""

import collections
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make every word one symbol; replaying them is what a
    tokenizer does.

    Args: words, lower-case ASCII. Returns: pairs; the last symbol of a word ends in "</w>".
    """
    symbols = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while any(len(s) > 1 for s in symbols):
        pairs = collections.Counter(pair for s in symbols for pair in zip(s, s[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = [_merge(s, best) for s in symbols]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append("".join(pair))
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def make_word_tokenizer(words: list[str], folder: Path, *, max_length: int, pad_token: str) -> int:
    """Writes a tokenizer folder that `transformers.CLIPTokenizer.from_pretrained` reads.

    Args:
      words: lower-case ASCII words; each becomes one token, any other text falls into bytes.
      folder: to write.
      max_length: tokens per prompt with the two specials.
      pad_token: END as SDXL's first tokenizer, "!" (id 0) as its second.
    Returns:
      the vocabulary's size; START and END are its last two ids, as in CLIP.
    """
    from transformers import CLIPTokenizer

    merges = learn_merges(words)
    alphabet = _byte_symbols()
    symbols = [
        *alphabet,
        *(s + "</w>" for s in alphabet),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length
    ).save_pretrained(folder)
    return len(vocab)
