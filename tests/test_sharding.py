# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines import folder as pipeline

MEGABYTE = 2**20


@pytest.mark.parametrize(
    "config",
    [
        published.UNET_SDXL,
        published.VAE_SDXL,
        published.PIXART_1024,
        published.CLIP_BIGG_TEXT,
        published.CLIP_H14,
        published.T5_XXL,
    ],
    ids=["unet", "vae", "pixart", "bigG", "pickscore", "t5"],
)
@pytest.mark.parametrize("fsdp", [pytest.param(8, marks=pytest.mark.long), 16])
def test_no_leaf_over_a_megabyte_is_replicated_at_full_size(config, fsdp):
    mesh = AbstractMesh((1, fsdp, 1), sharding.AXES)
    tree = pipeline.abstract_model(config).params
    shardings = sharding.params_sharding(mesh, tree)
    for (path, leaf), split in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings)
    ):
        if 4 * math.prod(leaf.shape) > MEGABYTE:
            assert math.prod(split.shard_shape(leaf.shape)) * fsdp == math.prod(leaf.shape), (
                jax.tree_util.keystr(path)
            )


def test_mesh_fills_in_what_is_left_and_refuses_what_does_not_fit():
    assert sharding.make_mesh(-1, 4).shape == {"data": 2, "fsdp": 4, "context": 1}
    assert sharding.make_mesh(8, -1).shape == {"data": 8, "fsdp": 1, "context": 1}
    assert sharding.make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "context": 2}
    with pytest.raises(UserError, match="data=-1 x fsdp=3 does not make up the 8 devices"):
        sharding.make_mesh(-1, 3)


def spec(shape, fsdp):
    tree = jax.ShapeDtypeStruct(shape, "float32")
    return tuple(sharding.params_sharding(AbstractMesh((1, fsdp, 1), sharding.AXES), tree).spec)


def test_scanned_blocks_are_split_inside_and_not_by_depth():
    assert spec((2048, 1024, 64), 8) == (None, sharding.PARAMS, None)
    assert spec((640, 2048), 8) == (None, sharding.PARAMS)
    assert spec((4096, 320), 8) == (sharding.PARAMS, None)


def test_small_leaves_stay_whole_and_a_large_one_that_cannot_be_split_is_refused():
    assert spec((1280,), 8) == ()
    assert spec((300, 301), 16) == ()
    with pytest.raises(
        UserError,
        match="mesh.fsdp x mesh.context = 7 divides no axis of .*"
        r"with shape \(640, 640\); use a power",
    ):
        spec((640, 640), 7)


def test_moments_are_split_like_their_parameters():
    params = {"down": {0: {"kernel": jax.ShapeDtypeStruct((1280, 5120), "float32")}}}
    mesh = AbstractMesh((2, 4, 1), sharding.AXES)
    moments = jax.eval_shape(optax.adam(1e-3).init, params)
    split = sharding.params_sharding(mesh, moments)
    assert split[0].mu == split[0].nu == sharding.params_sharding(mesh, params)


def test_a_gathered_parameters_gradient_is_the_sum_of_rounded_shares_and_not_rounded_again():
    mesh = sharding.make_mesh(1, 4, 2)
    shares = 1.0 + np.arange(8 * 16 * 24).reshape(8, 16, 24) % 97 / 2**6
    weights = np.zeros((16, 24), np.float32)

    def gradient(part, share):
        _, pull_back = jax.vjp(lambda w: sharding.gather_param(w, (16, 24), jnp.bfloat16), part)
        return pull_back(share[0].astype(jnp.bfloat16))[0]

    for split in (PartitionSpec(sharding.PARAMS), PartitionSpec(None, sharding.PARAMS)):
        of = sharding.on_each(mesh, gradient, (split, PartitionSpec(sharding.PARAMS)), split)
        found = jax.jit(of)(weights, shares)
        rounded = np.asarray(jnp.asarray(shares).astype(jnp.bfloat16), np.float64)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(found, np.float64), rounded.sum(0))


def test_batch_is_split_over_all_devices():
    mesh = sharding.make_mesh(2, 4)
    assert sharding.batch_sharding(mesh).shard_shape((16, 77)) == (2, 77)


def test_a_process_places_its_own_rows_in_the_order_of_the_batch():
    mesh = sharding.make_mesh(2, 2, 2)
    ids = np.arange(16 * 3).reshape(16, 3)
    rows = sharding.local_rows(mesh, 16)
    assert rows == list(range(16))  # this one process has all devices
    placed = sharding.place_batch({"ids": ids[rows]}, mesh, 16)["ids"]
    assert placed.sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(placed, ids)
    for shard in placed.addressable_shards:
        of_device = sharding.local_rows(mesh, 16, [shard.device])
        np.testing.assert_array_equal(shard.data, ids[of_device])


def test_devices_of_one_context_need_the_same_rows_and_others_rows_are_left_out():
    mesh = sharding.make_mesh(2, 2, 2)
    first, second = list(mesh.devices[0, 0]), list(mesh.devices[1, 1])
    assert sharding.local_rows(mesh, 8, first[:1]) == sharding.local_rows(mesh, 8, first) == [0, 1]
    assert sharding.local_rows(mesh, 8, [second[0], first[1]]) == [0, 1, 6, 7]


def test_a_tree_is_made_abstract_with_a_sharding_a_leaf_or_one_for_all():
    mesh = sharding.make_mesh(1, 8)
    tree = {"a": np.zeros((512, 256), np.float32), "b": {"c": np.zeros(3, np.int32)}}
    bare = sharding.abstract(tree)
    assert bare["b"]["c"] == jax.ShapeDtypeStruct((3,), np.int32)
    assert bare["a"].sharding is None
    split = sharding.abstract(tree, sharding.params_sharding(mesh, tree), dtype="bfloat16")
    assert [(x.shape, x.dtype, x.sharding.spec) for x in jax.tree.leaves(split)] == [
        ((512, 256), "bfloat16", PartitionSpec(sharding.PARAMS, None)),
        ((3,), "bfloat16", PartitionSpec()),
    ]
    everywhere = sharding.abstract(tree, sharding.replicated(mesh))
    assert {x.sharding for x in jax.tree.leaves(everywhere)} == {sharding.replicated(mesh)}


class Device(NamedTuple):
    """Of a slice; what a mesh of several slices is made from, without their compiler."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices_of(*sizes):
    numbers = [index for index, size in enumerate(sizes) for _ in range(size)]
    return [Device(i, number) for i, number in enumerate(numbers)]


@pytest.mark.parametrize(
    "sizes, mesh, message",
    [
        ((4, 8), (-1, 4, 1), "the slices have 4, 8 devices, expected slices of one size"),
        ((4, 4), (1, 8, 1), "mesh fsdp=8 x context=1 does not fit in a slice of 4 devices, of wh"),
        ((4, 4), (1, 4, 2), "mesh fsdp=4 x context=2 does not fit in a slice of 4 devices, of wh"),
    ],
)
def test_slices_that_parameters_would_have_to_cross_are_refused(sizes, mesh, message):
    data, fsdp, context = mesh
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sharding.make_mesh(data, fsdp, context, devices=slices_of(*sizes))
    assert "\n" not in str(error.value)


def test_gpus_of_several_hosts_are_one_slice():
    gpus = [Device(i, i // 8, "gpu", "NVIDIA H100") for i in range(16)]
    assert sharding.slice_sizes(gpus) == [16]
    assert sharding.slice_sizes(slices_of(4, 4)) == [4, 4]
