# SPDX-License-Identifier: Apache-2.0
import collections
import functools
import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from di_star_jax.errors import UserError
from di_star_jax.prompts import sets as prompt_sets
from di_star_jax.prompts.source import load

REAL = Path(__file__).parent.parent.parent / "shared" / "prompts"
with_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real prompt lists are not beside this checkout"
)
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\r\n"
    'a "red" cat\tAnimals\tBasic\tof one\r\n'
    "  a dog \tAnimals\tQuantity\t\r\n"
    " \tAnimals\tBasic\tnothing\r\n"
    'a "red" cat\tArts\tBasic\t\r\n'
)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_hpsv2(folder, leave_out=""):
    for style in ("anime", "concept-art", "paintings", "photo"):
        if style != leave_out:
            write(folder / f"{style}.json", json.dumps([f"{style} {i}" for i in range(3)]))
    write(folder / "drawbench.json", json.dumps(["not one of the four styles"]))
    return folder


def prompts_of(name, path):
    spec = prompt_sets.PROMPT_SETS[name] if name else prompt_sets.own_file()
    return prompt_sets.read(spec, path)


def read(name, path):
    return [tuple(prompt) for prompt in prompts_of(name, path)]


def jsonl(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_parti_keeps_rows_duplicates_and_both_kinds_of_category(tmp_path):
    assert read("parti", write(tmp_path / "PartiPrompts.tsv", PARTI)) == [
        (0, 'a "red" cat', {"Category": "Animals", "Challenge": "Basic"}),
        (1, "a dog", {"Category": "Animals", "Challenge": "Quantity"}),
        (3, 'a "red" cat', {"Category": "Arts", "Challenge": "Basic"}),
    ]


def test_hpsv2_names_each_prompt_by_style_and_index_as_the_published_pictures_are(tmp_path):
    found = read("hpsv2", write_hpsv2(tmp_path))
    assert [row for row, _, _ in found] == list(range(12))
    assert found[4] == (4, "concept-art 1", {"style": "concept-art", "index": "1"})
    assert found[11] == (11, "photo 2", {"style": "photo", "index": "2"})


def test_coco_is_read_from_a_plain_list_from_mlperf_and_from_the_annotations(tmp_path):
    assert read("coco", write(tmp_path / "captions.txt", "A dog.\nA cat. \nA dog.\n")) == [
        (0, "A dog.", {}),
        (1, "A cat.", {}),
        (2, "A dog.", {}),
    ]
    expected = [(0, "A dog.", {"image_id": "42", "id": "7"})]
    assert (
        read(
            "coco", write(tmp_path / "a.tsv", "id\timage_id\tcaption\theight\n7\t42\tA dog.\t480\n")
        )
        == expected
    )
    annotations = {
        "info": {},
        "images": [{"id": 42}],
        "annotations": [{"image_id": 42, "id": 7, "caption": "A dog.\n"}],
    }
    assert (
        read("coco", write(tmp_path / "captions_val2014.json", json.dumps(annotations))) == expected
    )


def test_drawbench_is_a_quoted_table_with_categories(tmp_path):
    path = write(
        tmp_path / "a.csv",
        '"Prompts","Category"\n"A red car, and ""Hi""","Colors"\nTwo\u2028dogs.,"Counting"\n',
    )
    assert read("drawbench", path) == [
        (0, 'A red car, and "Hi"', {"Category": "Colors"}),
        (1, "Two\u2028dogs.", {"Category": "Counting"}),
    ]


def test_geneval_keeps_its_tags(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        jsonl(
            {
                "tag": "counting",
                "include": [{"class": "cow", "count": 2}],
                "prompt": "a photo of two cows",
            }
        ),
    )
    assert read("geneval", path) == [(0, "a photo of two cows", {"tag": "counting"})]


def test_dpg_bench_gives_the_same_prompts_from_its_table_of_questions_its_folder_and_json(tmp_path):
    table = write(
        tmp_path / "dpg_bench.csv",
        "item_id,text,keywords,proposition_id\n"
        '1,A long prompt.,,1\n1,A long prompt.,,2\ncoco5,"Another, longer.",,1\n',
    )
    folder = tmp_path / "prompts"
    write(folder / "1.txt", "A long prompt.\n")
    write(folder / "coco5.txt", "Another,\nlonger.")
    lines = write(
        tmp_path / "a.jsonl",
        jsonl(
            {"id": "1", "prompt": "A long prompt."}, {"id": "coco5", "prompt": "Another, longer."}
        ),
    )
    first, second = (
        (0, "A long prompt.", {"item_id": "1"}),
        ("Another, longer.", {"item_id": "coco5"}),
    )
    assert read("dpg", table) == [first, (2, *second)]
    assert read("dpg", folder) == [first, (1, *second)]
    assert read("dpg", lines) == [
        (0, "A long prompt.", {"id": "1"}),
        (1, "Another, longer.", {"id": "coco5"}),
    ]


def test_laion_and_pickapic_are_read_from_text_and_parquet(tmp_path):
    text = write(tmp_path / "a.txt", "a lake\n\na hill\n")
    laion = write_parquet(
        tmp_path / "laion.parquet", URL=["u"] * 3, TEXT=["a lake", None, "a hill"]
    )
    pickapic = write_parquet(
        tmp_path / "pickapic.parquet", jpg_0=[b"\xff"] * 3, caption=["a lake", "", "a hill"]
    )
    for name, path in (
        ("laion", text),
        ("laion", laion),
        ("pickapic", text),
        ("pickapic", pickapic),
    ):
        assert read(name, path) == [(0, "a lake", {}), (2, "a hill", {})], path.name


@pytest.mark.parametrize(
    "name, content, kept",
    [
        ("a.csv", "prompt,style,level\na cat,ink,3\n", {"style": "ink", "level": "3"}),
        ("a.tsv", "style\tprompt\nink\ta cat\n", {"style": "ink"}),
        ("a.jsonl", jsonl({"prompt": "a cat", "style": "ink", "boxes": [1, 2]}), {"style": "ink"}),
        ("a.json", json.dumps(["a cat"]), {}),
        ("a.txt", "a cat", {}),
    ],
)
def test_further_columns_of_text_in_the_users_own_file_are_kept(tmp_path, name, content, kept):
    found = load(write(tmp_path / name, content), tmp_path / "data")
    assert list(found) == [(0, "a cat", kept)] and found.name == name
    assert found.verified is None and found.notes == ()


def test_further_columns_of_text_in_the_users_own_parquet_are_kept(tmp_path):
    import pyarrow

    path = write_parquet(
        tmp_path / "a.parquet",
        prompt=["a cat", "a dog"],
        image=[b"\xff"] * 2,
        size=[1, 2],
        style=pyarrow.array(["ink", None]).dictionary_encode(),
    )
    assert read("", path) == [(0, "a cat", {"style": "ink"}), (1, "a dog", {"style": ""})]


def test_a_loaded_set_keeps_what_was_read_and_is_built_anew_when_its_file_changes(tmp_path):
    path = write(tmp_path / "PartiPrompts.tsv", PARTI)
    found = load("parti", tmp_path / "data", file=path)
    assert [tuple(prompt) for prompt in found] == read("parti", path)
    assert found[0].text == 'a "red" cat' and found[2].row == 3 and found.name == "parti"
    assert found.digest == hashlib.sha256(PARTI.encode()).hexdigest()
    built = sorted((tmp_path / "data").iterdir())
    load("parti", tmp_path / "data", file=path)
    assert sorted((tmp_path / "data").iterdir()) == built
    write(path, PARTI.replace("dog", "döner"))
    assert load("parti", tmp_path / "data", file=path)[1].text == "a döner"


def test_a_run_trains_on_a_named_set_and_keeps_nothing_beside_the_prompts_of_a_file(tmp_path):
    path = write(tmp_path / "PartiPrompts.tsv", PARTI)
    options = {"column": "", "option": "data.prompts"}
    named = load("parti", tmp_path / "data", file=path, **options)
    own = load(path, tmp_path / "data", **options)
    assert [p.text for p in named] == ['a "red" cat', "a dog", 'a "red" cat']
    assert [p.text for p in own] == [p.text for p in named]
    assert named[1].categories["Challenge"] == "Quantity" and own[1].categories == {}
    with pytest.raises(UserError, match="add data.prompts_file=PATH_OR_URL"):
        load("parti", tmp_path / "data", **options)


def test_one_file_read_as_two_sets_is_two_data_sources(tmp_path):
    path = write(tmp_path / "a.tsv", PARTI)
    assert "Note" in load(path, tmp_path / "data")[0].categories
    assert "Note" not in load("parti", tmp_path / "data", file=path)[0].categories


def test_a_source_that_differs_from_the_published_one_is_used_and_says_so(tmp_path):
    found = load("parti", tmp_path / "data", file=write(tmp_path / "a.tsv", PARTI))
    assert found.verified is False
    assert "is not, byte for byte, the file of google-research/parti @ 5a65797" in found.notes[0]
    assert (
        found.notes[1].endswith("a.tsv holds 3 prompts, PartiPrompts 1,632")
        and len(found.notes) == 2
    )


def test_a_published_count_without_a_known_checksum_is_neither_verified_nor_refused(tmp_path):
    rows = "".join(f"prompt {i},Colors\n" for i in range(200))
    found = load(
        "drawbench", tmp_path / "data", file=write(tmp_path / "a.csv", "Prompts,Category\n" + rows)
    )
    assert found.verified is None and found.notes == ()


def test_a_folders_digest_is_that_of_its_list_of_checksums(tmp_path):
    found = load("hpsv2", tmp_path / "data", file=write_hpsv2(tmp_path / "benchmark"))
    files = [
        tmp_path / "benchmark" / f"{style}.json"
        for style in ("anime", "concept-art", "paintings", "photo")
    ]
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files
    )
    assert found.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert (
        found.verified is None and "holds 12 prompts, the HPSv2 benchmark 3,200" in found.notes[0]
    )


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        (
            "parti",
            "a.tsv",
            "id\tcaption\n1\ta cat\n",
            "columns id, caption, expected Prompt, Category, Challenge; is this really "
            "PartiPrompts",
        ),
        ("parti", "a.tsv", "<html>" + "x" * 5000, "is this really PartiPrompts"),
        ("parti", "a.tsv", "Prompt\tCategory\na\tb\n", "expected Prompt, Category, Challenge"),
        (
            "parti",
            "a.txt",
            "a cat",
            "ends in .txt, expected .tsv; give PartiPrompts.tsv of google-research/parti",
        ),
        (
            "geneval",
            "a.jsonl",
            jsonl({"prompt": "a cat"}),
            "expected prompt, tag; is this really GenEval",
        ),
        (
            "geneval",
            "a.jsonl",
            '"a cat"\n',
            "holds 'a cat', expected objects with tag; is this really GenEval",
        ),
        ("hpsv2", "a.json", '["a cat"]', "expected a folder with anime.json, concept-art.json"),
        ("drawbench", "a.csv", "", "a.csv is empty, expected DrawBench"),
        ("drawbench", "a.csv", "Prompts,Category\n", "holds no prompts"),
        ("laion", "a.pkl", "x", "is a pickle, which can run code .* write its prompts to a .txt"),
        ("", "a.pkl", "x", "is a pickle"),
        (
            "",
            "a.csv",
            "words,style\na cat,ink\n",
            "columns words, style, expected prompt or .*; rename the prompts",
        ),
        ("", "a.csv", "prompt\nfine\n" + "x" * 20_000, "row 1 has 20000 characters"),
        ("coco", "a.json", '{"images": []}', "holds a NoneType, expected a list"),
    ],
)
def test_files_that_are_not_the_set_are_refused_in_one_line(tmp_path, name, file, content, message):
    path = write(tmp_path / file, content)
    with pytest.raises(UserError, match=message) as error:
        load(name or path, tmp_path / "data", file=path if name else "")
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="no paintings.json in .*; is this really the HPSv2 benchmark"
    ):
        read("hpsv2", write_hpsv2(tmp_path, leave_out="paintings"))
    with pytest.raises(UserError, match=r"no \*.txt in .*; is this really DPG-Bench"):
        read("dpg", tmp_path)


@pytest.mark.parametrize(
    "name, source, message",
    [
        (
            "parti",
            "",
            "needs PartiPrompts, which is PartiPrompts.tsv of google-.* "
            "add --prompts_file=PATH_OR_URL",
        ),
        ("drawbnch", "", "neither a file nor one of parti, hpsv2, .*, did you mean drawbench"),
        (
            "parti",
            "nowhere.tsv",
            "no prompt file nowhere.tsv; give the path or URL of PartiPrompts.tsv",
        ),
        ("nowhere.txt", "", "no prompt file nowhere.txt"),
        ("a.txt", "b.txt", "--prompts=a.txt is a file, and --prompts_file=b.txt another"),
        ("parti", "ftp://host/a.tsv", "starts with ftp://, expected http:// or https://"),
        ("laion", "https://host/captions.pkl", "is a pickle"),
    ],
)
def test_unknown_names_and_missing_sources_are_refused_in_one_line(tmp_path, name, source, message):
    with pytest.raises(UserError, match=message) as error:
        load(name, tmp_path, file=source)
    assert "\n" not in str(error.value)


def test_an_unknown_set_is_refused_whatever_its_file():
    with pytest.raises(UserError, match="did you mean geneval"):
        prompt_sets.resolve("genevel", "a.jsonl")


def test_columns_to_tabulate_by_are_columns_that_are_kept():
    for name, spec in prompt_sets.PROMPT_SETS.items():
        assert all(set(spec.groups) <= set(layout.keep) for layout in spec.forms.values()), name


class Handler(http.server.SimpleHTTPRequestHandler):
    """A folder of files; /short/ announces more than comes."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/short/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"too little")
            return
        super().do_GET()

    def log_message(self, *args):
        del args


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(folder that is served, its URL, paths asked for)."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    server.asked = []
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_once(tmp_path, web):
    folder, url, asked = web
    write(folder / "PartiPrompts.tsv", PARTI)
    for _ in range(2):
        assert len(load("parti", tmp_path / "data", file=f"{url}/PartiPrompts.tsv?raw=true")) == 3
    assert asked == ["/PartiPrompts.tsv?raw=true"]
    own = load(f"{url}/PartiPrompts.tsv", tmp_path / "data")
    assert own.name == "PartiPrompts.tsv" and own[0].categories["Note"] == "of one"


def test_a_url_of_a_folder_and_one_without_suffix_are_downloaded(tmp_path, web):
    folder, url, asked = web
    write_hpsv2(folder / "benchmark")
    write(folder / "export", "Prompts,Category\na red car,Colors\n")
    assert len(load("hpsv2", tmp_path / "data", file=f"{url}/benchmark/")) == 12
    assert len(asked) == 4 and "/benchmark/concept-art.json" in asked
    assert (
        load("drawbench", tmp_path / "data", file=f"{url}/export?format=csv")[0].text == "a red car"
    )


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("parti", "/nowhere.tsv", "HTTP Error 404"),
        ("parti", "/short/a.tsv", "10 of 1000 bytes came"),
        ("drawbench", "/page/", "is a web page"),
    ],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path, web, name, path, message):
    folder, url, _ = web
    write(folder / "page" / "index.html", "<html>")
    with pytest.raises(UserError, match=message) as error:
        load(name, tmp_path / "data", file=url + path)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(
        UserError, match="cannot download http://127.0.0.1:1/a.tsv .* and give its path"
    ):
        load("parti", tmp_path, file="http://127.0.0.1:1/a.tsv")


def test_a_round_trip_through_tfds_imports_neither_tensorflow_nor_torch(tmp_path):
    path = write(tmp_path / "a.tsv", PARTI)
    code = (
        "import sys; from di_star_jax.prompts.source import load; "
        f"p = load('parti', {str(tmp_path)!r}, file={str(path)!r}); "
        "assert len(p) == 3 and 'tensorflow_datasets' in sys.modules; "
        "print([m for m in ('torch', 'tensorflow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


@with_real
@pytest.mark.parametrize(
    "name, file, count, last",
    [
        (
            "parti",
            "parti_prompts.tsv",
            1632,
            {"Category": "Artifacts", "Challenge": "Writing & Symbols"},
        ),
        ("coco", "coco2014_val_30k.txt", 30_000, {}),
        ("coco", "coco2014_val_mlperf_5k.tsv", 5000, None),
        ("geneval", "geneval_metadata.jsonl", 553, {"tag": "color_attr"}),
        ("dpg", "dpg_bench.jsonl", 1065, None),
    ],
)
def test_published_files_are_whole_verified_and_without_notes(tmp_path, name, file, count, last):
    found = load(name, tmp_path, file=REAL / file)
    assert len(found) == count and found.verified is True and found.notes == ()
    assert [found[i].row for i in (0, count // 2, count - 1)] == [0, count // 2, count - 1]
    assert found.digest == hashlib.sha256((REAL / file).read_bytes()).hexdigest()
    if last is not None:
        assert found[count - 1].categories == last


@with_real
def test_published_categories_have_their_published_sizes():
    parti = list(prompts_of("parti", REAL / "parti_prompts.tsv"))
    sizes = {
        column: collections.Counter(p.categories[column] for p in parti)
        for column in ("Category", "Challenge")
    }
    assert len(sizes["Category"]) == 12 and sizes["Category"]["Animals"] == 314
    assert len(sizes["Challenge"]) == 11 and sizes["Challenge"]["Fine-grained Detail"] == 312
    geneval = prompts_of("geneval", REAL / "geneval_metadata.jsonl")
    tags = collections.Counter(p.categories["tag"] for p in geneval)
    assert len(tags) == 6 and tags["single_object"] == 80 and tags["color_attr"] == 100
    coco = list(prompts_of("coco", REAL / "coco2014_val_mlperf_5k.tsv"))
    assert coco[0] == (
        0,
        "A city at night with people walking around.",
        {"image_id": "227049", "id": "70"},
    )
    assert len({p.text for p in prompts_of("coco", REAL / "coco2014_val_30k.txt")}) <= 29_436


@with_real
def test_sets_are_read_in_under_a_second():
    for name, file in (
        ("parti", "parti_prompts.tsv"),
        ("geneval", "geneval_metadata.jsonl"),
        ("dpg", "dpg_bench.jsonl"),
        ("coco", "coco2014_val_30k.txt"),
    ):
        start = time.perf_counter()
        assert len(list(prompts_of(name, REAL / file))) > 500
        assert time.perf_counter() - start < 1.0, name
