# SPDX-License-Identifier: Apache-2.0
import json
import os
import pty
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from test_config import ROOT

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


@pytest.mark.case("faults 4", "faults 30")
def test_a_damaged_metrics_file_never_stops_a_resume_and_what_is_dropped_is_said(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    broken = [
        b'{"loss": 1.0}',
        bytes(7),
        b"",
        b"[1]",
        b'{"step": "x"}',
        b"\xff\xfe",
        b'{"step": 2, "l',
    ]
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + b"\n".join(broken))
    with metrics.Writer(tmp_path, first_step=2) as writer:
        writer.scalars(3, {"loss": 1.5})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.5}]
    assert "metrics.jsonl: 6 damaged lines dropped" in capsys.readouterr().out


def shown(folder):
    """{tag: [steps]} of all event files, and how many files there are."""
    found = {}
    files = sorted(folder.glob("events*"))
    for file in files:
        for event in events(file.read_bytes()):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found, len(files)


def events(content):
    while content:  # length, its checksum, event, its checksum
        size = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


@pytest.mark.case("faults 32")
def test_each_step_is_there_once_after_starts_that_were_killed(tmp_path):
    for i, (first, last) in enumerate(((0, 3), (0, 5), (4, 6), (4, 8))):
        with metrics.Writer(tmp_path, first_step=first) as writer:
            for step in range(first + 1, last + 1):
                writer.scalars(step, {"loss": float(step)})
        (newest,) = set(tmp_path.glob("events*")) - set(tmp_path.glob("events*.start*"))
        os.truncate(newest, newest.stat().st_size - 5)  # the last event is cut
        newest.rename(f"{newest}.start{i}")  # those within one second have one name
    with metrics.Writer(tmp_path, first_step=7) as writer:
        writer.scalars(8, {"loss": 8.0})
    found, files = shown(tmp_path)
    assert sorted(found["loss"]) == [1, 2, 3, 4, 5, 6, 7, 8] and files == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.case("first hour 26")
def test_tensorboard_has_names_as_given_pictures_and_text(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.scalars(0, {"eval/pickscore, std": 0.25})
        writer.text(0, "run", "| a table |")
    (events,) = tmp_path.glob("events*")
    content = events.read_bytes()
    assert b"eval/pickscore, std" in content and b"| a table |" in content


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_progress_prints_step_and_text_without_time_at_the_end(capsys):
    progress = metrics.Progress(total=10, start=4)
    progress.update(10, "pickscore 0.2500, 12.5 images/s")
    progress.close()
    assert capsys.readouterr().out == "step 10/10, pickscore 0.2500, 12.5 images/s\n"


@pytest.mark.case("faults 13", "first hour 9")
def test_the_time_left_is_right_within_a_fifth_after_ten_steps(capsys):
    clock = Clock()
    warmup, total, scoring, final, compiling = 40, 240, 7.0, 60.0, 90.0
    scorings = range(50, total + 1, 50)
    progress = metrics.Progress(
        total,
        0,
        phases=[metrics.Phase(warmup, cost=1.0), metrics.Phase(total, cost=2.0)],
        pauses={"scoring": lambda k: sum(s > k for s in scorings), "final": lambda k: 1},
        clock=clock,
    )
    progress.expect("scoring", scoring)
    progress.expect("final", final)
    told = []
    for k in range(1, total + 1):
        clock.now += compiling if k in (1, warmup + 1) else 0  # each program's first call
        clock.now += 1.0 if k <= warmup else 2.0
        progress.update(k, "")
        told.append((k, clock.now, progress.seconds_left()))
        if k in scorings:
            with progress.paused("scoring"):
                clock.now += scoring
    end = clock.now + final
    assert [left for k, _, left in told if k <= 2] == [None, None]
    for k, now, left in told[10:]:
        compiles = compiling if k <= warmup else 0.0  # in a run it comes before the first step
        assert left == pytest.approx(end - now - compiles, rel=0.2), k
    assert capsys.readouterr().out.startswith("step 1/240, no estimate of the time yet\n")


@pytest.mark.case("faults 13", "first hour 9")
def test_the_rate_is_that_of_the_last_ten_steps_and_unknown_right_after_a_resume():
    clock = Clock()
    progress = metrics.Progress(100, 60, clock=clock)
    for k in range(61, 81):
        clock.now += 30.0 if k < 64 else 1.0  # slow at first, as caches are filled
        progress.update(k, "")
        if k < 63:
            assert progress.step_seconds() is None
    assert progress.step_seconds() == pytest.approx(1.0)
    assert progress.seconds_left() == pytest.approx(20.0)


@pytest.mark.case("first hour 10")
def test_a_wait_is_announced_said_to_go_on_and_timed(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "HEARTBEAT", 0.2)
    with metrics.waiting("compiling the step", "about a minute"):
        time.sleep(1.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiling the step, about a minute"
    assert lines[1].startswith("still compiling the step, ") and len(lines) >= 4
    assert lines[-1] == "compiling the step took 1 s"
    with pytest.raises(ZeroDivisionError), metrics.waiting("dividing"):
        raise ZeroDivisionError
    assert capsys.readouterr().out == "dividing\n"


@pytest.mark.case("first hour 10")
def test_the_bar_of_a_terminal_swallows_no_line():
    script = """
from di_star_jax import log
with log.Progress(4, 0) as progress:
    for k in range(1, 5):
        progress.update(k, "loss 1.0")
        log.say(f"line {k}")
"""
    terminal, end = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stdout=end, stderr=end, cwd=ROOT, check=True)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    lines = shown.replace("\r", "\n").split("\n")
    assert [line for line in lines if line.startswith("line")] == [f"line {k}" for k in range(1, 5)]


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


def test_a_comparison_shows_the_images_of_each_prompt_beside_each_other():
    images = {
        name: np.full((3, 8, 8, 3), value, np.uint8)
        for name, value in (("before", 0), ("after", 100), ("teacher", 200))
    }
    prompts = ["one", "two words", "three " * 30]
    picture = pictures.compared_grid(images, prompts, width=200, side=16)
    first, second = 24 + 8, 24 + (3 * 20 - 4) + 24 + 8  # of two cells in a row
    assert [picture[34 + 8, first + 20 * k, 0] for k in range(3)] == [0, 100, 200]
    assert [picture[34 + 8, second + 20 * k, 0] for k in range(3)] == [0, 100, 200]
    assert picture.shape[1] < 200


def test_a_table_has_a_line_a_row_and_a_cells_bar_does_not_end_the_cell():
    table = metrics.markdown_table(["", "a|b"], [["reward", "0.1"], ["score", ""]])
    assert table == "|  | a\\|b |\n|---|---|\n| reward | 0.1 |\n| score |  |"
