# SPDX-License-Identifier: Apache-2.0
"""What a run says of signals and of the time that its last scoring takes, and how long it is."""

import ast
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from di_star_jax import drawing, train
from di_star_jax.evaluation.held_out import HeldOut
from di_star_jax.prompts.files import Prompt
from di_star_jax.stop import Stop
from di_star_jax.storage import files


@pytest.mark.case("faults 27")
def test_a_run_says_at_its_start_what_a_signal_will_do():
    with Stop() as stop:
        assert "exit code 75, Ctrl-C with 130" in stop.promise()
    said = []

    def elsewhere():
        with Stop() as stop:
            said.append(stop.promise())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said[0].startswith("warning: ") and "without saving" in said[0]


def test_what_is_compiled_first_is_no_part_of_the_time_that_scoring_is_expected_to_take():
    calls = []

    def draw(generator, token_ids, z):
        calls.append(1)
        # Also what is made of the first images, which begins when all of a prompt's are drawn.
        time.sleep(0.5 if len(calls) in (1, 3) else 0.01)
        count = len(token_ids["ids"])
        scores = {"pickscore": np.zeros(count)}
        return drawing.Scored(np.zeros((count, 8, 8, 3)), scores, {})

    held = HeldOut(
        draw=draw,
        sampling=drawing.Sampling("few_step", np.array([399]), 1.0, (1, 1, 4)),
        prompts=[Prompt(i, "a", {}) for i in range(6)],
        token_ids={"ids": np.zeros((6, 4), np.int32)},
        samples=2,
        batch_size=2,
        seed=0,
        reads_attributes=False,
    )
    assert held.measure(None).seconds < 0.05


def test_folders_are_told_apart_by_a_sample_of_their_bytes(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name / "unet").mkdir(parents=True)
        content = bytearray(10**6)
        content[5] = name == "other"
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(content)
        (tmp_path / name / ".cache").write_text(name)
    one, same, other = (files.sampled_digest(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "same" / "unet" / "config.json").write_text("{}")
    assert files.sampled_digest(tmp_path / "same") != one


def test_the_functions_of_a_run_fit_a_screen():
    source = Path(train.__file__).read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert max(lengths.values()) <= 80, lengths
