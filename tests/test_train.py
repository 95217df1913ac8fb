# SPDX-License-Identifier: Apache-2.0
"""A whole run on a tiny random pipeline: outputs, restart, and what reads its workdir."""

import json

import jax
import numpy as np
import pytest
from test_config import load as load_config
from test_step import CONFIGS

from di_star_jax import drawing, models, train
from di_star_jax.errors import UserError
from di_star_jax.pipelines import folder as pipeline
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
        cls, settings = pipeline.model_class(config)
        params = models.init(lambda rngs: cls(settings, rngs=rngs), seed=i)[1]
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


@pytest.mark.case("first hour 2")
def test_the_model_card_of_a_run_shows_its_samples_and_the_call(straight):
    export = straight / "diffusers"
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "![samples](samples.png)" in card and "num_inference_steps=1, guidance_scale=0" in card
    assert "pickscore (scale" in card and "ema, step 4" in card
    assert (export / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()


def test_a_run_leaves_pictures_scores_scalars_and_a_diffusers_folder(straight):
    scores = json.loads((straight / "before_after.json").read_text())
    assert set(scores["after"]) == {"pickscore", "pickscore, std", "diversity"}
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


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights_and_compiles_nothing_anew(
    folder, straight, tmp_path, missed
):
    for steps in (1, 3):  # stops at step 2 of 4
        missed.clear()
        train.run(config_for(folder, **{"train.steps": steps, "eval.prompts": ""}), str(tmp_path))
    assert not missed
    for name in ("generator", "assistant", "ema"):
        a, b = unet_of(straight, 4, name), unet_of(tmp_path, 4, name)
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))), (
            name
        )


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


@pytest.mark.slow
def test_sample_makes_the_same_picture_from_a_workdir_and_from_its_export(straight):
    z = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 4))
    pictures = []
    for source in (straight, straight / "diffusers"):
        loaded = drawing.load(str(source), "ema")
        assert loaded.timesteps == (399,)
        draw = drawing.draw_prompts(
            loaded, drawing.Sampling("few_step", np.array([399]), 1.0, (8, 8, 4))
        )
        pictures.append(draw(["a red circle", "a blue square"], z))
    assert pictures[0].shape == (2, 16, 16, 3)
    assert np.array_equal(*pictures)
