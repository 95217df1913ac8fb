# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, by Orbax.

One item per field of the state, so that one network can be read without the rest.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from di_star_jax.errors import UserError
from di_star_jax.storage import buckets, folders
from di_star_jax.storage.files import expand

FOLDER = "checkpoints"  # of a run, in its workdir
_METADATA = "metadata"
_RENAMED = {"unet_config": "denoiser_config"}  # by earlier versions' names
_SAVED = "_CHECKPOINT_METADATA"  # Orbax's own, in each step's folder
_COMMITTED = "commit_success.txt"  # Orbax's, last of all on a bucket, where nothing is renamed
_ASIDE = ".set-aside"  # ends the name of what stood in a checkpoint's place and is none
_BESIDE = 1_000_000  # bytes of what is written beside the arrays
_PATTERN = "[]*?\\"  # Orbax and TensorStore take these for a pattern: what is saved is not found


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in one folder, which is made where it is missing.

    Used in a `with`, or closed by hand: what is being written is on disk after that.

    Args:
      folder: one run's own, here or at gs://; no other job may write there.
      keep: how many of the newest to keep, or None for all.
    Raises: UserError where the folder cannot be made, or not read back.
    """

    def __init__(self, folder: str | os.PathLike, keep: int | None):
        check_path(folder)
        self.folder = place(folder)
        self._known = {}  # step -> whether its folder is a checkpoint, or is to become one
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
            )
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints in {folder} ({error.strerror}); give another folder"
            ) from None

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict,
    ) -> None:
        """Starts to write `state`; its buffers may be donated as soon as this returns.

        Args:
          step: does nothing if this step is there already.
          state: a NamedTuple, dataclass or dict of trees.
          metadata: stored as JSON: what an export needs, such as `denoiser_config` and `reference`.
        Raises: UserError where the disk has no room for it.
        """
        if step in self.steps():
            return
        self.check_room(state)
        items = {
            name: ocp.args.StandardSave({name: tree}) for name, tree in _fields(state)[0].items()
        }
        self._known[step] = True
        self._manager.save(
            step,
            args=ocp.args.Composite(**items, **{_METADATA: ocp.args.JsonSave(metadata)}),
            custom_metadata={"step": step},
            force=True,
        )

    def check_room(self, state: Any) -> None:
        """Raises: UserError where the disk has no room for one more checkpoint of `state`."""
        if isinstance(self.folder, epath.Path):
            return  # a bucket has no end
        need = 1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _BESIDE
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < need:  # some network drives know neither
            raise UserError(
                f"disk full at {self.folder}: a checkpoint takes {_size(need)}, {_size(disk.free)} "
                "are free; make room, or give another --workdir, and run the same command again"
            )

    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is complete."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps whose checkpoint is there; of a folder that is none, a warning is said."""
        found = sorted(self._manager.all_steps())
        for step in found:
            if step not in self._known:
                self._known[step] = _is_ours(self.folder, step)
                if not self._known[step]:
                    logging.warning("%s is no checkpoint; skipped", self.folder / str(step))
        return [step for step in found if self._known[step]]

    def tidy(self, items: Sequence[str]) -> None:
        """Removes what killed saves left; sets aside what is no checkpoint, with a warning.

        Else such a folder would be the newest, and stand in the way of a save. To be called by all
        processes of a run before its first save, with nobody else at work there.

        Args: items, that a checkpoint has, such as "generator".
        """
        if jax.process_index() == 0 and self.folder.is_dir():  # in a bucket no folder is empty
            for path in list(self.folder.iterdir()):
                if _is_leftover(path):
                    logging.warning("%s is what a killed save left; removed", path)
                    _remove(path)
                elif path.name.isdigit() and not _is_ours(self.folder, int(path.name), items):
                    aside = path.with_name(path.name + _ASIDE)
                    logging.warning("%s is no checkpoint of this run; now %s", path, aside.name)
                    _rename(path, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints tidied")
        self._known = {}
        self._manager.reload()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The whole state at `step`.

        Args:
          abstract_state: like the state, of `jax.ShapeDtypeStruct` with the shardings to restore
            to, which need not be those it was saved with; a leaf without sharding goes to the first
            device.
        Raises: UserError where the checkpoint is missing or is not of this model.
        """
        fields, treedef = _fields(abstract_state)
        return treedef.unflatten(
            [self.restore_item(step, name, tree) for name, tree in fields.items()]
        )

    def restore_item(
        self,
        step: int,
        name: str,
        abstract: Any,
    ) -> Any:
        """One field of the state, such as "generator", "ema" or "assistant".

        Otherwise as `restore`.
        """
        target = jax.tree.map(_placed, {name: abstract})
        self._check_fit(step, name, target)
        return self._read(step, name, ocp.args.StandardRestore(target))[name]

    def metadata(self, step: int) -> dict:
        """What `save` was given. Raises: UserError where the checkpoint is missing."""
        self._item_folder(step, _METADATA)
        found = self._read(step, _METADATA, ocp.args.JsonRestore())
        return {_RENAMED.get(name, name): value for name, value in found.items()}

    def clear(self) -> None:
        """Removes all that was saved. To be called by all processes of a run."""
        for step in self._manager.all_steps():
            self._manager.delete(step)
        self._known = {}

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all that was saved is on disk, then frees what the manager holds."""
        self._manager.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(
        self,
        step: int,
        name: str,
        args: Any,
    ) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]

    def _item_folder(self, step: int, name: str) -> Path:
        steps = self.steps()
        if step not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self.folder}, there are {steps}; "
                "give one of these"
            )
        folder = self.folder / str(step)
        if not (folder / name).is_dir():
            items = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise UserError(f"{folder} has no {name!r}, it has {items}; give one of these")
        return folder / name

    def _check_fit(
        self,
        step: int,
        name: str,
        target: Any,
    ) -> None:
        folder = self._item_folder(step, name)
        stored = _shapes(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
        wanted = _shapes(target)
        wrong = [
            f"{path} is {list(stored[path])}, expected {list(shape)}"
            for path, shape in wanted.items()
            if path in stored and stored[path] != shape
        ]
        missing = [f"missing {path}" for path in wanted if path not in stored]
        extra = [f"extra {path}" for path in stored if path not in wanted]
        if wrong or missing or extra:
            first = (wrong + missing + extra)[:10]
            raise UserError(
                f"{folder} does not fit the model: {len(missing)} arrays missing, "
                f"{len(extra)} extra, {len(wrong)} of the wrong shape; first {len(first)}: "
                f"{'; '.join(first)}; give the config it was saved with"
            )


def check_path(folder: str | os.PathLike) -> None:
    """Raises: UserError for a folder whose checkpoints could not be read back."""
    if buckets.is_remote(folder):
        buckets.check_url(str(folder))
        if not str(folder).startswith("gs://"):
            raise UserError(
                f"{folder}: Orbax writes checkpoints to no bucket but gs://, for it takes s3:// "
                "for a relative path (its pull request 2739); give a gs:// address, or a folder"
            )
        return
    path = str(place(folder))
    found = sorted(set(_PATTERN) & set(path))
    if found:
        raise UserError(
            f"{path} has {' '.join(found)} in it, which checkpoints cannot be read back from; "
            "give a folder without [ ] * ? or a backslash"
        )


def existing(folder: str | os.PathLike) -> Checkpoints:
    """The checkpoints in a folder, or in a run's workdir.

    Raises: UserError where there are none.
    """
    check_path(folder)
    if buckets.is_remote(folder):
        buckets.reach(str(folder))
    for candidate in (place(folder), place(folder) / FOLDER):
        if candidate.is_dir() and any(
            _is_ours(candidate, step) for step in ocp.utils.checkpoint_steps(candidate)
        ):
            return Checkpoints(candidate, keep=None)
    what = "no checkpoint in" if place(folder).is_dir() else "no folder"
    raise UserError(
        f"{what} {folder}; give the workdir of a run that has saved one, or its {FOLDER} folder"
    )


# Where a run's sources are now.


def located(metadata: dict) -> dict:
    """A run's metadata with its sources, stored as configured, as they are found from here.

    A relative folder is looked for where the run began, then from here; a Hub name, or what is
    gone, stays as it is.
    """
    began_in = metadata.get("directory", ".")

    def find(source):
        if buckets.is_remote(source):
            return source
        candidates = (Path(began_in) / expand(source), expand(source)) if source else ()
        return next((str(path) for path in candidates if path.exists()), source)

    of_weights = {name: find(source) for name, source in metadata.get("weights", {}).items()}
    single = {name: find(metadata[name]) for name in ("reference", "initial") if name in metadata}
    return metadata | single | {"weights": of_weights}


def reference_of(metadata: dict, given: str | None) -> Path:
    """The folder of a run's reference pipeline.

    Args: metadata, of `located`. given: by the user, in place of the run's; or None.
    Raises: UserError where it is gone.
    """
    if given:
        return folders.resolve(given)
    try:
        found = folders.resolve(metadata["reference"])
    except UserError as error:
        raise UserError(
            f"the reference pipeline of the checkpoint: {error}; or say where it is now with "
            "--reference_pipeline=FOLDER"
        ) from None
    other = folders.other_world(found, metadata.get("digest"), metadata.get("version"))
    if other:
        raise UserError(f"{other}; give those it had with --reference_pipeline=FOLDER")
    return found


# Folders, here or in a bucket.


def place(folder: str | os.PathLike) -> Path | epath.Path:
    """An absolute path, here or in a bucket."""
    if buckets.is_remote(folder):
        buckets.sign_in(str(folder).split("/")[2])
        return epath.Path(folder)
    return Path(os.path.abspath(expand(folder)))


def _is_ours(
    folder: Path | epath.Path,
    step: int,
    items: Sequence[str] = (),
) -> bool:
    """Whether a step's folder is what `save` has left there, with all of `items`."""
    path = folder / str(step)
    try:
        saved = json.loads((path / _SAVED).read_text(encoding="utf-8"))
        at = (saved.get("custom_metadata") or {}).get("step", step)
    except (OSError, ValueError, AttributeError):
        return False
    return at == step and all((path / name).is_dir() for name in (_METADATA, *items))


def _is_leftover(path: Path | epath.Path) -> bool:
    """Whether this is a checkpoint that was never finished: one that was is never taken for it."""
    if re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", path.name):
        return True
    if not isinstance(path, epath.Path) or not path.name.isdigit():
        return False
    if (path / _COMMITTED).exists():
        return False
    try:
        # Else all is there but for the last file, as where it was copied by hand.
        return not json.loads((path / _SAVED).read_text(encoding="utf-8")).get(
            "commit_timestamp_nsecs"
        )
    except (OSError, ValueError, AttributeError):
        return True


def _remove(path: Path | epath.Path) -> None:
    if isinstance(path, epath.Path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def _rename(path: Path | epath.Path, new: Path | epath.Path) -> None:
    if isinstance(path, epath.Path):
        buckets.move(str(path), str(new))
    else:
        path.rename(new)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _fields(state: Any) -> tuple[dict[str, Any], Any]:
    """{name: tree} of the state's fields, and the definition that puts them together again."""
    fields, treedef = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: node is not state
    )
    return {jax.tree_util.keystr(path, simple=True): tree for path, tree in fields}, treedef


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would ask for the devices that it was saved on.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
