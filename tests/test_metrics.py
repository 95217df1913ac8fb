# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
from PIL import Image

from di_star_jax import log as metrics
from di_star_jax import pictures


def test_writer_appends_after_a_restart_and_drops_what_was_beyond_the_checkpoint(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"reward/mean": 0.1 * step})
    writer.image(3, "samples", np.zeros((8, 8, 3), np.uint8))
    writer.close()
    resumed = metrics.Writer(tmp_path, first_step=2)
    resumed.scalars(3, {"reward/mean": 0.9})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], round(line["reward/mean"], 3)) for line in lines] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.9),
    ]
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_progress_prints_step_reward_rate_and_time_left(capsys):
    progress = metrics.Progress(total=10, start=4)
    progress.update(10, "pickscore 0.2500, 12.5 images/s")
    progress.close()
    assert "step 10/10, pickscore 0.2500, 12.5 images/s, 0.0 min left" in capsys.readouterr().out


def test_uint8_covers_the_range_and_clips():
    assert pictures.to_uint8(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_grid_keeps_order_and_saves(tmp_path):
    images = np.stack([np.full((4, 4, 3), v, np.float32) for v in (-1, 0, 1)])
    grid = pictures.image_grid(images, 2, padding=1)
    assert grid.shape == (9, 9, 3)
    assert grid[0, 0, 0] == 0 and grid[0, 8, 0] == 128 and grid[8, 0, 0] == 255
    pictures.save_png(tmp_path / "grid.png", grid)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)


def test_before_after_picture_shows_both_images_of_each_prompt():
    before, after = np.full((3, 8, 8, 3), -1.0), np.full((3, 8, 8, 3), 1.0)
    picture = pictures.before_after_grid(
        before, after, ["one", "two words", "three " * 30], columns=2, side=16
    )
    assert (picture[34 + 8, 20 + 8] == 0).all() and (picture[34 + 8, 20 + 16 + 4 + 8] == 255).all()


def test_a_table_has_a_line_a_row_and_a_cells_bar_does_not_end_the_cell():
    table = metrics.markdown_table(["", "a|b"], [["reward", "0.1"], ["score", ""]])
    assert table == "|  | a\\|b |\n|---|---|\n| reward | 0.1 |\n| score |  |"
