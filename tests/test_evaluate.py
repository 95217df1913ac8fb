# SPDX-License-Identifier: Apache-2.0
"""The command that evaluates: a generator on tiny random weights, folders of images with known
answers, bad input.
"""

import colorsys
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import types

import grain  # noqa: F401  its flags must be there before any are saved and restored
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from test_config import ROOT
from test_train import UNET, config_for, write_pipeline

from di_star_jax import (
    assembly,
    drawing,
    errors,
    evaluate,
    models,
    pictures,
    rewards,
    sharding,
    train,
)
from di_star_jax import command as commands
from di_star_jax.evaluation.run import STORE
from di_star_jax.evaluation.scores import params_digest
from di_star_jax.evaluation.store import Store
from di_star_jax.pipelines import single
from di_star_jax.pipelines.folder import load_model
from di_star_jax.rewards.reward import Reward
from di_star_jax.storage import checkpoint, folders, weights

CAPTIONS = [
    f"a {colour} {kind}{more}"
    for colour in ("red", "blue")
    for kind in ("circle", "square")
    for more in ("", " a", " red", " blue")
][:12]
FILES = ("results.json", "scores.parquet", "table.md", "page.html")
FLUX = weights.Stored((2,), "F32", lambda: np.zeros(2, np.float32))
SHAPES = ROOT / "di_star_jax" / "shapes" / "checkpoint"


@pytest.fixture(scope="module", autouse=True)
def defined_flags():
    before = set(flags.FLAGS)
    evaluate.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    usual = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", usual)


@pytest.fixture
def command(capsys, monkeypatch):
    """command(*arguments) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        code = 0
        capsys.readouterr()
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                rest = errors.exit_on_user_error(commands.parse)(["evaluate", *map(str, arguments)])
                commands.command(evaluate.main)(rest)
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return run


def random_model(make, seed):
    """As `models.init`, without its compilation."""
    graphdef, params = models.abstract(make)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: rng.normal(0.1, 0.2, x.shape).astype(x.dtype), params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder with generator/, reward/ and twelve prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "init", random_model)
        out = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    (out / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    return out


def trained(folder):
    return jax.tree.map(lambda x: 1.1 * x, load_model(folder / "generator").params)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """What a run of two steps would leave, which made all weights larger by a tenth."""
    out = tmp_path_factory.mktemp("run")
    store = checkpoint.Checkpoints(out / checkpoint.FOLDER, keep=1)
    store.save(
        2,
        {"ema": trained(folder)},
        {
            "denoiser_config": UNET,
            "reference": str(folder),
            "generator_timesteps": [399],
            "initial": str(folder / "generator"),
            "trained_on": {"pickscore": 100.0},
            "weights": {
                "pickscore": str(folder / "reward"),
                "reward_tokenizer": str(folder / "tokenizer"),
            },
        },
    )
    store.close()
    return out


def arguments_for(workdir, folder, out, **changes):
    given = {
        "checkpoint": workdir,
        "prompts": folder / "prompts.txt",
        "metrics": "pickscore,saturation,diversity",
        "samples": 2,
        "features": "pickscore",
        "batch_size": 8,
        "out": out,
        **changes,
    }
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def straight(folder, workdir, tmp_path_factory):
    """An undisturbed evaluation."""
    out = tmp_path_factory.mktemp("evals") / "straight"
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["evaluate", *arguments_for(workdir, folder, out)])
        evaluate.evaluate(evaluate.request())
    return out


def results_of(out):
    """results.json, read as strictly as JSON is defined."""

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def columns_of(out, samples):
    table = pyarrow.parquet.read_table(out / "scores.parquet").to_pydict()
    return {name: np.reshape(values, (-1, samples)) for name, values in table.items()}


def same_numbers(out, other, tolerance=0.0):
    ours, theirs = (results_of(folder) for folder in (out, other))
    for name, found in theirs["metrics"].items():
        assert abs(ours["metrics"][name]["mean"] - found["mean"]) <= tolerance, name
    return True


def scored(out, metric):
    """How many images have a score in the store."""
    if not (out / STORE).exists():
        return 0
    with contextlib.closing(sqlite3.connect(out / STORE, timeout=60)) as store:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'scores'"
        if not store.execute(tables).fetchone()[0]:
            return 0
        query = "SELECT count(*) FROM scores WHERE metric = ?"
        return store.execute(query, [metric]).fetchone()[0]


def drawn_in(out):
    return {file.name: file.read_bytes() for file in (out / "images").iterdir()}


# A generator.


def test_an_evaluation_of_a_run_leaves_results_scores_table_and_page(straight, folder):
    found, scores = results_of(straight), columns_of(straight, samples=2)
    for name in ("pickscore", "saturation", "diversity"):
        means = scores[name].mean(axis=1)
        assert np.isclose(found["metrics"][name]["mean"], means.mean(), rtol=1e-12, atol=0)
        assert np.isclose(
            found["metrics"][name]["stderr"], means.std(ddof=1) / np.sqrt(12), rtol=1e-9, atol=0
        )
        counts = [found["metrics"][name][key] for key in ("prompts", "images", "left_out")]
        assert counts == [12, 24, 0], name
    assert scores["prompt"][:, 1].tolist() == CAPTIONS and scores["sample"][0].tolist() == [0, 1]
    saturation = [[_saturation(straight / file) for file in files] for files in scores["file"]]
    assert np.allclose(scores["saturation"], saturation, rtol=1e-6, atol=0)
    assert (scores["diversity"][:, 0] == scores["diversity"][:, 1]).all() and len(
        set(scores["pickscore"].flat)
    ) == 24
    table = (straight / "table.md").read_text()
    assert (
        f"| {found['metrics']['pickscore']['mean']:.4f} ± " in table and "| PickScore † |" in table
    )
    page = (straight / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 24 and 'src="http' not in page


@pytest.mark.long
def test_a_checkpoint_in_one_file_has_the_numbers_of_its_folder(
    command, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "mine.safetensors"
    single.from_folder(folder, file, dtype="float32")
    given = {"metrics": "saturation", "sampler": "euler", "steps": 2}
    of_file = {"checkpoint": file, "reference_pipeline": folder}
    for name, more in (("file", of_file), ("folder", {"checkpoint": folder})):
        arguments = arguments_for(folder, folder, tmp_path / name, **given, **more)
        code, _, error = command(*arguments)
        assert code == 0, error
    assert same_numbers(tmp_path / "file", tmp_path / "folder")
    assert results_of(tmp_path / "file")["name"] == "mine.safetensors"


def test_a_file_of_another_kind_is_refused_before_anything_is_made(command, folder, tmp_path):
    file = tmp_path / "flux.safetensors"
    weights.write_file(file, {"double_blocks.0.x": FLUX}, jnp.dtype("float32"))
    code, _, error = command(*arguments_for(file, folder, tmp_path / "out"))
    assert code == 2 and f"{file} is a FLUX checkpoint" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.case("first hour 19")
def test_the_table_says_what_its_errors_are_of_and_how_far_noise_moves_a_mean(straight):
    table = (straight / "table.md").read_text()
    assert (
        "standard error over prompts, in which the spread of reruns of a training is not" in table
    )
    assert "one standard error of the mean over prompts" in (straight / "page.html").read_text()
    scores = columns_of(straight, samples=2)["saturation"]
    low, high = sorted(scores.mean(axis=0))
    found = results_of(straight)["metrics"]
    assert np.allclose(found["saturation"]["over_noise"], [low, high], rtol=1e-12)
    assert f"Saturation {low:.3f} to {high:.3f}" in table
    assert found["diversity"]["over_noise"] is None  # of all images of a prompt


def _saturation(file):
    rgb = np.asarray(Image.open(file), np.float64) / 255
    return np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in rgb.reshape(-1, 3)])


def test_results_say_what_drew_the_images_and_nothing_that_does_not_apply(
    straight, folder, workdir
):
    found = results_of(straight)
    settings = found["settings"]
    assert (settings["sampler"], settings["timesteps"], settings["guidance_scale"]) == (
        "few_step",
        [399],
        1.0,
    )
    assert (settings["resolution"], settings["which"], settings["checkpoint_step"]) == (
        16,
        "ema",
        2,
    )
    assert not {"steps", "timestep", "images_digest"} & settings.keys()
    assert settings["denoiser_sha256"] == params_digest(trained(folder))
    reward = load_model(folder / "reward").params
    assert settings["metrics"]["pickscore"] == {
        "weights": "reward",
        "sha256": params_digest(reward),
        "tokenizer": "tokenizer",
    }
    assert len(settings["vae_and_text_sha256"]) == 64
    assert (
        settings["trained_on"] == {"pickscore": 100.0}
        and found["metrics"]["pickscore"]["trained_on"]
    )
    assert found["made"]["jax"] == jax.__version__ and found["made"]["date"].startswith("20")
    assert found["name"] == f"{workdir.name} (ema)"
    cost = found["cost"]
    assert (cost["timed_batches"], cost["steps"], cost["device"]) == (2, 1, "8 x cpu")
    assert 0 < cost["seconds_per_image"] < 10 and cost["peak_memory_gb"] > 0


def test_a_pipeline_is_drawn_with_the_sampler_that_is_asked_for_and_has_no_which(
    command, folder, tmp_path
):
    out = tmp_path / "out"
    code, _, stderr = command(
        *arguments_for(
            folder,
            folder,
            out,
            sampler="ddim",
            steps=3,
            guidance_scale=2,
            num_prompts=4,
            metrics="contrast",
        )
    )
    assert code == 0, stderr
    settings = results_of(out)["settings"]
    assert (settings["sampler"], len(settings["timesteps"]), settings["guidance_scale"]) == (
        "ddim",
        3,
        2.0,
    )
    assert "which" not in settings and settings["prompts"]["count"] == 4
    assert results_of(out)["name"] == folder.name and results_of(out)["cost"]["steps"] == 3


def test_a_pipeline_is_drawn_by_default_as_the_papers_sdxl_rows(command, folder, tmp_path):
    out = tmp_path / "out"
    given = arguments_for(folder, folder, out, num_prompts=4, metrics="contrast")
    code, _, stderr = command(*given)
    assert code == 0, stderr
    settings = results_of(out)["settings"]
    assert (settings["sampler"], len(settings["timesteps"]), settings["guidance_scale"]) == (
        "euler",
        50,
        7.5,
    )


@pytest.mark.long
def test_one_device_and_split_parameters_give_the_images_and_numbers_of_eight_devices(
    command, straight, folder, workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(sharding, "SMALL", 64)  # so that tiny weights are split too
    split = tmp_path / "split"
    assert command(*arguments_for(workdir, folder, split, fsdp=2))[0] == 0
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda data, fsdp: make_mesh(1, 1, devices=jax.devices()[:1])
    )
    one = tmp_path / "one"
    assert command(*arguments_for(workdir, folder, one))[0] == 0
    assert results_of(one)["cost"]["device"] == "1 x cpu"
    for out in (split, one):
        apart = [
            np.abs(
                np.int16(Image.open(straight / "images" / name)) - Image.open(out / "images" / name)
            )
            for name in drawn_in(straight)
        ]
        assert np.max(apart) <= 1 and np.mean(apart) < 0.01
        assert same_numbers(out, straight, tolerance=1e-3)
        assert (
            results_of(out)["settings"]["denoiser_sha256"]
            == results_of(straight)["settings"]["denoiser_sha256"]
        )


def test_noise_depends_on_seed_row_and_sample_alone_and_few_step_begins_with_the_same():
    def noise(seed, rows, samples, sampler="euler", times=(999,)):
        sampling = drawing.Sampling(sampler, np.array(times), 1.0, (4, 4, 2))
        return drawing.noise(seed, rows, samples, sampling)

    rows, samples = [0, 0, 5, 5], [0, 1, 0, 1]
    z = noise(3, rows, samples)
    assert np.array_equal(z[2:], noise(3, rows[2:], samples[2:]))
    assert len({image.tobytes() for image in z}) == 4
    assert not np.array_equal(z, noise(4, rows, samples))
    few = noise(3, rows, samples, "few_step", (999, 749, 499))
    assert few.shape == (3, 4, 4, 4, 2) and np.array_equal(few[0], z)


@pytest.mark.case("faults 14")
def test_the_table_of_a_run_and_an_evaluation_of_its_checkpoint_have_the_same_numbers(
    straight, folder, tmp_path
):
    config = config_for(folder)
    mesh = sharding.make_mesh(-1, 1)
    parts = assembly.load_parts(config, mesh)
    settings = assembly.method_of(config, parts).settings
    prompts = {"eval": train.load_prompts(config, "eval", tmp_path)}
    scorer = train.scorer_of(config, parts, settings, mesh, prompts)
    scores = scorer.measure(trained(folder)).scores
    evaluated = results_of(straight)["metrics"]
    for name in ("pickscore", "diversity"):
        assert np.isclose(scores[name], evaluated[name]["mean"], rtol=1e-4), name


# Stopped and continued.


class Stopped(BaseException):
    """As if killed."""


def stop_after(calls, function):
    def stopping(*arguments, **named):
        if not calls[0]:
            raise Stopped
        calls[0] -= 1
        return function(*arguments, **named)

    return stopping


@pytest.mark.parametrize(
    "module, name, calls",
    [
        pytest.param(pictures, "save_png", 11, marks=pytest.mark.long),
        (Store, "add_scores", 8),
        (Store, "add_features", 1),
    ],
    ids=["drawing", "scoring", "embedding"],
)
def test_an_evaluation_that_was_stopped_continues_to_the_same_results(
    command, straight, folder, workdir, tmp_path, monkeypatch, module, name, calls
):
    out = tmp_path / "out"
    if module is not pictures:  # as if drawn a moment ago
        shutil.copytree(straight, out, ignore=shutil.ignore_patterns(STORE, *FILES))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop_after([calls], getattr(module, name)))
        with pytest.raises(Stopped):
            command(*arguments_for(workdir, folder, out))
    assert not (out / "results.json").exists()
    if module is pictures:
        (out / "images" / ".00009_0.png.1.partial").write_text("half an image")
    kept = {file: file.stat().st_mtime_ns for file in (out / "images").glob("*.png")}
    code, stdout, stderr = command(*arguments_for(workdir, folder, out))
    assert code == 0, stderr
    assert kept and all(file.stat().st_mtime_ns == before for file, before in kept.items())
    assert drawn_in(out) == drawn_in(straight)
    assert same_numbers(out, straight)
    assert len(kept) == (11 if module is pictures else 24)
    assert (
        f"drawing {24 - len(kept)} images" in stdout
        if module is pictures
        else "drawing" not in stdout
    )
    assert (
        f"{'features' if name == 'add_features' else 'pickscore'} 24/24" not in stdout
        or module is pictures
    )


@pytest.mark.case("first hour 24")
def test_a_finished_evaluation_run_again_with_others_keeps_its_scores_and_makes_what_is_new(
    command, straight, folder, workdir, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    more = arguments_for(
        workdir, folder, out, metrics="pickscore,contrast,frechet", reference=straight / "images"
    )
    code, stdout, stderr = command(*more)
    assert code == 0, stderr
    assert (
        "contrast 24/24" in stdout and "drawing" not in stdout and "pickscore 24/24" not in stdout
    )
    ours, before = results_of(out), results_of(straight)
    kept = ["pickscore", "saturation", "diversity"]
    assert list(ours["metrics"]) == [*kept, "contrast", "frechet"]
    assert all(ours["metrics"][name] == before["metrics"][name] for name in kept)
    assert ours["cost"] == before["cost"]
    both, earlier = columns_of(out, samples=2), columns_of(straight, samples=2)
    assert all(np.array_equal(both[name], earlier[name]) for name in kept)
    assert both["contrast"].all() and "| Diversity |" in (out / "table.md").read_text()
    assert abs(ours["metrics"]["frechet"]["mean"]) < 1e-6  # of the images to themselves
    again = arguments_for(workdir, folder, out, metrics="frechet", reference=folder)
    code, _, stderr = command(*again)
    assert code == 2 and "holds 0 images" in stderr
    shutil.copytree(straight / "images", tmp_path / "others")
    code, _, stderr = command(
        *arguments_for(workdir, folder, out, metrics="frechet", reference=tmp_path / "others")
    )
    assert (
        code == 2
        and "holds scores of frechet with reference=" in stderr
        and stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 3}, "with samples=2, this one has 3; give another --out"),
        ({"seed": 1}, "with seed=0, this one has 1"),
        ({"num_prompts": 3}, "with prompts=prompts.txt, 12 of digest"),
        ({"which": "initial"}, "with which='ema', this one has 'initial'"),
        ({"resolution": 64}, "with resolution=None, this one has 64"),
        ({"checkpoint": "FOLDER"}, "with checkpoint="),
    ],
)
def test_a_folder_with_an_evaluation_of_other_settings_is_refused(
    command, straight, folder, workdir, changes, message
):
    changes = {name: folder if value == "FOLDER" else value for name, value in changes.items()}
    before = (straight / "settings.json").read_bytes()
    code, _, stderr = command(*arguments_for(workdir, folder, straight, **changes))
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert (straight / "settings.json").read_bytes() == before


@pytest.mark.long
def test_images_of_other_weights_under_the_same_path_are_not_mixed(command, folder, tmp_path):
    source, out = tmp_path / "pipeline", tmp_path / "out"
    shutil.copytree(folder, source)
    given = arguments_for(
        source,
        folder,
        out,
        sampler="few_step",
        num_prompts=4,
        metrics="pickscore",
        weights=f"pickscore={source}/reward",
        tokenizer=folder / "tokenizer",
    )
    assert command(*given)[0] == 0
    shutil.rmtree(source / "reward")
    weights.save(
        source / "reward",
        load_model(folder / "reward").params | {"logit_scale": jnp.zeros(())},
        config=folders.read_config(folder / "reward"),
        file_name="model.safetensors",
    )
    code, _, stderr = command(*given)
    assert (
        code == 2 and "holds scores of pickscore with sha256=" in stderr and stderr.count("\n") == 1
    )
    shutil.rmtree(source / "reward")
    shutil.copytree(folder / "reward", source / "reward")
    shutil.rmtree(source / "unet")
    shutil.copytree(folder / "generator", source / "unet")
    assert command(*given)[0] == 0  # nothing is drawn
    (out / "images" / "00002_1.png").unlink()
    code, _, stderr = command(*given)
    assert (
        code == 2
        and "holds images drawn with denoiser_sha256=" in stderr
        and stderr.count("\n") == 1
    )


def test_a_checkpoint_that_was_mistyped_can_be_mended_in_the_same_folder(
    command, folder, workdir, tmp_path
):
    out = tmp_path / "out"
    wrong = arguments_for(tmp_path / "nowhere", folder, out, metrics="saturation", num_prompts=4)
    assert command(*wrong)[0] == 2
    code, _, stderr = command(
        *arguments_for(workdir, folder, out, metrics="saturation", num_prompts=4)
    )
    assert code == 0, stderr


@pytest.mark.long
def test_killed_while_it_draws_and_while_it_scores_it_continues_to_the_same_results(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join((SHAPES / "prompts_held_out.txt").read_text().splitlines(keepends=True)[:6])
    )

    def start(out):
        given = [
            f"--checkpoint={SHAPES}",
            "--sampler=dpm_solver_pp",
            "--steps=20",
            f"--prompts={prompts}",
            "--samples=4",
            "--metrics=saturation,pickscore,diversity",
            f"--weights=pickscore={SHAPES}/reward",
            f"--tokenizer={SHAPES}/tokenizer",
            "--features=pickscore",
            "--batch_size=2",
            f"--out={out}",
        ]
        env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "di_star_jax.evaluate", *given],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill_when(out, reached):
        process = start(out)
        while process.poll() is None and not reached(out):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(killed, lambda out: len(list(out.glob("images/*.png"))) >= 5)
    assert len(list(killed.glob("images/*.png"))) < 24
    kill_when(killed, lambda out: scored(out, "pickscore"))
    for out in (killed, whole):
        process = start(out)
        assert process.wait() == 0, process.stderr.read()
    assert drawn_in(killed) == drawn_in(whole) and same_numbers(killed, whole)


def test_features_are_openais_clips_where_nothing_else_is_asked_for():
    """Numbers of diversity and Frechet distance mean another thing with another CLIP."""
    assert flags.FLAGS["features"].default == "clipscore"


# Images that others made, with known answers.


def brightness(title, scale=1.0, **facts):
    """A reward without a network: the mean of all values, [-1, 1]."""

    def load(folder, options):
        def score(params, images, prompts):
            return params["scale"] * images.mean(axis=(1, 2, 3))

        params = jax.device_put({"scale": jnp.array(scale)})
        return Reward(
            params,
            score,
            score,
            lambda texts: np.zeros(len(texts)),
            jax.ShapeDtypeStruct((1,), np.float32),
        )

    return rewards.Entry(title, load=load, abstract=None, **facts)


@pytest.fixture
def bright(monkeypatch):
    """The metric "bright", printed times 100, and hpsv2 and hpsv21 replaced by the same."""
    for name, title, groups in (
        ("bright", "Brightness", ()),
        ("hpsv2", "HPSv2.0", ("style",)),
        ("hpsv21", "HPSv2.1", ("style",)),
    ):
        entry = brightness(title, factor=100.0, digits=2, groups=groups)
        monkeypatch.setitem(rewards.REWARDS, name, entry)


def write_image(file, level, size=(16, 16), mode="RGB"):
    """One level 0..255 all over; in alpha 0, which must not matter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    colour = {"RGB": (level,) * 3, "L": level, "RGBA": (level,) * 3 + (0,), "P": level}[mode]
    Image.new(mode, size, colour).save(file, lossless=True, quality=100)
    return file


def printed(level):
    return 100 * (level / 127.5 - 1)


def images_and_prompts(tmp_path, levels, name="images", prompts=None):
    for i, level in enumerate(levels):
        write_image(tmp_path / name / f"{i}.png", level)
    file = tmp_path / "prompts.txt"
    file.write_text(
        "".join(f"{text}\n" for text in prompts or [f"prompt {i}" for i in range(len(levels))])
    )
    return [
        f"--images={tmp_path / name}",
        f"--prompts={file}",
        f"--tokenizer={SHAPES / 'tokenizer'}",
        "--batch_size=8",
    ]


def test_images_are_taken_in_the_order_of_their_numbers_whatever_their_size_and_mode(
    command, bright, tmp_path
):
    given = images_and_prompts(tmp_path, range(0, 120, 10))  # 2.png before 10.png
    for i, mode, size in ((1, "L", (16, 16)), (2, "RGBA", (24, 16)), (5, "RGB", (16, 40))):
        write_image(tmp_path / "images" / f"{i}.png", 10 * i, size, mode)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "3.png").unlink()
    write_image(tmp_path / "images" / "3.webp", 30)
    out = tmp_path / "out"
    code, _, stderr = command(*given, "--metrics=bright,contrast", f"--out={out}")
    assert code == 0, stderr
    assert np.allclose(
        columns_of(out, 1)["bright"][:, 0], printed(np.arange(0, 120, 10)), rtol=0, atol=1e-3
    )
    found = results_of(out)
    assert (
        np.isclose(found["metrics"]["bright"]["mean"], printed(55.0), rtol=1e-4)
        and found["name"] == "images"
    )
    assert (
        found["settings"]["noise"] is None
        and "sampler" not in found["settings"]
        and found["broken"] == []
    )
    assert found["cost"] == {
        "seconds_per_image": None,
        "timed_batches": 0,
        "peak_memory_gb": None,
        "steps": None,
    }


def test_a_broken_image_is_listed_and_left_out_and_counts_again_once_it_is_mended(
    command, bright, tmp_path
):
    given = [
        *images_and_prompts(tmp_path, [0, 50, 100, 150, 200, 250], prompts=["a", "b", "c"]),
        "--samples=2",
    ]
    whole = np.asarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)), np.uint8)
    Image.fromarray(whole).save(tmp_path / "images" / "1.png")
    data = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(data[: len(data) // 2])  # its header can be read
    for i in (4, 5):
        (tmp_path / "images" / f"{i}.png").write_text("a text")
    out = tmp_path / "out"
    code, stdout, stderr = command(*given, "--metrics=bright,saturation", f"--out={out}")
    assert code == 0, stderr
    found = results_of(out)
    assert found["broken"] == [f"{i}.png" for i in (1, 4, 5)]
    assert all(f"no readable image: {tmp_path}/images/{i}.png (" in stdout for i in (1, 4, 5))
    assert "3 images cannot be read and are left out" in (out / "table.md").read_text()
    summary = found["metrics"]["bright"]
    assert [summary[key] for key in ("prompts", "images", "left_out")] == [2, 3, 3]
    assert np.isclose(
        summary["mean"], (printed(0) + (printed(100) + printed(150)) / 2) / 2, rtol=1e-4
    )
    assert np.isnan(columns_of(out, 2)["bright"][[0, 2, 2], [1, 0, 1]]).all()
    assert scored(out, "bright") == 3
    code, stdout, _ = command(*given, "--metrics=bright,saturation", f"--out={out}")
    assert code == 0 and scored(out, "bright") == 3
    assert "bright 3/3" in stdout  # the broken ones alone are tried again


def test_only_one_prompt_has_no_standard_error_and_no_interval_and_is_valid_json(
    command, bright, tmp_path
):
    given = images_and_prompts(tmp_path, [100])
    assert command(*given, "--metrics=bright", f"--out={tmp_path}/base")[0] == 0
    code, _, stderr = command(
        *given, "--metrics=bright", f"--baseline={tmp_path}/base", f"--out={tmp_path}/out"
    )
    assert code == 0, stderr
    found = results_of(tmp_path / "out")
    assert found["metrics"]["bright"]["stderr"] is None
    assert np.isclose(found["metrics"]["bright"]["mean"], printed(100), rtol=1e-4)
    compared = found["comparison"]["metrics"]["bright"]
    assert (compared["difference"], compared["low"], compared["win_rate"]) == (0.0, None, 0.5)
    assert (
        '"comparison": {}' in (tmp_path / "out" / "page.html").read_text()
    )  # its bars need an interval


def test_a_json_of_prompt_to_files_and_duplicate_prompts_are_taken_at_their_word(
    command, bright, tmp_path
):
    given = images_and_prompts(tmp_path, [0, 100, 200], prompts=["a cat", "a dog", "a cat"])
    mapping = tmp_path / "list.json"
    mapping.write_text(
        json.dumps({"a dog": ["images/2.png"], "a cat": "images/1.png", "a bird": "images/0.png"})
    )
    given[0] = f"--images={mapping}"
    code, _, stderr = command(*given, "--metrics=bright", f"--out={tmp_path}/out")
    assert code == 0, stderr
    assert np.allclose(
        columns_of(tmp_path / "out", 1)["bright"][:, 0],
        printed(np.array([100, 200, 100])),
        atol=1e-4,
    )
    mapping.write_text(
        json.dumps(["images/1.png", ["images/2.png"], "images/0.png"])
    )  # in the prompts' order
    assert command(*given, "--metrics=bright", f"--out={tmp_path}/listed")[0] == 0
    found = columns_of(tmp_path / "listed", 1)["bright"][:, 0]
    assert np.allclose(found, printed(np.array([100, 200, 0])), atol=1e-4)


def test_of_a_folder_with_all_images_the_first_prompts_can_be_taken(command, bright, tmp_path):
    given = images_and_prompts(tmp_path, [0, 100, 200, 250])
    assert command(*given, "--metrics=bright", "--num_prompts=2", f"--out={tmp_path}/out")[0] == 0
    assert np.isclose(
        results_of(tmp_path / "out")["metrics"]["bright"]["mean"], printed(50), rtol=1e-4
    )
    code, _, stderr = command(
        *given, "--metrics=bright", "--num_prompts=3", "--samples=2", f"--out={tmp_path}/other"
    )
    assert code == 2 and "holds 4 images, expected 6 for 3 prompts with --samples=2" in stderr


def test_categories_of_the_users_own_file_have_their_table(command, bright, tmp_path):
    given = images_and_prompts(tmp_path, [0, 100, 200])
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,kind\na cat,animal\na car,thing\na dog,animal\n")
    given[1] = f"--prompts={file}"
    assert command(*given, "--metrics=bright", f"--out={tmp_path}/out")[0] == 0
    groups = results_of(tmp_path / "out")["groups"]["kind"]
    assert np.isclose(groups["animal"]["bright"]["mean"], printed(100), rtol=1e-4)
    assert groups["thing"]["bright"]["prompts"] == 1
    assert "| animal | 2 | -21.57 ± " in (tmp_path / "out" / "table.md").read_text()


def test_the_hpsv2_benchmark_has_its_four_styles_their_average_and_the_published_rows(
    command, bright, tmp_path
):
    styles = ("anime", "concept-art", "paintings", "photo")
    for s, style in enumerate(styles):
        (tmp_path / "benchmark").mkdir(exist_ok=True)
        (tmp_path / "benchmark" / f"{style}.json").write_text(
            json.dumps([f"{style} {i}" for i in range(3)])
        )
        for i in range(3):
            write_image(
                tmp_path / "images" / style / f"{i:05d}.jpg", 128 + 40 * s - 40 * (s == 3) + 10 * i
            )
    code, _, stderr = command(
        f"--images={tmp_path}/images",
        "--prompts=hpsv2",
        f"--prompts_file={tmp_path}/benchmark",
        "--metrics=hpsv21,hpsv2",
        "--weights=hpsv21=",
        "--weights=hpsv2=",
        f"--tokenizer={SHAPES / 'tokenizer'}",
        "--batch_size=8",
        "--name=ours",
        f"--out={tmp_path}/out",
    )
    assert code == 0, stderr
    levels = np.array([138, 178, 218, 218])
    found, table = results_of(tmp_path / "out"), (tmp_path / "out" / "table.md").read_text()
    for style, level in zip(styles, levels):
        assert np.isclose(
            found["groups"]["style"][style]["hpsv21"]["mean"], printed(level), atol=0.5
        )  # JPEG
    line = next(
        line for line in table.splitlines() if line.startswith("| ours |") and line.count("±") == 5
    )
    assert np.allclose(
        [float(cell.split()[0]) for cell in line.split("|")[2:-1]],
        [*printed(levels), printed(levels).mean()],
        atol=0.5,
    )
    assert "| HPSv2.1 | anime | concept-art | paintings | photo | average |" in table
    long = r"*DI\* long (2.6B, 1024 px), published [1]*"
    assert f"| {long} | *33.22* | *31.67* | *31.25* | *28.62* | *31.19* |" in table
    assert "holds 12 prompts, the HPSv2 benchmark 3,200" in table
    assert (
        "| *SDXL-base (2.6B, 1024 px, guidance 7.5), published [1]* | 50 | 111.00 |  | *29.05* |"
        in table
        and "another protocol" in table
    )
    # The two versions are two scales: no number of one stands in the other's column.
    diff_instruct_pp = "| *DI++ of PixArt-alpha (0.6B, pixels not said), published [2]* |"
    assert f"{diff_instruct_pp} 1 |  |  |  | *28.48* |" in table
    by_style = table[table.index("| HPSv2.0 | anime") :]
    assert f"{diff_instruct_pp}  |  |  |  | *28.48* |" in by_style
    assert "| *28.42* | *27.63* | *27.60* | *27.29* | *27.73* |" in by_style
    assert "31.19" not in by_style and table.count("28.48") == 2
    assert "- *Published* [2]: arXiv 2410.18881, abstract" in table


# What `sample` has written.


def write_samples(folder, levels):
    """0000.png, ... of {prompt: levels}, the grid of all, and prompts.json."""
    listed = {}
    for text, of_prompt in levels.items():
        for level in of_prompt:
            name = f"{len(listed):04d}.png"
            write_image(folder / name, level)
            listed[name] = text
    write_image(folder / "grid.png", 255)
    (folder / "prompts.json").write_text(json.dumps(listed))


@pytest.mark.case("first hour 17")
def test_pictures_of_sample_bring_their_prompts_and_the_grid_is_none_of_them(
    command, bright, tmp_path
):
    write_samples(tmp_path / "drawn", {"a cat": [0, 10, 20], "a dog, sleeping": [100, 110, 120]})
    given = [f"--images={tmp_path}/drawn", "--metrics=bright", "--batch_size=8"]
    code, _, stderr = command(*given, f"--out={tmp_path}/out")
    assert code == 0, stderr
    found = columns_of(tmp_path / "out", samples=3)
    assert found["prompt"][:, 0].tolist() == ["a cat", "a dog, sleeping"]
    levels = np.array([[0, 10, 20], [100, 110, 120]])
    assert np.allclose(found["bright"], printed(levels), atol=1e-3)
    assert results_of(tmp_path / "out")["settings"]["prompts"]["name"] == "prompts.json"
    file = tmp_path / "six.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(6)))
    (tmp_path / "drawn" / "prompts.json").unlink()
    code, _, stderr = command(*given, f"--prompts={file}", f"--out={tmp_path}/six")
    assert code == 0, stderr
    assert columns_of(tmp_path / "six", samples=1)["bright"].max() < printed(121)


@pytest.mark.case("first hour 17")
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no --prompts; give one of parti"),
        ("[", "prompts.json is not readable as JSON"),
        ("7", "holds a int, expected {file: prompt}"),
        ('["a cat"]', "lists 1 prompts for 3 images"),
        ('{"0000.png": "a cat", "0009.png": "a cat"}', "names 0009.png, which is not there"),
        ('{"0000.png": " "}', "has ' ' for 0000.png, expected its prompt"),
        ('{"0000.png": "a", "0001.png": "a", "0002.png": "b"}', "has 1 or 2 images a prompt"),
        ("{}", "has no images a prompt"),
        ("SAMPLES", "--samples=2, but "),
    ],
)
def test_a_prompts_json_that_does_not_say_the_prompts_is_refused(
    command, bright, tmp_path, content, message
):
    write_samples(tmp_path / "drawn", {"a cat": [0, 10, 20]})
    file = tmp_path / "drawn" / "prompts.json"
    if content is None:
        file.unlink()
    elif content != "SAMPLES":
        file.write_text(content)
    given = [f"--images={tmp_path}/drawn", "--metrics=bright", f"--out={tmp_path}/out"]
    code, _, stderr = command(*given, "--batch_size=8", "--samples=2")
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr


# Paths.


@pytest.mark.case("faults 11")
def test_a_tilde_is_the_home_folder_in_every_path(command, bright, monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    images_and_prompts(home, [0, 100, 200])
    images_and_prompts(home, [0, 100, 200], "real")
    shutil.copytree(SHAPES / "reward", home / "reward")
    shutil.copytree(SHAPES / "tokenizer", home / "tokenizer")
    given = [
        "--images=~/images",
        "--prompts=~/prompts.txt",
        "--weights=pickscore=~/reward",
        "--tokenizer=~/tokenizer",
        "--batch_size=8",
    ]
    code, _, stderr = command(*given, "--metrics=bright", "--out=~/before")
    assert code == 0, stderr
    code, _, stderr = command(
        *given,
        "--metrics=bright,frechet",
        "--reference=~/real",
        "--features=pickscore",
        "--baseline=~/before",
        "--out=~/after",
    )
    assert code == 0, stderr
    assert all((home / "after" / name).is_file() for name in FILES)
    assert os.listdir(tmp_path) == ["home"]
    code, _, stderr = command("--checkpoint=~/none", *given[1:], "--out=~/third")
    assert code == 2 and f"no folder {home}/none" in stderr, stderr


@pytest.mark.case("first hour 28")
def test_no_file_that_others_read_names_a_folder_of_this_machine(command, straight, tmp_path):
    for name in ("results.json", "table.md", "page.html"):
        assert str(straight.parent) not in (straight / name).read_text(), name
        assert "/tmp" not in (straight / name).read_text(), name
    files = columns_of(straight, samples=2)["file"]
    assert files[0].tolist() == ["images/00000_0.png", "images/00000_1.png"]


@pytest.mark.case("first hour 28")
def test_given_images_are_named_by_their_place_and_found_again_by_a_later_comparison(
    command, bright, tmp_path
):
    given = images_and_prompts(tmp_path, [0, 100, 200])
    (tmp_path / "images" / "1.png").write_text("a text")
    assert command(*given, "--metrics=bright", f"--out={tmp_path}/before")[0] == 0
    code, _, stderr = command(
        *given, "--metrics=bright", f"--baseline={tmp_path}/before", f"--out={tmp_path}/after"
    )
    assert code == 0, stderr
    for name in ("results.json", "table.md", "page.html"):
        assert str(tmp_path) not in (tmp_path / "after" / name).read_text(), name
    assert columns_of(tmp_path / "before", 1)["file"][0, 0] == "../images/0.png"
    page = (tmp_path / "after" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2


@pytest.mark.case("first hour 24")
def test_all_that_is_missing_is_said_at_once_and_before_the_images_are_read(
    command, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    given = images_and_prompts(tmp_path, [0, 100, 200])
    given[0] = f"--images={tmp_path}/none"
    given[1] = f"--prompts={tmp_path}/none.txt"
    code, _, stderr = command(
        *given,
        "--metrics=hpsv2,fid,pickscore",
        f"--weights=pickscore={tmp_path}/reward",
        f"--reference={SHAPES}/unet",
        f"--baseline={tmp_path}/before",
        f"--out={tmp_path}/out",
    )
    assert code == 2 and stderr.count("\n") == 1
    for part in (
        "6 inputs are missing",
        "unet holds 0 images",
        "no results.json in",
        "none is no folder",
        "no prompt file",
        "fid needs clean-fid",
        "weights/hpsv2.0 for hpsv2",
        f"no folder {tmp_path}/reward for pickscore",
    ):
        assert part in stderr, part
    assert not (tmp_path / "out").exists()


@pytest.mark.case("faults 26")
@pytest.mark.parametrize("flag", ["images", "prompts", "baseline", "out", "reference"])
def test_a_name_that_is_too_long_is_one_line(command, tmp_path, flag):
    long = {flag: tmp_path / f"{'x' * 300}.txt"}
    given = {"images": tmp_path, "prompts": tmp_path / "a.txt", "out": tmp_path / "out"} | long
    (tmp_path / "a.txt").write_text("a cat\n")
    arguments = [f"--{name}={value}" for name, value in given.items()]
    code, _, stderr = command(*arguments, "--metrics=frechet,contrast", "--batch_size=8")
    assert code == 2 and stderr.count("\n") == 1, stderr


# Progress.


@pytest.mark.case("first hour 9", "first hour 10")
def test_each_stage_is_said_once_in_its_order_and_so_is_a_wait_for_the_compiler(
    command, bright, tmp_path
):
    given = images_and_prompts(tmp_path, [0, 100, 200])
    code, stdout, stderr = command(*given, "--metrics=bright,contrast", f"--out={tmp_path}/out")
    assert code == 0, stderr
    stages = [line for line in stdout.splitlines() if line.startswith("stage ")]
    assert [line.split(",")[0] for line in stages] == [
        "stage 1 of 5: reading the images",
        "stage 2 of 5: loading the metrics' weights",
        "stage 3 of 5: contrast",
        "stage 4 of 5: bright",
        "stage 5 of 5: writing the tables and the page",
    ]
    assert "0.0 min left" not in stdout
    assert stdout.index("stage 4") < stdout.index("compiling bright") < stdout.index("bright 3/3")


# Two evaluations.


def test_a_baseline_is_compared_prompt_by_prompt(command, bright, tmp_path):
    base, ours = [100, 100, 100, 100, 40], [110, 90, 130, 100, 250]
    given = images_and_prompts(tmp_path, base, "base")
    assert command(*given, "--metrics=bright,saturation", f"--out={tmp_path}/before")[0] == 0
    given = images_and_prompts(tmp_path, ours, "ours")
    code, stdout, stderr = command(
        *given,
        "--metrics=contrast,bright",
        f"--baseline={tmp_path}/before",
        "--trained_on=bright",
        f"--out={tmp_path}/after",
    )
    assert code == 0, stderr
    found = results_of(tmp_path / "after")["comparison"]
    assert list(found["metrics"]) == ["bright"] and found["same_noise"] is False
    compared, differences = found["metrics"]["bright"], (np.array(ours) - base) / 1.275
    assert (
        np.isclose(compared["difference"], differences.mean(), atol=1e-4)
        and compared["win_rate"] == 0.7
    )
    assert compared["low"] < compared["difference"] < compared["high"] and compared["prompts"] == 5
    low, high = (f"{compared[key]:+.2f}" for key in ("low", "high"))
    cell = f"{differences.mean():+.2f} [{low}, {high}], 70.0 %"
    assert f"| difference (not the same noise) |  |  |  |  | {cell} |" in stdout
    assert "Brightness †" in stdout and "proves nothing" in stdout
    assert (tmp_path / "after" / "page.html").read_text().count("data:image/png;base64,") == 10


@pytest.mark.long
def test_two_networks_of_one_run_are_compared_on_the_same_noise(
    command, straight, folder, workdir, tmp_path
):
    out = tmp_path / "initial"
    code, _, stderr = command(
        *arguments_for(workdir, folder, out, which="initial", baseline=straight)
    )
    assert code == 0, stderr
    found, scores, before = results_of(out), columns_of(out, 2), columns_of(straight, 2)
    assert found["comparison"]["same_noise"] and found["name"] == f"{workdir.name} (initial)"
    assert not found["metrics"]["pickscore"]["trained_on"]
    for name in ("pickscore", "saturation", "diversity"):
        difference = (scores[name] - before[name]).mean(axis=1)
        compared = found["comparison"]["metrics"][name]
        assert np.isclose(compared["difference"], difference.mean(), rtol=1e-9, atol=1e-12)
        assert np.isclose(compared["win_rate"], np.mean(difference > 0))
    drawn = results_of(straight)["settings"]["noise"]
    assert found["settings"]["noise"] == drawn == {"seed": 0, "latent_shape": [8, 8, 4]}


# Frechet distances.


def test_statistics_of_a_reference_serve_in_place_of_its_folder(command, folder, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "reference"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(
                tmp_path / name / f"{i}.png"
            )
    (tmp_path / "reference" / "6.png").write_text("broken")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\n")
    given = [
        f"--images={tmp_path}/images",
        f"--prompts={tmp_path}/prompts.txt",
        "--metrics=frechet",
        "--batch_size=8",
        "--features=clipscore",
        f"--weights=clipscore={folder}/reward",
        f"--tokenizer={folder}/tokenizer",
    ]
    assert command(*given, f"--reference={tmp_path}/reference", f"--out={tmp_path}/out")[0] == 0
    found = results_of(tmp_path / "out")["metrics"]["frechet"]
    assert "6 images against 6 of" in found["note"] and "1 more not readable" in found["note"]
    assert found["mean"] > 0 and found["stderr"] is None
    (npz,) = (tmp_path / "out").glob("reference_*.npz")
    assert command(*given, f"--reference={npz}", f"--out={tmp_path}/again")[0] == 0
    assert np.isclose(
        results_of(tmp_path / "again")["metrics"]["frechet"]["mean"], found["mean"], rtol=1e-9
    )


@pytest.fixture
def cleanfid(monkeypatch):
    """A stand-in for the package; [(files of the first folder, second folder, other arguments)]."""
    calls = []

    def compute_fid(ours, theirs=None, **named):
        files = sorted(os.scandir(ours), key=lambda file: file.name)
        assert str(named.pop("device")) == "cpu" and named.pop("use_dataparallel") is False
        calls.append(([os.path.realpath(file) for file in files], theirs, named))
        return np.float32(12.5)

    def test_stats_exists(name, mode, model_name):
        return (name, mode, model_name) == ("coco", "clean", "inception_v3")

    module = types.ModuleType("cleanfid")
    module.fid = types.SimpleNamespace(compute_fid=compute_fid, test_stats_exists=test_stats_exists)
    monkeypatch.setitem(sys.modules, "cleanfid", module)
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    return calls


def test_clean_fid_takes_its_own_statistics_by_name_and_says_which_it_does_not_have(
    command, cleanfid, tmp_path
):
    given = [*images_and_prompts(tmp_path, range(0, 30, 10)), "--reference=cleanfid:coco"]
    assert command(*given, "--metrics=fid", f"--out={tmp_path}/out")[0] == 0
    assert cleanfid[0][1:] == (
        None,
        {
            "mode": "clean",
            "model_name": "inception_v3",
            "dataset_name": "coco",
            "dataset_split": "custom",
        },
    )
    assert "against its statistics coco" in results_of(tmp_path / "out")["metrics"]["fid"]["note"]
    code, _, stderr = command(*given, "--metrics=clip_fid", f"--out={tmp_path}/other")
    assert code == 2 and "clean-fid has no statistics 'coco' for clip_fid; make them" in stderr


@pytest.mark.case("faults 9")
def test_clean_fid_is_given_8_bits_for_16_and_no_reference_of_16(command, cleanfid, tmp_path):
    given = images_and_prompts(tmp_path, range(0, 30, 10))
    deep = Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))
    deep.save(tmp_path / "images" / "1.png")
    opened = []
    fid = sys.modules["cleanfid"].fid
    compute_fid = fid.compute_fid

    def compute(ours, *others, **named):
        opened.extend(np.asarray(Image.open(file).convert("RGB")) for file in os.scandir(ours))
        return compute_fid(ours, *others, **named)

    fid.compute_fid = compute
    given.append("--metrics=fid")
    code, _, stderr = command(*given, "--reference=cleanfid:coco", f"--out={tmp_path}/out")
    assert code == 0, stderr
    assert sorted(int(image.max()) for image in opened) == [0, 20, 100]
    reference = f"--reference={tmp_path}/images"
    code, _, stderr = command(*given, reference, f"--out={tmp_path}/other")
    assert code == 2 and "1.png of --reference=" in stderr and "save it with 8 bits" in stderr


def test_clip_fid_without_the_package_that_clean_fid_needs_is_refused_at_once(
    command, cleanfid, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "clip", None)
    given = [
        *images_and_prompts(tmp_path, range(0, 30, 10)),
        "--reference=cleanfid:coco",
        "--metrics=clip_fid",
    ]
    code, _, stderr = command(*given, f"--out={tmp_path}/out")
    assert code == 2 and "clip_fid needs OpenAI's CLIP package" in stderr


def test_clean_fid_is_given_the_readable_images_in_a_folder_and_asked_once(
    command, cleanfid, tmp_path
):
    given = images_and_prompts(tmp_path, range(0, 110, 10))
    (tmp_path / "images" / "1.png").write_text("broken")
    images_and_prompts(tmp_path, range(4), "reference")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(11)))
    given = [
        *given,
        "--metrics=fid,clip_fid",
        f"--reference={tmp_path}/reference",
        f"--out={tmp_path}/out",
    ]
    code, _, stderr = command(*given)
    assert code == 0, stderr
    files = [str(tmp_path / "images" / f"{i}.png") for i in range(11) if i != 1]
    reference = str(tmp_path / "reference")
    assert cleanfid == [
        (files, reference, {"mode": "clean", "model_name": "inception_v3"}),
        (files, reference, {"mode": "clean", "model_name": "clip_vit_b_32"}),
    ]
    found = results_of(tmp_path / "out")["metrics"]
    assert (
        found["fid"]["mean"] == 12.5
        and "resized to 299 bicubic, antialiased, not rounded; 10 images (.png) against 4 of"
        in found["fid"]["note"]
    )
    assert "clip_vit_b_32" in found["clip_fid"]["note"] and found["fid"]["left_out"] == 1
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["prompts"]
    assert command(*given)[0] == 0 and len(cleanfid) == 2


# Bad input.


@pytest.fixture
def compilations():
    """Names of what was compiled."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (
            found.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    return found


BAD = {
    "neither": (["--images="], "give one of --checkpoint"),
    "both": (["--checkpoint=x"], "give one of --checkpoint"),
    "unknown metric": (["--metrics=picscore"], "--metrics=picscore, expected some of pickscore"),
    "no metric": (["--metrics="], "--metrics is empty"),
    "unknown set": (["--prompts=partti"], "did you mean parti?"),
    "set without its file": (
        ["--prompts=parti"],
        "PartiPrompts.tsv of google-research/parti on GitHub; add",
    ),
    "no prompt file": (["--prompts=TMP/none.txt"], "no prompt file"),
    "empty prompts": (["--prompts=TMP/empty.txt"], "is empty"),
    "blank prompts": (["--prompts=TMP/blank.txt"], "holds no prompts"),
    "too few images": (["--images=TMP/two"], "holds 2 images, expected 3 for 3 prompts"),
    "no folder": (["--images=TMP/none"], "is no folder"),
    "all broken": (["--images=TMP/broken"], "none of the 3 images can be read"),
    "JSON without a prompt": (
        ["--images=TMP/others.json"],
        "has no images for 3 of the 3 prompts, the first is",
    ),
    "JSON of a list": (
        ["--images=TMP/list.json"],
        "lists 0 entries, expected one for each of the 3 prompts",
    ),
    "no JSON": (["--images=TMP/no.json"], "is not readable as JSON"),
    "JSON with a wrong path": (["--images=TMP/paths.json"], "names 1 files that are not there"),
    "JSON with two for one": (
        ["--images=TMP/pairs.json"],
        "expected 1 file name(s); set --samples",
    ),
    "hpsv2 without weights": (
        ["--metrics=hpsv2"],
        "HPS_v2_compressed.pt (2.0) or HPS_v2.1_compressed.pt (2.1) of xswu/HPSv2 on the Hub",
    ),
    "aesthetic without weights": (
        ["--metrics=aesthetic"],
        "sac+logos+ava1-l14-linearMSE.safetensors (converted once",
    ),
    "imagereward without weights": (
        ["--metrics=imagereward"],
        "ImageReward.pt of THUDM/ImageReward on the Hub",
    ),
    "a UNet as metric": (
        ["--metrics=pickscore", "--weights=pickscore=SHAPES/unet"],
        "holds a UNet2DConditionModel",
    ),
    "a UNet as features": (
        [
            "--metrics=frechet",
            "--reference=TMP/images",
            "--features=hpsv2",
            "--weights=hpsv2=SHAPES/unet",
        ],
        "holds a UNet2DConditionModel",
    ),
    "weights of nothing": (["--weights=pikscore=x"], "expected METRIC=FOLDER"),
    "unknown features": (["--features=clip"], "--features=clip, expected one of"),
    "unknown reward": (["--trained_on=clip"], "--trained_on=clip, expected one of"),
    "no reference": (["--metrics=frechet"], "--metrics=frechet without --reference"),
    "reference that is not there": (
        ["--metrics=frechet", "--reference=TMP/none"],
        "does not exist",
    ),
    "reference without images": (
        ["--metrics=frechet", "--reference=TMP/empty"],
        "holds 0 images, expected 2 or more",
    ),
    "broken statistics": (
        ["--metrics=frechet", "--reference=TMP/empty.txt", "--features=pickscore"],
        "not readable as .npz",
    ),
    "fid without clean-fid": (["--metrics=fid", "--reference=TMP/images"], "needs clean-fid"),
    "fid of a file": (
        ["--metrics=fid", "--reference=TMP/empty.txt"],
        "fid takes a folder of images",
    ),
    "diversity of one": (["--metrics=diversity"], "--samples=1, expected 2 or more"),
    "no caption for the oracle": (["--metrics=oracle"], "cannot read the caption 'prompt 0'"),
    "batch that is not divisible": (["--batch_size=9"], "not divisible by the 8 devices; use 16"),
    "fsdp that is not a divisor": (["--fsdp=3"], "--fsdp=3 does not divide the 8 devices"),
    "baseline that is none": (["--baseline=TMP/images"], "no results.json in"),
    "baseline that is out": (["--baseline=TMP/out"], "is --out too"),
    "out that is a file": (["--out=TMP/empty.txt"], "cannot make --out"),
    "out with other things": (["--out=TMP/two"], "holds other things than an evaluation"),
    "checkpoint of nothing": (["--images=", "--checkpoint=TMP/empty"], "no checkpoint in"),
    "checkpoint that is not there": (["--images=", "--checkpoint=TMP/none"], "no folder"),
    "wrong resolution": (
        ["--images=", "--checkpoint=SHAPES", "--resolution=65"],
        "not a multiple of 64",
    ),
    "unknown sampler": (["--sampler=heun"], "ddim, dpm_solver_pp, euler, few_step"),
    "no prompts on the page": (["--max_prompts=0"], "expected a positive integer"),
    "surplus": (["more"], "got 'more', expected flags only"),
    "unknown flag": (["--imagse=x"], "imagse"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_exit_code_2_before_anything_compiles(
    command, tmp_path, compilations, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    arguments, message = BAD[name]
    given = images_and_prompts(tmp_path, [0, 100, 200])
    for folder, count in (("two", 2), ("empty", 0), ("broken", 0)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            write_image(tmp_path / folder / f"{i}.png", i)
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_text("a text")
    texts = [f"prompt {i}" for i in range(3)]
    for file, content in (
        ("empty.txt", ""),
        ("blank.txt", "\n\n"),
        ("no.json", "{"),
        ("list.json", "[]"),
        ("others.json", '{"a": "images/0.png"}'),
        (
            "paths.json",
            json.dumps(
                {text: f"images/{7 * i}.png" for i, text in enumerate(texts[:2])}
                | {texts[2]: "images/2.png"}
            ),
        ),
        ("pairs.json", json.dumps({text: ["images/0.png", "images/1.png"] for text in texts})),
    ):
        (tmp_path / file).write_text(content)
    given = [
        *given,
        "--metrics=saturation",
        f"--weights=pickscore={SHAPES}/reward",
        f"--out={tmp_path}/out",
        *(text.replace("TMP", str(tmp_path)).replace("SHAPES", str(SHAPES)) for text in arguments),
    ]
    if "--images=" in given:
        given = [text for text in given if not text.startswith("--images")]
    code, _, stderr = command(*given)
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr, stderr
    assert not compilations


@pytest.mark.parametrize(
    "change, message",
    [
        (["--num_prompts=2"], "has other prompts (prompts.txt, 3 of digest"),
        (["--samples=2", "--num_prompts=1"], "has other prompts"),
        ([], "has bright by other weights"),
    ],
)
def test_a_baseline_of_other_prompts_or_weights_is_refused_before_anything_is_scored(
    command, bright, monkeypatch, tmp_path, change, message
):
    given = images_and_prompts(tmp_path, [0, 100, 200])
    assert command(*given, "--metrics=bright", f"--out={tmp_path}/before")[0] == 0
    if not change:
        monkeypatch.setitem(rewards.REWARDS, "bright", brightness("Brightness", 2.0))
    write_image(tmp_path / "images" / "0.png", 1)
    if "--samples=2" in change:
        (tmp_path / "images" / "2.png").unlink()
    code, _, stderr = command(
        *given,
        "--metrics=bright",
        *change,
        f"--baseline={tmp_path}/before",
        f"--out={tmp_path}/after",
    )
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not scored(tmp_path / "after", "bright")


def test_an_error_as_a_user_meets_it_is_one_line_without_traceback(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "di_star_jax.evaluate",
            f"--images={tmp_path}",
            "--prompts=parti",
            f"--out={tmp_path}/out",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --prompts=parti needs PartiPrompts"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.case("first hour 28")
def test_a_function_of_the_users_own_is_a_metric_whose_file_is_noted(
    command, monkeypatch, tmp_path
):
    own = tmp_path / "my.py"
    own.write_text("def brightness(images):\n    return images.mean((1, 2, 3))\n")
    given = images_and_prompts(tmp_path, [0, 255])
    asked = (*given, f"--metrics={own}:brightness", f"--out={tmp_path}/out")
    code, _, stderr = command(*asked)
    monkeypatch.delitem(rewards.REWARDS, "brightness")
    assert code == 0, stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["metrics"]["brightness"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["settings"]["metrics"]["brightness"]["weights"] == "my.py"
    own.write_text("def brightness(images):\n    return 2 * images.mean((1, 2, 3))\n")
    code, _, stderr = command(*asked)
    monkeypatch.delitem(rewards.REWARDS, "brightness")
    assert code == 2 and "holds scores of brightness with sha256" in stderr
