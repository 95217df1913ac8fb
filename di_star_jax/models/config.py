# SPDX-License-Identifier: Apache-2.0
"""A file's fields as a frozen dataclass: each is followed, known to be harmless, or refused.

The dataclass's fields are those that are followed; its annotations and the tables below say what
their values may be. `Fields` says what is made of all others.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from di_star_jax.errors import UserError

Config = TypeVar("Config")

# Bounds of fields that are followed; of others an int is in 1..65536, a float from 0 on. They are
# wide enough for any model that was published, and keep arithmetic and memory finite.
_SMALLEST = {
    "eos_token_id": 0,
    "steps_offset": 0,
    "freq_shift": -math.inf,
    "logit_scale_init_value": -math.inf,
    "scaling_factor": 1e-6,
    "interpolation_scale": 1e-3,
    "beta_start": 1e-12,
    "beta_end": 1e-12,
}
_LARGEST = {
    "vocab_size": 2**20,
    "eos_token_id": 2**20,
    "layers_per_block": 16,
    "num_decoder_blocks": 16,
    "transformer_layers_per_block": 128,
    "num_hidden_layers": 1024,
    "num_layers": 1024,
    "image_size": 4096,
    "beta_start": 0.999,
    "beta_end": 0.999,
}
_MOST_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Fields:
    """What is made of the fields of a file that its dataclass does not have.

    fixed: by name the values that the port implements, the one for an absent field first.
    harmless: names of those that change no picture.
    file: what to call a file whose path is not known; advice, what to add to an error.
    """

    fixed: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str]
    file: str
    advice: str = ""


# Of every config.json of transformers: how to train, to generate text, to report.
_GENERAL = """
    add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
"""
TRANSFORMERS = frozenset(_GENERAL.split())


def shown(value: Any) -> str:
    """A field's value in an error: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _equal(value: Any) -> Any:
    """The number of a list of equal numbers, as files have one for each block; else the value."""
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _refuse(
    where: str,
    name: str,
    value: Any,
    expected: str,
) -> UserError:
    return UserError(f"{where} has {name}={shown(value)}, {expected}")


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Equality that tells 0 from false and 1 from true."""
    flag = isinstance(value, bool)
    return any(value == one and flag == isinstance(one, bool) for one in values)


def check_others(
    fields: Fields,
    config: Mapping[str, Any],
    where: str,
    followed: typing.Container[str],
) -> None:
    """Raises: UserError for a field that is neither followed nor fixed nor harmless.

    Other names with an underscore first are notes of the library that wrote the file. A name that
    nobody knows is of a newer library: null and false are taken as 'not in use'.
    """
    for name, value in config.items():
        if name in followed or name in fields.harmless:
            continue
        only = fields.fixed.get(name)
        if only is None and name.startswith("_"):
            continue
        if only is None and (value is None or value is False):
            continue
        if only is None:
            expected = "a field that the port does not know, so it is not ignored"
            raise _refuse(where, name, value, expected + fields.advice)
        if not _is_one_of(value, only) and not _is_one_of(_equal(value), only):
            expected = f"the port implements {' and '.join(map(repr, only))} only"
            raise _refuse(where, name, value, expected + fields.advice)


def _number(name: str, value: Any, hint: type) -> tuple[Any, str]:
    """(value or None where it is wrong, what is expected) of an int or a float."""
    value = _equal(value)
    smallest = _SMALLEST.get(name, 1 if hint is int else 0)
    largest = _LARGEST.get(name, 65536 if hint is int else math.inf)
    wanted = "an integer" if hint is int else "a finite number"
    expected = f"expected {wanted} in {smallest}..{largest}"
    kinds = int if hint is int else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    # A float beyond 1e300 is no size, and an integer beyond is no float.
    if not right or not smallest <= value <= largest or not abs(value) <= 1e300:
        return None, expected
    return hint(value), expected


def _typed(
    where: str,
    name: str,
    value: Any,
    hint: Any,
) -> Any:
    """The value of a followed field as its annotation wants it. Raises: UserError."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = hint.__args__[0]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MOST_BLOCKS:
            raise _refuse(where, name, value, f"expected a list of 1 to {_MOST_BLOCKS} values")
        if any(isinstance(item, list | tuple) for item in value):
            raise _refuse(where, name, value, "expected a list of single values")
        return tuple(_typed(where, name, item, hint.__args__[0]) for item in value)
    if hint in (int, float):
        found, expected = _number(name, value, hint)
        if found is None:
            raise _refuse(where, name, value, expected)
        return found
    if not isinstance(value, hint):
        expected = {str: "a text", bool: "true or false"}.get(hint, "an object")
        raise _refuse(where, name, value, f"expected {expected}")
    return value


def from_json(
    cls: type[Config],
    config: Mapping[str, Any],
    fields: Fields,
    file: str | None = None,
) -> Config:
    """`cls` of the fields that it shares with a parsed file, its defaults for what is absent.

    Args:
      cls: a dataclass; lists become tuples, and a list of equal numbers the number where one is
        wanted.
      config: the parsed file.
      fields: what is made of the others.
      file: the file's path, for errors.
    Raises: UserError for a field that cannot be followed.
    """
    where = file or fields.file
    hints = typing.get_type_hints(cls)
    check_others(fields, config, where, hints)
    return cls(
        **{
            name: _typed(where, name, value, hints[name])
            for name, value in config.items()
            if name in hints
        }
    )


def check_class(
    config: Mapping[str, Any],
    expected: str,
    file: str,
    advice: str,
) -> None:
    """Raises: UserError where a config.json of diffusers is of another class."""
    name = config.get("_class_name", expected)
    if name != expected:
        raise UserError(
            f"wrong architecture: {file} is of a {shown(name)}, expected {expected}; {advice}"
        )


def check_divides(
    built: Any,
    field: str,
    by: str,
    file: str,
) -> None:
    """Raises: UserError where the field `by` of a config does not divide its field `field`."""
    size, parts = getattr(built, field), getattr(built, by)
    if size % parts:
        raise UserError(
            f"{file} has {field}={size}, which is not divisible by {by}={parts}; change one of them"
        )
