# SPDX-License-Identifier: Apache-2.0
"""Frechet distances of an evaluation's images to reference ones: of CLIP features by us, FID and
CLIP-FID by clean-fid.
"""

import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures
from di_star_jax.evaluation import scores as scoring
from di_star_jax.evaluation.scores import Shot

# {metric: (clean-fid's model, what it does to an image)}
CLEAN_FID = {
    "fid": ("inception_v3", "resized to 299 bicubic, antialiased, not rounded"),
    "clip_fid": ("clip_vit_b_32", "resized to 224 bicubic with 8 bits, cropped"),
}
STATISTICS = "cleanfid:"  # --reference=cleanfid:NAME, of cleanfid.fid.make_custom_stats(NAME, ...)


def check_clean_fid(names: list[str], reference: str) -> None:
    """Raises:

    UserError where a package is missing, or the reference cannot serve. Args: names, of CLEAN_FID.
    """
    fid = _clean_fid()
    if "clip_fid" in names:
        try:
            import clip  # noqa: F401  clean-fid needs it and does not say so
        except ImportError as error:
            raise UserError(
                f"--metrics=clip_fid needs OpenAI's CLIP package beside clean-fid ({error}); pip install "
                "git+https://github.com/openai/CLIP, or leave clip_fid out"
            ) from None
    if reference.startswith(STATISTICS):
        for name in names:
            known = reference.removeprefix(STATISTICS)
            if not fid.test_stats_exists(known, mode="clean", model_name=CLEAN_FID[name][0]):
                raise UserError(
                    f"clean-fid has no statistics {known!r} for {name}; make them with "
                    f"cleanfid.fid.make_custom_stats({known!r}, FOLDER, model_name={CLEAN_FID[name][0]!r})"
                )
        return
    theirs = scoring.images_in(Path(reference))
    broken = scoring.broken_among(theirs)
    if broken:
        raise UserError(
            f"{len(broken)} of the {len(theirs)} images of --reference={reference} cannot be read, the "
            f"first is {broken[0]}; clean-fid takes whole folders: take them out"
        )


def _clean_fid() -> ModuleType:
    try:
        from cleanfid import fid
    except ImportError as error:
        raise UserError(
            f"--metrics=fid needs clean-fid ({error}); pip install -e '.[fid]', or leave fid and clip_fid "
            "out: frechet is this package's own, of another feature extractor"
        ) from None
    return fid


def clean_fid(name: str, files: list[Path], reference: str, out: Path) -> tuple[float, str]:
    """(FID or CLIP-FID, note) by the clean-fid package, mode clean, on CUDA where there is one.

    Args: name, of CLEAN_FID; files, readable images; reference, a folder or STATISTICS and a name;
      out, where a folder of links may be.
    """
    import torch

    fid, (model, processing) = _clean_fid(), CLEAN_FID[name]
    common = dict(
        mode="clean",
        model_name=model,
        use_dataparallel=False,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    with tempfile.TemporaryDirectory(
        dir=out, prefix=f"{name}_"
    ) as folder:  # of exactly the images that are scored
        for i, file in enumerate(files):
            (Path(folder) / f"{i:06d}{file.suffix.lower()}").symlink_to(file.absolute())
        if reference.startswith(STATISTICS):
            known = reference.removeprefix(STATISTICS)
            value = fid.compute_fid(folder, dataset_name=known, dataset_split="custom", **common)
            against = f"its statistics {known}"
        else:
            value = fid.compute_fid(folder, reference, **common)
            against = f"{len(scoring.images_in(Path(reference))):,} of {reference}"
    kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
    return (
        float(value),
        f"clean-fid, mode clean, {model}, {processing}; {len(files):,} images ({kinds}) against {against}",
    )


def of_features(
    features: np.ndarray, name: str, model: scoring.Features, reference: Path, kept: Path
) -> tuple[float, str]:
    """(distance, note) to a folder of images or a file of statistics, in float64.

    Args:
      features: [P, K, D], NaN where broken. name: of the features.
      model: that made them, for the reference's images.
      reference: folder, or .npz of statistics. kept: .npz for those of a folder, made once.
    """
    ours = measures.FeatureStatistics(name)
    ours.update(features.reshape(-1, features.shape[-1]))
    if reference.is_file() or kept.exists():
        theirs = measures.FeatureStatistics.load(reference if reference.is_file() else kept, name)
    else:
        shots = [Shot(i, 0, "", file) for i, file in enumerate(scoring.images_in(reference))]
        theirs = measures.FeatureStatistics(name)
        theirs.update(model.of(shots, (len(shots), 1), None)[:, 0])
        partial = kept.with_suffix(".partial")
        theirs.save(partial)
        partial.rename(kept)
    count = "an unknown number of" if theirs.count is None else f"{theirs.count:,}"
    left_out = f", {theirs.left_out} more not readable" if theirs.left_out else ""
    return measures.frechet_distance(ours, theirs), (
        f"{ours.count:,} images against {count} of {reference}{left_out}; {name}; float64, in this package"
    )
