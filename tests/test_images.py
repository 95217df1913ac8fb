# SPDX-License-Identifier: Apache-2.0
"""Image files of an evaluation: which are pictures, and what their pixels are."""

import os

import numpy as np
import pytest
from PIL import Image

from di_star_jax.evaluation import measures
from di_star_jax.evaluation.images import to_unit
from di_star_jax.storage.images import fault_of, images_in, read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def contrast(file):
    return measures.contrast(to_unit(read_image(file)[None]))[0]


@pytest.mark.case("faults 9")
def test_gray_of_16_bits_has_the_pixels_and_the_contrast_of_gray_of_8(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "8.png")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert Image.open(tmp_path / "16.png").mode.startswith("I")
    np.testing.assert_array_equal(read_image(tmp_path / "16.png"), np.stack([RAMP] * 3, axis=-1))
    assert contrast(tmp_path / "16.png") == contrast(tmp_path / "8.png") > 0.28


@pytest.mark.case("faults 9")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_modes_become_rgb_as_pillow_has_it(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image.convert("RGB"))


@pytest.mark.case("faults 9")
def test_transparency_is_dropped_in_every_mode_and_cmyk_is_inverted(tmp_path):
    clear = np.zeros((16, 16), np.uint8)
    Image.fromarray(np.dstack([COLOURS, clear])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([RAMP, clear]), "LA").save(tmp_path / "la.png")
    Image.fromarray(RAMP).convert("P").save(tmp_path / "p.png", transparency=7)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), COLOURS)
    for name in ("la.png", "p.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.stack([RAMP] * 3, axis=-1))
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.case("faults 9", "faults 19")
def test_what_has_no_known_pixels_is_no_image_and_says_why(tmp_path, monkeypatch):
    picture = Image.fromarray(COLOURS)
    other = [Image.fromarray(COLOURS[::-1])]
    for name in ("moving.png", "moving.webp"):
        picture.save(tmp_path / name, save_all=True, append_images=other)
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "floats.png", "TIFF")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "integers.png", "TIFF")
    picture.save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:-40]
    (tmp_path / "cut.png").write_bytes(cut)
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    reasons = {
        "moving.png": "2 pictures that move, expected one",
        "moving.webp": "2 pictures that move",
        "floats.png": "mode F, whose range is not known",
        "integers.png": "mode I, whose range is not known",
        "cut.png": "truncated",
        "large.png": "9000 x 9000 pixels, expected 64 million at most",
    }
    for name, reason in reasons.items():
        assert read_image(tmp_path / name) is None, name
        assert reason in fault_of(tmp_path / name), name
    assert fault_of(tmp_path / "whole.png") == ""


@pytest.mark.case("faults 10", "faults 19")
def test_hidden_files_folders_and_pipes_are_no_pictures_and_suffixes_have_any_case(tmp_path):
    for name in ("2.png", "10.PNG", "sub/1.JPeg", "._2.png", ".ipynb_checkpoints/2-checkpoint.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(COLOURS).save(tmp_path / name, "PNG")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = [str(file.relative_to(tmp_path)) for file in images_in(tmp_path)]
    assert names == ["2.png", "10.PNG", "sub/1.JPeg"]
    hidden = tmp_path / ".hidden"
    hidden.mkdir()
    Image.fromarray(COLOURS).save(hidden / "0.png")
    assert images_in(hidden) == [hidden / "0.png"]  # the folder that is given may be
