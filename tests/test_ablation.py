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

from di_star_jax.errors import UserError
from di_star_jax.studies import ablation

CAPTIONS = [f"one red square number {i} on a white background" for i in range(8)]


@pytest.fixture
def workdir(tmp_path):
    """Two rows with two seeds and one, and the initial generator."""
    rng = np.random.default_rng(0)
    for name, seed, reward in (
        (ablation.INIT, "0", 0.5),
        ("diff_instruct", "0", 0.6),
        ("diff_instruct", "1", 0.7),
        ("di_star", "0", 0.8),
    ):
        folder = tmp_path / "rows" / name / seed
        folder.mkdir(parents=True)
        np.save(folder / "pictures.npy", rng.uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32))
        scores = dict.fromkeys(ablation.MEASURES, 0.25) | {"reward": reward}
        (folder / "result.json").write_text(
            json.dumps(
                {"scores": scores, "curve": [[reward, 0.3]], "seconds": 60.0, "device": "cpu"}
            )
        )
    return tmp_path


def test_rows_are_presets_of_the_shapes_config_and_all_of_table_2():
    assert set(ablation.ROWS) <= set(presets("shapes"))
    assert {
        name for name in presets("sdxl") if name.split("_")[0] in ("kl", "inside", "outside")
    } <= {*ablation.ROWS, "inside_100_7.5_long"}


@pytest.mark.case("first hour 19")
def test_table_has_mean_and_spread_over_seeds(workdir):
    lines = ablation.table(ablation.results_of(workdir)).splitlines()
    assert lines[2].startswith("| initial generator |  | 1 | 0.5000 |")
    assert lines[3].startswith(
        "| KL (0, 7.5), Diff-Instruct | `diff_instruct` | 2 | 0.6500 ± 0.0707 | 0.2500 ± 0.0000 |"
    )
    assert lines[4].startswith("| DI* inside (100, 7.5) | `di_star` | 1 | 0.8000 |")


def test_page_keeps_its_conclusion_when_rows_are_added(workdir, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs"
    out.mkdir()
    ablation.write_page(workdir, CAPTIONS, out)
    assert "Not drawn yet." in (out / "ablation.md").read_text()
    (out / "ablation.md").write_text("## Conclusion\n\nIt holds.\n")
    ablation.write_page(workdir, CAPTIONS, out)
    page = (out / "ablation.md").read_text()
    assert page.endswith("## Conclusion\n\nIt holds.\n") and "`diff_instruct`" in page
    assert (out / "ablation.png").exists() and (out / "ablation_curves.png").exists()


@pytest.mark.case("first hour 24")
def test_the_page_goes_to_the_workdir_and_not_to_the_documents(workdir):
    pytest.importorskip("matplotlib")
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
    assert (workdir / "ablation.png").exists() and (workdir / "ablation_curves.png").exists()
    assert ablation.SPREAD in done.stdout and str(workdir / "ablation.md") in done.stdout
    assert pages and before == [file.stat().st_mtime_ns for file in pages]


def refused(monkeypatch, **given):
    """What main says of flags."""
    asked = {"config": str(ROOT / "configs" / "shapes.py"), "rows": [], "seeds": ["0"], "out": None}
    given = SimpleNamespace(**(asked | given))
    monkeypatch.setattr(ablation, "flags", SimpleNamespace(FLAGS=given))
    with pytest.raises(UserError) as error:
        ablation.main()
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


def test_a_damaged_result_is_named(workdir):
    (workdir / "rows" / "di_star" / "0" / "result.json").write_text('{"scores":')
    with pytest.raises(UserError, match=r"di_star/0/result.json is damaged.*made again"):
        ablation.results_of(workdir)


@pytest.mark.case("first hour 20")
def test_columns_have_captions_and_curves_their_own_colours(workdir, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    results = ablation.results_of(workdir)
    ablation.draw_grid(workdir, results, CAPTIONS, tmp_path / "grid.png")
    ablation.draw_curves(
        {ablation.INIT: results[ablation.INIT]} | dict.fromkeys(ablation.ROWS, results["di_star"]),
        tmp_path / "curves.png",
    )
    grid, curves = drawn
    titles = [axis.get_title() for axis in grid.axes[: ablation.COLUMNS]]
    assert [re.sub(r"\s+", " ", title) for title in titles] == CAPTIONS
    colours = [tuple(line.get_color()) for line in curves.axes[0].lines]
    assert len(set(colours)) == len(colours) == len(ablation.ROWS) + 1


@pytest.mark.case("first hour 9", "first hour 10")
def test_time_left_comes_from_the_runs_that_are_done(workdir):
    assert ablation._estimate(ablation.results_of(workdir), 5) == "5.0 min left in all"
    assert "two cores" in ablation._estimate({}, 5)
