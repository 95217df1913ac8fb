# SPDX-License-Identifier: Apache-2.0
"""The miniature Table 2 from results that are there; training itself is test_train's."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_config import ROOT, presets

from di_star_jax import checks
from di_star_jax.config import load_config
from di_star_jax.errors import UserError
from di_star_jax.evaluation.measures import diversity
from di_star_jax.shapes import scenes
from di_star_jax.shapes.taste import taste
from di_star_jax.studies import ablation, ablation_page, figures, results, rows, world

CONFIG = str(ROOT / "configs" / "shapes.py")
CAPTIONS = [f"one red square number {i} on a white background" for i in range(8)]


def put(
    workdir,
    name,
    seed,
    reward=0.5,
    **scores,
):
    """A made-up result, which is what a run leaves."""
    folder = workdir / "rows" / name / str(seed)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(folder / "pictures.npy", rng.uniform(-1, 1, (6, 64, 64, 3)).astype(np.float32))
    scores = dict.fromkeys(world.MEASURES, 0.25) | {"reward": reward} | scores
    curve = {name: [0.1, value] for name, value in scores.items()} | {"step": [40, 80]}
    (folder / "result.json").write_text(
        json.dumps({"scores": scores, "curve": curve, "seconds": 60.0, "device": "cpu"})
    )


def begin(workdir):
    """Two rows with two seeds and one, and the initial generator."""
    put(workdir, results.INIT, 0, 0.5)
    put(workdir, "diff_instruct", 0, 0.6)
    put(workdir, "diff_instruct", 1, 0.7)
    put(workdir, "di_star", 0, 0.8)
    results.note_origin(workdir, CONFIG)
    return workdir


def complete(workdir):
    """All runs of a whole page."""
    for lacking in results.missing(results.results_of(workdir), ()):
        name, seed = re.fullmatch(r"(.+?)(?: \(seed (\d)\))?", lacking).groups()
        put(workdir, name, seed or 0)
    return workdir


@pytest.fixture
def workdir(tmp_path):
    """With some runs done."""
    return begin(tmp_path)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Drawing is most of what these tests do."""
    monkeypatch.setattr(figures, "DPI", 20)


def test_rows_are_presets_of_the_shapes_config_and_all_of_table_2():
    assert {row.preset for row in rows.ROWS.values()} <= set(presets("shapes"))
    assert {
        name for name in presets("sdxl") if name.split("_")[0] in ("kl", "inside", "outside")
    } <= {*rows.ROWS, "inside_100_7.5_long"}
    for row in rows.ROWS.values():
        checks.check(rows.config_of(row, CONFIG, seed=1), device_count=1)


def test_methods_are_compared_at_equal_balances_in_both_weightings():
    compared = set()
    for row in rows.rows_of(["balance"]):
        objective = rows.config_of(row, CONFIG, seed=0).objective
        balance = rows.config_of(row, CONFIG, seed=0).reward.balance
        compared.add((objective.name, objective.distance, objective.weighting, balance))
    assert len(rows.BALANCES) >= 4 and 0 not in rows.BALANCES
    assert compared == {
        (*method, balance)
        for balance in rows.BALANCES
        for method in (
            ("di_star", "pseudo_huber", "x0"),
            ("di_star", "pseudo_huber", "eps"),
            ("kl", "pseudo_huber", "x0"),
            ("kl", "pseudo_huber", "eps"),
            ("di_star", "l2", "x0_normalised"),
            ("di_star_outside", "pseudo_huber", "x0"),
        )
    }
    assert set(rows.CONCLUSIVE) <= set(rows.ROWS)
    assert all(len(rows.ROWS[name].seeds) == 3 for name in rows.CONCLUSIVE)


def test_hacked_runs_are_as_long_as_the_good_one_beside_them():
    good, hard, free = (rows.config_of(r, CONFIG, seed=0) for r in rows.rows_of(["hacking"]))
    assert hard.reward.pickscore == 10 * good.reward.pickscore
    assert free.objective.name == "reward_only"
    assert good.train.steps == hard.train.steps == free.train.steps == 2 * rows.STEPS


def test_losses_are_compared_from_the_teacher_alone_by_their_presets():
    configs = {row.name: rows.config_of(row, CONFIG, seed=0) for row in rows.rows_of(["distill"])}
    assert [config.objective.name for config in configs.values()] == ["kl", "kl", "di_star", "sid"]
    for name, config in configs.items():
        preset = load_config(CONFIG, name)
        assert not config.weights.generator and config.reward.pickscore == 0
        assert config.data.batch_size == preset.data.batch_size == 32
        assert config.optim == preset.optim and config.assistant == preset.assistant
        assert list(rows.points_of(config)) == [20, 40, 60, 80, 100, 120]


def test_rows_are_asked_for_by_name_and_by_group(workdir):
    conclusive = rows.CONCLUSIVE[-1]
    put(workdir, conclusive, 0)
    asked = [(r.name, seed) for r, seed in ablation._todo(workdir, [conclusive, "hacking"], ())]
    assert asked == [  # the first seed of the conclusive row is done
        *((name, 0) for name in ("good_run", "reward_times_10", "no_regulariser")),
        (conclusive, 1),
        (conclusive, 2),
    ]
    conclusive = rows.CONCLUSIVE[0]
    assert [seed for _, seed in ablation._todo(workdir, [conclusive], ())] == [0, 1, 2]
    assert [seed for _, seed in ablation._todo(workdir, [conclusive], [7])] == [7]


@pytest.mark.case("first hour 19")
def test_table_has_mean_and_spread_over_seeds(workdir):
    lines = ablation_page.table(results.results_of(workdir), "paper").splitlines()
    assert lines[2].startswith("| initial generator |  |  | 0.500 |")
    assert lines[3].startswith(
        "| KL (0, 7.5), Diff-Instruct | `diff_instruct` | 2 | 0.650 ± 0.071 | 0.250 ± 0.000 |"
    )
    assert lines[4].startswith("| DI* inside (100, 7.5) | `di_star` | 1 | 0.800 |")


def test_methods_are_compared_where_they_have_the_same_reward(workdir):
    for balance, reward, attributes in zip(rows.BALANCES, (0.6, 0.66, 0.74), (1.0, 0.9, 0.5)):
        put(workdir, rows.balanced_name("kl_x0", balance), 0, reward, attributes=attributes)
    found = results.results_of(workdir)
    at = results.at_reward(found, "kl_x0", 0.7)
    assert at["attributes"] == pytest.approx(0.7) and at["reward"] == pytest.approx(0.7)
    assert results.at_reward(found, "kl_x0", 0.75) is None
    assert results.at_reward(found, "l2", 0.7) is None
    lines = ablation_page.table_at_rewards(found).splitlines()
    assert "| 0.7 | KL in x0 | 0.250 | 0.700 |" in "\n".join(lines)
    assert "| 0.75 | KL in x0 | beyond its balances |" in "\n".join(lines)


def test_a_row_says_where_its_reward_was_best_and_whether_it_still_rose():
    def ending(*seeds):
        steps = [40, 80, 120]
        runs = [{"step": steps, "reward": list(rewards)} for rewards in seeds]
        return results.ending([results.Run(i, {}, c, 1.0, "cpu") for i, c in enumerate(runs)])

    assert ending((0.5, 0.6, 0.7)) == (120, True)
    assert ending((0.5, 0.7, 0.701)) == (120, False)
    assert ending((0.5, 0.7, 0.6)) == (80, False)
    assert ending((0.5, 0.7, 0.6), (0.5, 0.5, 0.9)) == (120, True)  # of the mean


def test_page_keeps_its_conclusion_and_says_what_is_missing(workdir):
    pytest.importorskip("matplotlib")
    page = workdir / "ablation.md"
    ablation.write_page(workdir, CAPTIONS, (), workdir)
    assert "Not drawn yet." in page.read_text()
    page.write_text("## Conclusion\n\nIt holds.\n")
    ablation.write_page(workdir, CAPTIONS, (), workdir)
    text = page.read_text()
    assert text.endswith("## Conclusion\n\nIt holds.\n") and "`diff_instruct`" in text
    assert re.search(r"Not complete: \d+ runs are missing: teacher, kl_0_0 \(seed 0\)", text)
    assert not (workdir / "ablation_balance.png").exists() and "ablation_balance.png" not in text


def untrained(*args):
    pytest.fail("began to train")


def test_each_seed_that_is_not_done_is_missing(workdir):
    put(workdir, rows.CONCLUSIVE[0], 0)
    done = results.results_of(workdir)
    lacking = [n for n in results.missing(done, ()) if n.startswith(rows.CONCLUSIVE[0])]
    assert lacking == [f"{rows.CONCLUSIVE[0]} (seed {seed})" for seed in (1, 2)]
    assert f"{rows.CONCLUSIVE[0]} (seed 0)" not in results.missing(done, [0])


def run_main(monkeypatch, **given):
    asked = {"config": CONFIG, "rows": [], "seeds": [], "out": None}
    given = SimpleNamespace(**(asked | given))
    monkeypatch.setattr(ablation, "flags", SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(ablation.jax, "device_count", lambda: 1)  # as users have
    monkeypatch.setattr(ablation, "_run", untrained)
    ablation.main()


def test_a_partial_table_never_replaces_the_one_in_out(workdir, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    put(workdir, results.TEACHER, 0)
    out = tmp_path / "docs"
    out.mkdir()
    (out / "ablation.md").write_text("whole")
    run_main(monkeypatch, workdir=str(workdir), rows=["diff_instruct"], seeds=["0"], out=str(out))
    assert [file.name for file in out.iterdir()] == ["ablation.md"]
    assert (out / "ablation.md").read_text() == "whole"
    assert "Not complete" in (workdir / "ablation.md").read_text()
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "left as it is" in line)
    assert str(out) in said and "kl_0_0 (seed 0)" in said


@pytest.mark.long
def test_a_whole_page_goes_to_out_and_keeps_what_people_wrote(workdir, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs"
    out.mkdir()
    (out / "ablation.md").write_text("# Old\n\n## Conclusion\n\nIt holds.\n")
    run_main(monkeypatch, workdir=str(complete(workdir)), out=str(out))
    text = (out / "ablation.md").read_text()
    assert "Not complete" not in text and text.endswith("## Conclusion\n\nIt holds.\n")
    assert all(f"`{name}`" in text for name in rows.ROWS)
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (out / picture).exists()
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 4


@pytest.mark.case("first hour 24")
def test_the_page_goes_to_the_workdir_and_not_to_the_documents(workdir):
    pytest.importorskip("matplotlib")
    put(workdir, results.TEACHER, 0)
    pages = sorted((ROOT / "docs").glob("ablation*"))
    before = [file.stat().st_mtime_ns for file in pages]
    command = [sys.executable, "-m", "di_star_jax.studies.ablation", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, "--rows=di_star", "--seeds=0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # one device, as users have
    )
    assert done.returncode == 0, done.stderr
    assert "`di_star`" in (workdir / "ablation.md").read_text()
    assert (workdir / "ablation.png").exists()
    assert ablation.SPREAD in done.stdout and str(workdir / "ablation.md") in done.stdout
    assert pages and before == [file.stat().st_mtime_ns for file in pages]


def refused(monkeypatch, **given):
    """What main says of flags."""
    with pytest.raises(UserError) as error:
        run_main(monkeypatch, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.case("first hour 24")
def test_all_that_is_wrong_is_said_at_once_and_before_the_training(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refused(
        monkeypatch,
        rows=["di_sta"],
        seeds=["two"],
        workdir=str(tmp_path / ("a" * 300)),
        out=str(tmp_path / "file"),
    )
    for part in (
        "pip install matplotlib",
        "--rows=di_sta, did you mean di_star?",
        "--seeds=two",
        "File name too long",
        "it is a file",
    ):
        assert part in said


@pytest.mark.case("first hour 24")
def test_a_config_of_another_world_is_refused(monkeypatch, tmp_path):
    config = str(ROOT / "configs" / "sdxl.py")
    assert "expected one of the shapes world" in refused(
        monkeypatch, config=config, workdir=str(tmp_path)
    )


def test_results_of_another_generator_or_default_are_refused(workdir, monkeypatch, tmp_path):
    file = workdir / "world.json"
    kept = json.loads(file.read_text())
    changed = {"the initial generator": "0" * 64, "optim.generator_lr": 3e-4, "row dmd": {}}
    file.write_text(json.dumps(kept | changed))
    said = refused(monkeypatch, workdir=str(workdir))
    assert (
        "the initial generator, optim.generator_lr (0.0003 there, 0.0001 now), row dmd ({} there"
        in said
    )
    assert "give another --workdir" in said
    file.unlink()
    assert "no world.json: an older version" in refused(monkeypatch, workdir=str(workdir))


def test_other_balances_do_not_make_a_workdir_another_one(workdir, monkeypatch):
    kept = json.loads((workdir / "world.json").read_text())
    row = rows.ROWS["kl_x0@1.6"]._replace(name="kl_x0@5", overrides={"reward.balance": 5.0})
    monkeypatch.setattr(rows, "ROWS", {"di_star": rows.ROWS["di_star"], row.name: row})
    results.check_origin(workdir, CONFIG)
    results.note_origin(workdir, CONFIG)
    noted = json.loads((workdir / "world.json").read_text())
    assert noted == kept | {"row kl_x0@5": {"objective.name": "kl", "reward.balance": 5.0}}


def test_a_generator_is_told_from_another_by_its_content(monkeypatch, tmp_path):
    config = load_config(CONFIG, "di_star")
    copied = tmp_path / "generator"
    copied.mkdir()
    for source in (ROOT / "di_star_jax" / "shapes" / "checkpoint" / "generator").iterdir():
        (copied / source.name).write_bytes(source.read_bytes())
    before = results.origin(CONFIG)
    config.weights.generator = str(copied)
    monkeypatch.setattr(results, "load_config", lambda *_: config)
    assert results.origin(CONFIG) == before  # wherever it lies
    (copied / "config.json").write_text("{}")
    differ = {k for k, v in results.origin(CONFIG).items() if v != before[k]}
    assert differ == {"the initial generator"}


@pytest.mark.parametrize("text", ['{"scores":', '{"scores": {"reward": 1}, "curve": [[1, 2]]}'])
def test_a_damaged_or_older_result_is_named(workdir, monkeypatch, text):
    (workdir / "rows" / "di_star" / "0" / "result.json").write_text(text)
    said = refused(monkeypatch, workdir=str(workdir))
    assert re.search(r"di_star/0/result.json is damaged or of another version.*made again", said)


def test_pictures_are_measured_for_what_was_asked_and_what_is_liked():
    """Against measures of single pictures; the judge is a stand-in."""
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng, held_out=True) for _ in range(3)]
    unit = np.array([[scenes.render(scene, rng) for _ in range(2)] for scene in drawn])
    features = rng.normal(size=(6, 4))
    measured = object.__new__(world.World)
    measured.captions = [scene.caption for scene in drawn]
    measured.judge = SimpleNamespace(features=lambda images: features)
    measured._texts = np.ones((3, 4))
    measured._teacher_statistics = world.statistics(features)
    found = measured.measure(world.Drawn(unit * 2 - 1, np.arange(6.0).reshape(3, 2)))
    assert set(found) == set(world.MEASURES)
    assert found["attributes"] == 1.0 and found["reward"] == 2.5
    np.testing.assert_allclose(
        found["taste"], np.mean([taste(image) for image in unit.reshape(6, 64, 64, 3)]), rtol=1e-6
    )
    np.testing.assert_allclose(found["Frechet distance"], 0.0, atol=1e-6)
    of_captions = [diversity(features[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(found["diversity"], np.mean(of_captions))


def test_a_curve_has_the_same_captions_at_every_step_and_the_end_all_of_them(monkeypatch):
    monkeypatch.setattr(world, "CURVE_CAPTIONS", 2)
    stand_in = SimpleNamespace(
        captions=["a", "b", "c"],
        pictures=lambda params, count: world.Drawn(np.full(count, params), np.arange(count)),
        measure=lambda drawn: dict.fromkeys(
            world.MEASURES, 10 * int(drawn.images[0]) + len(drawn.images)
        ),
    )
    found, drawn = world.measured(stand_in, {40: 4, 80: 8})
    assert found["curve"]["step"] == [40, 80] and found["curve"]["taste"] == [42, 82]
    assert found["scores"]["taste"] == 83 and len(drawn.images) == 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page's figures, as they are saved."""
    figure = pytest.importorskip("matplotlib.figure")
    whole = complete(begin(tmp_path_factory.mktemp("whole")))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, path, **k: found.update({path: self}))
        ablation.write_page(whole, CAPTIONS, (), whole)
    return {path.stem: made for path, made in found.items()}


@pytest.mark.case("first hour 20")
def test_columns_have_captions_and_lines_their_own_look(drawn):
    grid, balance = drawn["ablation"], drawn["ablation_balance"]
    titles = [axis.get_title() for axis in grid.axes[: figures.COLUMNS]]
    assert [re.sub(r"\s+", " ", title) for title in titles] == CAPTIONS[: figures.COLUMNS]
    for axis in balance.axes:
        looks = [
            (line.get_color(), line.get_marker())
            for line in axis.lines
            if len(line.get_xdata()) == len(rows.BALANCES) and line.get_marker() in figures.MARKERS
        ]
        assert len(looks) == len(rows.METHODS) == 6
        assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 6
    assert balance.legends and not any(axis.get_legend() for axis in balance.axes)


def test_text_is_readable_at_the_width_of_a_page(drawn):
    from matplotlib.text import Text

    for name in ("ablation", "ablation_balance", "ablation_hacking", "ablation_distill"):
        texts = [text for text in drawn[name].findobj(Text) if text.get_text().strip()]
        shown = 830 / 96 / drawn[name].get_figwidth()  # 830 pixels on GitHub
        assert texts and min(text.get_fontsize() * shown for text in texts) >= 8.0, name


def test_hacking_shows_its_signals_beside_the_teachers(drawn):
    above, _ = drawn["ablation_hacking"].subfigs
    signals = [axis for axis in above.axes if axis.get_title()]
    assert len(signals) == 5
    for axis in signals:
        *runs, teacher = axis.lines
        assert len(runs) == 3 and teacher.get_linestyle() == "--"
        assert all(line.get_xdata()[0] == 0 for line in runs)  # the initial generator


def test_losses_of_the_first_stage_are_shown_beside_teacher_and_shipped_generator(drawn):
    above, _ = drawn["ablation_distill"].subfigs
    signals = [axis for axis in above.axes if axis.get_title()]
    assert len(signals) == 5
    for axis in signals:
        *runs, teacher, shipped = axis.lines
        assert len(runs) == 4 and [teacher.get_linestyle(), shipped.get_linestyle()] == ["--", ":"]
        assert all(line.get_xdata()[0] > 0 for line in runs)  # a copied teacher draws nothing


@pytest.mark.case("first hour 9", "first hour 10")
def test_time_left_comes_from_the_runs_that_are_done(workdir):
    todo = [(rows.ROWS["di_star"], 2), (rows.ROWS["good_run"], 0)]  # of two lengths
    assert ablation._estimate(results.results_of(workdir), todo) == "3.0 min left in all"
    assert "two cores" in ablation._estimate({}, todo)
