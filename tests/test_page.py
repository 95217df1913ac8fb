# SPDX-License-Identifier: Apache-2.0
import base64
import html
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.evaluation import page

NASTY = '</script><img src="http://x/y" onerror=alert(1)> "a" & b \u2028 猫 🎉'
SCORE = page.Metric("score", "Score", "cosine", 3, True, True, True)
BLUR = page.Metric("blur", "Blur", "pixels", 2, False, False, True)
HUE = page.Metric("hue", "Hue", "degrees", 1, None, False, True)
FID = page.Metric("fid", "FID", "Inception", 2, False, False, False)
METRICS = [SCORE, BLUR, HUE, FID]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
with_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")


def picture(folder, name, size=(16, 16), **scores):
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return page.Picture(folder / f"{name}.png", scores)


def run(name, items, summary=None, details=None):
    means = {
        "score": page.Summary(0.5, 0.01, len(items), "all prompts"),
        "blur": page.Summary(1.0, math.nan, 9, ""),
    }
    return page.Run(
        name, items, summary or means, details if details is not None else {"steps": "1"}
    )


def scored_run(name, values, samples=1):
    """A run without pictures; values[row] is the score, minus the blur and a tenth of the hue."""
    items = [
        page.Item(
            row,
            f"prompt {row}",
            {"kind": "even" if row % 2 == 0 else "odd"},
            [
                page.Picture(None, {"score": v + k, "blur": -(v + k), "hue": 10 * (v + k)})
                for k in range(samples)
            ],
        )
        for row, v in enumerate(values)
    ]
    return run(name, items)


def write(path, runs, metrics=METRICS, comparison=None, published=(), max_prompts=200):
    page.write(
        path,
        title="A <test>",
        runs=runs,
        metrics=metrics,
        comparison=comparison or {},
        published=list(published),
        max_prompts=max_prompts,
    )
    return path.read_text(encoding="utf-8")


def data_of(text):
    """The JSON object of a page, read as a browser would: up to the first end of a script."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_everything_of_the_contract_comes_back_out_of_the_page(tmp_path):
    item = page.Item(
        7, NASTY, {"kind": "<b>"}, [picture(tmp_path, "a", score=0.25, blur=math.nan, other=1.0)]
    )
    text = write(
        tmp_path / "page.html",
        [run("ours", [item]), run("base", [item])],
        comparison={"score": page.Comparison(0.1, 0.05, 0.15, 0.6, 3)},
        published=[page.PublishedRow("paper", {"score": 0.3, "elsewhere": 1.0}, "Table 2")],
    )
    data = data_of(text)
    assert data["title"] == "A <test>" and data["total"] == 1
    assert data["prompts"][0]["prompt"] == NASTY and data["prompts"][0]["categories"] == {
        "kind": "<b>"
    }
    assert data["prompts"][0]["runs"][0] == [{"image": 0, "scores": {"score": 0.25}}]
    assert data["runs"][0]["summary"]["blur"] == {
        "mean": 1.0,
        "stderr": None,
        "count": 9,
        "note": "",
    }
    assert data["comparison"]["score"]["win_rate"] == 0.6
    assert data["published"] == [{"name": "paper", "values": {"score": 0.3}, "source": "Table 2"}]
    assert [metric["trained_on"] for metric in data["metrics"]] == [True, False, False, False]


def test_no_text_can_leave_the_data_and_nothing_is_fetched(tmp_path):
    item = page.Item(0, NASTY, {NASTY: NASTY}, [picture(tmp_path, "a")])
    text = write(tmp_path / "page.html", [run(NASTY, [item], details={NASTY: NASTY})])
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


def test_large_pictures_are_shrunk_and_tiny_ones_kept_exactly(tmp_path):
    pictures = [
        picture(tmp_path, "large", (1200, 600)),
        picture(tmp_path, "middle", (300, 200)),
        picture(tmp_path, "tiny", (64, 48)),
    ]
    data = data_of(write(tmp_path / "page.html", [run("ours", [page.Item(0, "p", {}, pictures)])]))
    images = [decode(uri) for uri in data["images"]]
    assert [image.size for image in images] == [(512, 256), (300, 200), (64, 48)]
    assert [image.format for image in images] == ["WEBP", "WEBP", "PNG"]
    np.testing.assert_array_equal(images[2], Image.open(tmp_path / "tiny.png"))


def test_a_file_in_two_places_is_embedded_once(tmp_path):
    item = page.Item(0, "p", {}, [picture(tmp_path, "a")] * 6)
    data = data_of(write(tmp_path / "page.html", [run("ours", [item]), run("base", [item])]))
    assert len(data["images"]) == 1 and data["samples"] == 6
    assert [[p["image"] for p in pictures] for pictures in data["prompts"][0]["runs"]] == [
        [0] * page.SAMPLES
    ] * 2


def test_missing_and_broken_pictures_do_not_stop_the_page(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cut = picture(tmp_path, "cut", (64, 64)).file
    cut.write_bytes(cut.read_bytes()[:200])
    files = [None, tmp_path / "nowhere.png", tmp_path / "text.png", cut]
    item = page.Item(0, "p", {}, [page.Picture(file, {}) for file in files])
    data = data_of(write(tmp_path / "page.html", [run("ours", [item])]))
    assert [p["image"] for p in data["prompts"][0]["runs"][0]] == [None, 0, 1, 2] and data[
        "images"
    ] == [None] * 3


def test_runs_join_by_row_and_prompts_of_one_run_alone_are_kept(tmp_path):
    items = [
        page.Item(row, f"prompt {row}", {}, [page.Picture(None, {"score": row})])
        for row in range(4)
    ]
    data = data_of(
        write(tmp_path / "page.html", [run("ours", items[2::-1]), run("base", items[1:])])
    )
    assert [entry["row"] for entry in data["prompts"]] == [0, 1, 2, 3]
    assert [[len(pictures) for pictures in entry["runs"]] for entry in data["prompts"]] == [
        [1, 0],
        [1, 1],
        [1, 1],
        [0, 1],
    ]


def test_picks_hold_the_extremes_of_each_metric_and_a_random_draw(tmp_path):
    rng = np.random.default_rng(0)
    ours, base = rng.normal(size=(2, 300))
    data = data_of(
        write(
            tmp_path / "page.html",
            [scored_run("ours", ours), scored_run("base", base)],
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
        1 < depth <= page.LISTED
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
    for i, scores in enumerate((values, values, -values[::-1])):
        data = data_of(write(tmp_path / f"{i}.html", [scored_run("ours", scores)], max_prompts=40))
        draws.append([entry["row"] for entry in data["prompts"] if entry["random"]])
    assert draws[0] == draws[1]
    shorter, longer = sorted((draws[0], draws[2]), key=len)  # both begin one order of the rows
    assert set(shorter) <= set(longer) and len(shorter) >= 20 and max(shorter) > 200


def test_gains_hold_no_losses_and_each_prompt_once(tmp_path):
    ours, base = (
        scored_run("ours", [3.0, 1.0, 2.0, 0.0], samples=3),
        scored_run("base", [1.0, 1.5, 2.0, 0.5], samples=3),
    )
    lists = data_of(write(tmp_path / "page.html", [ours, base]))["lists"]["score"]
    assert lists["gains"] == [[0, 0]] and lists["losses"] == [[1, 0], [3, 0]]
    assert lists["best"] == [[0, 2], [2, 2]] and lists["worst"] == [[3, 0], [1, 0]]


def test_the_histogram_counts_every_difference_and_splits_at_zero(tmp_path):
    ours, base = np.random.default_rng(2).normal(size=(2, 50))
    data = data_of(
        write(
            tmp_path / "page.html",
            [scored_run("ours", ours), scored_run("base", base)],
            max_prompts=10,
        )
    )
    counts = data["histograms"]["score"]["counts"]
    assert sum(counts) == 50 and sum(counts[: page.BINS // 2]) == np.sum(ours < base)


def test_votes_are_kept_apart_by_title_and_pictures(tmp_path):
    runs = [scored_run("ours", [1.0]), scored_run("base", [2.0])]
    item = page.Item(0, "prompt 0", {}, [picture(tmp_path, "a")])
    ids = [
        data_of(write(tmp_path / "page.html", r))["id"]
        for r in (runs, runs, [run("ours", [item]), runs[1]])
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("max_prompts", [1, 2, 3, 7, 8])
def test_never_more_prompts_than_asked_for_and_lists_point_at_them(tmp_path, max_prompts):
    runs = [scored_run("ours", range(8)), scored_run("base", range(8, 0, -1))]
    data = data_of(write(tmp_path / "page.html", runs, max_prompts=max_prompts))
    assert len(data["prompts"]) == max_prompts
    for kinds in data["lists"].values():
        assert all(0 <= i < max_prompts for keys in kinds.values() for i, _ in keys)
    assert any(entry["random"] for entry in data["prompts"])


@pytest.mark.parametrize(
    "runs, max_prompts, message",
    [
        ([], 5, "got no runs"),
        ([scored_run("ours", [1.0])], 0, "max_prompts=0, expected at least 1"),
        ([run("ours", [page.Item(3, "a", {}, []), page.Item(3, "a", {}, [])])], 5, "row 3 twice"),
        (
            [run("ours", [page.Item(3, "a", {}, [])]), run("base", [page.Item(3, "b", {}, [])])],
            5,
            "row 3 is 'b'",
        ),
    ],
)
def test_unusable_input_is_refused_in_one_line(tmp_path, runs, max_prompts, message):
    with pytest.raises(UserError, match=message) as error:
        write(tmp_path / "page.html", runs, max_prompts=max_prompts)
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
    probe = f"<script>document.body.append(el('pre', {{id: 'answers'}}, JSON.stringify((() => {{{script}}})())))</script>"
    path.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    return json.loads(
        html.unescape(re.search(r'<pre id="answers">(.*?)</pre>', dump(path), re.DOTALL)[1])
    )


def two_runs(folder):
    rows = [(NASTY, 0.1, 0.3, "x"), ("second", 0.9, 0.2, "y"), ("third", 0.5, 0.4, "y")]
    runs = []
    for r, name in enumerate(("ours", "theirs")):
        items = [
            page.Item(
                i, row[0], {"kind": row[3]}, [picture(folder, f"{name}{'-' * i}", score=row[1 + r])]
            )
            for i, row in enumerate(rows)
        ]
        runs.append(run(name, items))
    write(
        folder / "page.html",
        runs,
        comparison={"score": page.Comparison(0.2, 0.1, 0.3, 2 / 3, 3)},
        published=[page.PublishedRow("a paper", {"score": 0.3}, "Table 2")],
    )
    return folder / "page.html"


@with_chromium
def test_in_a_browser_the_page_shows_table_sorted_cards_and_escaped_prompts(tmp_path):
    seen = answers(
        two_runs(tmp_path),
        """
        const prompts = () => [...document.querySelectorAll("#cards .prompt")].map((p) => p.textContent);
        const rising = (change) => { setGrid(change); return prompts(); };
        const enlarged = () => {
            document.querySelector("#cards .zoom").click();
            byId("viewer").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
            return [byId("viewer").open, byId("viewer").querySelector("header span").textContent];
        };
        return {rows: [...document.querySelectorAll("#summary tr")].map((row) => row.textContent),
                trained: document.querySelectorAll("#summary td.trained").length,
                first: prompts(), difference: rising({order: "difference"}),
                falling: rising({descending: true}), filtered: rising({filters: {kind: "y"}}),
                searched: rising({filters: {}, search: "SEC"}), injected: document.querySelectorAll("[onerror]").length,
                images: [...document.querySelectorAll("#cards img")].map((image) => image.alt),
                verdict: byId("verdict").textContent, enlarged: enlarged()}""",
    )
    assert "trained on" in seen["rows"][0] and seen["trained"] == 3  # two runs and the difference
    assert (
        "0.500" in seen["rows"][1] and "+0.200" in seen["rows"][3] and "66.7 %" in seen["rows"][3]
    )
    assert "Published, other protocol" in seen["rows"][4] and "0.300" in seen["rows"][5]
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
        return {blind, votes: ballot.votes.length, result: resultNumbers()[0], shown: byId("result").textContent,
                agree: agreement([{row: 0, sample: 0, left: 1, right: 0, choice: "left"},
                                  {row: 1, sample: 0, left: 1, right: 0, choice: "right"},
                                  {row: 2, sample: 0, left: 1, right: 0, choice: "left"},
                                  {row: 2, sample: 0, left: 0, right: 1, choice: "tie"}], metricByName("score")),
                two: bradleyTerry([[0, 7], [3, 0]]), none: bradleyTerry([[0, 7], [0, 0]]),
                three: bradleyTerry([[0, 7, 9], [3, 0, 6], [1, 4, 0]]), wilson: wilson(7, 10)}""",
    )
    assert seen["blind"] and seen["votes"] == 3 and seen["agree"] == {"agree": 2, "total": 3}
    result = seen["result"]
    assert (result["wins"], result["ties"], result["losses"]) == (2, 1, 0)
    assert result["strength"] == pytest.approx(math.log(2.5 / 0.5))
    spread = 1.959964 * math.sqrt(1 / 2.5 + 1 / 0.5)
    assert result["strength_interval"] == pytest.approx(
        [math.log(5) - spread, math.log(5) + spread]
    )
    assert seen["two"] == [
        pytest.approx({"value": math.log(3 / 7), "stderr": math.sqrt(1 / 3 + 1 / 7)})
    ]
    assert seen["none"] is None and "83.3 %" in seen["shown"]
    check_three_runs(seen["three"], np.array([[0, 7, 9], [3, 0, 6], [1, 4, 0]]))
    # Wilson's interval solves (share - p)^2 = z^2 p (1 - p) / n.
    for p in seen["wilson"]:
        assert (0.7 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 10)


def check_three_runs(answer, wins):
    """At the maximum of the likelihood every run wins as often as expected; the spread is the
    inverse information.
    """
    theta = np.array([0.0, *(run["value"] for run in answer)])
    games = wins + wins.T
    chance = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    np.testing.assert_allclose((games * chance).sum(axis=1), wins.sum(axis=1), rtol=1e-6)
    weight = games * chance * (1 - chance)
    information = (np.diag(weight.sum(axis=1)) - weight)[1:, 1:]
    np.testing.assert_allclose(
        [run["stderr"] for run in answer], np.sqrt(np.diag(np.linalg.inv(information)))
    )


@with_chromium
def test_in_a_browser_one_run_has_no_vote_and_no_gains(tmp_path):
    path = tmp_path / "page.html"
    write(path, [scored_run("ours", [1.0, 2.0])], metrics=[SCORE, FID])
    tree = dump(path, "#extremes")
    body = tree[tree.index("<body") : tree.index('id="data"')]
    assert 'id="tab-grid"' in body and 'id="tab-extremes"' in body
    assert "tab-vote" not in body and "tab-changes" not in body and "Difference" not in body
    assert "best 1" in body and "worst 1" in body and "broken image" in body
