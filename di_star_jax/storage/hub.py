# SPDX-License-Identifier: Apache-2.0
"""What was written here, uploaded to the Hub: only where a user asks for it, private at first."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
from huggingface_hub.errors import HTTPError  # of the HTTP library that this release has

from di_star_jax.errors import UserError
from di_star_jax.storage import folders
from di_star_jax.storage.files import MARKER


def check(name: str) -> None:
    """What can be known of an upload before the work whose result it is.

    Args: name, OWNER/NAME. Raises: UserError for another name, and where there is no token.
    """
    try:
        if not re.fullmatch(r"[^/]+/[^/]+", name):
            raise ValueError("it is not two names with a slash between them")
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push_to_hub={name} is no name on the Hub ({reason}); expected OWNER/NAME, of "
            "letters, digits, - _ and ."
        ) from None
    folders.check_endpoint()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"--push_to_hub={name}, but the environment has HF_HUB_OFFLINE, by which nothing "
            "reaches the Hub; unset one of them"
        )
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"--push_to_hub={name} needs a token that may write; run `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(
    name: str,
    written: Path,
    files: Mapping[str, Path] = {},
    *,
    public: bool = False,
) -> str:
    """Uploads what was written, and makes the repository if it is new.

    Args:
      name: as of `check`.
      written: a folder, or a file.
      files: those to upload, by their names on the Hub; if none are given, all of the folder.
      public: whether all may see the repository.
    Returns: its address.
    Raises: UserError where that fails; what was written stays as it is.
    """
    api = huggingface_hub.HfApi(library_name="di_star_jax")
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.repo_info(name).private:
            raise UserError(
                f"{name} is on the Hub and public, so nothing was pushed to it; give --public, or "
                "another name"
            )
        message = "Upload by di_star_jax"
        with _together(files) if files else contextlib.nullcontext(written) as folder:
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[MARKER]
            )
        return str(address)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if isinstance(error, RuntimeError):  # that a file could not be uploaded; the cause says why
            error = error.__cause__ or error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not push to {name} on {huggingface_hub.constants.ENDPOINT} ({reason:.300}); "
            "what was written stays: check the name, the token's rights and the network, then run "
            f"`hf upload {name} {written}`"
        ) from None


@contextlib.contextmanager
def _together(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder for a moment, with links to files under other names."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).symlink_to(path.resolve())
        yield Path(folder)
