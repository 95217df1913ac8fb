# SPDX-License-Identifier: Apache-2.0
"""Published prompt sets: how the files that their authors publish are read.

None of them is in this package.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from di_star_jax.errors import UserError, suggest
from di_star_jax.prompts import files
from di_star_jax.prompts.files import Layout, Prompt
from di_star_jax.storage.files import shown

PICKLES = (".pkl", ".pickle", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What a published set of prompts looks like.

    Args:
      title: its name in print.
      published: the file and where its authors publish it, for the error that asks for it; "" for
        the user's own file.
      forms: how each kind of file holds it: {suffix: layout}.
      groups: columns to tabulate results by; further ones that a layout keeps name a prompt
        elsewhere.
      folder: names or patterns of the files of a set that is a folder; () takes a file.
      read_folder: files to prompts, where folder is set.
      one_per: column whose repeats are left out, in files with several rows for a prompt.
      counts: numbers of prompts in the published versions.
      digests: of published files: {suffix: (sha256, repository and commit)}.
    """

    title: str
    published: str
    forms: dict[str, Layout]
    groups: tuple[str, ...] = ()
    folder: tuple[str, ...] = ()
    read_folder: Callable[[list[Path]], Iterator[Prompt]] | None = None
    one_per: str = ""
    counts: tuple[int, ...] = ()
    digests: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def _read_lists(paths: list[Path]) -> Iterator[Prompt]:
    """A list in each file: rows count through; file name and index name the picture."""
    first = 0
    for path in paths:
        index = -1
        for index, text, _ in files.read(path, Layout()):
            yield Prompt(first + index, text, {"style": path.stem, "index": str(index)})
        first += index + 1


def _read_texts(paths: list[Path]) -> Iterator[Prompt]:
    """A prompt in each file, whose name is the prompt's."""
    for row, path in enumerate(paths):
        text = " ".join(line.text for line in files.read(path, Layout()))
        if text:
            yield Prompt(row, text, {"item_id": path.stem})


PROMPT_SETS = {
    "parti": PromptSet(
        title="PartiPrompts",
        published="PartiPrompts.tsv of google-research/parti on GitHub",
        forms={".tsv": Layout(("Prompt",), ("Category", "Challenge"))},
        groups=("Category", "Challenge"),
        counts=(1632,),
        digests={
            ".tsv": (
                "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
                "google-research/parti @ 5a65797",
            )
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
        published="annotations/captions_val2014.json of cocodataset.org, or a list drawn from it: "
        "prompts/captions.txt of mingyuanzhou/SiD-LSG, "
        "text_to_image/coco2014/captions/captions_source.tsv of mlcommons/inference",
        forms={
            ".txt": Layout(),
            ".tsv": Layout(("caption",), ("image_id", "id")),
            ".json": Layout(("caption",), ("image_id", "id"), records="annotations"),
        },
        counts=(30_000, 5000, 202_654),
        digests={
            ".txt": (
                "edabd2a556026cbf5d36a5fffa35ad43d7ba71b72f6d640b727c1edefb7f1945",
                "mingyuanzhou/SiD-LSG @ 709fc22",
            ),
            ".tsv": (
                "2eeb95637b30fe5af26dd644bafa7affe4e5472ad0bda32d0feb1bd261280d5e",
                "mlcommons/inference @ b66003e1",
            ),
        },
    ),
    "geneval": PromptSet(
        title="GenEval",
        published="prompts/evaluation_metadata.jsonl of djghosh13/geneval on GitHub",
        forms={".jsonl": Layout(("prompt",), ("tag",))},
        groups=("tag",),
        counts=(553,),
        digests={
            ".jsonl": (
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
                "djghosh13/geneval @ af4902f",
            )
        },
    ),
    "dpg": PromptSet(
        title="DPG-Bench",
        published="dpg_bench/dpg_bench.csv or the folder dpg_bench/prompts of "
        "TencentQQGYLab/ELLA on GitHub",
        forms={".csv": Layout(("text",), ("item_id",)), ".jsonl": Layout(("prompt",), ("id",))},
        folder=("*.txt",),
        read_folder=_read_texts,
        one_per="item_id",
        counts=(1065,),  # the .csv has a row a question
        digests={
            ".jsonl": (
                "b540e6e34e336cc454541ac568db8ddd6a89fab95fe05af4df6afbc0fe39f944",
                "Lakonik/LakonLab @ 84566d5",
            )
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
        published="data/laion/captions_laion_score6.25.pkl of tianweiy/DMD2 on Hugging Face, "
        "converted to .txt or .parquet",
        forms={".txt": Layout(), ".parquet": Layout(("TEXT", "text", "caption", "prompt"))},
    ),
    "pickapic": PromptSet(
        title="the test prompts of Pick-a-Pic",
        published="data/test_unique-*.parquet of yuvalkirstain/pickapic_v1_no_images on Hugging "
        "Face, or dataset/pickscore/test.txt of yifan123/flow_grpo on GitHub",
        forms={".txt": Layout(), ".parquet": Layout(("caption",))},
        counts=(500, 2048),
    ),
}


def own_file(column: str | None = None) -> PromptSet:
    """A prompt file of the user's own.

    Args: column of the prompts, beside which nothing is kept; "" takes the first of files.COLUMNS
      that is there. None does too, and keeps every other column of text.
    """
    layout = Layout(keep=None, advice="rename the prompts' column")
    if column is not None:
        layout = Layout((column,) if column else files.COLUMNS)
    return PromptSet("a prompt file", "", dict.fromkeys(files.READERS, layout))


def resolve(
    name_or_file: str,
    file: str = "",
    option: str = "--prompts",
) -> tuple[str, str]:
    """What a user asks for: (name of a set or "" for the user's own file, path or URL).

    Args:
      name_or_file: one of PROMPT_SETS, or the path or URL of a prompt file.
      file: path or URL of a named set; of its folder, for a set that is one.
      option: what the user gave `name_or_file` as, for the errors; `file` is OPTION_file.
    Raises: UserError for a name that is unknown, a set without `file`, and a file with another.
    """
    if name_or_file in PROMPT_SETS:
        if not file:
            spec = PROMPT_SETS[name_or_file]
            raise UserError(
                f"{option}={name_or_file} needs {spec.title}, which is {spec.published}; add "
                f"{option}_file=PATH_OR_URL"
            )
        return name_or_file, file
    looks_like_a_file = "/" in name_or_file or Path(name_or_file).suffix in (
        *files.READERS,
        *PICKLES,
    )
    if not looks_like_a_file and not Path(name_or_file).exists():
        raise UserError(
            f"{option}={name_or_file} is neither a file nor one of {', '.join(PROMPT_SETS)}"
            f"{suggest(name_or_file, tuple(PROMPT_SETS))}; give one of them, or the path of a "
            "prompt file"
        )
    if file:
        raise UserError(
            f"{option}={name_or_file} is a file, and {option}_file={file} another; leave out the "
            "second"
        )
    return "", name_or_file


def read(spec: PromptSet, path: Path) -> Iterator[Prompt]:
    """Prompts of a set in the published order, duplicates kept.

    Args: spec, of PROMPT_SETS or own_file(); path: file, or folder of a set that is one.
    Raises: UserError for a file that is missing, empty or not that set's.
    """
    paths = find(spec, path)
    if path.is_dir():
        yield from spec.read_folder(paths)
        return
    layout = spec.forms[path.suffix]
    if spec.published:
        advice = f"is this really {spec.title}? That is {spec.published}"
        layout = dataclasses.replace(layout, advice=advice)
    seen = set()
    for prompt in files.read(path, layout):
        if spec.one_per in prompt.categories:
            if prompt.categories[spec.one_per] in seen:
                continue
            seen.add(prompt.categories[spec.one_per])
        yield prompt


def find(spec: PromptSet, path: Path) -> list[Path]:
    """The files of a set at a path, in the order they are read. Raises: UserError as `read`."""
    if spec.folder and path.is_dir():
        found = [sorted(path.glob(pattern)) for pattern in spec.folder]
        if not all(found):
            raise UserError(
                f"no {spec.folder[found.index([])]} in {path}; is this really {spec.title}? "
                f"That is {spec.published}"
            )
        return [file for matches in found for file in matches]
    check_suffix(spec, path)
    if not path.is_file():
        what = spec.published or "a prompt file"
        raise UserError(f"no prompt file {path}; give the path or URL of {what}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty, expected {spec.title}; download or write it again")
    return [path]


def check_suffix(spec: PromptSet, path: Path) -> None:
    """Refuses kinds of file that a set does not come in, pickles before all. Raises: UserError."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, and is not opened here; "
            "write its prompts to a .txt, one a line, with a script of your own outside of this "
            "project"
        )
    if path.suffix not in spec.forms:
        expected = list(spec.forms)
        if spec.folder:
            expected.append(f"a folder with {', '.join(spec.folder)}")
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'}, expected {' or '.join(expected)}; "
            f"give {spec.published or 'another file'}"
        )


def digest_of(spec: PromptSet, path: Path) -> str:
    """sha256 of a file; of a folder, that of what `sha256sum FILES` prints inside it."""
    digests = {}
    for file in find(spec, path):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if path.is_file():
        return digests[path.name]
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(
    spec: PromptSet,
    path: Path,
    digest: str,
    count: int,
) -> Iterator[str]:
    """A line for each way in which a source of `count` prompts differs from what is published."""
    known, where = spec.digests.get(path.suffix, (digest, ""))
    if digest != known:
        yield f"{shown(path)} is not, byte for byte, the file of {where}"
    if spec.counts and count not in spec.counts:
        published = " or ".join(f"{n:,}" for n in spec.counts)
        yield f"{shown(path)} holds {count:,} prompts, {spec.title} {published}"
