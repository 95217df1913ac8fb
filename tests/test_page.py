# SPDX-License-Identifier: Apache-2.0
"""The evaluation page: what it holds, and what its program does in a browser."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.evaluation import metrics, page, papers, picks
from di_star_jax.evaluation.metrics import Metric
from di_star_jax.evaluation.results import Evaluation
from di_star_jax.prompts.files import Prompt

NASTY = '</script><img src="http://x/y" onerror=alert(1)> "a" & b \u2028 猫 🎉'
SCORE = Metric("score", "Score", "cosine", 3, True)
BLUR = Metric("blur", "Blur", "pixels", 2, False)
HUE = Metric("hue", "Hue", "degrees", 1, None)
FID = Metric("fid", "FID", "Inception", 2, False, per_image=False)
COST = {"seconds_per_image": None, "timed_batches": 0, "peak_memory_gb": None, "steps": None}


@pytest.fixture(autouse=True)
def some_metrics(monkeypatch):
    for metric in (SCORE, BLUR, HUE, FID):
        monkeypatch.setitem(metrics.OTHERS, metric.name, metric)


def program(*names):
    """(its path, or None; a mark that skips a test where none of the names is on the path)."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found, pytest.mark.skipif(found is None, reason=f"no {names[0]} on the path")


CHROMIUM, with_chromium = program("chromium", "chromium-browser", "google-chrome", "chrome")
NODE, with_node = program("node")


def picture(folder, name, size=(16, 16)):
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / f"{name}.png"


def mean_of(mean, stderr=None, count=1, note="", trained_on=False):
    counts = {"prompts": count, "images": count, "left_out": 0}
    said = {"label": "", "trained_on": trained_on, "note": note}
    return {"mean": mean, "stderr": stderr, **counts, **said}


def run(name, prompts, files, values, *, details=None, compared=None, prompt_set="a <set>"):
    """An evaluation of prompts with files [P][K] and scores {metric: [P, K]}."""
    values = {metric: np.asarray(of_metric, np.float64) for metric, of_metric in values.items()}
    means = {
        "score": mean_of(0.5, 0.01, len(prompts), "all prompts", trained_on=True),
        "blur": mean_of(1.0, None, 9),
        "hue": mean_of(None),
        "fid": mean_of(None),
    }
    settings = {
        "prompts": {"name": prompt_set, "count": len(prompts), "notes": []},
        "samples": len(files[0]),
        "trained_on": {},
        "metrics": {},
        **(details or {}),
    }
    comparison = {"same_noise": True, "metrics": compared} if compared else None
    results = {"name": name, "settings": settings, "metrics": means, "made": {}, "cost": COST}
    return Evaluation(Path(), results | {"comparison": comparison}, prompts, files, values)


def numbered(count):
    return [Prompt(i, f"prompt {i}", {"kind": ("even", "odd")[i % 2]}) for i in range(count)]


def scored_run(name, values, samples=1):
    """A run without pictures; values[row] is the score, minus the blur and a tenth of the hue."""
    score = np.array(values, np.float64)[:, None] + np.arange(samples)
    files = [[Path("none") / f"{row}_{k}" for k in range(samples)] for row in range(len(values))]
    scores = {"score": score, "blur": -score, "hue": 10 * score}
    return run(name, numbered(len(values)), files, scores)


def pictured_run(name, prompts, files):
    """A run without scores."""
    return run(name, prompts, files, {})


def write(folder, ours, theirs=None, max_prompts=200):
    page.write(dataclasses.replace(ours, folder=folder), theirs, max_prompts)
    return (folder / "page.html").read_text(encoding="utf-8")


def data_of(text):
    """The JSON object of a page, read as a browser would: up to the first end of a script."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_everything_of_the_contract_comes_back_out_of_the_page(tmp_path, monkeypatch):
    paper = papers.Row("paper", {"score": 0.3, "elsewhere": 1.0})
    monkeypatch.setitem(papers.TABLES, "a <set>", (papers.Table("Table 2", [paper]),))
    prompts = [Prompt(7, NASTY, {"kind": "<b>"})]
    files = [[picture(tmp_path, "a")]]
    scores = {"score": [[0.25]], "blur": [[math.nan]], "other": [[1.0]]}
    paired = {"difference": 0.1, "low": 0.05, "high": 0.15, "win_rate": 0.6, "prompts": 3.0}
    unbounded = paired | {"low": None, "high": None}
    ours = run("ours", prompts, files, scores, compared={"score": paired, "blur": unbounded})
    data = data_of(write(tmp_path, ours, run("base", prompts, files, scores)))
    assert data["title"] == "ours on a <set> against base" and data["total"] == 1
    assert data["prompts"][0]["prompt"] == NASTY
    assert data["prompts"][0]["categories"] == {"kind": "<b>"}
    assert data["prompts"][0]["runs"][0] == [{"image": 0, "scores": {"score": 0.25}}]
    assert (
        data["runs"][0]["summary"]["blur"].items()
        >= {
            "mean": 1.0,
            "stderr": None,
            "prompts": 9,
            "note": "",
        }.items()
    )
    assert "hue" not in data["runs"][0]["summary"]
    assert data["comparison"] == {"score": paired}
    (published,) = data["published"]
    assert published == {
        "name": "paper",
        "values": {"score": 0.3},
        "steps": "",
        "source": "Table 2",
    }
    assert [metric["trained_on"] for metric in data["metrics"]] == [True, False, False, False]


def test_a_published_row_says_its_model_and_steps_and_another_metrics_is_left_out(
    tmp_path, monkeypatch
):
    rows = [
        papers.Row("teacher", {"score": 0.3}, "2B, 64 px", steps=50, guidance=7.5),
        papers.Row("small", {"score": 0.2}, "1B, 32 px", steps=1),
        papers.Row("elsewhere", {"other": 1.0}, "1B, 32 px", steps=1),
    ]
    tables = (papers.Table("Table 2", rows[1:]), papers.Table("Table 3", rows[:1]))
    monkeypatch.setitem(papers.TABLES, "a <set>", tables)
    ours = run("ours", [Prompt(7, "a", {})], [[picture(tmp_path, "a")]], {"score": [[0.25]]})
    published = data_of(write(tmp_path, ours))["published"]
    assert [(row["name"], row["steps"], row["source"]) for row in published] == [
        ("small (1B, 32 px)", "1 step", "Table 2"),
        ("teacher (2B, 64 px, guidance 7.5)", "50 steps", "Table 3"),
    ]


def test_no_text_can_leave_the_data_and_nothing_is_fetched(tmp_path):
    prompts = [Prompt(0, NASTY, {NASTY: NASTY})]
    ours = run(NASTY, prompts, [[picture(tmp_path, "a")]], {}, details={NASTY: NASTY})
    text = write(tmp_path, ours)
    assert text.count("</script>") == 2 and "<img" not in text  # the data's and the program's own
    markup = text.replace(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1], "")
    assert (
        "http" not in markup.replace("http-equiv", "")
        and "@import" not in markup
        and "url(" not in markup
    )
    assert re.search(
        "Content-Security-Policy\"\\s+content=\"default-src 'none'; img-src data:;", markup
    )
    assert set(re.findall(r'(?:src|href)="([^"]*)"', markup)) == {"data:,"}


def test_style_and_program_are_written_into_the_page(tmp_path):
    text = write(tmp_path, scored_run("ours", [1.0]))
    for name in ("page.css", "votes.js", "page.js"):
        part = Path(page.__file__).with_name(name).read_text(encoding="utf-8")
        assert part in text and "__" not in part, name
    assert "__STYLE__" not in text and "__PROGRAM__" not in text and "__EVALUATION" not in text


def test_large_pictures_are_shrunk_and_tiny_ones_kept_exactly(tmp_path):
    pictures = [
        picture(tmp_path, "large", (1200, 600)),
        picture(tmp_path, "middle", (300, 200)),
        picture(tmp_path, "tiny", (64, 48)),
    ]
    data = data_of(write(tmp_path, pictured_run("ours", numbered(1), [pictures])))
    images = [decode(uri) for uri in data["images"]]
    assert [image.size for image in images] == [(512, 256), (300, 200), (64, 48)]
    assert [image.format for image in images] == ["WEBP", "WEBP", "PNG"]
    np.testing.assert_array_equal(images[2], Image.open(tmp_path / "tiny.png"))


def test_a_file_in_two_places_is_embedded_once(tmp_path):
    files = [[picture(tmp_path, "a")] * 6]
    ours, base = (pictured_run(name, numbered(1), files) for name in ("ours", "base"))
    data = data_of(write(tmp_path, ours, base))
    assert len(data["images"]) == 1 and data["samples"] == 6
    assert [[p["image"] for p in pictures] for pictures in data["prompts"][0]["runs"]] == [
        [0] * page.SAMPLES
    ] * 2


def test_missing_and_broken_pictures_do_not_stop_the_page(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cut = picture(tmp_path, "cut", (64, 64))
    cut.write_bytes(cut.read_bytes()[:200])
    files = [[tmp_path / "nowhere.png", tmp_path / "text.png", cut]]
    data = data_of(write(tmp_path, pictured_run("ours", numbered(1), files)))
    assert [p["image"] for p in data["prompts"][0]["runs"][0]] == [0, 1, 2]
    assert data["images"] == [None] * 3


def test_picks_hold_the_extremes_of_each_metric_and_a_random_draw(tmp_path):
    rng = np.random.default_rng(0)
    ours, base = rng.normal(size=(2, 300))
    data = data_of(
        write(
            tmp_path,
            scored_run("ours", ours),
            scored_run("base", base),
            max_prompts=40,
        )
    )
    assert len(data["prompts"]) == 40 and data["total"] == 300
    rows = {
        kind: [data["prompts"][i]["row"] for i, _ in keys]
        for kind, keys in data["lists"]["score"].items()
    }
    depth = len(rows["best"])
    assert (
        1 < depth <= picks.LISTED
        and len(rows["losses"]) == len(rows["gains"]) == len(rows["worst"]) == depth
    )
    assert rows["best"] == list(np.argsort(-ours)[:depth]) and rows["worst"] == list(
        np.argsort(ours)[:depth]
    )
    assert rows["gains"] == list(np.argsort(base - ours)[:depth])
    assert rows["losses"] == list(np.argsort(ours - base)[:depth])
    assert (
        data["lists"]["blur"] == data["lists"]["score"]
    )  # lower is better, and blur is minus the score
    assert sum(entry["random"] for entry in data["prompts"]) >= 20


def test_the_random_draw_is_the_same_each_time_and_knows_nothing_of_the_scores(tmp_path):
    values = np.random.default_rng(1).normal(size=300)
    draws = []
    for scores in (values, values, -values[::-1]):
        data = data_of(write(tmp_path, scored_run("ours", scores), max_prompts=40))
        draws.append([entry["row"] for entry in data["prompts"] if entry["random"]])
    assert draws[0] == draws[1]
    shorter, longer = sorted((draws[0], draws[2]), key=len)  # both begin one order of the rows
    assert set(shorter) <= set(longer) and len(shorter) >= 20 and max(shorter) > 200


def test_gains_hold_no_losses_and_each_prompt_once(tmp_path):
    ours, base = (
        scored_run("ours", [3.0, 1.0, 2.0, 0.0], samples=3),
        scored_run("base", [1.0, 1.5, 2.0, 0.5], samples=3),
    )
    lists = data_of(write(tmp_path, ours, base))["lists"]["score"]
    assert lists["gains"] == [[0, 0]] and lists["losses"] == [[1, 0], [3, 0]]
    assert lists["best"] == [[0, 2], [2, 2]] and lists["worst"] == [[3, 0], [1, 0]]


def test_the_histogram_counts_every_difference_and_splits_at_zero(tmp_path):
    ours, base = np.random.default_rng(2).normal(size=(2, 50))
    data = data_of(
        write(
            tmp_path,
            scored_run("ours", ours),
            scored_run("base", base),
            max_prompts=10,
        )
    )
    counts = data["histograms"]["score"]["counts"]
    assert sum(counts) == 50 and sum(counts[: picks.BINS // 2]) == np.sum(ours < base)


def test_votes_are_kept_apart_by_title_and_pictures(tmp_path):
    ours, base = scored_run("ours", [1.0]), scored_run("base", [2.0])
    other = dataclasses.replace(ours, files=[[picture(tmp_path, "a")]])
    renamed = scored_run("theirs", [1.0])
    ids = [data_of(write(tmp_path, run, base))["id"] for run in (ours, ours, other, renamed)]
    assert ids[0] == ids[1] and len(set(ids)) == 3


@pytest.mark.parametrize("max_prompts", [1, 2, 3, 7, 8])
def test_never_more_prompts_than_asked_for_and_lists_point_at_them(tmp_path, max_prompts):
    runs = [scored_run("ours", range(8)), scored_run("base", range(8, 0, -1))]
    data = data_of(write(tmp_path, *runs, max_prompts=max_prompts))
    assert len(data["prompts"]) == max_prompts
    for kinds in data["lists"].values():
        assert all(0 <= i < max_prompts for keys in kinds.values() for i, _ in keys)
    assert any(entry["random"] for entry in data["prompts"])


@pytest.mark.parametrize(
    "theirs, message",
    [(Prompt(3, "b", {}), "row 3 is 'b' in run 'base'"), (Prompt(4, "a", {}), "row 4 is 'a'")],
)
def test_a_baseline_of_other_prompts_is_refused_in_one_line(tmp_path, theirs, message):
    ours = pictured_run("ours", [Prompt(3, "a", {})], [[tmp_path / "a.png"]])
    base = pictured_run("base", [theirs], ours.files)
    with pytest.raises(UserError, match=message) as error:
        write(tmp_path, ours, base)
    assert "\n" not in str(error.value)


def dump(path, view=""):
    """The document after its program ran, in headless Chromium."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={path.parent / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        path.as_uri() + view,
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode(
        "utf-8"
    )


def answers(path, script):
    """What a script, run inside the page after the page's own, answers."""
    text = path.read_text(encoding="utf-8")
    answer = f"JSON.stringify((() => {{{script}}})())"
    probe = f"<script>document.body.append(el('pre', {{id: 'answers'}}, {answer}))</script>"
    path.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    return json.loads(
        html.unescape(re.search(r'<pre id="answers">(.*?)</pre>', dump(path), re.DOTALL)[1])
    )


def two_runs(folder):
    rows = [(NASTY, 0.1, 0.3, "x"), ("second", 0.9, 0.2, "y"), ("third", 0.5, 0.4, "y")]
    prompts = [Prompt(i, row[0], {"kind": row[3]}) for i, row in enumerate(rows)]
    paper = papers.Row("a paper", {"score": 0.3})
    paired = {"difference": 0.2, "low": 0.1, "high": 0.3, "win_rate": 2 / 3, "prompts": 3.0}
    runs = []
    for r, name in enumerate(("ours", "theirs")):
        files = [[picture(folder, f"{name}{'-' * i}")] for i in range(len(rows))]
        scores = {"score": [[row[1 + r]] for row in rows]}
        details = {"steps": 1}
        runs.append(run(name, prompts, files, scores, details=details, compared={"score": paired}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(papers.TABLES, "a <set>", (papers.Table("Table 2", [paper]),))
        write(folder, *runs)
    return folder / "page.html"


@with_chromium
def test_in_a_browser_the_page_shows_table_sorted_cards_and_escaped_prompts(tmp_path):
    seen = answers(
        two_runs(tmp_path),
        """
        const texts = (found) => [...document.querySelectorAll(found)].map((p) => p.textContent);
        const prompts = () => texts("#cards .prompt");
        const rising = (change) => { setGrid(change); return prompts(); };
        const enlarged = () => {
            document.querySelector("#cards .zoom").click();
            byId("viewer").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
            return [byId("viewer").open, byId("viewer").querySelector("header span").textContent];
        };
        return {rows: texts("#summary tr"),
                trained: document.querySelectorAll("#summary td.trained").length,
                first: prompts(), difference: rising({order: "difference"}),
                falling: rising({descending: true}), filtered: rising({filters: {kind: "y"}}),
                searched: rising({filters: {}, search: "SEC"}),
                injected: document.querySelectorAll("[onerror]").length,
                images: [...document.querySelectorAll("#cards img")].map((image) => image.alt),
                verdict: byId("verdict").textContent, enlarged: enlarged()}""",
    )
    assert "trained on" in seen["rows"][0] and seen["trained"] == 3  # two runs and the difference
    assert (
        "0.500" in seen["rows"][1] and "+0.200" in seen["rows"][3] and "66.7 %" in seen["rows"][3]
    )
    assert "Published, other protocol" in seen["rows"][4]
    assert seen["rows"][5] == "Table 2" and "0.300" in seen["rows"][6]
    assert seen["first"] == [NASTY, "second", "third"] and seen["injected"] == 0
    assert seen["difference"] == [NASTY, "third", "second"] and seen["falling"] == [
        "second",
        "third",
        NASTY,
    ]
    assert seen["filtered"] == ["second", "third"] and seen["searched"] == ["second"]
    assert seen["images"] == ["ours: second", "theirs: second"]
    assert "Its training reward: better by Score" in seen["verdict"]
    assert seen["enlarged"] == [True, "theirs (2 of 2)"]


@with_chromium
def test_in_a_browser_keys_vote_blindly_and_the_result_is_right(tmp_path):
    seen = answers(
        two_runs(tmp_path),
        """
        show("vote");
        const press = (key) => dispatchEvent(new KeyboardEvent("keydown", {key}));
        const blind = !byId("vote").innerHTML.match(/ours|theirs/);
        const ours = () => ballot.pairs[ballot.votes.length].left === 0 ? "ArrowLeft" : "b";
        press(ours()); press("t"); press("Backspace"); press("ArrowDown"); press(ours());
        const judged = (row, left, choice) => ({row, sample: 0, left, right: 1 - left, choice});
        const votes = [judged(0, 1, "left"), judged(1, 1, "right"), judged(2, 1, "left"),
                       judged(2, 0, "tie")];
        return {blind, votes: ballot.votes.length, result: resultNumbers(),
                shown: byId("result").textContent, agree: agreement(votes, metricByName("score")),
                two: strength(3, 7), none: strength(0, 7), wilson: wilson(7, 10)}""",
    )
    assert seen["blind"] and seen["votes"] == 3 and seen["agree"] == {"agree": 2, "total": 3}
    result = seen["result"]
    assert (result["wins"], result["ties"], result["losses"]) == (2, 1, 0)
    assert result["strength"] == pytest.approx(math.log(2.5 / 0.5))
    spread = 1.959964 * math.sqrt(1 / 2.5 + 1 / 0.5)
    assert result["strength_interval"] == pytest.approx(
        [math.log(5) - spread, math.log(5) + spread]
    )
    assert seen["two"] == pytest.approx(
        {"value": math.log(3 / 7), "stderr": math.sqrt(1 / 3 + 1 / 7)}
    )
    assert seen["none"] is None and "83.3 %" in seen["shown"]
    # Wilson's interval solves (share - p)^2 = z^2 p (1 - p) / n.
    for p in seen["wilson"]:
        assert (0.7 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 10)


@with_chromium
def test_in_a_browser_one_run_has_no_vote_and_no_gains(tmp_path):
    write(tmp_path, scored_run("ours", [1.0, 2.0]))
    tree = dump(tmp_path / "page.html", "#extremes")
    body = tree[tree.index("<body") : tree.index('id="data"')]
    assert 'id="tab-grid"' in body and 'id="tab-extremes"' in body
    assert "tab-vote" not in body and "tab-changes" not in body and "Difference" not in body
    assert "best 1" in body and "worst 1" in body and "broken image" in body


@with_node
def test_the_program_parses_and_votes_need_no_page(tmp_path):
    folder = Path(page.__file__).parent
    for name in ("votes.js", "page.js"):
        subprocess.run([NODE, "--check", folder / name], check=True)
    script = """
        const pairs = [...Array(200).keys()].map((row) => ({row, left: 0, right: 1}));
        const voted = (left, choice) => ({left, right: 1 - left, choice});
        const votes = [voted(0, "left"), voted(1, "left"), voted(1, "right"), voted(0, "tie")];
        const [order, again, other] = [7, 7, 8].map((seed) => shuffled(pairs, seed));
        console.log(JSON.stringify({order, again, other, tally: tally(votes),
                                    two: strength(3, 7), none: strength(4, 0)}));"""
    program = (folder / "votes.js").read_text() + script
    done = subprocess.run([NODE, "-e", program], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["tally"] == {"wins": 2, "ties": 1, "losses": 1}
    assert seen["two"]["value"] == pytest.approx(math.log(3 / 7)) and seen["none"] is None
    rows = [pair["row"] for pair in seen["order"]]
    assert seen["order"] == seen["again"] != seen["other"]
    assert sorted(rows) == list(range(200)) != rows
    assert 60 < sum(pair["left"] for pair in seen["order"]) < 140
