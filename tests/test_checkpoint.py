# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a small state: restarts, partial reads, other devices, and wrong input."""

import os
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from di_star_jax import __version__
from di_star_jax.errors import UserError
from di_star_jax.storage import checkpoint, folders


class State(NamedTuple):
    step: Any
    generator: Any
    assistant: Any
    ema: Any
    opt_generator: Any


def _params(seed: int, width: int = 4):
    """Parameters with the int keys of module lists, more than ten of them: their order as strings
    is another.
    """
    keys = jax.random.split(jax.random.key(seed), 12)
    return {
        "blocks": {i: {"kernel": jax.random.normal(key, (8, width))} for i, key in enumerate(keys)}
    }


def _state(seed: int = 0, width: int = 4) -> State:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    generator = _params(seed, width)
    _, moments = optimizer.update(_params(seed + 9, width), optimizer.init(generator), generator)
    return State(
        jnp.int32(7 + seed), generator, _params(seed + 1, width), _params(seed + 2, width), moments
    )


def _abstract(state):
    return jax.eval_shape(lambda: state)


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _error(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """A folder with one state at step 7."""
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(
            7, _state(), {"denoiser_config": {"widths": [1, 2]}, "reference": "folder"}
        )
    return tmp_path / "checkpoints"


def test_a_state_comes_back_bit_for_bit_with_its_metadata(saved):
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7
        _assert_same(checkpoints.restore(7, _abstract(_state())), _state())
        metadata = checkpoints.metadata(7)
    assert metadata == {"denoiser_config": {"widths": [1, 2]}, "reference": "folder"}


def test_what_earlier_versions_called_unet_is_found(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, _state(), {"unet_config": {"widths": [1]}, "reference": "folder"})
    with checkpoint.existing(tmp_path) as checkpoints:
        assert checkpoints.metadata(7) == {
            "denoiser_config": {"widths": [1]},
            "reference": "folder",
        }


def test_one_network_is_read_without_the_rest_of_the_state(saved):
    for field in ("opt_generator", "assistant"):  # not even there
        (saved / "7" / field).rename(saved.parent / field)
    checkpoints = checkpoint.existing(saved.parent)  # the workdir will do
    for name in ("generator", "ema"):
        _assert_same(
            checkpoints.restore_item(7, name, _abstract(_params(0))), getattr(_state(), name)
        )


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"generator": _params(step)}, {})
        checkpoints.save(3, {"generator": _params(0)}, {})
    checkpoints = checkpoint.existing(tmp_path)
    assert checkpoints.latest_step() == 3
    _assert_same(checkpoints.restore_item(3, "generator", _abstract(_params(3))), _params(3))
    assert "there are [2, 3]" in _error(checkpoints.metadata, 1)


def test_buffers_may_be_donated_while_they_are_being_written(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1500, 1000))
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        for i in range(4):
            checkpoints.save(i, {"generator": {"w": x}}, {})
            for _ in range(3):
                x = step(x)
    checkpoints = checkpoint.existing(tmp_path)
    abstract = {"w": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    for i in range(4):
        w = checkpoints.restore_item(i, "generator", abstract)["w"]
        assert (float(w.min()), float(w.max())) == (3 * i, 3 * i)


SAVE_ON_8 = """
import sys, jax
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[2])
from test_checkpoint import _state
from di_star_jax.storage.checkpoint import Checkpoints
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
split = lambda x: jax.device_put(x, NamedSharding(mesh, P(*["fsdp"][:x.ndim])))
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(7, jax.tree.map(split, _state()), {})
"""


def test_a_state_saved_on_eight_devices_is_restored_on_one(tmp_path):
    # With conftest's XLA_FLAGS: the compiler's other levels round the state's numbers otherwise.
    subprocess.run(
        [sys.executable, "-c", SAVE_ON_8, str(tmp_path), os.path.dirname(__file__)], check=True
    )
    checkpoints = checkpoint.existing(tmp_path)
    state = checkpoints.restore(7, _abstract(_state()))
    _assert_same(state, _state())
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(state))


def test_a_checkpoint_that_was_not_finished_is_not_seen(saved):
    (saved / "7").rename(saved / "8.orbax-checkpoint-tmp-3")  # what Orbax leaves when it is killed
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert "no checkpoint in" in _error(checkpoint.existing, saved)
        checkpoints.save(8, _state(1), {})
    restored = checkpoint.existing(saved).restore(8, _abstract(_state()))
    _assert_same(restored, _state(1))


def test_what_was_saved_before_an_error_is_on_disk_after_it(tmp_path):
    with (
        pytest.raises(UserError, match="stop"),
        checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints,
    ):
        checkpoints.save(4, {"generator": _params(4)}, {})
        raise UserError("stop")
    restored = checkpoint.existing(tmp_path).restore_item(4, "generator", _abstract(_params(4)))
    _assert_same(restored, _params(4))


def test_a_state_of_another_model_is_refused_with_the_first_ten_differences(saved):
    checkpoints = checkpoint.existing(saved)
    message = _error(checkpoints.restore_item, 7, "ema", _abstract(_params(0, width=6)))
    assert "0 arrays missing, 0 extra, 12 of the wrong shape; first 10" in message
    assert "ema/blocks/0/kernel is [8, 4], expected [8, 6]" in message
    stranger = {"blocks": {0: {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    message = _error(checkpoints.restore_item, 7, "ema", stranger)
    assert "1 arrays missing, 12 extra" in message and "missing ema/blocks/0/bias" in message
    assert "has no 'reward', it has ['assistant'" in _error(
        checkpoints.restore_item, 7, "reward", stranger
    )
    assert "no checkpoint of step 9" in _error(checkpoints.restore, 9, _abstract(_state()))


def test_folders_without_checkpoints_are_refused(tmp_path):
    assert "no checkpoint in" in _error(checkpoint.existing, tmp_path)
    assert "no folder" in _error(checkpoint.existing, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").touch()
    assert "cannot write checkpoints" in _error(checkpoint.Checkpoints, tmp_path / "file" / "x", 1)
    assert "cannot write checkpoints" in _error(checkpoint.Checkpoints, tmp_path / "file", 1)


@pytest.mark.case("faults 4")
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_it_is_written(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root")
    try:
        with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
            state = {"generator": {"w": jnp.zeros((1000, 1000))}}
            message = _error(checkpoints.save, 1, state, {})
            assert "disk full at" in message and "a checkpoint takes 5.2 MB, 2.1 MB are" in message
            checkpoints.check_room({"w": jnp.zeros(10)})
            assert checkpoints.latest_step() is None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.case("faults 2")
@pytest.mark.parametrize("name", ["x[1]", "a*", "b?"])
def test_a_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path, name):
    assert "cannot be read back from" in _error(checkpoint.Checkpoints, tmp_path / name, 1)
    assert not (tmp_path / name).exists()


def _strange(folder):
    """Puts beside a run's checkpoints what is none. Returns: the steps that they seem to be of."""
    (folder / "8").mkdir()  # empty
    (folder / "9").mkdir()
    (folder / "9" / "file").touch()  # foreign
    shutil.copytree(folder / "7", folder / "10")  # by hand: of another step
    shutil.copytree(folder / "7", folder / "11")
    shutil.rmtree(folder / "11" / "ema")  # cut short
    return ("8", "9", "10", "11")


@pytest.mark.case("faults 29")
def test_a_newest_folder_that_is_no_checkpoint_is_skipped_with_a_warning(saved, caplog):
    _strange(saved)
    shutil.rmtree(saved / "11")  # who reads one network does not ask for the others
    with checkpoint.existing(saved) as checkpoints:
        assert checkpoints.latest_step() == 7
        _assert_same(checkpoints.restore_item(7, "ema", _abstract(_params(2))), _params(2))
    for name in ("8", "9", "10"):
        assert f"{saved}/{name} is no checkpoint; skipped" in caplog.text
    assert sorted(os.listdir(saved)) == ["10", "7", "8", "9"], "nothing is changed"


@pytest.mark.case("faults 29")
def test_before_a_run_saves_leftovers_are_removed_and_what_is_strange_is_set_aside(saved, caplog):
    strange = _strange(saved)
    shutil.copytree(saved / "7", saved / "77.orbax-checkpoint-tmp-1234")
    (saved / "notes.txt").touch()
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.tidy(State._fields)
        assert checkpoints.latest_step() == 7
        assert f"{saved}/77.orbax-checkpoint-tmp-1234 is what a killed save left" in caplog.text
        aside = {f"{name}.set-aside" for name in strange}
        assert set(os.listdir(saved)) == {"7", "notes.txt"} | aside
        assert (saved / "9.set-aside" / "file").exists()
        for step in (8, 9):
            checkpoints.save(step, _state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [8, 9], "the strange ones do not count as the newest"
    _assert_same(checkpoint.existing(saved).restore(9, _abstract(_state(9))), _state(9))


@pytest.mark.parametrize("lost", ["ema", "metadata"])
def test_a_checkpoint_of_its_own_step_that_has_lost_a_part_is_not_gone_on_from(saved, lost):
    shutil.rmtree(saved / "7" / lost)
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.tidy(State._fields)
        assert checkpoints.latest_step() is None
    assert (saved / "7.set-aside").is_dir()


def test_a_reference_with_other_weights_than_the_run_began_with_is_refused(tmp_path):
    (tmp_path / "unet").mkdir(parents=True)
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"weights")
    now = folders.digest(tmp_path)
    for known in ({"digest": now, "version": "0.2.0"}, {}):  # of an older version
        metadata = {"reference": str(tmp_path)} | known
        assert checkpoint.reference_of(metadata, None) == tmp_path
    other = {"reference": str(tmp_path), "digest": "0123", "version": "0.2.0"}
    assert "other weights than when the run began; give those it had with --ref" in _error(
        checkpoint.reference_of, other, None
    )
    assert checkpoint.reference_of(other, str(tmp_path)) == tmp_path


@pytest.mark.parametrize("known", [{"digest": "0123", "version": "0.9.0"}, {"version": "0.9.0"}])
def test_a_checkpoint_of_another_shapes_world_is_refused_with_both_versions(known):
    shipped = folders.SHIPPED / "shapes" / "checkpoint"
    said = _error(checkpoint.reference_of, {"reference": str(shipped)} | known, None)
    assert f"shapes world of di_star_jax 0.9.0, this is {__version__}" in said
