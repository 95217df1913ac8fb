# SPDX-License-Identifier: Apache-2.0
"""FID and CLIP-FID, by the clean-fid package."""

import tempfile
from pathlib import Path
from types import ModuleType

from di_star_jax.errors import UserError
from di_star_jax.pictures import save_png
from di_star_jax.storage.buckets import local
from di_star_jax.storage.files import shown
from di_star_jax.storage.images import broken_among, images_in, is_16_bit, read_image

# {metric: (clean-fid's model, what it does to an image)}
MODELS = {
    "fid": ("inception_v3", "resized to 299 bicubic, antialiased, not rounded"),
    "clip_fid": ("clip_vit_b_32", "resized to 224 bicubic with 8 bits, cropped"),
}
STATISTICS = "cleanfid:"  # --reference=cleanfid:NAME, of cleanfid.fid.make_custom_stats(NAME, ...)


def check_packages(names: list[str]) -> None:
    """Raises: UserError where a package is missing. Args: names, of MODELS."""
    if names:
        _package()
    if "clip_fid" in names:
        try:
            import clip  # noqa: F401  clean-fid needs it and does not say so
        except ImportError as error:
            raise UserError(
                f"--metrics=clip_fid needs OpenAI's CLIP package beside clean-fid ({error}); pip "
                "install git+https://github.com/openai/CLIP, or leave clip_fid out"
            ) from None


def check(names: list[str], reference: str) -> None:
    """Raises: UserError where the reference cannot serve.

    Args: names, of MODELS; reference, as of `distance`.
    """
    fid = _package()
    if reference.startswith(STATISTICS):
        _check_statistics(fid, names, reference.removeprefix(STATISTICS))
        return
    theirs = images_in(local(reference))
    broken = broken_among(theirs)
    if broken:
        raise UserError(
            f"{len(broken)} of the {len(theirs)} images of --reference={reference} cannot be read, "
            f"the first is {broken[0]}; clean-fid takes whole folders: take them out"
        )
    deep = next(filter(is_16_bit, theirs), None)
    if deep is not None:
        raise UserError(
            f"{deep} of --reference={reference} is gray of 16 bits, which clean-fid takes for "
            "white; save it with 8 bits"
        )


def _check_statistics(
    fid: ModuleType,
    names: list[str],
    known: str,
) -> None:
    for name in names:
        model = MODELS[name][0]
        if not fid.test_stats_exists(known, mode="clean", model_name=model):
            raise UserError(
                f"clean-fid has no statistics {known!r} for {name}; make them with "
                f"cleanfid.fid.make_custom_stats({known!r}, FOLDER, model_name={model!r})"
            )


def _package() -> ModuleType:
    try:
        from cleanfid import fid
    except ImportError as error:
        raise UserError(
            f"--metrics=fid needs clean-fid ({error}); pip install -e '.[fid]', or leave fid and "
            "clip_fid out: frechet is this package's own, of another feature extractor"
        ) from None
    return fid


def distance(
    name: str,
    files: list[Path],
    reference: str,
    out: Path,
) -> tuple[float, str]:
    """FID or CLIP-FID, mode clean, on CUDA where there is one; and a note.

    Args: name, of MODELS; files, readable images; reference, a folder or STATISTICS and a name;
      out, where a folder of links may be.
    """
    import torch

    fid = _package()
    model, processing = MODELS[name]
    named = dict(
        mode="clean",
        model_name=model,
        use_dataparallel=False,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if reference.startswith(STATISTICS):
        folder = None
        known = reference.removeprefix(STATISTICS)
        named |= dict(dataset_name=known, dataset_split="custom")
        against = f"its statistics {known}"
    else:
        folder = str(local(reference))
        against = f"{len(images_in(local(reference))):,} of {shown(reference)}"
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{name}_") as links:
        for i, file in enumerate(files):  # exactly the images that are scored
            link = Path(links) / f"{i:06d}{file.suffix.lower()}"
            if is_16_bit(file):
                save_png(link, read_image(file))
            else:
                link.symlink_to(file.absolute())
        value = fid.compute_fid(links, folder, **named)
    kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
    count = f"{len(files):,} images ({kinds})"
    return float(value), f"clean-fid, mode clean, {model}, {processing}; {count} against {against}"
