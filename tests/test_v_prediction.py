# SPDX-License-Identifier: Apache-2.0
"""Runs whose reference predicts v: a folder that says so, and a single file."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_train import config_for, refusal, write_pipeline

from di_star_jax import assembly, drawing, sharding, train
from di_star_jax.models import unet
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines import single
from di_star_jax.storage import checkpoint, folders

RUN = {"assistant.warmup_steps": 0, "train.steps": 2, "eval.prompts": "", "train.log_every": 1}


def copy_with(folder, out, **said):
    """A copy of a pipeline whose scheduler says something else."""
    shutil.copytree(folder, out)
    path = out.joinpath(*folders.SCHEDULER)
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return out


@pytest.fixture(scope="module")
def eps(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "eps")


@pytest.fixture(scope="module")
def predicts(eps):
    """v: the same weights, taken for v; and zero_snr: up to pure noise."""
    v = copy_with(eps, eps.parent / "v", prediction_type="v_prediction")
    zero_snr = copy_with(v, eps.parent / "zero_snr", rescale_betas_zero_snr=True)
    return {"v": v, "zero_snr": zero_snr}


@pytest.fixture
def file_of(eps, tmp_path, monkeypatch):
    """file_of(folder) -> the pipeline in one file, whose empty tensors alone say what it predicts.

    Tokenizers and settings are those of the noise prediction, as those of the published SDXL are.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(single, "hub_name", lambda family: str(eps))

    def write(folder):
        single.from_folder(folder, tmp_path / "mine.safetensors", dtype="float32")
        return tmp_path / "mine.safetensors"

    return write


def same(tree, other):
    leaves = [jax.tree.leaves(each) for each in (tree, other)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def changed(config, name, value):
    config.weights[name] = str(value)
    return config


@pytest.mark.parametrize(
    "kind, of_file",
    [
        pytest.param("v", False, marks=pytest.mark.long),
        pytest.param("zero_snr", False, marks=pytest.mark.long),
        pytest.param("zero_snr", True, marks=pytest.mark.long),
    ],
)
def test_a_run_from_a_v_prediction_reference_trains_and_exports_one(
    eps, predicts, file_of, tmp_path, kind, of_file
):
    reference = file_of(predicts[kind]) if of_file else predicts[kind]
    given = predicts[kind] / "generator"
    config = config_for(eps, **RUN)
    config.weights.reference, config.weights.generator = str(reference), str(given)
    single.with_folders(config)
    mesh = sharding.make_mesh(4, 2)
    prompts = {"data": train.load_prompts(config, "data", tmp_path)}
    loaded = train.load(config, mesh, prompts)
    (tmp_path / "none").mkdir()
    with checkpoint.Checkpoints(tmp_path / "none", keep=1) as store:
        state = train.load_state(config, loaded, store)
    assert same(state.assistant, pipeline.load_model(eps / "unet").params)
    assert same(state.generator, pipeline.load_model(eps / "generator").params)

    train.run(config, str(tmp_path / "run"))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert len(lines) >= 2 and np.isfinite(numbers).all()
    betas = loaded.metadata["denoiser_config"][unet.V_PREDICTION]
    assert bool(betas.get("rescale_betas_zero_snr")) is (kind == "zero_snr")
    exported = folders.read_config(tmp_path / "run" / "diffusers", *folders.SCHEDULER)
    assert exported["prediction_type"] == "v_prediction"
    assert bool(exported.get("rescale_betas_zero_snr")) is (kind == "zero_snr")

    def drawn(source):
        loaded = drawing.load(str(source), "ema")
        sampling = drawing.sampling_of(drawing.Asked(None, None, None, (), None), loaded)
        shape = (1, 1, *sampling.latent_shape)
        z = np.random.default_rng(0).standard_normal(shape, np.float32)
        return drawing.draw_prompts(loaded, sampling)(["a red circle"], z)

    assert np.abs(drawn(tmp_path / "run") - drawn(tmp_path / "run" / "diffusers")).max() < 1e-5


@pytest.mark.slow
def test_a_generator_of_the_other_prediction_is_refused_in_one_line(eps, predicts, file_of):
    """What the networks share is one graph, which predicts one thing."""
    for reference, generator, ours, theirs in (
        (eps, predicts["v"], "noise", "v"),
        (predicts["v"], eps, "v", "noise"),
        (predicts["v"], predicts["zero_snr"], "v", "v, of another schedule"),
        (eps, file_of(predicts["v"]), "noise", "v"),
    ):
        config = changed(config_for(eps), "reference", reference)
        changed(config, "generator", generator)
        single.with_folders(config)
        parts = assembly.load_parts(config, sharding.make_mesh(8, 1))
        denoiser = parts.models["denoiser"]
        error = refusal(train.first_of, parts, "generator", parts.start.folder, denoiser.params, 0)
        assert f"predicts {theirs} (" in error and f"the reference predicts {ours};" in error
        assert "\n" not in error and "scheduler_config.json" in error


@pytest.mark.long
def test_a_generator_without_a_scheduler_predicts_what_the_reference_does(eps, predicts, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(eps / "unet", alone)
    for reference in (eps, predicts["zero_snr"]):
        config = changed(config_for(eps), "reference", reference)
        parts = assembly.load_parts(changed(config, "generator", alone), sharding.make_mesh(8, 1))
        abstract = pipeline.abstract_model(parts.models["denoiser"].config).params
        found = train.first_of(parts, "generator", parts.start.folder, abstract, 0)
        assert same(found, pipeline.load_model(alone).params)
