# SPDX-License-Identifier: Apache-2.0
"""The papers' numbers: which stand beside which of ours."""

import itertools
import re

import numpy as np
import pytest

from di_star_jax.evaluation import metrics, papers
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.sets import PROMPT_SETS

ROWS = [
    (prompts, table, row)
    for prompts, tables in papers.TABLES.items()
    for table in tables
    for row in table.rows
]


def scores(prompts, metric):
    """(name, score) of what is shown for one metric."""
    rows = [row for table in papers.tables_of(prompts, [metric]) for row in table.rows]
    return [(row.name, row.scores[metric]) for row in rows]


def test_diff_instruct_pps_numbers_are_shown_for_coco_and_by_hpsv2_0():
    assert ("DI++ of PixArt-alpha", 6.19) in scores("coco", "aesthetic")
    assert ("DI++ of PixArt-alpha", 1.24) in scores("coco", "imagereward")
    assert ("DI++ of PixArt-alpha", 28.48) in scores("hpsv2", "hpsv2")
    assert ("DI* of PixArt-alpha", 28.70) in scores("hpsv2", "hpsv2")
    assert ("SDXL-Turbo", 0.78) in scores("coco", "imagereward")
    assert not papers.tables_of("parti", ["hpsv2", "hpsv21"])
    assert not papers.tables_of("a file", ["imagereward"])


def test_hpsv2_0_and_2_1_are_never_mixed():
    of_both = [row for _, _, row in ROWS if {"hpsv2", "hpsv21"} <= row.scores.keys()]
    assert not of_both
    for metric, version in (("hpsv2", "HPSv2.1"), ("hpsv21", "HPSv2.0")):
        assert not [t for t in papers.tables_of("hpsv2", [metric]) if version in t.source]
    of_di_star = {31.19, 29.05, 29.72}
    assert of_di_star <= {score for _, score in scores("hpsv2", "hpsv21")}
    assert of_di_star.isdisjoint(score for _, score in scores("hpsv2", "hpsv2"))


def test_the_average_over_styles_is_the_printed_one():
    for _, _, row in ROWS:
        for metric, styles in row.by_style.items():
            assert len(styles) == len(papers.HPSV2_STYLES)
            assert np.isclose(np.mean(styles), row.scores[metric], atol=0.0101), row


def test_rows_say_of_what_size_they_are_and_in_how_many_steps_they_are_drawn():
    for prompts, table, row in ROWS:
        assert prompts in PROMPT_SETS and set(row.scores) <= set(metrics.names())
        if "README of HPSv2," in table.source:
            assert row.model == "size not said"
            continue
        assert re.fullmatch(r"[\d.]+B, (\d+ px|pixels not said)", row.model), row
        assert row.steps and row.model in row.label


@pytest.mark.parametrize("prompts", list(papers.TABLES))
def test_no_two_rows_look_the_same(prompts):
    rows = itertools.chain(*(table.rows for table in papers.TABLES[prompts]))
    labels = [(row.label, row.steps, *row.scores) for row in rows]
    assert len(labels) == len(set(labels))


def test_a_row_without_any_of_the_metrics_is_left_out():
    (table,) = papers.tables_of("coco", ["fid"])
    assert "2410.20898, Table 1" in table.source and len(table.rows) == 10


def test_the_papers_teachers_are_drawn_as_we_draw_a_teacher_by_default():
    for prompts in papers.TABLES:
        rows = {row.name: row for row in papers.TABLES[prompts][0].rows}
        for name in ("SDXL-base", "SDXL-DPO"):
            assert (rows[name].steps, rows[name].guidance) == SDXL.teacher
