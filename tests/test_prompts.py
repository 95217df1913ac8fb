# SPDX-License-Identifier: Apache-2.0
import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from di_star_jax.errors import UserError
from di_star_jax.prompts import source as prompt_source
from di_star_jax.prompts.files import Layout, read
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.shapes import scenes
from di_star_jax.shapes.tokenizer import END, learn_merges, make_word_tokenizer

REAL = Path(__file__).parent.parent.parent / "shared" / "prompts"
with_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real prompt lists are not beside this checkout"
)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def texts(path):
    return [prompt.text for prompt in read(path, Layout())]


def load(path, folder):
    return prompt_source.load(path, folder, column="", option="data.prompts")


def test_every_format_gives_the_same_prompts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    expected = ['a "red" cat', "ein Käse, bitte", "猫"]
    files = [
        write(
            tmp_path / "a.txt",
            "\ufeff" + "\r\n".join([expected[0], "  ", expected[1] + " ", expected[2], ""]),
        ),
        write(
            tmp_path / "a.tsv",
            "id\tprompt\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(expected)),
        ),
        write(tmp_path / "a.csv", 'prompt,id\n"a ""red"" cat",1\n"ein Käse, bitte",2\n猫,3\n'),
        write(tmp_path / "a.json", json.dumps([{"prompt": p} for p in expected])),
        write(tmp_path / "a.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for p in expected)),
    ]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": expected}), tmp_path / "a.parquet")
    for path in (*files, tmp_path / "a.parquet"):
        assert texts(path) == expected, path.name


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\nbad \xff byte\n", "line 2: byte 0xff is not UTF-8"),
        ("a.txt", b"a\0b\n", "row 0 holds a NUL"),
        ("a.txt", b"x" * 20_000, "row 0 has 20000 characters, expected at most 10000"),
        ("a.txt", b"\n  \n", "holds no prompts"),
        ("a.csv", b"id,words\n1,a cat\n", "columns id, words, expected prompt or Prompt"),
        ("a.jsonl", b"{not json}\n", "is not JSONL"),
        ("a.parquet", b"nothing", "not readable as parquet"),
        ("a.pkl", b"", "is a pickle, which can run code"),
        ("a.zip", b"", "ends in .zip, expected .txt or .tsv"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name, tmp_path / "data")
    assert "\n" not in str(error.value)


DAMAGED = {
    "commas unquoted": ("a.csv", "prompt\na cat, on a mat, 4k\n", "row 0 has 3 cells, .*quote a"),
    "commas before a nameless column": ("a.csv", "prompt,\na cat, on a mat\n", "row 0 has 2 cells"),
    "a cell missing": ("a.csv", "prompt,style\na dog,ink\na cat\n", "row 1 has 1 cells"),
    "a cell of a .tsv missing": ("a.tsv", "style\tprompt\nink\n", "row 0 has 1 cells"),
    "a cell of a .tsv too many": ("a.tsv", "prompt\na cat\ton a mat\n", "row 0 has 2 cells, .*tab"),
    "a quote left open": ("a.csv", 'prompt\n"a cat\na dog\n', "line 3: unexpected end of data"),
    "a quote that swallows": ("a.csv", 'prompt\n"a cat\n"a dog"\n', "line 3: ',' expected after"),
    "two columns of a name": (
        "a.csv",
        "prompt,prompt\na,b\n",
        "two columns 'prompt', expected one",
    ),
    "two keys of a name": ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1.*is there twice"),
    "another column in a row": ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "row 1 has the col"),
    "no text in a row": ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "row 1 holds None"),
    "a line cut": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', "line 2, is not JSONL"),
    "NUL in another column": ("a.csv", "prompt,style\na cat,\0ink\n", "row 0 holds a NUL"),
    "ends of lines of old Macs": ("a.txt", "a cat\ra dog\r", "line 1 holds a carriage return"),
}


@pytest.mark.case("faults 8")
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_row_is_refused_and_not_a_shorter_or_a_missing_prompt(tmp_path, name):
    file, content, message = DAMAGED[name]
    path = write(tmp_path / file, content)
    with pytest.raises(UserError, match=message) as error:
        prompt_source.load(path, tmp_path / "data")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_column_of_row_numbers_without_a_name_and_quoted_lines_are_no_damage(tmp_path):
    path = write(tmp_path / "a.csv", ',prompt\n0,"a cat,\non a mat"\n\n1,a dog\n')
    found = [
        (prompt.row, prompt.text, prompt.categories) for prompt in read(path, Layout(keep=None))
    ]
    assert found == [(0, "a cat,\non a mat", {}), (2, "a dog", {})]


@pytest.mark.case("faults 20")
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"prompt":' * 100_000, "line 1, is nested too deeply"),
        ("a.jsonl", '"a dog"\n"a cat \\ud83d"\n', "row 1 holds half of a surrogate pair"),
        ("a.jsonl", '{"prompt": "a", "style": "\\ud83d"}', "row 0 holds half of a surrogate pair"),
    ],
)
def test_json_that_no_text_comes_of_is_refused_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        prompt_source.load(path, tmp_path / "data")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.case("faults 20")
def test_many_prompts_share_records_which_take_a_tenth_of_the_time_of_one_for_each(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"prompt number {i} of many\n" for i in range(60_000)))
    source = load(path, tmp_path / "data")  # 0.15 s; 1.6 s with a record a prompt
    assert len(source) == 60_000 and len(source.records) == 938
    for i in (0, 63, 64, 59_999):
        assert source[i] == (i, f"prompt number {i} of many", {})
    with pytest.raises(IndexError):
        source[60_000]


@pytest.mark.case("faults 20")
@pytest.mark.parametrize("damage", ["cut", "changed", "lost", "unfinished"])
def test_a_data_source_damaged_by_a_stop_is_written_anew(tmp_path, damage):
    path = write(tmp_path / "a.txt", "".join(f"prompt {i}\n" for i in range(500)))
    expected = list(load(path, tmp_path / "data"))
    (seal,) = (tmp_path / "data").rglob("whole.json")
    (records,) = seal.parent.rglob("*.array_record*")
    whole = records.read_bytes()
    if damage == "cut":
        records.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        records.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "lost":
        records.unlink()
    else:
        seal.unlink()
        records.write_bytes(b"")
    assert list(load(path, tmp_path / "data")) == expected and records.read_bytes() == whole


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no prompt file"):
        load(tmp_path / "nowhere.txt", tmp_path / "data")


def test_source_keeps_order_and_rows_and_is_rebuilt_when_the_file_changes(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\nthree\n")
    source = load(path, tmp_path / "data")
    assert [prompt.text for prompt in source] == ["one", "two", "three"]
    assert [prompt.row for prompt in source] == [0, 2, 3]
    write(path, "four\n")
    assert [prompt.text for prompt in load(path, tmp_path / "data")] == ["four"]


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_step_sees_the_same_prompts_on_any_number_of_hosts(hosts):
    source = [f"prompt {i}" for i in range(30)]
    for step in (0, 1, 7):
        whole = prompt_source.PromptStream(source, seed=3, batch_size=8).at(step)
        stream = prompt_source.PromptStream(source, seed=3, batch_size=8)
        rows = [range(8)[8 // hosts * host :][: 8 // hosts] for host in range(hosts)]
        assert [p for part in rows for p in stream.at(step, part)] == whole


def test_each_pass_sees_every_prompt_once_in_a_new_order():
    source = [f"prompt {i}" for i in range(24)]
    stream = prompt_source.PromptStream(source, seed=0, batch_size=8)
    passes = [[p for step in range(3 * n, 3 * n + 3) for p in stream.at(step)] for n in range(2)]
    assert all(collections.Counter(p) == collections.Counter(source) for p in passes)
    assert passes[0] != passes[1]
    assert prompt_source.PromptStream(source, seed=1, batch_size=8).at(0) != stream.at(0)


def test_word_tokenizer_gives_one_token_a_word_and_pads_as_asked(tmp_path):
    size = make_word_tokenizer(
        ["red", "circle", "circles", "a", "right", "ride"],
        tmp_path / "one",
        max_length=8,
        pad_token=END,
    )
    make_word_tokenizer(
        ["red", "circle", "circles", "a", "right", "ride"],
        tmp_path / "two",
        max_length=8,
        pad_token="!",
    )
    first, second = Tokenizer(tmp_path / "one"), Tokenizer(tmp_path / "two")
    ids = first(["a red circle"])
    assert ids.shape == (1, 8) and ids.dtype == "int32"
    start, end = size - 2, size - 1
    assert ids[0, 0] == start and ids[0, 4:].tolist() == [end] * 4
    assert second(["a red circle"])[0].tolist() == [*ids[0, :5].tolist(), 0, 0, 0]
    for word in ("circles", "right", "ride"):
        assert (first([word])[0] != end).sum() == 2
    assert first(["x" * 40]).shape == (1, 8)  # unknown words fall into bytes


def test_the_same_words_have_the_same_tokens_in_any_process():
    code = (
        "from di_star_jax.shapes import scenes; "
        "from di_star_jax.shapes.tokenizer import learn_merges; "
        "print(learn_merges(scenes.words()))"
    )
    here = {str(learn_merges(scenes.words())) for _ in range(20)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert here == {done.stdout.strip()}


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer(tmp_path)


@with_real
@pytest.mark.parametrize(
    "name, count",
    [
        ("parti_prompts.tsv", 1632),
        ("coco2014_val_30k.txt", 30_000),
        ("coco2014_val_mlperf_5k.tsv", 5000),
        ("geneval_metadata.jsonl", 553),
        ("dpg_bench.jsonl", 1065),
        ("imagereward_benchmark.json", 100),
        ("diffusiondb_refl_filtered.txt", 8706),
    ],
)
def test_published_prompt_lists_are_read_whole(name, count):
    assert len(texts(REAL / name)) == count


@with_real
def test_a_published_list_becomes_a_data_source_with_its_quotes_and_accents(tmp_path):
    source = load(REAL / "parti_prompts.tsv", tmp_path)
    direct = texts(REAL / "parti_prompts.tsv")
    assert len(source) == 1632 and any('"' in p for p in direct)
    for i in (0, 17, 800, 1631):
        assert source[i].text == direct[i]
