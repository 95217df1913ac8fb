# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there."""

import os

import pytest

from di_star_jax.storage import files


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.whole(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    with files.whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_has_its_name_only_when_it_is_whole_and_replaces_all_of_the_old_one(tmp_path):
    path = tmp_path / "unet"
    with files.whole_folder(path) as partial:
        (partial / "old").touch()
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.whole_folder(path) as partial:
        (partial / "half").touch()
        raise ZeroDivisionError
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["unet"]
    with files.whole_folder(path) as partial:
        (partial / "new").touch()
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["unet"]
