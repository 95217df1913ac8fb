# SPDX-License-Identifier: Apache-2.0
"""The miniature Table 2 from results that are there; training itself is test_train's."""

import json

import numpy as np
import pytest
from test_config import presets

from di_star_jax.studies import ablation


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


def test_table_has_mean_and_standard_error_over_seeds(workdir):
    lines = ablation.table(ablation.results_of(workdir)).splitlines()
    assert lines[2].startswith("| initial generator |  | 1 | 0.5000 |")
    assert lines[3].startswith(
        "| KL (0, 7.5), Diff-Instruct | `diff_instruct` | 2 | 0.6500 ± 0.0500 | 0.2500 ± 0.0000 |"
    )
    assert lines[4].startswith("| DI* inside (100, 7.5) | `di_star` | 1 | 0.8000 |")


def test_page_keeps_its_conclusion_when_rows_are_added(workdir, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs"
    ablation.write_page(workdir, out)
    assert "Not drawn yet." in (out / "ablation.md").read_text()
    (out / "ablation.md").write_text("## Conclusion\n\nIt holds.\n")
    ablation.write_page(workdir, out)
    page = (out / "ablation.md").read_text()
    assert page.endswith("## Conclusion\n\nIt holds.\n") and "`diff_instruct`" in page
    assert (out / "ablation.png").exists() and (out / "ablation_curves.png").exists()
