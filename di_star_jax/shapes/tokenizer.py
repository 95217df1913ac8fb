# SPDX-License-Identifier: Apache-2.0
"""Tokenizers for a small world, each of whose words is one token: CLIP's and T5's."""

import json
from pathlib import Path

from di_star_jax.prompts.t5 import LENGTH
from di_star_jax.prompts.tokens import Tokenizer

_SMALL = 5000  # tokens; CLIP's vocabulary has 49,408
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make every word one symbol; the same ones in any process.

    Args: words, lower-case ASCII.
    Returns: pairs; the last symbol of a word ends in "</w>".
    """
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        min_frequency=1,
        end_of_word_suffix="</w>",
        # Numbered here: the trainer would number them as its hash map has them, which differs from
        # process to process and decides between equally frequent pairs.
        special_tokens=sorted({f"{word[-1]}</w>" for word in words}),
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(words)), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def make_word_tokenizer(
    words: list[str],
    folder: Path,
    *,
    max_length: int,
    pad_token: str,
) -> int:
    """Writes a tokenizer folder that `transformers.CLIPTokenizer.from_pretrained` reads.

    Args:
      words: lower-case ASCII words; each becomes one token, any other text falls into bytes.
      folder: to write.
      max_length: tokens per prompt with the two specials.
      pad_token: END as SDXL's first tokenizer, "!" (id 0) as its second.
    Returns:
      the vocabulary's size; START and END are its last two ids, as in CLIP.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = learn_merges(words)
    symbols = sorted(ByteLevel.alphabet())  # stand-ins of the 256 bytes, in CLIP's order
    symbols += [f"{symbol}</w>" for symbol in symbols]
    symbols += ["".join(pair) for pair in merges]
    symbols += [START, END]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length
    )
    tokenizer.save_pretrained(folder)
    return len(vocab)


def make_word_pieces(words: list[str], folder: Path) -> int:
    """Writes a tokenizer folder that `transformers.T5Tokenizer.from_pretrained` reads.

    Args:
      words: each becomes one piece; of any other text the blank before it is known, and no more.
      folder: to write.
    Returns:
      the vocabulary's size: pad 0, end 1 and unknown 2, the blank and the words; none of the
      sentinels that T5 has for its pre-training.
    """
    from transformers import T5Tokenizer

    specials = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    # All are equally likely: whatever word it is, it is likelier than any part of it and a rest.
    pieces = [(f"▁{word}", -1.0) for word in ("", *words)]
    tokenizer = T5Tokenizer(vocab=[*specials, *pieces], extra_ids=0, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return len(specials) + len(pieces)


def unknown_words(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Words of the texts that a small world's tokenizer has no token for; [] by any other.

    In a large vocabulary, a word of several tokens is a usual one.
    """
    if len(tokenizer) > _SMALL:
        return []
    words = dict.fromkeys(word for text in texts for word in text.lower().split())
    return [word for word in words if len(tokenizer.pieces(word)) != 1]
