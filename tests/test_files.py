# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there."""

import errno
import os

import pytest

from di_star_jax.errors import UserError
from di_star_jax.storage import files
from di_star_jax.storage.workdir import Workdir


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


@pytest.mark.case("faults 26", "faults 11", "first hour 24")
def test_a_folder_to_write_in_is_made_or_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.writable_folder("~/runs/first", "--out") == tmp_path / "runs" / "first"
    assert os.listdir(tmp_path / "runs" / "first") == []
    (tmp_path / "file").touch()
    for path, reason in (
        (str(tmp_path / "file"), "it is a file"),
        (str(tmp_path / "file" / "below"), "Not a directory"),
        (str(tmp_path / ("a" * 300)), "File name too long"),
        ("/proc/x", "No such file or directory"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(UserError, match=rf"^--out=(?s:.)* \({reason}\); give another"):
            files.writable_folder(path, "--out")


@pytest.mark.case("faults 25")
def test_a_mount_that_cannot_rename_folders_is_refused_at_the_start(tmp_path, monkeypatch):
    usual = os.rename

    def rename(source, target, **options):  # as gcsfuse, which nothing can mount here
        if os.path.isdir(source):
            raise OSError(errno.EMFILE, "Too many open files")
        usual(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(
        UserError, match=r"renamed there: Too many open files; of a mounted bucket "
    ):
        Workdir(tmp_path / "mount")
    assert list((tmp_path / "mount").iterdir()) == []
