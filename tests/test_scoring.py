# SPDX-License-Identifier: Apache-2.0
"""Scores that are kept while they come, and files that are read as images."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_config import ROOT

from di_star_jax.errors import UserError
from di_star_jax.evaluation import images, results, scores
from di_star_jax.evaluation.features import Features, features_of
from di_star_jax.evaluation.images import Shot, missing_from
from di_star_jax.evaluation.scores import params_digest
from di_star_jax.evaluation.store import Store
from di_star_jax.storage.images import images_in, read_image

PLACES = [(p, k) for p in range(2) for k in range(3)]


def test_what_is_added_is_there_again_and_what_is_not_finite_is_missing(tmp_path):
    shots = [Shot(p, k, "", Path()) for p, k in PLACES]
    with Store(tmp_path / "store", (2, 3)) as store:
        store.add_scores("metric", PLACES[:3], [0.1, 0.2, 1 / 3])
        store.add_scores("other", PLACES, np.arange(6))
    with Store(tmp_path / "store", (2, 3)) as store:
        assert missing_from(store.scores("metric"), shots) == shots[3:]
        store.add_scores("metric", PLACES[2:], np.array([1 / 3, 4, np.nan, 5]))
    with Store(tmp_path / "store", (2, 3)) as store:
        assert missing_from(store.scores("metric"), shots) == [shots[4]]
        expected = [[0.1, 0.2, 1 / 3], [4, np.nan, 5]]
        assert np.array_equal(store.scores("metric"), expected, equal_nan=True)
        assert store.holds_other_than("metric") and store.distance("fid") is None
        store.clear()
        assert not store.holds_other_than("nothing")
        store.add_distance("fid", 1 / 3, "note")
        assert store.distance("fid") == (1 / 3, "note") and store.holds_other_than("metric")


def test_a_process_killed_in_a_batch_leaves_the_batches_before_it_whole(tmp_path):
    count = 20_000  # more than SQLite holds back in memory
    script = f"""
import os, signal
from di_star_jax.evaluation.store import Store
from di_star_jax.storage.images import images_in, read_image
places = [(p, 0) for p in range({count})]
store = Store("store", ({count}, 1))
store._connection.execute("PRAGMA cache_size = 1")
store.add_scores("metric", places[:5], [1.0] * 5)
def values():
    yield from [2.0] * ({count} - 1)
    os.kill(os.getpid(), signal.SIGKILL)
store.add_scores("metric", places, values())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "store-journal").exists()  # it was in the middle of writing
    with Store(tmp_path / "store", (count, 1)) as store:
        found = store.scores("metric")[:, 0]
        assert (found[:5] == 1.0).all() and np.isnan(found[5:]).all()
        store.add_scores("metric", [(7, 0)], [3.0])
        assert store.scores("metric")[7, 0] == 3.0


def test_features_are_computed_for_what_has_none_and_of_broken_images_there_are_none(tmp_path):
    seen = []

    def embed(batch):
        seen.append(len(batch))
        return np.repeat(batch[:, 0, 0, :1] / np.float32(255), 4, axis=1)

    model = Features("name", "digest", 4, 2, embed)
    shots = [Shot(p, k, "", tmp_path / f"{p}_{k}.png") for p in range(3) for k in range(2)]
    for i, shot in enumerate(shots[:-1]):  # the last is missing
        Image.new("RGB", (3, 3), (i, 0, 0)).save(shot.file)
    with Store(tmp_path / "store", (3, 2)) as store:
        found = features_of(shots[:3], store, model)
        assert seen == [2, 1] and np.isnan(found[[1, 2, 2], [1, 0, 1]]).all()
        found = features_of(shots, store, model)
        assert found.dtype == np.float32 and seen == [2, 1, 2]
        expected = np.array([[0, 1], [2, 3], [4, np.nan]]) / 255
        assert np.allclose(found[..., 0], expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_is_an_image_or_none_and_never_an_error(tmp_path, kind):
    rng, buffer, file = np.random.default_rng(0), io.BytesIO(), tmp_path / "image"
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, kind)
    found = []
    for i in range(300):
        data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        data[rng.integers(0, min(len(data), 80 if i % 2 else len(data)), 3)] = rng.integers(
            0, 256, 3
        )
        file.write_bytes(data[: rng.integers(0, len(data)) if i % 3 == 0 else None].tobytes())
        found.append(read_image(file))
    assert any(image is None for image in found) and any(image is not None for image in found)
    assert all(
        image is None or (image.dtype == np.uint8 and image.shape[2] == 3) for image in found
    )


def test_names_with_all_kinds_of_digits_are_in_natural_order(tmp_path):
    names = ["2.png", "10.PNG", "a/1.jpg", "²3.webp", "²20.webp"]
    for name in [*names, "a/notes.txt", "b.gif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in images_in(tmp_path)] == names


def test_images_of_different_sizes_come_in_batches_of_one_size_and_none_is_lost(tmp_path):
    shots = []
    for i in range(23):
        size = (4, 4) if i % 3 else (8, 4)
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
        shots.append(Shot(i, 0, "", tmp_path / f"{i}.png"))
    (tmp_path / "7.png").write_text("a text")
    seen = []
    for part, batch in images.batches(shots, 4):
        assert len(part) <= 4
        if batch is None:
            assert [shot.prompt for shot in part] == [7]
        else:
            assert batch.shape[0] == len(part) and batch[:, 0, 0, 0].tolist() == [
                shot.prompt for shot in part
            ]
        seen += [shot.prompt for shot in part]
    assert sorted(seen) == list(range(23))


def test_the_digest_of_parameters_knows_names_values_and_types_and_not_where_they_are():
    params = {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.float32(1)}
    digest = params_digest(params)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(
        params["a"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    assert params_digest(params | {"a": split}) == digest
    changed = params["a"].copy()
    changed[7, 1] += 1
    others = [
        params | {"a": changed},
        {"c": params["a"], "b": params["b"]},
        params | {"a": params["a"].reshape(2, 8)},
        params | {"b": jax.numpy.bfloat16(1)},
    ]
    assert len({digest, *map(params_digest, others)}) == 5


def test_the_oracle_refuses_images_of_another_size():
    with pytest.raises(
        UserError, match="x.png has 32 x 48 pixels, the oracle reads images of 64 x 64"
    ):
        scores.by_oracle(
            [Shot(0, 0, "a red circle", Path("x.png"))], np.zeros((1, 48, 32, 3), np.uint8)
        )


@pytest.mark.parametrize("broken", ["scores.parquet", "results.json"])
def test_a_damaged_evaluation_is_no_baseline(tmp_path, broken):
    (tmp_path / "results.json").write_text('{"settings": {"samples": 1}, "metrics": {}}')
    (tmp_path / broken).write_text("{")
    with pytest.raises(UserError, match="holds no readable evaluation .*; run it again") as error:
        results.read(tmp_path)
    assert "\n" not in str(error.value)
