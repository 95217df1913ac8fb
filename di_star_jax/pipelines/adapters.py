# SPDX-License-Identifier: Apache-2.0
"""Files of adapters (LoRA) of a denoiser, in the two conventions that other programs read.

A convolution's down is [r, in, kh, kw], its up [out, r, 1, 1]; any other's [r, in] and [out, r].

- "diffusers", PEFT's: `unet.<module>.lora_A.weight` is down, `.lora_B.weight` is up, and W + B A
  the merged matrix: nothing in such a file says alpha, so that its scale is in B.
- "kohya", that of sd-scripts: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`,
  for W + alpha / r up down. Modules of SDXL have their names in the original layout, those of SD
  1.5 the names of diffusers: so sd-scripts writes, and A1111, Forge, ComfyUI and diffusers read.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from di_star_jax import log
from di_star_jax.errors import UserError
from di_star_jax.models import lora
from di_star_jax.models.lora import ADAPTERS, FROZEN, Lora
from di_star_jax.pipelines import card, original
from di_star_jax.pipelines.export import denoiser_in, in_workdir, weights_name
from di_star_jax.pipelines.families import family_at, is_denoiser
from di_star_jax.pipelines.folder import abstract_model, class_name, read_config
from di_star_jax.storage import buckets, folders, weights
from di_star_jax.storage.files import digest_of, expand, user_cache
from di_star_jax.storage.weights import Stored

FORMATS = ("diffusers", "kohya")
TARGETS = ("attention", "feed_forward", "projections")  # of what is taken from two networks
ABOUT = "di_star_jax"  # of a file's header: what the run was, as JSON
_BESIDE = "adapters"  # of a denoiser's folder: the file that was merged, by its base's digest
_PEFT = "lora_adapter_metadata"  # of a file's header: PEFT's config, as diffusers writes it
_UNET = "UNet2DConditionModel"
# What ends a tensor's name, and what it then is.
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
# Names of what is no plain pair of matrices, and what it is.
_OTHERS = (
    (r"\.(hada_|lokr_|oft_|diff$|diff_b$)", "a file of LoHa, LoKr or other adapters"),
    (r"\.(dora_scale|lora_magnitude_vector)", "a file of DoRA's adapters"),
    (r"\.lora_mid\.", "a file of adapters of three matrices"),
)
_OF_TEXT = re.compile(r"^(lora_te\d?_|text_encoder(_\d)?\.|lora_prior_te_)")


class Adapter(NamedTuple):
    """Of one module: what is added to its matrix is alpha / r up down.

    down: float32 [r, in] or [r, in, kh, kw]. up: [out, r] or [out, r, 1, 1].
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to a matrix. Args: its shape."""
        up, down = (part.reshape(len(part), -1) for part in (self.up, self.down))
        return (np.float32(self.scale) * (up @ down)).reshape(shape)


Adapters = Mapping[str, Adapter]  # by the module's name in diffusers


def of_run(learnt: dict, low_rank: Lora) -> Adapters:
    """A run's adapters, one for each block of a stack. Args: learnt, {ADAPTERS: tree}."""
    flat = traverse_util.flatten_dict(learnt[ADAPTERS])
    parts = {}
    for part in ("a", "b"):
        # By the rule by which kernels get PyTorch's names and layout.
        kernels = {(*path[:-1], "kernel"): x for path, x in flat.items() if path[-1] == part}
        tensors = weights.tensors_from_params(traverse_util.unflatten_dict(kernels))
        parts[part] = {name.removesuffix(".weight"): x for name, x in tensors.items()}
    found = {}
    for module, down in parts["a"].items():
        up = parts["b"][module]
        up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
        found[module] = Adapter(down, up, low_rank.alpha)
    return found


def as_tree(found: Adapters, params: dict) -> tuple[dict, int]:
    """Adapters as `models.lora.bind` takes frozen ones, {FROZEN: tree}, and the largest rank.

    Smaller ones are filled with zeros, and a stack's blocks that have none get zeros; alpha / r is
    in B. Args: params, of the denoiser; may be abstract. Returns: NumPy arrays, float32.
    """
    rank = max(adapter.rank for adapter in found.values())
    tree = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[-1] != "kernel":
            continue
        names = weights.torch_keys(path, kernel)
        rows = [names] if isinstance(names, str) else names
        each = [found.get(name.removesuffix(".weight")) for name in rows]
        if not any(each):
            continue
        shape = kernel.shape if isinstance(names, str) else kernel.shape[1:]
        pairs = [_factors(adapter, shape, rank) for adapter in each]
        for part, arrays in zip(("a", "b"), zip(*pairs)):
            whole = arrays[0] if isinstance(names, str) else np.stack(arrays)
            tree[(*path[:-1], part)] = whole
    return {FROZEN: traverse_util.unflatten_dict(tree)}, rank


def _factors(
    adapter: Adapter | None,
    shape: tuple[int, ...],
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A [..., in, r] and B [r, out] of a kernel [..., in, out]. Args: shape, of the kernel."""
    a = np.zeros((*shape[:-1], rank), np.float32)
    b = np.zeros((rank, shape[-1]), np.float32)
    if adapter is not None:
        axes = (2, 3, 1, 0) if len(shape) == 4 else (1, 0)
        down = adapter.down.reshape(adapter.rank, shape[-2], *shape[:-2])
        a[..., : adapter.rank] = down.transpose(axes)
        b[: adapter.rank] = adapter.scale * adapter.up.reshape(shape[-1], adapter.rank).T
    return a, b


def has_readers(config: dict) -> bool:
    """Whether others have readers of adapters for a denoiser. Args: its config.json."""
    return class_name(config) == _UNET


# Of two networks.


class Extracted(NamedTuple):
    """The low-rank part of a difference.

    kept: share of the squared norm of the difference of the adapted matrices that it has.
    adapted: share of the squared norm of the whole networks' difference that these have.
    """

    adapters: Adapters
    kept: float
    adapted: float


def denoiser_folder(source: str) -> Path:
    """The folder of a denoiser, alone or in a pipeline or an export. Raises: UserError."""
    folder = in_workdir(folders.resolve(source))
    if folders.is_pipeline(folder):
        return denoiser_in(folder, family_at(folder))
    if not is_denoiser(class_name(read_config(folder))):
        raise UserError(f"{source} holds no denoiser; give the folder of one, or of a pipeline")
    return folder


def extracted(
    finetuned: Path,
    base: Path,
    rank: int,
) -> Extracted:
    """The best approximation of rank r to what one network has learnt from another's weights.

    By the singular values of each matrix's difference, whose roots both factors get.

    Args: folders of two denoisers of one kind.
    Raises: UserError for a rank above the smallest matrix, and networks of different kinds.
    """
    params = abstract_model(read_config(base)).params
    shapes = weights.shapes(params)
    targeted = _targeted(params, TARGETS)
    for key in targeted:
        rows, columns = shapes[key][0], math.prod(shapes[key][1:])
        if rank > min(rows, columns):
            raise UserError(
                f"--extract_lora={rank} is more than {key}, a matrix of {rows} x {columns}, can "
                f"have; use {min(rows, columns)} or less"
            )
    adapters, kept, of_adapted, of_all = {}, 0.0, 0.0, 0.0
    with weights.opened(base) as of_base, weights.opened(finetuned) as of_finetuned:
        before = weights.matched(str(base), params, of_base)
        after = weights.matched(str(finetuned), params, of_finetuned)
        for key, shape in shapes.items():
            change = _float32(after[key]) - _float32(before[key])
            square = float(np.vdot(change, change))
            if not math.isfinite(square):
                raise UserError(
                    f"{key} of {finetuned} or {base} is not finite; use undamaged files"
                )
            of_all += square
            if key in targeted:
                u, s, v = np.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
                of_adapted += float(np.vdot(s, s))
                kept += float(np.vdot(s[:rank], s[:rank]))
                root = np.sqrt(s[:rank])
                down = (root[:, None] * v[:rank]).reshape(rank, *shape[1:])
                up = (u[:, :rank] * root).reshape(shape[0], rank, *(1,) * (len(shape) - 2))
                adapters[key.removesuffix(".weight")] = Adapter(down, up, float(rank))
    if not of_adapted:
        raise UserError(
            f"{finetuned} and {base} have the same {', '.join(TARGETS)}, so there is nothing to "
            "extract; give the network before and after it was trained"
        )
    return Extracted(adapters, kept / of_adapted, of_adapted / of_all)


def _targeted(params: dict, targets: tuple[str, ...]) -> set[str]:
    """Names of the matrices that adapters are for."""
    found = set()
    for path, kernel in lora.targeted(params, targets):
        names = weights.torch_keys((*path, "kernel"), kernel)
        found |= {names} if isinstance(names, str) else {*names}
    return found


def _float32(tensor: Stored) -> np.ndarray:
    return tensor.read().astype(np.float32)


# Out.


def check_format(config: dict, kind: str) -> None:
    """Raises: UserError where nobody reads a format. Args: a denoiser's config.json; of FORMATS."""
    if kind == "kohya" and not has_readers(config):
        raise UserError(
            "--format=kohya of PixArt-alpha, for which there are no such names that others read; "
            "use --format=diffusers"
        )


def write(
    file: Path,
    adapters: Adapters,
    config: dict,
    *,
    kind: str,
    dtype: str,
    about: dict,
) -> None:
    """Writes a safetensors file.

    Args:
      file: of which there is none yet.
      config: config.json of the denoiser.
      kind: of FORMATS. dtype: of all but alpha.
      about: of the run, for the header.
    Raises: UserError for a format that nobody reads, values that are not finite in dtype, and a
      file that cannot be written.
    """
    check_format(config, kind)
    tensors, exact = {}, []
    names = _names(config)
    for module, adapter in adapters.items():
        name = names[module][kind]
        if kind == "kohya":
            tensors[f"{name}.lora_down.weight"] = _stored(adapter.down)
            tensors[f"{name}.lora_up.weight"] = _stored(adapter.up)
            tensors[f"{name}.alpha"] = _stored(np.float32(adapter.alpha))
            exact.append(f"{name}.alpha")
        else:
            tensors[f"{name}.lora_A.weight"] = _stored(adapter.down)
            tensors[f"{name}.lora_B.weight"] = _stored(np.float32(adapter.scale) * adapter.up)
    header = {ABOUT: json.dumps(about)}
    if has_readers(config):
        # By which A1111 and Forge know whether to offer a file.
        header["ss_base_model_version"] = "sdxl_base_v1-0" if _is_sdxl(config) else "sd_v1"
    weights.write_new_file(file, tensors, jnp.dtype(dtype), exact=exact, metadata=header)


def _stored(array: np.ndarray) -> Stored:
    return Stored(np.shape(array), "F32", lambda: array)


def _is_sdxl(config: dict) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _names(config: dict) -> dict[str, dict[str, str]]:
    """What modules are called in files: {module: {format, or "others": name}}.

    Others is a name in the layout that kohya's has not for the family, which some write.
    """
    shapes = weights.shapes(abstract_model(config).params)
    keys = [key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1]
    named_by_others = has_readers(config)
    places = original.places(original.UNET, shapes) if named_by_others else {}
    found = {}
    for key in keys:
        module = key.removesuffix(".weight")
        prefix = "unet" if named_by_others else "transformer"
        found[module] = {"diffusers": f"{prefix}.{module}"}
        if named_by_others:
            flat = module.replace(".", "_")
            of_original = places[key].name.removesuffix(".weight").replace(".", "_")
            kohya, other = (of_original, flat) if _is_sdxl(config) else (flat, of_original)
            found[module] |= {"kohya": f"lora_unet_{kohya}", "others": f"lora_unet_{other}"}
    return found


# In.


def is_file(path: str | os.PathLike) -> bool:
    """Whether a user's input is a file of adapters, on this machine or in a bucket.

    Raises: UserError for a file that is no safetensors file, or was cut off.
    """
    if buckets.is_remote(path):
        if not str(path).endswith(".safetensors"):
            return False
    elif not expand(path).is_file():
        return False
    here = buckets.local(path)
    with buckets.named(here, str(path)), weights.opened(here) as stored:
        return original.is_lora(stored)


def read(file: Path, config: dict) -> Adapters:
    """The adapters of a denoiser in a file, of either format; those of text encoders are left out.

    Args: config, config.json of the denoiser that they are for.
    Raises: UserError for a file of another denoiser, of other adapters, or of text encoders alone.
    """
    names = _names(config)
    # diffusers' save_lora_adapter leaves out what stands before a module's name.
    module_of = {module: module for module in names}
    module_of |= {name: module for module, s in names.items() for name in s.values()}
    shapes = weights.shapes(abstract_model(config).params)
    with weights.opened(file) as stored:
        _check_kind(file, stored)
        parts = {}
        of_denoiser = {name: tensor for name, tensor in stored.items() if not _OF_TEXT.match(name)}
        if not of_denoiser:
            raise UserError(
                f"{file} is a LoRA file of text encoders alone, expected one of a denoiser; give "
                "one"
            )
        for name, tensor in of_denoiser.items():
            suffix = next((end for end in _PARTS if name.endswith(end)), None)
            module = suffix and module_of.get(name.removesuffix(suffix))
            if module is None:
                raise UserError(f"{file} has adapters of another network: {name} is none {_HERE}")
            if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{file}: {name} is stored as {tensor.dtype}, expected F32 or F16")
            parts.setdefault(module, {})[_PARTS[suffix]] = (name, tensor)
        alpha_of = _alphas(file)
        found = {}
        for module, pair in parts.items():
            if not {"down", "up"} <= pair.keys():
                name = next(iter(pair.values()))[0]
                raise UserError(
                    f"{file} has {name}, but not what it is multiplied with; download it again"
                )
            down, up = (pair[part][1] for part in ("down", "up"))
            _check_shapes(file, pair, shapes[f"{module}.weight"])
            rank = down.shape[0]
            alpha = float(pair["alpha"][1].read()) if "alpha" in pair else alpha_of(module, rank)
            found[module] = Adapter(_float32(down), _float32(up), alpha)
            if not all(np.isfinite(part).all() for part in found[module]):
                raise UserError(
                    f"{file}: the adapter of {module} is not finite; use an undamaged file"
                )
    return found


_HERE = "of this base's; give the denoiser that the file was made for as weights.reference"


def _check_kind(file: Path, stored: Mapping[str, Stored]) -> None:
    for pattern, kind in _OTHERS:
        name = next((name for name in stored if re.search(pattern, name)), None)
        if name:
            raise UserError(
                f"{file} is {kind} ({name}), expected a LoRA of the denoiser alone; give one"
            )


def _check_shapes(
    file: Path,
    pair: dict[str, tuple[str, Stored]],
    shape: tuple[int, ...],
) -> None:
    """Raises: UserError for factors whose product is no matrix of this shape."""
    (name, down), (_, up) = pair["down"], pair["up"]
    rank = down.shape[0] if down.shape else 0
    fits = (
        rank > 0
        and up.shape[:2] == (shape[0], rank)
        and math.prod(up.shape[2:]) == 1
        and _without_ones(down.shape[1:]) == _without_ones(shape[1:])
    )
    if not fits:
        raise UserError(
            f"{file} is of another base: {name} and its partner are {list(down.shape)} and "
            f"{list(up.shape)}, for a matrix of {list(shape)}; give the denoiser that the file "
            "was made for as weights.reference"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution of one pixel may lie as a matrix."""
    return shape[:1] if all(size == 1 for size in shape[1:]) else shape


def _alphas(file: Path) -> Callable[[str, int], float]:
    """(module, rank) -> alpha where no tensor says it: by PEFT's config in the header, else r."""
    config = _header(file).get(_PEFT)
    config = json.loads(config) if config else {}
    fields = {re.sub(r"^(unet|transformer)\.", "", name): value for name, value in config.items()}
    patterns = fields.get("alpha_pattern") or {}

    def alpha_of(module: str, rank: int) -> float:
        named = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
        alpha = float(next(named, fields.get("lora_alpha", rank)))
        return alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha

    return alpha_of


def _header(file: Path) -> dict[str, str]:
    return folders.open_weights(file).metadata() or {}


def as_folder(file: str, reference: str) -> str:
    """The folder of the reference's denoiser with the adapters of a file merged into it, float32.

    It is made once in the user's cache, where both are known by their content.

    Args: reference, folder or Hub name of a pipeline.
    Raises: UserError as of `read`.
    """
    base = denoiser_folder(reference)
    path = buckets.local(file)
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update(folders.digest(base).encode())
    folder = user_cache() / "lora" / digest.hexdigest()
    _say_what_is_left_out(file, path)
    if folders.is_model(folder):
        log.say(f"{file}: it was merged with the denoiser of {reference} in {folder}")
        return str(folder)
    config = read_config(base)
    with buckets.named(path, file):
        adapters = read(path, config)
    log.say(
        f"{file}: a LoRA of {_ranks(adapters)} in {len(adapters)} modules{_made_for(path, base)}; "
        f"merging it once with the denoiser of {reference}, into {folder}"
    )
    with folders.new_folder(folder, [base, path]) as partial:
        folders.write_object(partial / "config.json", config)
        (partial / _BESIDE).mkdir()
        shutil.copyfile(path, partial / _BESIDE / f"{folders.digest(base)}.safetensors")
        lora_file = card.base_of_file(path, file.rpartition("/")[2], digest_of(path))
        about = card.About("", (*card.bases_of(reference), lora_file))
        folders.write_object(partial / card.FACTS, about.facts())
        name = weights_name(folders.DIFFUSERS, "float32")
        weights.write_tensors(partial, merged(base, config, adapters), name, jnp.float32)
    return str(folder)


def _say_what_is_left_out(file: str, path: Path) -> None:
    with weights.opened(path) as stored:
        count = sum(bool(_OF_TEXT.match(name)) for name in stored)
    if count:
        log.say(
            f"warning: {file} has adapters of text encoders too, {count} tensors, which are left "
            "out: a run's text encoders are the reference's; to have them, merge the file with a "
            "whole pipeline (in diffusers load_lora_weights, fuse_lora and save_pretrained) and "
            "give that as weights.reference"
        )


def is_merged(folder: Path) -> bool:
    """Whether `as_folder` has made a denoiser's folder."""
    return (folder / _BESIDE).is_dir()


def beside(folder: Path, base: Path) -> Path | None:
    """The file of adapters that `as_folder` made a denoiser of, if it was on this base."""
    file = folder / _BESIDE / f"{folders.digest(base)}.safetensors"
    return file if file.is_file() else None


def merged(
    base: Path,
    config: dict,
    adapters: Adapters,
) -> Iterator[tuple[str, np.ndarray]]:
    """A denoiser's tensors with adapters merged into them, float32, one at a time."""
    params = abstract_model(config).params
    with weights.opened(base) as stored:
        for key, tensor in weights.matched(str(base), params, stored).items():
            array = _float32(tensor)
            adapter = adapters.get(key.removesuffix(".weight"))
            yield key, array if adapter is None else array + adapter.product(array.shape)


def _ranks(adapters: Adapters) -> str:
    ranks = {adapter.rank for adapter in adapters.values()}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def _made_for(file: Path, base: Path) -> str:
    """What one of our own files says of itself: its generator's times, and another base."""
    about = json.loads(_header(file).get(ABOUT, "{}"))
    said = ""
    if about.get("timesteps"):
        said += f", for a generator at times {', '.join(map(str, about['timesteps']))}"
    if about.get("base_digest") not in (None, folders.digest(base)):
        said += f" (warning: it was made for other weights than these, {about.get('base')})"
    return said
