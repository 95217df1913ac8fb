# SPDX-License-Identifier: Apache-2.0
"""`di-star reward`: from pairs to a folder that is a reward, resumed, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import torch
import transformers
from test_clip_rewards import tiny, tokenizer, transformers_clip  # noqa: F401
from test_config import ROOT, load
from test_pairs import image_file, parquet, some_rows, table

from di_star_jax import rewards
from di_star_jax.config import fields
from di_star_jax.errors import UserError
from di_star_jax.preference import run as reward_run
from di_star_jax.preference.checks import check
from di_star_jax.shapes import scenes, taste
from di_star_jax.storage import checkpoint

STEPS = 6


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):  # noqa: F811
    """A folder with clip/ and pairs/."""
    folder = tmp_path_factory.mktemp("world")
    transformers_clip(tiny(tokenizer[1])).save_pretrained(folder / "clip")
    table(folder / "pairs", some_rows(36, prompts=18))
    return folder, tokenizer[0]


def config_of(world, **changes):
    config = load("reward", "shapes")
    config.update_from_flattened_dict(
        {
            "weights.model": str(world[0] / "clip"),
            "weights.tokenizer": str(world[1]),
            "data.pairs": str(world[0] / "pairs"),
            "data.held_out": 0.3,
            "data.batch_size": 8,
            "data.records": str(world[0] / "records"),
            "optim.lr": 1e-3,
            "optim.lr_warmup_steps": 1,
            "train.steps": STEPS,
            "train.log_every": 1,
            "train.save_every": 2,
            "eval_every": 2,
        }
        | changes
    )
    return config


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def state_of(workdir, step):
    with checkpoint.existing(workdir) as checkpoints:
        folder = Path(checkpoints.folder) / str(step)
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(folder / "params")["params"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The workdir of a whole run."""
    workdir = tmp_path_factory.mktemp("finished")
    reward_run.run(config_of(world), str(workdir))
    return workdir


@pytest.mark.long
def test_the_best_parameters_are_exported_and_transformers_reads_them(world, finished, capsys):
    held_out = [line for line in lines(finished) if "held_out/accuracy" in line]
    assert [line["step"] for line in held_out] == [0, 2, 4, 6]
    best = max(held_out, key=lambda line: (line["held_out/accuracy"], -line["step"]))
    said = json.loads((finished / "reward" / "reward.json").read_text())["held_out"]
    assert said["accuracy"] == best["held_out/accuracy"] and said["step"] == best["step"]
    losses = [line["train/loss"] for line in lines(finished) if "train/loss" in line]
    assert len(losses) == STEPS

    theirs = transformers.CLIPModel.from_pretrained(finished / "reward")
    name = "pickscore"
    loaded = rewards.load_rewards({name: str(finished / "reward")}, str(finished / "reward"))[name]
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
    captions = ["a red cat", "blue dog"]
    images = np.float32(levels / 127.5 - 1)
    ours = loaded.evaluate(loaded.params, images, loaded.tokenize(captions))
    ids = torch.tensor(loaded.tokenize(captions)).long()
    pixels = (torch.tensor(levels).float() / 255).permute(0, 3, 1, 2)
    from test_clip_rewards import MEAN, STD

    out = theirs(input_ids=ids, pixel_values=(pixels - MEAN) / STD)
    assert parity.relative(ours, (out.image_embeds * out.text_embeds).sum(-1).detach()) < 1e-5

    reward_run.run(config_of(world), str(finished))  # the same command again
    assert "finished: best at step" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_that_stopped_goes_on_as_if_it_had_not(world, finished, tmp_path, monkeypatch):
    class Stopping(Exception):
        pass

    plain = reward_run.stream.tokenized
    seen = []

    def until_the_third(batch, tokenize):
        if len(batch["label_0"]) == 8:
            seen.append(batch)
        if len(seen) == 4:
            raise Stopping
        return plain(batch, tokenize)

    monkeypatch.setattr(reward_run.stream, "tokenized", until_the_third)
    with pytest.raises(Stopping):
        reward_run.run(config_of(world), str(tmp_path))
    monkeypatch.setattr(reward_run.stream, "tokenized", plain)
    reward_run.run(config_of(world), str(tmp_path))
    straight, resumed = (state_of(workdir, STEPS) for workdir in (finished, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert [(x["step"], x.get("train/loss")) for x in lines(tmp_path)] == [
        (x["step"], x.get("train/loss")) for x in lines(finished)
    ]


@pytest.mark.slow
def test_a_workdir_of_another_run_is_refused(world, finished, tmp_path):
    with pytest.raises(UserError, match="holds another run: optim.weight_decay was .*, is 0.5"):
        reward_run.run(config_of(world, **{"optim.weight_decay": 0.5}), str(finished))
    others = table(tmp_path / "others", some_rows(36, prompts=9))
    with pytest.raises(UserError, match="data.pairs=.*others has another content"):
        reward_run.run(config_of(world, **{"data.pairs": str(others)}), str(finished))
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "config.json").write_text('{"config": {"objective.name": "sid"}}')
    with pytest.raises(UserError, match="a run of another command: its config.json has no loss"):
        reward_run.run(config_of(world), str(tmp_path / "alignment"))


def refused(world, workdir, message, **changes):
    """A run that must end before anything is compiled."""
    with pytest.raises(UserError, match=message) as error:
        reward_run.run(config_of(world, **changes), str(workdir))
    assert "\n" not in str(error.value)


def test_a_validation_set_that_shares_prompts_is_refused(world, tmp_path):
    one = some_rows(1)[0]
    others = table(tmp_path / "others", [one, ("another", *one[1:])])
    refused(
        world,
        tmp_path / "run",
        "1 of its 2 pairs have prompts that data.pairs has too, the first is 'prompt 0'",
        **{"data.validation": str(others)},
    )


def test_pairs_of_which_nothing_can_be_learnt_are_refused(world, tmp_path):
    rows = [(*row[:3], "tie") for row in some_rows(12)]
    ties = table(tmp_path / "ties", rows)
    message = "data.pairs: all .* pairs are ties, of which nothing can be learnt"
    refused(world, tmp_path / "run", message, **{"data.pairs": str(ties)})
    few = table(tmp_path / "few", some_rows(6))
    message = "data.batch_size=8 is more than the [1-6] pairs to train on; use"
    refused(world, tmp_path / "run", message, **{"data.pairs": str(few)})


def test_too_many_rows_that_cannot_be_used_are_refused_and_few_are_told(world, tmp_path, capsys):
    rows = some_rows(36, prompts=18)
    rows[5] = (*rows[5][:3], "better")
    mostly = table(tmp_path / "pairs", rows)
    reward_run.run(
        config_of(world, **{"data.pairs": str(mostly), "train.steps": 1}), str(tmp_path / "run")
    )
    told = "35 of 36 labelled pairs are usable; left out: 1 unknown label; first: .*: row 5: unkno"
    assert re.search(told, capsys.readouterr().out)
    assert "row 5: unknown label" in (tmp_path / "run" / "left_out.txt").read_text()
    named = table(tmp_path / "named", [(*row[:3], "left") for row in rows])
    message = "0 of 36 labelled pairs are usable; .*more than data.left_out=0.1 of them, or all"
    refused(world, tmp_path / "other", message, **{"data.pairs": str(named)})


def test_a_model_that_is_no_reward_or_has_other_words_is_refused(world, tmp_path):
    for name, message in (
        ("gone", "no folder"),
        ("empty", "no file .*config.json"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        model = str(tmp_path / name)
        refused(world, tmp_path / "run", message, **{"weights.model": model})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "hinge"}, "loss='hinge', expected one of 'pickscore', 'imagereward'"),
        ({"optim.lr": 0.0}, "optim.lr=0.0, expected more than 0"),
        ({"data.held_out": 1.0}, r"data.held_out=1.0, expected a number in \[0, 1\)"),
        ({"data.held_out": 0.0}, "leaves nothing to measure by"),
        ({"data.pairs": ""}, "no data.pairs; give --config.data.pairs=FOLDER"),
        ({"data.batch_size": 12}, "data.batch_size=12 is not divisible by the 8 devices; use 16"),
    ],
)
def test_a_config_that_cannot_run_is_refused(world, changes, message):
    with pytest.raises(UserError, match=message):
        check(config_of(world, **changes), 8)


def test_every_recipe_passes_the_checks():
    for preset in ("pickscore", "imagereward", "shapes"):
        config = load("reward", preset)
        config.data.pairs = "pairs"
        check(config, 8)
    with pytest.raises(UserError, match="the config has no field loss"):
        check(load("sdxl"), 8)


def command(*arguments, cwd):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_COMP"))}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_commands_refusal_is_a_line_and_exit_code_2(tmp_path):
    given = ("--config=reward:shapes", "--workdir=run", "--config.data.pairs=none")
    done = command("di_star_jax.rewards.train", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "data.pairs=none: no such file" in done.stderr


@pytest.mark.long
def test_imagereward_is_trained_and_its_folder_is_a_reward(tmp_path):
    import test_blip

    module = test_blip._randomise(test_blip.TorchImageReward(test_blip.CONFIG, test_blip.VISION))
    folder = test_blip._write(tmp_path / "blip", test_blip._published_tensors(module))
    changes = {"loss": "imagereward", "weights.model": str(folder), "optim.fixed_blocks": 0.7}
    changes |= {"data.records": "", "data.pairs": str(table(tmp_path / "p", some_rows(36)))}
    config = config_of((tmp_path, tmp_path), **changes)
    reward_run.run(config, str(tmp_path / "run"))
    held_out = [line for line in lines(tmp_path / "run") if "held_out/loss" in line]
    best = min(line["held_out/loss"] for line in held_out)
    said = json.loads((tmp_path / "run" / "reward" / "reward.json").read_text())["held_out"]
    assert said["loss"] == best
    loaded = rewards.load_rewards({"imagereward": str(tmp_path / "run" / "reward")}, "")
    assert loaded["imagereward"].tokenize(["a cat"])["mask"].any()


@pytest.mark.long
def test_pick_a_pics_files_are_trained_on_by_worker_processes_in_bfloat16(world, tmp_path):
    def rows(first, count):
        colors = [(200 * i, 20 * j, 9) for i in range(2) for j in range(12)]
        images = [image_file(color, kind="JPEG") for color in colors]
        return [
            (f"p {first + i}", images[i % 12], images[12 + i % 12], i % 2, 1 - i % 2, True)
            for i in range(count)
        ]

    as_floats = {"label_0": [float(i % 2) for i in range(16)]}
    as_floats["label_1"] = [1.0 - value for value in as_floats["label_0"]]
    for i in range(2):
        parquet(tmp_path / "data" / f"train-{i}-of-2.parquet", rows(16 * i, 16), **as_floats)
    as_floats = {name: values[:6] for name, values in as_floats.items()}
    parquet(tmp_path / "data" / "validation_unique-0-of-1.parquet", rows(50, 6), **as_floats)
    config = config_of(
        world,
        **{
            "data.pairs": str(tmp_path / "data" / "train-*.parquet"),
            "data.validation": str(tmp_path / "data" / "validation_unique-*.parquet"),
            "data.records": "",
            "data.workers": 2,
            "compute.dtype": "bfloat16",
            "compute.remat": "full",
            "mesh.fsdp": 2,
        },
    )
    reward_run.run(config, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "reward" / "reward.json").read_text())["held_out"]


def documented():
    """The commands of docs/rewards.md on training, by block."""
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    section = page.split("## Training a reward of your own")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in blocks]


def test_the_documented_commands_have_known_flags_and_fields():
    lines_of = [line for block in documented() for line in block]
    known = ("--config=", "--workdir=", "--out=", "--config.")
    for line in lines_of:
        flags = [word for word in line.split() if word.startswith("--")]
        assert flags and all(flag.startswith(known) for flag in flags), line
        for flag in flags:
            if flag.startswith("--config.") and "reward " in line:
                assert flag.partition("=")[0].removeprefix("--config.") in fields(load("reward"))


@pytest.mark.long
def test_shapes_pairs_make_a_reward_that_ranks_clear_ones_as_documented(tmp_path):
    """85 % of rendered pairs that the taste ranks clearly, of captions it was not trained on."""
    render, train, align = documented()[0]
    for line in (render, train):
        arguments = line.split(" -m ")[-1].replace("di-star ", "di_star_jax ").split()
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    short = "--config.train.steps=1 --config.assistant.warmup_steps=0 --config.eval.prompts="
    done = command(*align.replace("di-star", "di_star_jax").split(), *short.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]

    folder = tmp_path / "runs" / "reward" / "reward"
    reward = rewards.load_rewards({"pickscore": str(folder)}, str(folder))["pickscore"]
    rng = np.random.default_rng(11)
    drawn = [scenes.sample_scene(rng, held_out=True) for _ in range(400)]
    pairs = [taste.preference_pair(scene, rng) for scene in drawn]
    ids = reward.tokenize([scene.caption for scene in drawn])
    evaluate = jax.jit(reward.evaluate)
    first, second = (
        evaluate(reward.params, np.stack([2.0 * pair[i] - 1.0 for pair in pairs]), ids)
        for i in range(2)
    )
    prob = np.array([pair[2] for pair in pairs])
    clear = np.abs(prob - 0.5) > 0.3
    found = np.mean((np.asarray(first) > second) == (prob > 0.5), where=clear)
    print(f"{found:.3f} of {clear.sum()} clear pairs")
    assert found >= 0.85
