# SPDX-License-Identifier: Apache-2.0
"""T5's tokenizer against sentencepiece and transformers, on a small model of its kind.

The token ids of sentencepiece, and of transformers with it, are kept in t5_reference/.
"""

import functools
import json
import logging
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import t5_reference as reference
import transformers

from di_star_jax.errors import UserError
from di_star_jax.pipelines import card, export
from di_star_jax.prompts import t5
from di_star_jax.prompts.t5 import T5Tokenizer
from di_star_jax.prompts.tokens import Tokenizer, check_lengths
from di_star_jax.shapes.tokenizer import make_word_pieces, make_word_tokenizer, unknown_words
from di_star_jax.storage import folders

with_real = pytest.mark.skipif(
    not reference.PROMPTS.is_dir(), reason="the real prompt lists are not beside this checkout"
)
IDS = json.loads(reference.IDS.read_text())
# Four marks on a letter: transformers, which is followed, takes them off, sentencepiece does not.
STACKED_MARKS = "a\u0301\u0302\u0303\u0304"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As published: spiece.model and small json files."""
    return reference.write_folder(tmp_path_factory.mktemp("t5") / "tokenizer")


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The tokenizer's folder of an exported pipeline."""
    pipeline = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(folder, pipeline / "tokenizer")
    (pipeline / "scheduler").mkdir()
    folders.write_object(pipeline.joinpath(*folders.SCHEDULER), {"_class_name": "Some"})
    parts = {
        "_class_name": "PixArtAlphaPipeline",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "Some"],
        "scheduler": ["diffusers", "Some"],
    }
    folders.write_object(pipeline / "model_index.json", parts)
    network = export.Denoiser({"linear": {"kernel": np.ones((2, 2), np.float32)}}, {}, None)
    output = pipeline.parent / "exported"
    about = card.About("ema", (card.Base("reference"),))
    export.export_pipeline(network, about, reference_folder=pipeline, output=output)
    return output / "tokenizer"


def _error(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ids_of_odd_strings_are_those_of_transformers_and_sentencepiece(folder):
    texts = reference.strings()
    ours = T5Tokenizer(folder)(texts)
    assert ours.shape == (500, 120) and ours.dtype == np.int32
    np.testing.assert_array_equal(ours, reference.rows(IDS["strings"]["transformers"]))
    theirs = np.array(reference.rows(IDS["strings"]["sentencepiece"]))
    differ = {text for text, a, b in zip(texts, ours, theirs) if (a != b).any()}
    assert differ == {text for text in texts if STACKED_MARKS in text}


@with_real
def test_ids_of_real_prompts_are_those_of_transformers_and_sentencepiece(folder, exported):
    prompts = reference.real_prompts()
    assert len(prompts) == 2000
    ours = T5Tokenizer(folder)(prompts)
    theirs = transformers.T5Tokenizer.from_pretrained(exported)(
        reference.cleaned(prompts), padding="max_length", truncation=True, max_length=120
    )
    np.testing.assert_array_equal(ours, theirs["input_ids"])
    for name, digest in IDS["prompts"].items():
        assert reference.digest(ours.tolist()) == digest, name


def test_an_export_is_read_by_transformers_and_here_without_sentencepiece(
    folder, exported, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    model = (folder / "spiece.model").read_bytes()
    assert (exported / "spiece.model").read_bytes() == model, "for older transformers"
    texts = reference.strings()
    expected = T5Tokenizer(folder)(texts)
    np.testing.assert_array_equal(T5Tokenizer(exported)(texts), expected)
    for cls in (transformers.T5Tokenizer, transformers.AutoTokenizer):
        found = cls.from_pretrained(exported)(
            reference.cleaned(texts), padding="max_length", truncation=True, max_length=120
        )
        np.testing.assert_array_equal(found["input_ids"], expected)
        np.testing.assert_array_equal(found["attention_mask"], expected != 0)


def test_an_empty_prompt_is_the_end_of_text_and_case_and_blanks_do_not_count(folder, caplog):
    t5._say_cleaning.cache_clear()
    with caplog.at_level(logging.INFO, logger=t5.__name__):
        tokenize = T5Tokenizer(folder)
        T5Tokenizer(folder)
    assert ["lower case" in message for message in caplog.messages] == [True]
    ids = tokenize(["", " \n", "A Red CAT, sitting ", "a red cat, sitting"])
    assert (ids[:2, 0] == 1).all() and (ids[:2, 1:] == 0).all()
    np.testing.assert_array_equal(ids[2], ids[3])
    assert tokenize.pieces("A red cat") == ["▁a", "▁red", "▁cat"]


def test_prompts_that_are_cut_are_counted_and_the_first_is_told(folder):
    tokenize = T5Tokenizer(folder)
    fits, long = "cat " * 119, "cat " * 120
    assert tokenize.too_long(["a cat", fits]) is None
    assert tokenize([long])[0].tolist() == tokenize([fits])[0].tolist(), "the end is kept"
    told = tokenize.too_long(["a cat", long, "a dog", "dog " * 600])
    assert "2 of 4 prompts have over 120 tokens" in told
    assert "the first, with 121, is 'cat cat" in told and len(told) < 200
    many = "\u338f" * 100  # kg, each one letter
    assert len(tokenize.pieces(many)) > 119 and "1 of 1" in tokenize.too_long([many])
    message = _error(lambda: check_lengths(tokenize, [long], "data.prompts"))
    assert message.startswith("data.prompts: 1 of 1 prompts have over 120") and "shorten" in message


def test_a_vocabulary_that_the_encoder_has_no_table_for_is_refused(folder):
    tokenize = T5Tokenizer(folder)
    tokenize.check_fits(SimpleNamespace(vocab_size=reference.SIZE + 100), "text_encoder")
    message = _error(lambda: tokenize.check_fits(SimpleNamespace(vocab_size=2099), "text_encoder"))
    assert "has 2100 tokens, but text_encoder has vocab_size=2099" in message


def test_spiece_model_is_fetched_from_a_bucket(folder, bucket):
    import gcsfs

    fs = gcsfs.GCSFileSystem()
    for path in folder.iterdir():
        fs.put_file(str(path), f"{bucket.url}/t5/tokenizer/{path.name}")
    found = folders.resolve_tokenizer(f"{bucket.url}/t5")
    np.testing.assert_array_equal(
        T5Tokenizer(found / "tokenizer")(["a cat"]), T5Tokenizer(folder)(["a cat"])
    )


# What is refused. A later field of a Protocol Buffers message wins over the ones before.


def _field(number, content):
    """Of a message: bytes, or a small integer."""
    number = number << 3 | (0 if isinstance(content, int) else 2)
    key = [number] if number < 128 else [number & 127 | 128, number >> 7]
    if isinstance(content, int):
        return bytes([*key, content])
    return bytes([*key, len(content)]) + content


def _trainer(number, value):
    return _field(2, _field(number, value))


def _model(change):
    def write(folder):
        file = folder / "spiece.model"
        file.write_bytes(change(file.read_bytes()))

    return write


def _config(**fields):
    return lambda folder: folders.write_object(folder / "tokenizer_config.json", fields)


def _json(text):
    return lambda folder: (folder / "tokenizer.json").write_text(text)


def _clips(folder):
    make_word_tokenizer(["cat"], folder / "clip", max_length=8, pad_token="!")
    shutil.copy(folder / "clip" / "tokenizer.json", folder)


_TRUNCATED = "is no whole SentencePiece model"


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda f: (f / "spiece.model").unlink(),
            "no T5 tokenizer in .*, expected spiece.model or",
        ),
        (_model(lambda data: data[:5000]), _TRUNCATED),
        (_model(lambda data: data[: len(data) // 2]), _TRUNCATED),
        (_model(lambda data: data[:-1]), _TRUNCATED),
        (_model(lambda data: b""), _TRUNCATED),
        (_model(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), _TRUNCATED),
        (_model(lambda data: data + _trainer(3, 2)), "is a BPE model, expected Unigram"),
        (_model(lambda data: data + _trainer(35, 1)), "unknown characters in bytes"),
        (_model(lambda data: _field(1, _field(1, b"x")) + data), r"begins with the pieces \('x', "),
        (
            _model(lambda data: data + _field(1, _field(1, b"x") + _field(3, 4))),
            "has the piece 'x' of type 4",
        ),
        (_model(lambda data: data + _field(3, _field(4, 0))), "remove_extra_whitespaces=false"),
        (_model(lambda data: data + _field(3, b"")), "replaces no characters, expected the table"),
        (_model(lambda data: data + _field(3, _field(2, b"abc"))), "transformers cannot read"),
        (_config(tokenizer_class="LlamaTokenizer"), "tokenizer_class='LlamaTokenizer', expected"),
        (_json("{"), "tokenizer.json is not JSON"),
        (_json("{}"), "transformers cannot read the tokenizer"),
        (_clips, "transformers cannot read the tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_t5s_is_refused_in_one_line(folder, tmp_path, break_it, message):
    broken = shutil.copytree(folder, tmp_path / "tokenizer")
    break_it(broken)
    with pytest.raises(UserError, match=message) as error:
        T5Tokenizer(broken)
    assert "\n" not in str(error.value)


def test_clips_tokenizer_refuses_t5s_folder(folder):
    assert "no tokenizer in" in _error(functools.partial(Tokenizer, folder))


def test_a_small_worlds_pieces_are_its_words_and_transformers_reads_them(tmp_path):
    words = ["red", "circle", "circles", "a", "right", "ride"]
    assert make_word_pieces(words, tmp_path) == 10  # with pad, end, unknown and the blank
    ours = T5Tokenizer(tmp_path)
    texts = ["A red  circle", "circles right ride", "a cat", ""]
    ids = ours(texts)
    assert ids.shape == (4, 120) and len(ours) == 10
    red, circle, circles, a, right, ride = range(4, 10)
    blank, unknown = 3, 2
    expected = [[a, red, circle, 1], [circles, right, ride, 1], [a, blank, unknown, 1], [1]]
    assert [row[row != 0].tolist() for row in ids] == expected
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.T5Tokenizer) and theirs.model_max_length == 120
    assert theirs([text.lower() for text in texts])["input_ids"] == expected
    assert unknown_words(ours, ["a red cat", "circle"]) == ["cat"]
