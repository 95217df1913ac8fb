# SPDX-License-Identifier: Apache-2.0
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from di_star_jax import pipeline, sharding
from di_star_jax.config import UserError
from di_star_jax.models import published

MEGABYTE = 2**20


@pytest.mark.parametrize("config", [published.UNET_SDXL, published.VAE_SDXL, published.CLIP_BIGG_TEXT,
                                    published.PICKSCORE], ids=["unet", "vae", "bigG", "pickscore"])
@pytest.mark.parametrize("fsdp", [8, 16])
def test_no_leaf_over_a_megabyte_is_replicated_at_full_size(config, fsdp):
    mesh = AbstractMesh((1, fsdp), ("data", "fsdp"))
    tree = pipeline.abstract_model(config).params
    shardings = sharding.params_sharding(mesh, tree)
    for (path, leaf), split in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings)):
        if 4 * math.prod(leaf.shape) > MEGABYTE:
            assert math.prod(split.shard_shape(leaf.shape)) * fsdp == math.prod(leaf.shape), jax.tree_util.keystr(path)


def test_mesh_fills_in_what_is_left_and_refuses_what_does_not_fit():
    assert sharding.make_mesh(-1, 4).shape == {"data": 2, "fsdp": 4}
    assert sharding.make_mesh(8, -1).shape == {"data": 8, "fsdp": 1}
    with pytest.raises(UserError, match="data=-1 x fsdp=3 does not make up the 8 devices"):
        sharding.make_mesh(-1, 3)


def test_batch_is_split_over_all_devices():
    mesh = sharding.make_mesh(2, 4)
    assert sharding.batch_sharding(mesh).shard_shape((16, 77)) == (2, 77)
