# SPDX-License-Identifier: Apache-2.0
"""The T5 encoder against transformers with random weights, and at full size without allocating
anything.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from parity import FORWARD, GRADIENT, relative
from transformers.models.t5.modeling_t5 import T5Attention

from di_star_jax import models, sharding
from di_star_jax.errors import UserError
from di_star_jax.models import published, t5
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import weights

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
CHOSEN = (
    BIAS,
    "shared.weight",
    "encoder.block.0.layer.0.layer_norm.weight",
    "encoder.block.2.layer.1.DenseReluDense.wi_0.weight",
)
# As published, but small; heads whose widths together are not the model's, as T5's may be.
TINY = published.T5_XXL | {
    "vocab_size": 99,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 3,
    "num_heads": 4,
}
LENGTHS = (120, 1, 37)  # of prompts, in tokens


@functools.cache
def _reference():
    """Nothing is left at zero or one, and attention is neither flat nor one key's alone."""
    config = transformers.T5Config(**{k: v for k, v in TINY.items() if k != "architectures"})
    model = transformers.T5EncoderModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.2 * noise
            elif name != BIAS and "shared" not in name:
                noise = noise / math.sqrt(p.shape[1])
            if ".q." in name:
                noise = noise / 2
            p.copy_(noise)
    return model.eval()


@functools.cache
def _port(dtype=jnp.float32, remat="none"):
    config = t5.T5Config.from_json(TINY)
    graphdef, tree = models.abstract(
        lambda rngs: t5.T5EncoderModel(config, rngs=rngs, dtype=dtype, remat=remat)
    )
    tensors = {name: p.detach().numpy() for name, p in _reference().state_dict().items()}
    return graphdef, weights.params_from_tensors(tensors, tree)


def _prompts(batch):
    """Token ids and mask of prompts of LENGTHS, padded to 120."""
    ids = np.random.default_rng(0).integers(3, 99, (batch, 120)).astype(np.int32)
    for row, length in zip(ids, LENGTHS):
        row[length - 1] = 1
        row[length:] = 0
    return ids, (ids != 0)


@pytest.mark.parametrize("batch, remat", [(1, "full"), (3, "none")])
def test_encoder_equals_transformers(batch, remat):
    graphdef, params = _port(remat=remat)
    reference = _reference()
    ids, mask = _prompts(batch)
    reference.zero_grad()
    expected = reference(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    cotangent = np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    (expected * torch.from_numpy(cotangent)).sum().backward()

    def loss(params):
        states = nnx.merge(graphdef, params)(ids, mask)
        return jnp.sum(states * cotangent), states

    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params)
    assert ("remat" in str(traced.jaxpr)) == (remat == "full")
    grads, states = traced.lower().compile()(params)
    ours = weights.tensors_from_params(grads)
    theirs = dict(reference.named_parameters())
    forward = relative(states, expected.detach())
    gradients = {name: relative(ours[name], theirs[name].grad) for name in CHOSEN}
    print("T5EncoderModel", batch, f"forward={forward:.1e}", gradients)  # `pytest -rP`
    assert forward <= FORWARD
    assert max(gradients.values()) <= GRADIENT


def test_padding_changes_nothing_where_a_prompt_has_tokens():
    graphdef, params = _port()
    ids, mask = _prompts(3)
    run = jax.jit(lambda ids, mask: nnx.merge(graphdef, params)(ids, mask))
    padded = run(ids, mask)
    length = LENGTHS[2]
    short = run(ids[2:, :length], mask[2:, :length])
    assert relative(padded[2:, :length], short) <= FORWARD
    assert np.abs(padded[2, length:]).max() > 0.1, "pads have states, so the next network masks"


def test_the_mask_of_token_ids_ends_with_the_prompt():
    spelled_pad = [5, 0, 7, 1, 0, 0]  # of a prompt that says '<pad>', a token like others
    ids = jnp.array([[5, 6, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], spelled_pad, [2, 3, 4, 5, 6, 1]])
    expected = [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(t5.mask_of(ids), np.array(expected, bool))
    assert t5.mask_of(ids).dtype == bool


@pytest.mark.parametrize("count, furthest", [(32, 128), (8, 20)])
def test_buckets_are_those_of_transformers(count, furthest):
    distances = np.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), True, count, furthest
    )
    np.testing.assert_array_equal(t5.relative_buckets(distances, count, furthest), expected.numpy())


def test_buckets_begin_where_t5s_do():
    """Three of the edges are powers of two, where the logarithm is a whole number of buckets."""
    firsts = {8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31}
    for first, bucket in firsts.items():
        found = t5.relative_buckets(np.array([first - 1, first, -first, 1 - first]), 32, 128)
        np.testing.assert_array_equal(found, [bucket - 1, bucket, bucket - 16, bucket - 17])
    assert t5.relative_buckets(np.array([0, 1, -1]), 32, 128).tolist() == [0, 17, 1]


def test_bfloat16_is_near_and_float16_is_refused():
    graphdef, params = _port()
    half, _ = _port(jnp.bfloat16)
    ids, mask = _prompts(3)
    run = jax.jit(lambda graphdef: nnx.merge(graphdef, params)(ids, mask), static_argnums=0)
    full, low = run(graphdef), run(half)
    assert low.dtype == jnp.bfloat16
    assert relative(low.astype(jnp.float32), full) < 0.05
    with pytest.raises(UserError, match="T5 encoder in float16 would overflow") as error:
        pipeline.abstract_model(TINY, pipeline.Options(dtype=jnp.float16))
    assert "\n" not in str(error.value)


def test_weights_that_are_split_over_devices_give_the_same(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    graphdef, params = _port()
    ids = _prompts(3)[0][[0, 1, 2, 0, 1, 2, 0, 1], :40]
    mesh = sharding.make_mesh(2, 4)
    specs = sharding.params_spec(mesh, params)
    split = sum(bool(spec) for spec in jax.tree.leaves(specs))
    assert split == len(jax.tree.leaves(params))

    def encode(params, ids):
        return nnx.merge(graphdef, params)(ids, t5.mask_of(ids))

    batch = sharding.batch_spec()
    spread = sharding.on_each(mesh, encode, (specs, batch), batch)
    assert relative(jax.jit(spread)(params, ids), jax.jit(encode)(params, ids)) <= FORWARD


# Files.


@pytest.fixture
def written(tmp_path):
    """What transformers writes, in several shards."""
    _reference().save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    return tmp_path / "theirs"


def _same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_weights_pass_both_ways_to_the_last_bit(written, tmp_path, monkeypatch):
    assert len(list(written.glob("*.safetensors"))) > 2
    config = pipeline.read_config(written)
    model = pipeline.load_model(written)
    _same(model.params, _port()[1])
    monkeypatch.setattr(weights, "MAX_SHARD", 50_000)
    weights.save(tmp_path / "ours", model.params, config=config, file_name="model.safetensors")
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours")
    expected = _reference().state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_embedding_is_read_under_either_name_or_both(written, tmp_path):
    tensors = weights.tensors_from_params(_port()[1])
    shared = tensors.pop("shared.weight")
    (tmp_path / "config.json").write_text((written / "config.json").read_text())
    for names in (
        ["encoder.embed_tokens.weight"],
        ["shared.weight", "encoder.embed_tokens.weight"],
    ):
        safetensors.numpy.save_file(
            tensors | {name: shared.copy() for name in names}, tmp_path / "model.safetensors"
        )
        _same(pipeline.load_model(tmp_path).params, _port()[1])
    other = tensors | {"shared.weight": shared, "encoder.embed_tokens.weight": shared + 1}
    safetensors.numpy.save_file(other, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="one parameter of the model, with other values") as error:
        pipeline.load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_the_tree_has_blocks_stacked_and_the_bias_beside_them():
    _, params = _port()
    encoder = params["encoder"]
    assert encoder["relative_attention_bias"]["embedding"].shape == (32, 4)
    assert encoder["block"]["layer"][0]["SelfAttention"]["q"]["kernel"].shape == (3, 48, 64)
    assert encoder["block"]["layer"][1]["DenseReluDense"]["wo"]["kernel"].shape == (3, 80, 48)


# Settings.


def test_full_size_has_the_published_parameter_count_and_traces():
    model = pipeline.abstract_model(published.T5_XXL, pipeline.Options(dtype=jnp.bfloat16))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(model.params)) == 4_762_310_656
    ids = jax.ShapeDtypeStruct((2, 120), jnp.int32)
    states = jax.eval_shape(
        lambda p, ids: nnx.merge(model.graphdef, p)(ids, t5.mask_of(ids)), model.params, ids
    )
    assert states.shape == (2, 120, 4096) and states.dtype == jnp.bfloat16


# Every field of the config.json of PixArt's text_encoder.
HUBS = published.T5_XXL | {
    "_name_or_path": "google/t5-v1_1-xxl",
    "classifier_dropout": 0.0,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "num_decoder_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.21.1",
    "use_cache": True,
}


def test_published_and_written_configs_are_read():
    expected = t5.T5Config.from_json(published.T5_XXL)
    assert t5.T5Config.from_json(HUBS) == expected
    theirs = transformers.T5Config(**{k: v for k, v in HUBS.items() if k != "torch_dtype"})
    assert t5.T5Config.from_json(theirs.to_dict()) == expected


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    reference = transformers.T5Config(feed_forward_proj="gated-gelu").to_dict()
    built = dataclasses.asdict(t5.T5Config.from_json({"feed_forward_proj": "gated-gelu"}))
    assert built == {name: reference[name] for name in built}
    assert t5.T5Config().feed_forward_proj == transformers.T5Config().feed_forward_proj


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu', the port implements 'gated-g"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu', the port"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn='gelu', the port implements 'gelu_new' only"),
        ({"model_type": "umt5"}, "has model_type='umt5', expected 't5'"),
        ({"pad_token_id": 1}, "pad_token_id=1, the port implements 0 only"),
        ({"relative_attention_num_buckets": 2}, "num_buckets=2, expected 4..1024"),
        ({"relative_attention_max_distance": 8}, "max_distance=8, expected more than the 8"),
        ({"num_layers": 5000}, "num_layers=5000, expected an integer in 1..1024"),
        ({"surprise": 1}, "surprise=1, a field that the port does not know"),
    ],
)
def test_a_config_the_port_does_not_implement_is_refused_in_one_line(changed, message):
    with pytest.raises(UserError, match=message) as error:
        t5.T5Config.from_json(TINY | changed)
    assert "\n" not in str(error.value)
