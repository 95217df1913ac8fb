# SPDX-License-Identifier: Apache-2.0
"""A whole run on a tiny random pipeline: outputs, restart, and what reads its workdir."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_config import ROOT
from test_config import load as load_config
from test_step import CONFIGS, random_model

from di_star_jax import assembly, drawing, sharding, train
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.evaluation import held_out
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.export import INPUT, TIMESTEPS
from di_star_jax.shapes.tokenizer import END, make_word_tokenizer
from di_star_jax.storage import checkpoint, weights

# One level, one transformer each way: what a run does with it is the same, and compiles in half the
# time.
UNET = {
    **CONFIGS["unet"],
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "transformer_layers_per_block": [1],
    "attention_head_dim": [1],
}


def write_pipeline(out):
    """Writes a tiny random pipeline folder with generator/, reward/ and prompts.txt.

    Returns: out.
    """
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        size = make_word_tokenizer(
            ["a", "red", "blue", "circle", "square"], out / name, max_length=8, pad_token=pad
        )
    text = {**CONFIGS["text_encoder"], "vocab_size": size, "eos_token_id": size - 1}
    configs = {
        "unet": UNET,
        "generator": UNET,
        "vae": CONFIGS["vae"],
        "text_encoder": text,
        "text_encoder_2": {**text, "architectures": ["CLIPTextModelWithProjection"]},
        "reward": {**CONFIGS["reward"], "text_config": text},
    }
    for i, (name, config) in enumerate(configs.items()):
        params = random_model(config, seed=i)[1]
        weights.save(out / name, params, config=config, file_name="model.safetensors")
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "EulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
            }
        )
    )
    (out / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionXLPipeline",
                **{
                    name: ["library", "Class"]
                    for name in (
                        "unet",
                        "vae",
                        "text_encoder",
                        "text_encoder_2",
                        "tokenizer",
                        "tokenizer_2",
                        "scheduler",
                    )
                },
            }
        )
    )
    (out / "prompts.txt").write_text(
        "".join(f"a {c} {k}\n" for c in ("red", "blue") for k in ("circle", "square"))
    )
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def config_for(folder, **changes):
    config = load_config("shapes")
    config.update_from_flattened_dict(
        {
            "weights.reference": str(folder),
            "weights.generator": str(folder / "generator"),
            "weights.pickscore": str(folder / "reward"),
            "weights.reward_tokenizer": str(folder / "tokenizer"),
            "data.prompts": str(folder / "prompts.txt"),
            "eval.prompts": str(folder / "prompts.txt"),
            "eval.oracle": "",
            "data.resolution": 16,
            "data.batch_size": 8,
            "eval.batch_size": 8,
            "eval.samples": 2,
            "assistant.warmup_steps": 1,
            "train.steps": 3,
            "train.save_every": 2,
            "eval_every": 2,
            "train.log_every": 1,
            "train.keep": 3,
            "mesh.fsdp": 2,
            **changes,
        }
    )
    return config


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train.run(config_for(folder), str(workdir))
    return workdir


def unet_of(workdir, step, name="generator"):
    store = checkpoint.existing(workdir)
    tree = store.restore_item(step, name, pipeline.abstract_model(UNET).params)
    store.close()
    return tree


def refusal(call, *arguments, **changes):
    with pytest.raises(UserError) as caught:
        call(*arguments, **changes)
    return str(caught.value)


def test_a_run_begins_with_what_another_has_exported_and_knows_its_form(folder, straight, tmp_path):
    reference = pipeline.load_pipeline(folder)

    def start(generator, **changes):  # as the run that begins
        return assembly.start_of(
            config_for(folder, **{"weights.generator": str(generator), **changes}), reference
        )

    unet = straight / "diffusers" / "unet"
    for given in (straight, straight / "diffusers"):
        assert start(given) == (unet, FewStep((399,), "noise"))
    assert start(unet) == (unet, None)
    assert start("") == start(folder) == (folder / "unet", None)
    error = refusal(start, straight, **{"generator.timesteps": (999,)})
    assert "was trained for times (399,) and noise as input" in error and str(unet) in error
    copy = tmp_path / "copy"
    shutil.copytree(straight / "diffusers", copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    assert "model_index.json" in refusal(start, copy)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    (copy / "model_index.json").write_text((straight / "diffusers/model_index.json").read_text())
    content = json.loads(scheduler.read_text()) | {TIMESTEPS: [625], INPUT: "scaled"}
    scheduler.write_text(json.dumps(content))
    config = config_for(folder, **{"weights.generator": str(copy)})
    parts = assembly.load_parts(config, sharding.make_mesh(8, 1))
    assert assembly.method_of(config, parts).settings.generator == FewStep((625,), "scaled")


def test_only_a_reward_can_be_gamed(folder):
    kept = held_out.Kept({}, {"saturation": 0.3}, None)
    assert train.watched(config_for(folder), kept) == kept.first
    assert train.watched(config_for(folder, **{"reward.pickscore": 0.0}), kept) == {}
    assert train.watched(config_for(folder), None) == {}


def test_what_draws_in_one_step_is_no_teacher(folder, straight):
    config = config_for(folder, **{"weights.reference": str(straight / "diffusers")})
    error = refusal(assembly.load_parts, config, sharding.make_mesh(8, 1))
    assert f"{straight / 'diffusers'} is a generator of 1 step (its scheduler says so)" in error


@pytest.mark.case("first hour 2")
def test_the_model_card_of_a_run_shows_its_samples_and_the_call(straight):
    export = straight / "diffusers"
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "![samples](samples.png)" in card and "num_inference_steps=1, guidance_scale=0" in card
    assert "pickscore (scale" in card and "ema, step 4" in card
    assert "## Scores\n\nMeans over held-out prompts" in card and "| pickscore | " in card
    assert str(straight) not in card
    assert (export / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()


def test_a_run_leaves_pictures_scores_scalars_and_a_diffusers_folder(straight):
    scores = json.loads((straight / "before_after.json").read_text())
    assert set(scores["after"]) == {"pickscore", "pickscore, std", "diversity", "saturation"}
    assert (straight / "samples.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "assistant/loss" in line] == [1, 2, 3, 4]
    assert {"reward/pickscore", "reward/pickscore/std", "reward/total"} < lines[-1].keys() | lines[
        -2
    ].keys()
    measured = [line for line in lines if "eval/pickscore" in line]
    assert [line["step"] for line in measured] == [0, 2, 4] and "eval/diversity" in measured[0]
    index = json.loads((straight / "diffusers" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    exported = pipeline.load_model(straight / "diffusers" / "unet").params
    kept = unet_of(straight, 4, "ema")
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(kept))
    )


def tensorboard(workdir):
    """{tag: [(step, kind of value), ...]} of a workdir's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(workdir.glob("events*")):
        content = file.read_bytes()
        while content:  # length, its checksum, event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.WhichOneof("value")))
    return found


@pytest.mark.case("first hour 5", "first hour 26")
def test_tensorboard_has_both_ends_the_rate_the_config_and_captions(straight):
    found = tensorboard(straight)
    for tag in ("eval/pickscore", "eval/pickscore, std"):
        assert found[tag] == [(k, "simple_value") for k in (0, 2, 4)]
    assert found["samples"] == [(k, "image") for k in (0, 2, 4)]
    assert [k for k, _ in found["generator/lr"]] == [2, 3, 4]
    assert [k for k, _ in found["assistant/lr"]] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    rates = [line["generator/lr"] for line in lines if "generator/lr" in line]
    assert rates == pytest.approx([1e-4 * (k + 1) / 11 for k in range(3)])  # 10 steps of warm-up
    texts = b"".join(file.read_bytes() for file in straight.glob("events*"))
    assert b"di_star: pseudo-Huber score divergence" in texts and b"| objective.name |" in texts
    assert b"1. a red circle" in texts


@pytest.mark.long
@pytest.mark.case("first hour 26")
def test_a_finished_run_shows_its_table_at_once_and_exports_again_only_what_is_gone(
    folder, straight, tmp_path, capsys
):
    workdir = shutil.copytree(straight, tmp_path / "copy")
    train.run(config_for(folder), str(workdir))
    shown = capsys.readouterr().out
    assert "finished: all 4 steps are done" in shown and "| pickscore | " in shown
    exported = workdir / "diffusers"
    assert shown.endswith(f"exported {exported}; {exported}/README.md says how to draw with it\n")
    for work in ("loading weights", "compiling the", "scoring the"):
        assert work not in shown
    shutil.rmtree(workdir / "diffusers")
    train.run(config_for(folder), str(workdir))
    shown = capsys.readouterr().out
    assert "exporting" in shown
    last = shown[shown.index(f"exported {exported}; to draw with it:") :]
    assert (
        "num_inference_steps=1, guidance_scale=0" in last
        and "guidance that it was trained for" in last
    )
    assert "compiling the" not in shown and "scoring the" not in shown
    assert (workdir / "diffusers" / "model_index.json").exists()
    with pytest.raises(
        UserError, match=r"train.steps=1 .*is at step 4; give train.steps=3 or more"
    ):
        train.run(config_for(folder, **{"train.steps": 1}), str(workdir))


@pytest.mark.case("first hour 4")
def test_another_method_in_a_finished_workdir_is_refused_before_weights(folder, straight, capsys):
    with pytest.raises(UserError, match="holds another run: objective.name was 'di_star', is 'kl"):
        train.run(config_for(folder, **{"objective.name": "kl"}), str(straight))
    assert "loading weights" not in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.case("faults 16")
def test_held_out_prompts_that_are_added_later_are_scored_before_and_after(
    folder, straight, tmp_path, capsys
):
    workdir = shutil.copytree(straight, tmp_path / "copy")
    for name in ("before.json", "before.npy", "before_after.json"):
        (workdir / name).unlink()
    train.run(config_for(folder), str(workdir))
    assert "the initial generator's scores are not there" in capsys.readouterr().out
    again, first = (
        json.loads((run / "before_after.json").read_text()) for run in (workdir, straight)
    )
    for when in ("before", "after"):
        assert again[when] == pytest.approx(first[when], abs=1e-6)


# As a user runs it, in a process of its own: what is compiled is that of `straight`.
COMMAND = """
import json, pathlib, sys
from di_star_jax import errors, train
from test_train import config_for
folder, workdir, changes = sys.argv[1:]
config = config_for(pathlib.Path(folder), **json.loads(changes))
errors.exit_on_user_error(train.run)(config, workdir)
"""


class Process:
    """A run in a process, whose lines are read as they come."""

    def __init__(self, folder, workdir, **changes):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.lines = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(folder), str(workdir), json.dumps(changes)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, start):
        """Reads up to a line that begins so."""
        for line in self._process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return
        raise AssertionError("".join(self.lines))

    def send(self, number):
        self._process.send_signal(number)

    def end(self):
        """(exit code, all that was said)."""
        self.lines += self._process.stdout.readlines()
        return self._process.wait(timeout=60), "".join(self.lines)


# What it compiles `straight` has compiled before, in the default tests: it is in the cache.
@pytest.mark.slow
@pytest.mark.case("first hour 7", "faults 27")
def test_ctrl_c_and_sigterm_save_and_say_that_the_same_command_goes_on(folder, tmp_path):
    changes = {"train.steps": 100_000, "train.save_every": 100_000, "eval.prompts": ""}
    run = Process(folder, tmp_path, **changes)
    run.until("step 1/")
    time.sleep(0.5)
    run.send(signal.SIGINT)
    code, said = run.end()
    assert code == 130 and "Traceback" not in said, said
    assert "SIGINT: ends after step " in said
    with checkpoint.existing(tmp_path) as store:
        saved = store.latest_step()
    assert run.lines[-1] == f"stopped at step {saved}; the same command goes on\n"
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == saved >= 1

    run = Process(folder, tmp_path, **changes)
    run.until(f"continuing at step {saved}")
    run.until("compiling the training step")
    run.send(signal.SIGTERM)
    code, said = run.end()
    assert code == 75 and "Traceback" not in said, said
    assert run.lines[-1] == f"SIGTERM: stopped at step {saved}; the same command goes on\n"


@pytest.mark.long
@pytest.mark.case("faults 4")
def test_a_disk_that_is_full_in_the_middle_is_one_line(folder, straight, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root")
    try:
        steps = {"train.steps": 100_000, "train.save_every": 100_000, "eval.prompts": ""}
        run = Process(folder, tmp_path / "run", **steps)
        run.until("step 1/")
        with contextlib.suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))
        code, said = run.end()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith(f"error: disk full at {tmp_path}/run")


@pytest.fixture
def missed():
    """Names of what XLA had to compile because the cache did not have it, while everything is
    cached.
    """
    names = []
    jax.monitoring.register_event_listener(
        lambda name, **kw: (
            names.append(name) if name == "/jax/compilation_cache/cache_misses" else None
        )
    )
    usual = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield names
    jax.config.update("jax_persistent_cache_min_compile_time_secs", usual)


def test_a_stopped_run_continues_to_the_same_weights_and_compiles_nothing_anew(
    folder, straight, tmp_path, missed
):
    for steps in (1, 3):  # stops at step 2 of 4
        missed.clear()
        train.run(config_for(folder, **{"train.steps": steps, "eval.prompts": ""}), str(tmp_path))
    assert not missed
    straight_lines, lines = (
        [x for x in (run / "metrics.jsonl").read_text().splitlines() if "eval/" not in x]
        for run in (straight, tmp_path)
    )
    assert lines == straight_lines
    for name in ("generator", "assistant", "ema"):
        a, b = unet_of(straight, 4, name), unet_of(tmp_path, 4, name)
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))), (
            name
        )


@pytest.mark.long
def test_weights_that_blow_up_stop_the_run_with_what_to_do(folder, tmp_path):
    huge = jax.tree.map(lambda x: 1e20 * x, pipeline.load_model(folder / "generator").params)
    weights.save(tmp_path / "huge", huge, config=UNET, file_name="model.safetensors")
    with pytest.raises(
        UserError, match=r"step \d+: a gradient is not finite.*lower optim.generator_lr"
    ):
        train.run(
            config_for(folder, **{"weights.generator": str(tmp_path / "huge"), "eval.prompts": ""}),
            str(tmp_path / "run"),
        )


@pytest.mark.long
def test_sample_makes_the_same_picture_from_a_workdir_and_from_its_export(straight):
    z = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 4))
    pictures = []
    for source in (straight, straight / "diffusers"):
        loaded = drawing.load(str(source), "ema")
        assert loaded.form == FewStep((399,))
        draw = drawing.draw_prompts(
            loaded, drawing.Sampling("few_step", np.array([399]), 1.0, (8, 8, 4))
        )
        pictures.append(draw(["a red circle", "a blue square"], z))
    assert pictures[0].shape == (2, 16, 16, 3)
    assert np.array_equal(*pictures)
