# SPDX-License-Identifier: Apache-2.0
"""Published prompt sets, each read from the file its authors publish, as tfds data sources.

None is in this package.
"""

import dataclasses
import hashlib
import http.client
import json
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from di_star_jax.errors import UserError, suggest
from di_star_jax.prompts import files as prompts
from di_star_jax.prompts.files import Layout

PICKLES = (".pkl", ".pickle", ".pt", ".pth")
TIMEOUT = 60.0  # seconds without an answer


class Prompt(NamedTuple):
    """One prompt: its row in the published file, its text, the columns beside it, such as
    {"Category": "Animals"}.
    """

    row: int
    text: str
    categories: dict[str, str]


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What a published set of prompts looks like.

    Args:
      title: its name in print.
      published: the file and where its authors publish it, for the error that asks for it.
      forms: how each kind of file holds it: {suffix: layout}.
      groups: columns to tabulate results by; further ones that a layout keeps name a prompt
        elsewhere.
      folder: names or patterns of the files of a set that is a folder; () takes a file.
      read_folder: files to prompts, where folder is set.
      one_per: column whose repeats are left out, in files with several rows for a prompt.
      counts: numbers of prompts in the published versions.
      digests: published files: {suffix: {sha256: repository and commit}}.
    """

    title: str
    published: str
    forms: dict[str, Layout]
    groups: tuple[str, ...] = ()
    folder: tuple[str, ...] = ()
    read_folder: Callable[[list[Path]], Iterator[Prompt]] | None = None
    one_per: str = ""
    counts: tuple[int, ...] = ()
    digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


class Prompts(Sequence):
    """Prompts by index. Fields: name, digest (sha256 of the source), verified and notes.

    verified: whether the source is a published file, byte for byte; None where no checksum is
      known.
    notes: one line for each way in which the source differs from what is published.
    """

    def __init__(
        self, data_source, *, name: str, digest: str, verified: bool | None, notes: tuple[str, ...]
    ):
        self._data_source = data_source
        self.name, self.digest, self.verified, self.notes = name, digest, verified, notes

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):  # what ends an iteration; the data source raises ValueError
            raise IndexError(f"prompt {index} of {len(self)}")
        entry = self._data_source[int(index)]
        return Prompt(
            int(entry["row"]), entry["prompt"].decode("utf-8"), json.loads(entry["categories"])
        )


def _read_lists(files: list[Path]) -> Iterator[Prompt]:
    """A list in each file: rows count through, and the file's name and the index inside it name the
    picture.
    """
    first = 0
    for path in files:
        index = -1
        for index, text, _ in prompts.read_records(path, Layout()):
            yield Prompt(first + index, text, {"style": path.stem, "index": str(index)})
        first += index + 1


def _read_texts(files: list[Path]) -> Iterator[Prompt]:
    """A prompt in each file, whose name is the prompt's."""
    for row, path in enumerate(files):
        text = " ".join(line for _, line, _ in prompts.read_records(path, Layout()))
        if text:
            yield Prompt(row, text, {"item_id": path.stem})


# The user's own file: every column of text beside the prompts is kept.
OWN = PromptSet(
    title="a prompt file",
    published="",
    forms={
        suffix: Layout(keep=None, advice="rename the prompts' column") for suffix in prompts.FORMATS
    },
)

PROMPT_SETS = {
    "parti": PromptSet(
        title="PartiPrompts",
        published="PartiPrompts.tsv of google-research/parti on GitHub",
        forms={".tsv": Layout(("Prompt",), ("Category", "Challenge"))},
        groups=("Category", "Challenge"),
        counts=(1632,),
        digests={
            ".tsv": {
                "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb": "google-research/parti @ 5a65797"
            }
        },
    ),
    "hpsv2": PromptSet(
        title="the HPSv2 benchmark",
        published="the folder benchmark of the dataset zhwang/HPDv2 on Hugging Face",
        forms={},
        groups=("style",),
        folder=("anime.json", "concept-art.json", "paintings.json", "photo.json"),
        read_folder=_read_lists,
        counts=(3200,),
    ),
    "coco": PromptSet(
        title="COCO captions of val2014",
        published="annotations/captions_val2014.json of cocodataset.org, or a list drawn from it: prompts/captions.txt "
        "of mingyuanzhou/SiD-LSG, text_to_image/coco2014/captions/captions_source.tsv of mlcommons/inference",
        forms={
            ".txt": Layout(),
            ".tsv": Layout(("caption",), ("image_id", "id")),
            ".json": Layout(("caption",), ("image_id", "id"), records="annotations"),
        },
        counts=(30_000, 5000, 202_654),
        digests={
            ".txt": {
                "edabd2a556026cbf5d36a5fffa35ad43d7ba71b72f6d640b727c1edefb7f1945": "mingyuanzhou/SiD-LSG @ 709fc22"
            },
            ".tsv": {
                "2eeb95637b30fe5af26dd644bafa7affe4e5472ad0bda32d0feb1bd261280d5e": "mlcommons/inference @ b66003e1"
            },
        },
    ),
    "geneval": PromptSet(
        title="GenEval",
        published="prompts/evaluation_metadata.jsonl of djghosh13/geneval on GitHub",
        forms={".jsonl": Layout(("prompt",), ("tag",))},
        groups=("tag",),
        counts=(553,),
        digests={
            ".jsonl": {
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13": "djghosh13/geneval @ af4902f"
            }
        },
    ),
    "dpg": PromptSet(
        title="DPG-Bench",
        published="dpg_bench/dpg_bench.csv or the folder dpg_bench/prompts of TencentQQGYLab/ELLA on GitHub",
        forms={".csv": Layout(("text",), ("item_id",)), ".jsonl": Layout(("prompt",), ("id",))},
        folder=("*.txt",),
        read_folder=_read_texts,
        one_per="item_id",
        counts=(1065,),  # the .csv has a row a question
        digests={
            ".jsonl": {
                "b540e6e34e336cc454541ac568db8ddd6a89fab95fe05af4df6afbc0fe39f944": "Lakonik/LakonLab @ 84566d5"
            }
        },
    ),
    "drawbench": PromptSet(
        title="DrawBench",
        published="the sheet that imagen.research.google links, saved as .csv",
        forms={".csv": Layout(("Prompts",), ("Category",))},
        groups=("Category",),
        counts=(200,),
    ),
    "laion": PromptSet(
        title="LAION-Aesthetic > 6.25 captions",
        published="data/laion/captions_laion_score6.25.pkl of tianweiy/DMD2 on Hugging Face, converted to .txt or "
        ".parquet",
        forms={".txt": Layout(), ".parquet": Layout(("TEXT", "text", "caption", "prompt"))},
    ),
    "pickapic": PromptSet(
        title="the test prompts of Pick-a-Pic",
        published="data/test_unique-*.parquet of yuvalkirstain/pickapic_v1_no_images on Hugging Face, or "
        "dataset/pickscore/test.txt of yifan123/flow_grpo on GitHub",
        forms={".txt": Layout(), ".parquet": Layout(("caption",))},
        counts=(500, 2048),
    ),
}


def read(name: str, path: str | os.PathLike) -> Iterator[Prompt]:
    """Prompts of a set in the published order; duplicates kept, blank ones left out, outer blanks
    stripped.

    Args:
      name: one of PROMPT_SETS; "" for a file of the user's own.
      path: file, or folder of a set that is one.
    Yields: prompts; rows count from 0 and leave out a header.
    Raises: UserError for an unknown set, and for a file that is missing, empty or not that set's.
    """
    if name and name not in PROMPT_SETS:
        raise _unknown(name)
    return _read(PROMPT_SETS.get(name, OWN), Path(path))


def load(
    name_or_file: str | os.PathLike, data_dir: str | os.PathLike, source: str | os.PathLike = ""
) -> Prompts:
    """A prompt set as a data source, built once: a changed file is built anew.

    Args:
      name_or_file: one of PROMPT_SETS, or the path or URL of a prompt file.
      data_dir: where the ArrayRecord files, and in `downloads` the files of a URL, go.
      source: path or http(s) URL of a named set; of its folder, for a set that is one.
    Raises: UserError as `read`, for a set without source, a failed download, and a source without
      prompts.
    """
    name, source = _name_and_source(str(name_or_file), str(source))
    spec = PROMPT_SETS.get(name, OWN)
    path = _fetch(spec, source, Path(data_dir) / "downloads") if "://" in source else Path(source)

    def examples():
        for row, text, categories in _read(spec, path):
            yield {"row": row, "prompt": text, "categories": json.dumps(categories)}

    if next(examples(), None) is None:
        raise UserError(f"{path} holds no prompts, expected at least one; give another file")
    digest = _digest(spec, path)
    key = f"{digest}\0{name}\0{path.suffix}\0{spec.forms.get(path.suffix)}"
    data_source = prompts.build(
        examples,
        ("prompt", "categories"),
        Path(data_dir) / hashlib.sha256(key.encode()).hexdigest()[:16],
    )
    known = spec.digests.get(path.suffix)
    verified = digest in known if known else None
    return Prompts(
        data_source,
        name=name or path.name,
        digest=digest,
        verified=verified,
        notes=tuple(_notes(spec, path, verified, len(data_source))),
    )


def _name_and_source(name: str, source: str) -> tuple[str, str]:
    """Name, "" for the user's own file, and path or URL."""
    if name in PROMPT_SETS:
        if not source:
            spec = PROMPT_SETS[name]
            raise UserError(
                f"--prompts={name} needs {spec.title}, which is {spec.published}; add "
                "--prompts_file=PATH_OR_URL"
            )
        return name, source
    if (
        "/" not in name
        and Path(name).suffix not in (*prompts.FORMATS, *PICKLES)
        and not Path(name).exists()
    ):
        raise _unknown(name)
    if source:
        raise UserError(
            f"--prompts={name} is a file, and --prompts_file={source} another; leave out the second"
        )
    return "", name


def _unknown(name: str) -> UserError:
    return UserError(
        f"--prompts={name} is neither a file nor one of {', '.join(PROMPT_SETS)}"
        f"{suggest(name, tuple(PROMPT_SETS))}; give one of them, or the path of a prompt file"
    )


def _read(spec: PromptSet, path: Path) -> Iterator[Prompt]:
    files = _files(spec, path)
    if path.is_dir():
        yield from spec.read_folder(files)
        return
    layout = spec.forms[path.suffix]
    if spec is not OWN:
        layout = dataclasses.replace(
            layout, advice=f"is this really {spec.title}? That is {spec.published}"
        )
    seen = set()
    for row, text, kept in prompts.read_records(path, layout):
        if spec.one_per in kept:
            if kept[spec.one_per] in seen:
                continue
            seen.add(kept[spec.one_per])
        yield Prompt(row, text, kept)


def _files(spec: PromptSet, path: Path) -> list[Path]:
    """The files of a source, in the order they are read."""
    if spec.folder and path.is_dir():
        files = [sorted(path.glob(pattern)) for pattern in spec.folder]
        if not all(files):
            raise UserError(
                f"no {spec.folder[files.index([])]} in {path}; is this really {spec.title}? "
                f"That is {spec.published}"
            )
        return [file for matches in files for file in matches]
    _check_suffix(spec, path)
    if not path.is_file():
        raise UserError(
            f"no prompt file {path}; give the path or URL of {spec.published or 'a prompt file'}"
        )
    if not path.stat().st_size:
        raise UserError(f"{path} is empty, expected {spec.title}; download or write it again")
    return [path]


def _check_suffix(spec: PromptSet, path: Path) -> None:
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, and is not opened here; write its "
            "prompts to a .txt, one a line, with a script of your own outside of this project"
        )
    if path.suffix not in spec.forms:
        folder = [f"a folder with {', '.join(spec.folder)}"] if spec.folder else []
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'}, expected {' or '.join([*spec.forms, *folder])}; "
            f"give {spec.published or 'another file'}"
        )


def _digest(spec: PromptSet, path: Path) -> str:
    """sha256 of a file; of a folder, that of what `sha256sum FILES` prints inside it."""
    digests = {}
    for file in _files(spec, path):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if path.is_file():
        return digests[path.name]
    return hashlib.sha256(
        "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    ).hexdigest()


def _notes(spec: PromptSet, path: Path, verified: bool | None, count: int) -> Iterator[str]:
    if verified is False:
        yield f"{path} is not, byte for byte, the file of {' or '.join(spec.digests[path.suffix].values())}"
    if spec.counts and count not in spec.counts:
        published = " or ".join(f"{n:,}" for n in spec.counts)
        yield f"{path} holds {count:,} prompts, {spec.title} {published}"


def _fetch(spec: PromptSet, url: str, folder: Path) -> Path:
    """Downloads a file, or every file of a set that is a folder of known names, unless it is there
    already.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"{url} starts with {parts.scheme}://, expected http:// or https://; or give a path"
        )
    folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    if not spec.forms:
        for name in spec.folder:
            _download(f"{url.rstrip('/')}/{name}", folder / name)
        return folder
    name = Path(parts.path).name
    if not Path(name).suffix and len(spec.forms) == 1:  # such as the export of a sheet
        name += next(iter(spec.forms))
    _check_suffix(spec, Path(name))
    _download(url, folder / name)
    return folder / name


def _download(url: str, path: Path) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, partial.open("wb") as file:
            if response.headers.get_content_type() == "text/html":
                raise UserError(
                    f"{url} is a web page, expected a prompt file; give the URL of the raw file"
                )
            shutil.copyfileobj(response, file)
            length = response.headers.get("Content-Length")
            if length is not None and file.tell() != int(length):
                raise OSError(f"{file.tell()} of {length} bytes came")
        partial.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}); check the URL, or download the file and give its "
            "path"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
