# SPDX-License-Identifier: Apache-2.0
"""What text encoders make of prompts, kept in a folder: found again by the prompt's text.

    FOLDER/text_cache.json     what it was made of, and how many texts it has
    FOLDER/index.npy           uint64 [N], of each text, as `_hash` has it
    FOLDER/00000, 00001, ...   tfds data sources of SHARD texts each, with arrays.json, their layout

A record has a text and, as bytes, each array that was made of it: its states, and what rewards make
of it. Zeros at an array's end are left out: padded token ids, and states that a mask hides.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines.families import family_at
from di_star_jax.pipelines.family import TEXT, Family
from di_star_jax.pipelines.folder import load_tokenizers
from di_star_jax.prompts import records
from di_star_jax.storage import buckets, folders
from di_star_jax.storage.files import sampled_digest

FILE = "text_cache.json"
INDEX = "index.npy"
ARRAYS = "arrays.json"
SHARD = 1024  # texts; with T5-XXL's states in bfloat16 and 30 tokens each, 250 MB
_OPEN = 4096  # shards
_TRIED = 64  # prompts by which a reward's tokenizer is known again

Arrays = dict[str, np.ndarray]


def shard_name(number: int) -> str:
    """Of a folder of records."""
    return f"{number:05d}"


def made_of(reference: Path, dtype: str) -> dict[str, Any]:
    """All that states of a prompt depend on.

    Args: reference, a pipeline's folder; dtype, that its text encoders compute in.
    """
    family = family_at(reference)
    tokenizers = load_tokenizers(reference, family)
    return {
        "family": family.name,
        "dtype": dtype,
        "text encoders": {
            part: folders.digest(reference / family.parts[part].folder)
            for part in family.tokenizers.values()
        },
        "tokenizers": {name: sampled_digest(reference / name) for name in tokenizers},
        "cleaning": {name: tokenizer.cleaning for name, tokenizer in tokenizers.items()},
    }


def encode(
    family: Family,
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, Any],
    token_ids: dict[str, jax.Array],
) -> Condition:
    """As `Family.encode_text`, with zeros where the mask hides a token."""
    text = family.encode_text(graphdefs, params, token_ids)
    if text.mask is None:
        return text
    return text._replace(context=jnp.where(text.mask[..., None], text.context, 0))


# Arrays by name.


def named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their path, as text.context."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _like(tree: Any, arrays: Mapping[str, Any]) -> Any | None:
    """A tree of the leaves' names in `tree`; None where one is not there."""
    names = list(named(tree))
    if not all(name in arrays for name in names):
        return None
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in names])


def layout(arrays: Arrays) -> dict[str, dict]:
    """dtype and shape of each array of one text, as ARRAYS has them. Args: of several, [B, ...]."""
    return {
        name: {"dtype": str(array.dtype), "shape": list(array.shape[1:])}
        for name, array in arrays.items()
    }


def to_records(texts: Sequence[str], arrays: Arrays) -> Iterator[records.Record]:
    """Args: B texts; what was made of them, [B, ...] by name."""
    for row, text in enumerate(texts):
        kept = {name: array[row].tobytes().rstrip(b"\0") for name, array in arrays.items()}
        yield {"prompt": text, **kept}


def _from_bytes(content: bytes, of: dict) -> np.ndarray:
    """Args: of, the array's part of `layout`."""
    dtype = jnp.dtype(of["dtype"])
    size = dtype.itemsize * int(np.prod(of["shape"]))
    return np.frombuffer(content.ljust(size, b"\0"), dtype).reshape(of["shape"])


def record_names(arrays: dict[str, dict]) -> list[str]:
    """What records have. Args: arrays, a `layout`."""
    return ["prompt", *arrays]


def hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64 [N]. Of ten million texts two have the same once in 400,000 times; a record's text is
    compared.
    """
    each = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(each), "<u8")


# Reading.


@dataclasses.dataclass(frozen=True, eq=False)
class TextCache:
    """A finished cache.

    folder: as it was given. local: it, or a copy of a bucket's.
    made, index, arrays: content of FILE, INDEX and ARRAYS.
    """

    folder: str
    local: Path
    made: dict[str, Any]
    index: np.ndarray
    arrays: dict[str, dict]

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.index)

    def lacking(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that are not in it."""
        return [texts[i] for i in np.flatnonzero(self._numbers(texts) < 0)]

    def _numbers(self, texts: Sequence[str]) -> np.ndarray:
        """Of each text's record; -1 where there is none."""
        wanted = hashes(texts)
        places = np.searchsorted(self.index, wanted, sorter=self._order)
        numbers = self._order[np.minimum(places, len(self.index) - 1)]
        return np.where(self.index[numbers] == wanted, numbers, -1)

    def read(self, texts: Sequence[str]) -> Arrays:
        """What was made of B texts, which must be in it: [B, ...] by name.

        Raises: UserError for one that is not there.
        """
        numbers = self._numbers(texts)
        rows = [self._record(text, int(number)) for text, number in zip(texts, numbers)]
        return {name: np.stack([row[name] for row in rows]) for name in self.arrays}

    def _record(self, text: str, number: int) -> Arrays:
        shard, place = divmod(number, SHARD)
        record = self._shard(shard)[place] if number >= 0 else {"prompt": b""}
        if number < 0 or record["prompt"].decode() != text:
            raise UserError(f"the text cache {self.folder} lacks the prompt {text[:60]!r}")
        return {name: _from_bytes(record[name], of) for name, of in self.arrays.items()}

    @functools.cached_property
    def _shard(self) -> Callable[[int], Sequence[dict[str, bytes]]]:
        names = record_names(self.arrays)
        return functools.lru_cache(_OPEN)(
            lambda number: records.read(self.local / shard_name(number), names)
        )

    def batch(self, texts: Sequence[str], rewards: dict[str, Any]) -> dict[str, Any]:
        """What a step is given of B prompts: their states under TEXT, and by name what a reward
        makes of them, where the cache has it.

        Args: rewards, shapes of what each makes of prompts.
        """
        found = self.read(texts)
        text = Condition(**{name: found.get(f"{TEXT}.{name}") for name in Condition._fields})
        of_rewards = {name: _like({name: shapes}, found) for name, shapes in rewards.items()}
        return {TEXT: text} | {
            name: tree[name] for name, tree in of_rewards.items() if tree is not None
        }


def open_cache(folder: str) -> TextCache:
    """Reads what a cache is; its records stay where they are, a bucket's are copied here first.

    Raises: UserError where there is none, or one that is not finished.
    """
    local = buckets.local(folder)
    if not (local / FILE).is_file():
        raise UserError(
            f"no text cache in {folder}, expected {FILE}; make one with di-star cache_text "
            f"--config=... --out={folder}"
        )
    made = folders.read_object(local / FILE)
    if not made.get("finished"):
        raise UserError(
            f"the text cache {folder} is not finished; give the command that made it again, which "
            "goes on"
        )
    arrays = folders.read_object(local / shard_name(0) / ARRAYS)
    return TextCache(folder, local, made, np.load(local / INDEX), arrays)


def check_same(
    cache: TextCache,
    reference: Path,
    dtype: str,
) -> None:
    """Refuses a cache of other text encoders. Args: as of `made_of`. Raises: UserError."""
    other = differences(cache.made, made_of(reference, dtype))
    if other:
        raise UserError(
            f"data.cache={cache.folder} was made of other text encoders: {other}; make one for "
            "this config with di-star cache_text"
        )


def differences(kept: dict[str, Any], now: dict[str, Any]) -> str:
    """In what two things differ of those that `now` has, in words; "" where they agree."""
    told = []
    for name, value in now.items():
        if kept.get(name) == value:
            continue
        if isinstance(value, str):
            told.append(f"{name} {kept.get(name)!r}, expected {value!r}")
        else:
            told.append(name)
    return "; ".join(told)


def check_prompts(
    cache: TextCache,
    option: str,
    texts: Sequence[str],
) -> None:
    """Refuses a cache that lacks prompts of a run. Args: option, that they are of.

    Raises: UserError with their number and the first.
    """
    lacking = cache.lacking(texts)
    if lacking:
        raise UserError(
            f"data.cache={cache.folder} lacks {len(lacking)} of the {len(texts)} prompts of "
            f"{option}, the first is {lacking[0][:60]!r}; make one for this config with di-star "
            "cache_text"
        )


def check_rewards(
    cache: TextCache,
    texts: Sequence[str],
    rewards: dict[str, Callable[[list[str]], Any]],
) -> None:
    """Refuses a cache whose rewards had other tokenizers. Args: texts that are in it.

    Raises: UserError.
    """
    tried = texts[:_TRIED]
    found = cache.read(tried)
    for name, tokenize in rewards.items():
        for leaf, ids in named({name: tokenize(tried)}).items():
            if leaf in found and not np.array_equal(found[leaf], ids):
                raise UserError(
                    f"data.cache={cache.folder} has token ids of another tokenizer for {name}; "
                    "make one for this config with di-star cache_text"
                )
