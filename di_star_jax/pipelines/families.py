# SPDX-License-Identifier: Apache-2.0
"""Which family a pipeline folder is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from di_star_jax.errors import UserError
from di_star_jax.models.config import shown
from di_star_jax.pipelines.family import DENOISER, Family
from di_star_jax.pipelines.pixart import PIXART
from di_star_jax.pipelines.sd15 import SD15
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.storage import folders

# By what model_index.json calls itself.
FAMILIES = {name: f for f in (SDXL, SD15, PIXART) for name in f.index.fixed["_class_name"]}


def family_of(index: Mapping[str, Any], file: str) -> Family:
    """The family of a parsed model_index.json. Args: its path, for errors.

    Raises: UserError for a pipeline that is not ported.
    """
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{file} has _class_name={shown(name)}, expected {', '.join(FAMILIES)}; give the "
            "folder of one of these pipelines"
        )
    return FAMILIES[name]


def family_at(folder: Path) -> Family:
    """As `family_of`, of a pipeline's folder."""
    file = folder / "model_index.json"
    return family_of(folders.read_config(folder, name=file.name), str(file))


def is_denoiser(class_name: Any) -> bool:
    """Whether a class of PyTorch's is some family's denoiser."""
    return any(class_name in family.parts[DENOISER].classes for family in FAMILIES.values())
