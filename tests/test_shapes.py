# SPDX-License-Identifier: Apache-2.0
"""The shapes world: its grammar, its oracle, its taste, and the checkpoint that comes with it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from di_star_jax import drawing, pictures, train
from di_star_jax.config import load_config
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures
from di_star_jax.prompts.files import Prompt
from di_star_jax.shapes import datasets, oracle, scenes, taste

SHIPPED = Path(scenes.__file__).parent / "checkpoint"
TWIN = SHIPPED.with_name("checkpoint_pixart")  # VAE, reward and captions are the other's


def blurred(image, sigma=0.7):
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    image = np.pad(image, ((3, 3), (3, 3), (0, 0)), "edge")
    image = sum(k * image[i : i + scenes.SIZE] for i, k in enumerate(kernel))
    return sum(k * image[:, i : i + scenes.SIZE] for i, k in enumerate(kernel))


def share(pairs):
    right, total = np.sum(pairs, axis=0)
    return right / total


def test_there_are_more_than_100_000_captions_and_parsing_inverts_them():
    assert scenes.num_captions() > 100_000
    rng = np.random.default_rng(0)
    for index in rng.integers(scenes.num_captions(), size=200):
        scene = scenes.scene_at(int(index))
        assert scenes.parse(scene.caption) == scene
        assert len(scene.caption.split()) <= 16
        assert set(scene.caption.split()) <= set(scenes.words())
    with pytest.raises(UserError):
        scenes.parse("a photo of a cat")


def test_captions_are_distinct():
    assert len({scenes.scene_at(i).caption for i in range(0, scenes.num_captions(), 97)}) == len(
        range(0, scenes.num_captions(), 97)
    )


def test_held_out_captions_are_never_trained_on():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng, held_out=False).caption for _ in range(500)]
    assert not any(scenes.is_held_out(caption) for caption in drawn)
    assert scenes.is_held_out(scenes.sample_scene(rng, held_out=True).caption)


def test_oracle_reads_clean_and_blurred_renders_and_is_not_fooled_by_another_scene():
    rng = np.random.default_rng(1)
    clean, soft, wrong = [], [], []
    for _ in range(200):
        scene, other = (scenes.sample_scene(rng, held_out=False) for _ in range(2))
        image = scenes.render(scene, rng)
        clean.append(oracle.attributes(scene, image))
        noisy = blurred(image) + 0.02 * rng.standard_normal(image.shape)
        soft.append(oracle.attributes(scene, np.clip(noisy, 0, 1)))
        wrong.append(oracle.attributes(other, image))
    assert share(clean) >= 0.99 and share(soft) >= 0.95
    assert share(wrong) < 0.3


def test_oracle_survives_images_without_any_object():
    scene = scenes.scene_at(0)
    for image in (
        np.zeros((64, 64, 3)),
        np.ones((64, 64, 3)),
        np.random.default_rng(0).random((64, 64, 3)),
    ):
        right, total = oracle.attributes(scene, image)
        assert 0 <= right < total


def test_taste_varies_with_style_and_not_with_what_captions_say():
    rng = np.random.default_rng(2)
    drawn = [scenes.sample_scene(rng, held_out=False) for _ in range(600)]
    values = np.array([taste.taste(scenes.render(scene, rng)) for scene in drawn])
    assert 0.7 < values.std() < 1.3 and abs(values.mean()) < 0.2
    for name in scenes.BACKGROUNDS:
        assert abs(values[[s.background == name for s in drawn]].mean()) < 0.35, name


def test_preferred_picture_has_the_better_light_or_the_right_scene():
    rng = np.random.default_rng(3)
    agree = []
    for _ in range(300):
        scene = scenes.sample_scene(rng, held_out=False)
        a, b, prob = taste.preference_pair(scene, rng)
        if prob in (0.97, 0.03):
            right, wrong = (a, b) if prob > 0.5 else (b, a)
            assert share([oracle.attributes(scene, right)]) >= share(
                [oracle.attributes(scene, wrong)]
            )
        else:
            agree.append((taste.taste(a) > taste.taste(b)) == (prob > 0.5))
    assert np.mean(agree) > 0.95


@pytest.mark.parametrize(
    "folder, size, form, least",
    [
        pytest.param(SHIPPED, 26.5e6, FewStep((399,), "noise"), 0.9, marks=pytest.mark.long),
        pytest.param(TWIN, 15e6, FewStep((440,), "scaled"), 0.85, marks=pytest.mark.long),
    ],
    ids=["sdxl", "pixart"],
)
def test_shipped_checkpoint_is_small_and_its_one_step_generator_draws_what_is_asked(
    folder, size, form, least
):
    from di_star_jax.pipelines import folder as pipeline

    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < size
    loaded = pipeline.load_pipeline(folder)
    generator = loaded._replace(
        models=loaded.models | {"denoiser": pipeline.load_model(folder / "generator")}
    )
    draw = drawing.draw_prompts(generator, drawing.few_step(form, (16, 16, 4)))
    captions = (SHIPPED / "prompts_held_out.txt").read_text().splitlines()
    assert len(captions) == 500 and all(scenes.is_held_out(caption) for caption in captions)
    z = np.random.default_rng(2).standard_normal((1, 200, 16, 16, 4), np.float32)
    images = pictures.to_uint8(draw(captions[:200], z))
    assert measures.attributes_right(captions[:200], images).mean() >= least


@pytest.mark.long
def test_the_twins_teacher_draws_what_is_asked_in_the_20_steps_of_its_scheduler():
    from di_star_jax.pipelines import folder as pipeline
    from di_star_jax.shapes import networks

    loaded = pipeline.load_pipeline(TWIN)
    assert loaded.scheduler.config == networks.PIXART_SCHEDULER
    sampling = drawing.sampling_of(drawing.Asked(None, None, None, (), None), loaded)
    assert (sampling.sampler, len(sampling.timesteps)) == ("dpm_solver_pp", 20)
    captions = (SHIPPED / "prompts_held_out.txt").read_text().splitlines()[:50]
    z = np.random.default_rng(3).standard_normal((50, 16, 16, 4), np.float32)
    images = pictures.to_uint8(drawing.draw_prompts(loaded, sampling)(captions, z))
    assert measures.attributes_right(captions, images).mean() >= 0.85


@pytest.mark.long
def test_diffusers_draws_the_twin_as_we_do():
    import diffusers
    import torch

    from di_star_jax.pipelines import folder as pipeline

    captions = (SHIPPED / "prompts_held_out.txt").read_text().splitlines()[:2]
    z = np.random.default_rng(5).standard_normal((2, 16, 16, 4), np.float32)
    loaded = pipeline.load_pipeline(TWIN)
    sampling = drawing.sampling_of(drawing.Asked(None, None, None, (), None), loaded)
    ours = drawing.draw_prompts(loaded, sampling)(captions, z) / 2 + 0.5
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(TWIN, variant="fp16", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        captions,
        guidance_scale=sampling.guidance_scale,
        latents=torch.from_numpy(z.transpose(0, 3, 1, 2)),
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    np.testing.assert_allclose(ours, theirs, atol=1 / 255)


def test_shipped_teacher_is_scored_on_the_prompts_and_with_the_reward_of_a_run():
    assert train.teacher_of(load_config("shapes_pixart"), held_out_prompts()) is not None
    teacher = train.teacher_of(load_config("shapes"), held_out_prompts())
    assert teacher is not None and teacher.images.dtype == np.uint8
    assert {"pickscore", "attributes right", "diversity"} < set(teacher.scores)
    other = load_config("shapes")
    other.weights.pickscore = str(SHIPPED / "text_encoder_2")
    assert train.teacher_of(other, held_out_prompts()) is None
    assert train.teacher_of(load_config("shapes"), held_out_prompts()[:9]) is None


def held_out_prompts():
    texts = (SHIPPED / "prompts_held_out.txt").read_text().splitlines()
    return [Prompt(row, text, {}) for row, text in enumerate(texts)]


@pytest.mark.long
def test_shipped_reward_shares_the_taste_and_reads_the_caption():
    from di_star_jax.pipelines import folder as pipeline
    from di_star_jax.prompts.tokens import Tokenizer
    from di_star_jax.rewards import similarity
    from di_star_jax.rewards.pixels import clip_pixels

    model = pipeline.load_model(SHIPPED / "reward")
    tokenizer = Tokenizer(SHIPPED / "tokenizer")
    rng = np.random.default_rng(4)
    drawn = [scenes.sample_scene(rng, held_out=True) for _ in range(128)]
    pairs = [taste.preference_pair(scene, rng) for scene in drawn]
    ids = tokenizer([scene.caption for scene in drawn])
    first, second = (
        similarity.cosine(
            model.graphdef,
            clip_pixels,
            model.params,
            jnp.stack([2.0 * pair[i] - 1.0 for pair in pairs]),
            ids,
        )
        for i in range(2)
    )
    prob = np.array([pair[2] for pair in pairs])
    clear = np.abs(prob - 0.5) > 0.3
    assert np.mean((first > second) == (prob > 0.5), where=clear) > 0.8


def test_scenes_in_the_taste_have_a_reward_that_an_aligned_generator_can_reach():
    """README's bounds: `python -m pytest -rP tests/test_shapes.py -k in_the_taste`."""
    from di_star_jax.rewards import load_rewards

    loaded = load_rewards({"pickscore": str(SHIPPED / "reward")}, str(SHIPPED / "tokenizer"))
    reward = loaded["pickscore"]
    captions = [prompt.text for prompt in held_out_prompts()[:100]]
    evaluate = jax.jit(reward.evaluate)

    def mean_reward(styles):
        rng = np.random.default_rng(0)
        images = [scenes.render(scenes.parse(c), rng, styles(rng)) for c in captions]
        scored = evaluate(reward.params, 2.0 * np.stack(images) - 1.0, reward.tokenize(captions))
        return float(np.mean(scored))

    def warm_from_above(rng):
        style = scenes.sample_style(rng)
        return dataclasses.replace(style, light=0.35, angle=-np.pi / 2, warmth=0.5)

    by_chance, best = mean_reward(scenes.sample_style), mean_reward(warm_from_above)
    print(f"reward of rendered scenes: light by chance {by_chance:.3f}, all the taste {best:.3f}")
    assert best > by_chance + 0.1


def few_steps(sizes):
    """All stages of a pre-training, two steps each."""
    stages = {
        name: dataclasses.replace(stage, steps=2, batch_size=4)
        for name, stage in vars(sizes).items()
        if hasattr(stage, "steps")
    }
    short = {"train.steps": 2, "train.save_every": 2, "data.batch_size": 8}
    return dataclasses.replace(sizes, images=16, pairs=48, reward=short, generator=short, **stages)


@pytest.mark.long
def test_the_twins_pretraining_makes_a_pipeline_of_its_own_and_a_second_start_changes_nothing(
    tmp_path,
):
    from di_star_jax import pretrain
    from di_star_jax.pipelines import folder as pipeline
    from di_star_jax.shapes.worlds import PIXART_WORLD

    small = {
        "denoiser": {"num_layers": 2, "num_attention_heads": 1, "cross_attention_dim": 32},
        "text_encoder": {"num_layers": 1, "d_ff": 32},
    }
    configs = {name: PIXART_WORLD.configs[name] | changes for name, changes in small.items()}
    world = dataclasses.replace(PIXART_WORLD, configs=configs)
    sizes = few_steps(pretrain.SIZES["pixart"])
    pretrain.make_twin(tmp_path, sizes, world)
    out = tmp_path / "checkpoint"
    written = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    loaded = pipeline.load_pipeline(out)
    assert loaded.family.name == "PixArt-alpha"
    teacher, generator = (
        pipeline.load_model(out / part).params for part in ("transformer", "generator")
    )
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), teacher, generator)
    assert any(jax.tree.leaves(differ))
    shipped = pipeline.load_model(SHIPPED / "vae").params
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(loaded.models["vae"].params), jax.tree.leaves(shipped), strict=True
        )
    )
    pretrain.make_twin(tmp_path, sizes, world)
    assert written == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.long
def test_pads_that_the_twins_training_leaves_out_change_no_prediction(tmp_path):
    from di_star_jax.prompts.t5 import T5Tokenizer
    from di_star_jax.shapes import networks, pretrain
    from di_star_jax.shapes.worlds import PIXART_WORLD, Reader, tokenized

    size = PIXART_WORLD.make_tokenizers(tmp_path)
    longest = max(
        (scenes.scene_at(i).caption for i in range(0, scenes.num_captions(), 97)), key=len
    )
    captions = [longest, "a red circle on a gray background"]
    cut = tokenized(PIXART_WORLD, tmp_path, captions)
    whole = T5Tokenizer(tmp_path / "tokenizer")
    assert cut.ids["tokenizer"].shape[1] < 20 and whole(captions).shape[1] == 120
    one_layer = {"num_layers": 1}
    made = {
        "text_encoder": pretrain.init(networks.T5 | one_layer | {"vocab_size": size}, 0),
        "denoiser": pretrain.init(networks.PIXART | one_layer, 0),
    }
    graphdefs = {name: network.graphdef for name, network in made.items()}
    params = {name: network.params for name, network in made.items()}
    x_t = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)

    def predictions(reader, token_ids):
        def predict(params, token_ids):
            denoiser = nnx.merge(graphdefs["denoiser"], params["denoiser"])
            conditions = reader.conditions(params, token_ids)
            return [denoiser(x_t, jnp.array([400, 9]), condition) for condition in conditions]

        return jax.jit(predict)(params, token_ids)

    with_pads = Reader(PIXART_WORLD, graphdefs, {"tokenizer": whole([""])})
    found = predictions(cut.reader(graphdefs), cut.ids)
    expected = predictions(with_pads, {"tokenizer": whole(captions)})
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    assert abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.long
def test_every_stage_of_the_pretraining_runs_and_a_second_start_changes_nothing(tmp_path):
    from di_star_jax import pretrain
    from di_star_jax.pipelines import folder as pipeline
    from di_star_jax.shapes import networks
    from di_star_jax.shapes.worlds import SDXL_WORLD

    one_level = {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "transformer_layers_per_block": [1],
        "attention_head_dim": [1],
    }
    # a fifth of the compiling
    configs = SDXL_WORLD.configs | {"denoiser": networks.UNET | one_level}
    world = dataclasses.replace(SDXL_WORLD, configs=configs)
    sizes = few_steps(pretrain.Sizes())
    pretrain.make(tmp_path, sizes, world)
    out = tmp_path / "checkpoint"
    written = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {*pipeline.load_pipeline(out).models} == {*pipeline.load_pipeline(SHIPPED).models}
    scored = {"teacher"}  # what the command adds
    assert {p.name for p in out.iterdir()} | scored == {p.name for p in SHIPPED.iterdir()}
    for part in ("unet", "generator", "vae", "text_encoder", "text_encoder_2", "clip", "reward"):
        made = pipeline.load_model(out / part)
        shipped = pipeline.load_model(SHIPPED / part)
        if part not in ("unet", "generator"):
            shapes = jax.tree.map(jnp.shape, (made.params, shipped.params))
            assert shapes[0] == shapes[1]
        assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(made.params))
    pretrain.make(tmp_path, sizes, world)
    assert written == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.case("first hour 7", "first hour 10")
def test_a_stage_that_was_interrupted_goes_on_and_ends_as_a_straight_one(tmp_path, capsys):
    from di_star_jax.shapes import pretrain

    stage = pretrain.Stage("vae", 250, 8, 1e-3, minutes=10)

    def run(folder, until):
        @jax.jit
        def update(state, batch, k):
            state = {"x": state["x"] * 0.9 + batch}
            return state, {"loss": state["x"]}

        def batch_at(k):
            if k == until:
                raise KeyboardInterrupt
            return jnp.float32(k)

        return pretrain.keep_training(folder, stage, {"x": jnp.zeros(())}, update, batch_at)["x"]

    straight = run(tmp_path / "straight", None)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 230)
    said = capsys.readouterr().out
    assert said.startswith("training vae: 250 steps, 10 minutes") and "compiling the step" in said
    np.testing.assert_array_equal(run(tmp_path / "stopped", None), straight)
    assert "training vae from step 200 on: 250 steps, 2 minutes" in capsys.readouterr().out
    shorter = dataclasses.replace(stage, steps=100)
    with pytest.raises(UserError, match="has done 250 steps, expected at most 100"):
        pretrain.keep_training(tmp_path / "straight", shorter, {"x": jnp.zeros(())}, None, None)


@pytest.mark.case("first hour 24")
def test_data_of_another_command_or_damaged_data_is_not_trained_on(tmp_path):
    images, captions = datasets.render_dataset(tmp_path, 5)
    again, same = datasets.render_dataset(tmp_path, 5)
    np.testing.assert_array_equal(images, again)
    assert captions == same and sorted(f.name for f in tmp_path.iterdir()) == [
        "captions.json",
        "images.npy",
    ]
    with pytest.raises(UserError, match="holds 5 scenes, expected 7"):
        datasets.render_dataset(tmp_path, 7)
    (tmp_path / "images.npy").write_bytes(b"half")
    with pytest.raises(UserError, match=r"images.npy is missing or damaged; delete .*made again"):
        datasets.render_dataset(tmp_path, 5)
    datasets.render_dataset(tmp_path / "other", 3)
    (tmp_path / "other" / "captions.json").write_text('["a')
    with pytest.raises(UserError, match=r"captions.json is damaged; delete it"):
        datasets.render_dataset(tmp_path / "other", 3)


@pytest.mark.case("first hour 24")
def test_pretraining_in_a_folder_that_cannot_be_is_refused_in_one_line(monkeypatch, tmp_path):
    from di_star_jax import pretrain

    (tmp_path / "file").touch()
    given = SimpleNamespace(workdir=str(tmp_path / "file"))
    monkeypatch.setattr(pretrain, "flags", SimpleNamespace(FLAGS=given))
    with pytest.raises(UserError, match="^workdir=.* is a file, expected a folder"):
        pretrain.main()
