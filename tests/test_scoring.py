# SPDX-License-Identifier: Apache-2.0
"""Scores that are kept while they come, and files that are read as images."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.evaluation import results
from di_star_jax.evaluation import scores as scoring
from di_star_jax.evaluation.scores import Scores, Shot

SHOTS = [Shot(p, k, "", Path()) for p in range(2) for k in range(3)]


def test_a_scores_file_that_was_cut_short_in_a_line_goes_on_after_the_last_whole_one(tmp_path):
    file = tmp_path / "scores" / "metric.jsonl"
    Scores(file, (2, 3)).add(SHOTS[:3], [0.1, 0.2, 1 / 3])
    whole = file.read_text()
    file.write_text(whole[:-6])
    again = Scores(file, (2, 3))
    assert again.missing(SHOTS) == SHOTS[2:]
    again.add(SHOTS[2:], [1 / 3, 4, np.nan, 5])
    assert Scores(file, (2, 3)).missing(SHOTS) == [SHOTS[4]]
    assert np.array_equal(
        Scores(file, (2, 3)).values, [[0.1, 0.2, 1 / 3], [4, np.nan, 5]], equal_nan=True
    )
    assert file.read_text().startswith(whole)


def test_features_that_were_half_written_are_computed_again(tmp_path):
    class Model(scoring.Features):
        def __init__(self):
            self._width, self._batch_size, self._params, self.seen = 4, 2, None, 0

        def _run(self, params, images):
            self.seen += len(images)
            return np.repeat(images[:, 0, 0, :1] / 255.0, 4, axis=1)

    shots = [Shot(p, k, "", tmp_path / f"{p}_{k}.png") for p in range(3) for k in range(2)]
    for i, shot in enumerate(shots[:-1]):  # the last is missing
        Image.new("RGB", (3, 3), (i, 0, 0)).save(shot.file)
    file, model = tmp_path / "features.npy", Model()
    found = model.of(shots, (3, 2), file)
    assert np.allclose(found[..., 0], np.array([[0, 1], [2, 3], [4, np.nan]]) / 255, equal_nan=True)
    kept = np.load(file, mmap_mode="r+")
    kept[1, 0, 2:] = np.nan  # as if killed while it was copied
    kept.flush()
    again = Model()
    assert np.array_equal(again.of(shots, (3, 2), file), found, equal_nan=True)
    assert again.seen == 2  # one batch, of the one that was missing, padded


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
        found.append(scoring.read_image(file))
    assert any(image is None for image in found) and any(image is not None for image in found)
    assert all(
        image is None or (image.dtype == np.uint8 and image.shape[2] == 3) for image in found
    )


def test_names_with_all_kinds_of_digits_are_in_natural_order(tmp_path):
    names = ["2.png", "10.PNG", "a/1.jpg", "²3.webp", "²20.webp"]
    for name in [*names, "a/notes.txt", "b.gif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in scoring.images_in(tmp_path)] == names


def test_images_of_different_sizes_come_in_batches_of_one_size_and_none_is_lost(tmp_path):
    shots = []
    for i in range(23):
        size = (4, 4) if i % 3 else (8, 4)
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
        shots.append(Shot(i, 0, "", tmp_path / f"{i}.png"))
    (tmp_path / "7.png").write_text("a text")
    seen = []
    for part, images in scoring.batches(shots, 4):
        assert len(part) <= 4
        if images is None:
            assert [shot.prompt for shot in part] == [7]
        else:
            assert images.shape[0] == len(part) and images[:, 0, 0, 0].tolist() == [
                shot.prompt for shot in part
            ]
        seen += [shot.prompt for shot in part]
    assert sorted(seen) == list(range(23))


def test_the_digest_of_parameters_knows_names_values_and_types_and_not_where_they_are():
    params = {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.float32(1)}
    digest = scoring.params_digest(params)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(
        params["a"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    assert scoring.params_digest(params | {"a": split}) == digest
    changed = params["a"].copy()
    changed[7, 1] += 1
    others = [
        params | {"a": changed},
        {"c": params["a"], "b": params["b"]},
        params | {"a": params["a"].reshape(2, 8)},
        params | {"b": jax.numpy.bfloat16(1)},
    ]
    assert len({digest, *map(scoring.params_digest, others)}) == 5


def test_the_oracle_refuses_images_of_another_size():
    with pytest.raises(
        UserError, match="x.png has 32 x 48 pixels, the oracle reads images of 64 x 64"
    ):
        scoring.attributes_right(
            [Shot(0, 0, "a red circle", Path("x.png"))], np.zeros((1, 48, 32, 3), np.uint8)
        )


@pytest.mark.parametrize("broken", ["scores.parquet", "results.json"])
def test_a_damaged_evaluation_is_no_baseline(tmp_path, broken):
    (tmp_path / "results.json").write_text('{"settings": {"samples": 1}, "metrics": {}}')
    (tmp_path / broken).write_text("{")
    with pytest.raises(UserError, match="holds no readable evaluation .*; run it again") as error:
        results.read(tmp_path)
    assert "\n" not in str(error.value)
