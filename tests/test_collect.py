# SPDX-License-Identifier: Apache-2.0
"""A person's choices between pictures: pairs, their table, what the server takes, and the page."""

import contextlib
import csv
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import browser
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_config import ROOT

from di_star_jax.errors import UserError
from di_star_jax.rewards import collect, collection
from di_star_jax.rewards.collection import named, pairs_of, read_samples

with_chromium = pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium on the path")
NASTY = '<img src=x onerror=alert(1)>, "quoted"\nof two lines & 猫'


def write_samples(folder, captions, each=2, size=(16, 16)):
    """What `sample` leaves: pictures of one colour, all different."""
    folder.mkdir()
    of = {}
    for i in range(len(captions) * each):
        Image.new("RGB", size, (i, 7 * i % 256, 255 - i)).save(folder / f"{i:04d}.png")
        of[f"{i:04d}.png"] = captions[i // each]
    (folder / "prompts.json").write_text(json.dumps(of))
    return folder


def opened(samples, out, seed=0):
    pictures = named(read_samples(samples))
    return collection.opened(str(out), pictures, pairs_of(pictures, seed))


def rows(out):
    """The table as anybody reads it."""
    with (out / "pairs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def colour(file):
    return Image.open(file).convert("RGB").getpixel((0, 0))


class Client:
    """Asks a server as the page does, and as others might."""

    def __init__(self, server):
        self.port = server.server_port
        self.token = server.token

    def request(self, method, path, body=None, **headers):
        """(status, its kind, content)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def state(self):
        return json.loads(self.request("GET", "/state")[2])

    def act(self, act, turn=None):
        """(status, answer)."""
        turn = self.state()["turn"] if turn is None else turn
        body = json.dumps({"act": act, "turn": turn})
        status, _, answer = self.request("POST", "/act", body, **{"X-Token": self.token})
        return status, json.loads(answer)


@contextlib.contextmanager
def served(samples, out, seed=0):
    with opened(samples, out, seed) as choices, collect.Server(choices, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_choices_are_rows_with_their_pictures_and_undo_takes_the_last_one_back(tmp_path):
    captions = [NASTY, "b", "c", "d"]
    samples, out = write_samples(tmp_path / "samples", captions), tmp_path / "out"
    with served(samples, out) as server:
        client = Client(server)
        shown = []
        for act in ("first", "second", "tie"):
            shown.append(client.state())
            assert client.act(act)[0] == 200
        found = rows(out)
        assert [row["label"] for row in found] == ["0", "1", "tie"]
        for row, state in zip(found, shown):
            assert row["caption"] == state["caption"]
            assert ["/" + row["image_0"], "/" + row["image_1"]] == state["pictures"]
            i = [" ".join(text.split()) for text in captions].index(row["caption"])
            of_caption = {colour(samples / f"{2 * i + k:04d}.png") for k in range(2)}
            assert {colour(out / row[name]) for name in ("image_0", "image_1")} == of_caption
        assert client.act("undo")[1]["caption"] == shown[2]["caption"]
        assert rows(out) == found[:2]
        assert client.act("skip")[1]["skipped"] == 1 and rows(out) == found[:2]
        assert client.act("undo")[1]["skipped"] == 0 and rows(out) == found[:2]
        client.act("skip")
        status, state = client.act("first")
        assert (status, state["caption"], state["total"], state["judged"]) == (200, None, 4, 3)
        assert state["counts"] == {"first": 2, "second": 1, "tie": 0}
        assert client.act("first")[0] == 409 and len(rows(out)) == 3
        state = client.act("undo")[1]  # of the choice, and then of the skip before it
        assert (state["judged"], state["skipped"]) == (2, 1)
        assert (client.act("undo")[1]["skipped"], len(rows(out))) == (0, 2)
        for _ in range(9):
            state = client.act("undo")[1]
        assert rows(out) == [] and not state["can_undo"] and state["total"] == 4


def test_the_same_command_goes_on_with_what_is_left_also_in_another_order(tmp_path):
    samples, out = write_samples(tmp_path / "samples", list("abcdef")), tmp_path / "out"
    with opened(samples, out) as choices:
        choices.choose("1")
        choices.choose("tie")
    before = rows(out)
    (out / before[0]["image_0"]).unlink()
    first = {pair.image_0 for pair in pairs_of(named(read_samples(samples)), 1)}
    assert not {row["image_0"] for row in before} <= first  # one at least is turned
    with opened(samples, out, seed=1) as choices:
        assert (len(choices.choices), choices.total) == (2, 6)
        assert rows(out) == before and (out / before[0]["image_0"]).exists()
        choices.undo()  # of the start before
        assert choices.coming()[0].caption == before[1]["caption"]
        while choices.coming():
            choices.choose("0")
    assert sorted(row["caption"] for row in rows(out)) == list("abcdef")


def test_a_choice_that_cannot_be_kept_is_not_counted_and_the_table_stays_whole(
    tmp_path, monkeypatch
):
    samples, out = write_samples(tmp_path / "samples", list("abc")), tmp_path / "out"
    with served(samples, out) as server:
        client = Client(server)
        client.act("first")
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr("di_star_jax.rewards.collection.write_text", full)
            status, answer = client.act("second")
        assert (status, answer) == (500, {"error": "not kept: No space left on device"})
        assert client.state()["judged"] == 1 and [row["label"] for row in rows(out)] == ["0"]
        assert client.act("second")[1]["judged"] == 2
        assert [row["label"] for row in rows(out)] == ["0", "1"]


def test_sides_and_order_are_random_by_seed_and_each_caption_comes_before_any_comes_twice():
    pictures = {f"caption {i}": {f"{i}_{k}": None for k in range(5)} for i in range(100)}
    pairs = pairs_of(pictures, 3)
    assert pairs == pairs_of(pictures, 3) != pairs_of(pictures, 4)
    assert len(pairs) == 200 and len({pair.caption for pair in pairs[:100]}) == 100
    assert [pair.caption for pair in pairs[:100]] != list(pictures)
    used = [name for pair in pairs for name in (pair.image_0, pair.image_1)]
    assert len(set(used)) == 400 and not any(name.endswith("_4") for name in used)
    assert all(name.split("_")[0] == pair.caption.split()[1] for pair in pairs for name in pair[1:])
    turned = sum(pair.image_0 > pair.image_1 for pair in pairs)
    assert 70 < turned < 130


def test_the_pictures_of_an_evaluation_are_read_and_equal_ones_make_no_pair(tmp_path):
    folder = tmp_path / "evaluation"
    (folder / "images").mkdir(parents=True)
    for i, shade in enumerate((0, 50, 90, 90)):
        Image.new("L", (8, 8), shade).save(folder / "images" / f"{i}.png")
    columns = {"prompt": ["a", "a", "b", "b"], "file": [f"images/{i}.png" for i in range(4)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "scores.parquet")
    with opened(folder, tmp_path / "out") as choices:
        assert [pair.caption for pair in choices.coming()] == ["a"]
        choices.choose("0")
    (row,) = rows(tmp_path / "out")
    files = [Image.open(tmp_path / "out" / row[name]) for name in ("image_0", "image_1")]
    assert {np.asarray(file)[0, 0].tolist()[0] for file in files} == {0, 50}
    assert all((file.format, file.mode) == ("PNG", "RGB") for file in files)


def test_only_this_machine_and_its_page_are_served_and_nothing_but_the_pictures(tmp_path):
    samples, out = write_samples(tmp_path / "samples", list("abc")), tmp_path / "out"
    with served(samples, out) as server:
        client = Client(server)
        assert server.server_address[0] == "127.0.0.1"
        status, headers, page = client.request("GET", "/")
        assert status == 200 and server.token.encode() in page and b"__TOKEN__" not in page
        assert not re.search(rb"(src|href)=\"?https?:|@import|url\(", page)
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        state = client.state()
        assert client.request("GET", state["pictures"][0])[1]["Content-Type"] == "image/png"
        for path in (
            "/pairs.csv",
            "/images/../pairs.csv",
            "/../samples/0000.png",
            "/images/",
        ):
            assert client.request("GET", path)[0] == 404, path
        for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1.evil.example", ""):
            for method, path in (("GET", "/"), ("GET", "/state"), ("POST", "/act")):
                assert client.request(method, path, Host=host)[0] == 403, host
        tunnel = client.request("GET", "/", Host="localhost:1234")
        assert tunnel[0] == 200
        token = {"X-Token": client.token}
        good = json.dumps({"act": "first", "turn": 0})
        assert client.request("POST", "/act", good)[0] == 403
        assert client.request("POST", "/act", good, **{"X-Token": "é"})[0] == 403
        assert client.request("POST", "/act", " " * 1001, **token)[0] == 413
        for bad in ("", "[", "[]", "{}", '{"act": "both", "turn": 0}', '{"act": [], "turn": 0}'):
            assert client.request("POST", "/act", bad, **token)[0] == 400, bad
        assert client.act("first", turn=1)[0] == 409  # of a page that shows another pair
        assert client.request("PUT", "/act", good, **token)[0] == 501
        assert rows(out) == [] and client.state() == state


@pytest.mark.parametrize(
    "case, message",
    [
        ("no folder", "is no folder; draw first: di-star sample"),
        ("nothing", "has no prompts.json and no scores.parquet; draw first"),
        ("one each", "has 3 captions and no two different pictures of one"),
        ("unreadable", "1 of its pictures cannot be read, the first is"),
        ("no file", "names 0001.png, which is not there"),
        ("no parquet", "scores.parquet is not readable"),
        ("other pictures", "holds choices between other pictures than those of --samples"),
        ("other things", "holds other things than choices, it has no pairs.csv"),
        ("other table", "has the columns caption, image_0, expected caption, image_0, image_1"),
        ("other label", "row 1 is ['a', 'x', 'y', '2'], expected caption, two pictures and 0, 1"),
        ("in use", "is in use by another collect"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, case, message):
    samples, out = write_samples(tmp_path / "samples", list("abc")), tmp_path / "out"
    out.mkdir()
    with contextlib.ExitStack() as stack:
        if case == "no folder":
            samples = tmp_path / "none"
        elif case == "nothing":
            (samples / "prompts.json").unlink()
        elif case == "one each":
            samples = write_samples(tmp_path / "ones", list("abc"), each=1)
        elif case == "unreadable":
            (samples / "0001.png").write_bytes((samples / "0001.png").read_bytes()[:40])
        elif case == "no file":
            (samples / "0001.png").unlink()
        elif case == "no parquet":
            (samples / "prompts.json").unlink()
            (samples / "scores.parquet").write_text("no")
        elif case == "other pictures":
            with opened(write_samples(tmp_path / "others", ["a"], size=(8, 8)), out) as others:
                others.choose("0")
        elif case == "other things":
            (out / "thesis.txt").touch()
        elif case == "other table":
            (out / "pairs.csv").write_text("caption,image_0\n")
        elif case == "other label":
            (out / "pairs.csv").write_text("caption,image_0,image_1,label\na,x,y,2\n")
        elif case == "in use":
            stack.enter_context(opened(samples, out))
        with pytest.raises(UserError, match=re.escape(message)) as error, opened(samples, out):
            pass
        assert "\n" not in str(error.value)


@pytest.fixture
def typed():
    """typed(*flags) -> the command in a process of its own, which does not outlive the test."""
    started = []
    # A device that is not there, so that a command that wanted one would fail.
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none_such", "XLA_FLAGS": ""}

    def start(*given):
        command = [sys.executable, "-m", "di_star_jax.rewards.collect", *map(str, given)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address_of(process):
    lines = [process.stdout.readline(), process.stdout.readline()]
    return re.search(r"open (http://127\.0\.0\.1:\d+/) in a browser", lines[1])[1]


def test_as_typed_it_prints_its_address_and_ctrl_c_says_what_comes_next(tmp_path, typed):
    samples, out = write_samples(tmp_path / "samples", list("abc")), tmp_path / "taste"
    given = [f"--samples={samples}", f"--out={out}", "--port=0"]
    process = typed(*given)
    port = int(address_of(process).rstrip("/").rpartition(":")[2])
    taken = typed(f"--samples={samples}", f"--out={out}2", f"--port={port}")
    _, error = taken.communicate(timeout=60)
    assert taken.returncode == 2 and error.count("\n") == 1
    assert f"--port={port} cannot be had (Address already in use); give another, or 0" in error
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    token = re.search(r'name="token" content="(.*?)"', connection.getresponse().read().decode())[1]
    connection.request("POST", "/act", '{"act": "second", "turn": 0}', {"X-Token": token})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr, stdout.count("\n")) == (0, "", 1)
    assert stdout.startswith(f"1 of 3 pairs judged in {out}; next: di-star reward --config=reward:")
    assert f"--config.data.pairs={out} " in stdout
    assert [row["label"] for row in rows(out)] == ["1"]


READY = "document.readyState === 'complete' && !busy && state !== null"


def turn_of(page, turn):
    page.until(f"{READY} && state.turn === {turn}")


@with_chromium
def test_in_a_browser_clicks_and_keys_choose_and_the_end_is_said(tmp_path):
    samples = write_samples(tmp_path / "samples", [NASTY, *"bcdef"], size=(64, 64))
    out = tmp_path / "out"
    with served(samples, out) as server, browser.Browser(tmp_path / "profile") as page:
        page.resize(1280, 800)
        page.open(server.url)
        page.until("location.port && " + READY)
        acts = [
            lambda: page.press("ArrowLeft"),
            lambda: page.press("ArrowRight"),
            lambda: page.press("ArrowDown"),
            lambda: page.click("[data-act=first]"),
            lambda: page.press("Backspace"),
            lambda: page.click("[data-act=second]"),
            lambda: page.click("[data-act=tie]"),
            lambda: page.press("ArrowUp"),
            lambda: page.press("t"),
            lambda: page.click("[data-act=undo]"),
            lambda: page.press("s"),
        ]
        seen = []
        for turn, act in enumerate(acts, 1):
            seen.append(page.value("byId('caption').textContent"))
            act()
            turn_of(page, turn)
        found = rows(out)
        assert [row["label"] for row in found] == ["0", "1", "tie", "1"]
        assert [row["caption"] for row in found] == seen[:4] and seen[5] == seen[3]
        assert page.value("document.querySelectorAll('[onerror]').length") == 0
        # On the right of it what the row says: the pictures are those that are named.
        shown = page.value("images.map((image) => new URL(image.src).pathname)")
        assert shown == page.value("state.pictures")
        assert page.value("images.every((image) => image.naturalWidth === 64)")
        assert page.value("byId('progress').textContent") == "4 of 6 pairs judged"
        page.press("ArrowRight")
        turn_of(page, 12)
        assert page.value("byId('end').innerText").startswith("No pair is left")
        assert "ties: 1, skipped: 1" in page.value("byId('counts').textContent")
        page.press("ArrowLeft")  # does nothing any more
        page.press("ArrowUp")
        turn_of(page, 13)
        assert page.value("byId('end').hidden && !byId('ballot').hidden")
        assert len(rows(out)) == 4


@with_chromium
def test_in_a_browser_all_fits_desktops_and_phones_and_what_failed_is_said(tmp_path, typed):
    long = " ".join(["an intricate castle on a hill by the sea"] * 6)
    samples = write_samples(tmp_path / "samples", [long] * 2, each=1, size=(96, 64))
    process = typed(f"--samples={samples}", f"--out={tmp_path / 'out'}", "--port=0")
    url = address_of(process)
    with browser.Browser(tmp_path / "profile") as page:
        for width, height, is_phone in ((1280, 720, False), (390, 844, True), (844, 390, True)):
            page.resize(width, height, is_phone=is_phone)
            page.open(url)
            page.until(f"innerWidth === {width} && location.port && {READY}")
            box = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            assert page.value(box) == [width, height]
            sides = page.value("images.map((i) => Math.min(i.clientWidth, i.clientHeight))")
            assert min(sides) > 130
        labels = "[...document.querySelectorAll('button')].map((b) => b.ariaLabel || b.innerText)"
        assert page.value(labels) == [
            "The first picture is better",
            "The second picture is better",
            "Undo",
            "Tie",
            "Skip",
        ]
        process.send_signal(signal.SIGINT)
        assert "0 of 1 pairs judged" in process.communicate(timeout=60)[0]
        page.press("ArrowLeft")
        page.until("!byId('problem').hidden && !busy")
        assert "Your choices are kept: start it again" in page.value("byId('problem').textContent")
    assert rows(tmp_path / "out") == []
