# SPDX-License-Identifier: Apache-2.0
"""Records by number: ArrayRecord files of tfds, written and read without TensorFlow."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, str | bytes]  # texts and bytes by name


def write(
    folder: Path,
    names: Sequence[str],
    records: Iterable[Record],
) -> None:
    """Writes records in their order to an empty folder. Args: names, of what each of them has."""
    quiet = io.StringIO()  # tfds's own bars
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        _builder(folder, names, records).download_and_prepare()


def read(folder: Path, names: Sequence[str]) -> Sequence[dict[str, bytes]]:
    """What `write` has written, by number."""
    return _builder(folder, names, ()).as_data_source(split="train")


def _builder(
    folder: Path,
    names: Sequence[str],
    records: Iterable[Record],
) -> Any:
    import tensorflow_datasets as tfds

    # tfds knows a builder by its name; here the folder tells them apart.
    with tfds.core.registered.skip_registration():

        class Prompts(tfds.core.GeneratorBasedBuilder):
            """Records of prompts."""

            VERSION = tfds.core.Version("2.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                # Bytes of any kind are a Text to tfds.
                features = {name: tfds.features.Text() for name in names}
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
                del dl_manager
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[int, Record]]:
                return enumerate(records)

    return Prompts(data_dir=str(folder), file_format="array_record")
