# SPDX-License-Identifier: Apache-2.0
"""A run's scores before and after, beside its teacher's, and what warns of a gamed reward."""

import json

import numpy as np
import pytest
from PIL import Image

from di_star_jax.evaluation import held_out
from di_star_jax.prompts.files import Prompt

INITIAL = {"saturation": 0.4, "diversity": 0.02, "attributes right": 0.95, "pickscore": 0.5}
PROMPTS = [Prompt(0, "a red circle", {}), Prompt(1, "two blue squares", {})]


def measured(reward, shade):
    scores = {"pickscore": reward, "pickscore, std": 0.1}
    return held_out.Measured(scores, scores, np.full((2, 8, 8, 3), shade, np.float32), 0.1)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"saturation": 0.51}, "saturation 0.5100, 1.27 of the initial 0.4000"),
        ({"saturation": 0.372}, "saturation 0.3720, 0.93 of the initial 0.4000"),
        ({"diversity": 0.013}, "diversity 0.0130, 0.65 of the initial 0.0200"),
        ({"attributes right": 0.91}, "attributes right 0.9100, 0.96 of the initial 0.9500"),
    ],
)
def test_a_signal_that_leaves_its_band_is_told(changed, told):
    assert held_out.gone_astray(INITIAL | changed, INITIAL) == [told]


def test_signals_within_their_bands_or_without_a_beginning_are_not_told():
    usual = {"saturation": 0.45, "diversity": 0.05, "attributes right": 1.0, "pickscore": 5.0}
    assert held_out.gone_astray(usual, INITIAL) == []
    assert held_out.gone_astray({"pickscore": 0.7}, INITIAL) == []
    assert held_out.gone_astray(usual, {}) == []


def test_what_is_kept_comes_back_for_the_same_settings_alone(tmp_path):
    settings = {"prompts": "a", "samples": 8}
    held_out.keep(tmp_path, held_out.BEFORE, settings, measured(0.5, -1.0))
    kept = held_out.kept(tmp_path, held_out.BEFORE, settings)
    assert kept.scores["pickscore"] == 0.5 and (kept.images == 0).all()
    assert held_out.kept(tmp_path, held_out.BEFORE, settings | {"prompts": "b"}) is None
    assert held_out.kept(tmp_path, held_out.TEACHER, settings) is None
    (tmp_path / "before.npy").write_bytes(b"half")
    assert held_out.kept(tmp_path, held_out.BEFORE, settings) is None


def test_the_teacher_is_a_third_column_of_the_table_and_of_the_pictures(tmp_path):
    for name, reward, shade in ((held_out.BEFORE, 0.5, -1.0), (held_out.TEACHER, 0.6, 1.0)):
        held_out.keep(tmp_path, name, {}, measured(reward, shade))
    before, teacher = (held_out.kept(tmp_path, n, {}) for n in (held_out.BEFORE, held_out.TEACHER))
    after = measured(0.7, 0.0)
    held_out.compare(tmp_path, PROMPTS, before, after, None)
    assert held_out.table(tmp_path).splitlines()[0] == "|  | before | after | change |"
    held_out.compare(tmp_path, PROMPTS, before, after, teacher)
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert [picture[34 + 64, 24 + 64 + 132 * k, 0] for k in range(3)] == [0, 128, 255]
    lines = held_out.table(tmp_path).splitlines()
    assert lines[0] == "|  | before | after | change | teacher |"
    assert lines[2] == "| pickscore | 0.5000 | 0.7000 | +0.2000 | 0.6000 |"
    assert "pickscore rose by +2.00 standard deviations of the initial ones" in lines
    assert json.loads((tmp_path / held_out.AFTER).read_text())["teacher"]["pickscore"] == 0.6
