# SPDX-License-Identifier: Apache-2.0
"""A diffusers folder as models: configs, graphs, parameters, tokenizers and schedule."""

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import models, sharding
from di_star_jax.diffusion import Betas, FewStep, Schedule
from di_star_jax.errors import UserError
from di_star_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from di_star_jax.models.config import check_others, shown
from di_star_jax.models.lora import Lora, bind
from di_star_jax.models.pixart import PixArtConfig, PixArtTransformer2DModel
from di_star_jax.models.t5 import T5Config, T5EncoderModel
from di_star_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from di_star_jax.models.unet import (
    V_PREDICTION,
    Condition,
    UNet2DConditionModel,
    UNetConfig,
)
from di_star_jax.models.vae import AutoencoderKL, VAEConfig
from di_star_jax.pipelines.export import form_of
from di_star_jax.pipelines.families import family_of, is_denoiser
from di_star_jax.pipelines.family import DENOISER, TEXT, Family, conditions
from di_star_jax.pipelines.scheduler import (
    NUM_TRAIN_TIMESTEPS,
    SchedulerFile,
    betas_of,
    predicts_v,
    schedule_from_json,
)
from di_star_jax.prompts.t5 import T5Tokenizer
from di_star_jax.prompts.tokens import Tokenizer, token_batch
from di_star_jax.storage import folders, weights


class Port(NamedTuple):
    """A class of PyTorch's and what is ours of it.

    module: built of (settings, rngs=, dtype=, remat=), and kernel= where attention is long.
    settings: its frozen dataclass, with `from_json`.
    long_attention: false for CLIPs and T5, whose attention is short, and in text encoders masked.
    tokenizer: of a text encoder's prompts.
    """

    module: type[nnx.Module]
    settings: Any
    long_attention: bool = False
    tokenizer: type = Tokenizer


_PORTS = {
    "UNet2DConditionModel": Port(UNet2DConditionModel, UNetConfig, long_attention=True),
    "PixArtTransformer2DModel": Port(PixArtTransformer2DModel, PixArtConfig, long_attention=True),
    # PixArt's published files say this, of a class that diffusers has parted since.
    "Transformer2DModel": Port(PixArtTransformer2DModel, PixArtConfig, long_attention=True),
    "AutoencoderKL": Port(AutoencoderKL, VAEConfig, long_attention=True),
    "AutoencoderTiny": Port(AutoencoderTiny, TinyVAEConfig),
    "CLIPTextModel": Port(CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": Port(CLIPTextModelWithProjection, CLIPTextConfig),
    "T5EncoderModel": Port(T5EncoderModel, T5Config, tokenizer=T5Tokenizer),
    "CLIPModel": Port(CLIPModel, CLIPConfig),
    "CLIPVisionModelWithProjection": Port(CLIPVisionModelWithProjection, CLIPConfig),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a network runs and is held, beside what its config.json says.

    dtype: it computes in.
    param_dtype: of its parameters in memory.
    remat: what blocks keep for the backward pass, a key of models.layers.REMAT.
    kernel: of long self-attention, see models/attention.py.
    shardings: from a tree of `jax.ShapeDtypeStruct` to a tree of its shardings; None is the default
      device.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    kernel: str = "xla"
    shardings: Callable[[Any], Any] | None = None

    def placed(self, tree: Any) -> Any:
        """The tree of `jax.ShapeDtypeStruct` with the parameters' dtype and shardings."""
        shardings = None if self.shardings is None else self.shardings(tree)
        return sharding.abstract(tree, shardings, self.param_dtype)


PLAIN = Options()


class Model(NamedTuple):
    """One network: `nnx.merge(graphdef, params)` runs it; `config` is its folder's config.json.

    lora: of a denoiser whose adapters learn, which params has none of; else None.
    """

    graphdef: nnx.GraphDef
    params: Any
    config: dict
    lora: Lora | None = None

    def network(self, params: Any) -> nnx.Module:
        """The network of other parameters, which may have adapters."""
        return bind(self.graphdef, self.lora, params)


class Pipeline(NamedTuple):
    """A diffusers pipeline folder.

    models, tokenizers: those of the family's that are there, by component; without its text
      encoders it needs `of_empty`, and prompts' states in place of token ids.
    form: of its denoiser, if that is a few-step generator, else None.
    scheduler: its scheduler_config.json, which the times of samplers are from.
    of_empty: what the text encoders make of "", where they are not there.
    """

    folder: Path
    family: Family
    models: dict[str, Model]
    tokenizers: dict[str, Tokenizer | T5Tokenizer]
    schedule: Schedule
    form: FewStep | None = None
    scheduler: SchedulerFile = SchedulerFile()
    of_empty: Condition | None = None

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return vae_scale(self.models["vae"].config)

    def encode_text(
        self,
        params: dict[str, Any],
        token_ids: dict[str, jax.Array],
        resolution: int,
    ) -> tuple[Condition, Condition]:
        """(condition, null condition) of B prompts, for images of so many pixels.

        Args: params, of the text encoders by component; token_ids [B, L], by tokenizer, or the
        prompts' states under TEXT.
        """
        if TEXT in token_ids:
            return conditions(self.family, token_ids[TEXT], self.of_empty, resolution)
        graphdefs = {name: model.graphdef for name, model in self.models.items()}
        of_empty = None
        if not self.family.null_is_zero:
            null_ids = token_batch([""], self.tokenizers)
            of_empty = self.family.encode_text(graphdefs, params, null_ids)
        text = self.family.encode_text(graphdefs, params, token_ids)
        return conditions(self.family, text, of_empty, resolution)


def vae_scale(config: dict) -> int:
    """Image pixels per latent pixel, along one side. Args: the VAE's config.json."""
    return VAEConfig.from_json(config).scale


def class_name(config: dict) -> Any:
    """What a config.json says it is of: a name of `_PORTS`, another one, or nothing of use."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return config.get("_class_name") or first


def _port(config: dict, file: str) -> Port:
    name = class_name(config)
    if not isinstance(name, str) or name not in _PORTS:
        nothing = "nothing, for it has neither _class_name nor architectures"
        what = nothing if name is None else shown(name).strip("'")
        raise UserError(f"{file} describes {what}, expected one of {', '.join(_PORTS)}")
    return _PORTS[name]


def model_class(config: dict, file: str = "config.json") -> tuple[type[nnx.Module], Any]:
    """The module's class and its frozen settings.

    Args: a parsed config.json; its path, for errors. Raises: UserError for what is not ported.
    """
    port = _port(config, file)
    return port.module, port.settings.from_json(config, file)


def read_config(folder: str | os.PathLike, part: str = "") -> dict:
    """config.json of a model's folder, or of a pipeline's part, whose class and settings are
    ported.

    Raises: UserError that names the file where they are not.
    """
    config = folders.read_config(folder, part)
    model_class(config, str(Path(folder) / part / "config.json"))
    return config


def check_tiny_vae(
    config: dict,
    vae: dict,
    file: str,
) -> None:
    """Looks whether a tiny decoder may stand for a pipeline's VAE. Args: config.json of both.

    Raises: UserError that names the file where it is of another class, or of other latents.
    """
    found = TinyVAEConfig.from_json(config, file)
    model_class(config, file)  # that it says its class at all
    found.check_stands_for(VAEConfig.from_json(vae), file)


def abstract_model(config: dict, options: Options = PLAIN) -> Model:
    """A model from its config.json without allocating it; params are `jax.ShapeDtypeStruct`.

    Args:
      config: with `_class_name` (diffusers) or `architectures` (transformers).
      options: their dtype and shardings are those of params.
    Raises: UserError for a class or a setting that is not ported.
    """
    return abstract_port(_port(config, "config.json"), config, options)


def abstract_port(
    port: Port,
    config: dict,
    options: Options,
) -> Model:
    """As `abstract_model`, of a class that config.json does not name."""
    settings = port.settings.from_json(config)
    given = {"dtype": options.dtype, "remat": options.remat}
    if port.long_attention:
        given["kernel"] = options.kernel
    graphdef, params = _abstract(port.module, settings, **given)
    return Model(graphdef, options.placed(params), config)


@functools.lru_cache(maxsize=64)
def _abstract(module: Callable[..., nnx.Module], settings: Any, **given) -> tuple:
    """`models.abstract`, which takes seconds at full size, once for networks that are alike."""
    return models.abstract(lambda rngs: module(settings, rngs=rngs, **given))


def load_model(
    folder: Path,
    options: Options = PLAIN,
    *,
    config: dict | None = None,
    arrange: weights.Arrange = dict,
) -> Model:
    """Reads one model folder.

    Args:
      folder: with safetensors, and a config.json unless `config` is given.
      arrange: of the stored tensors, as in `weights.load`.
    Raises: UserError for whatever is wrong with the folder.
    """
    model = abstract_model(read_config(folder) if config is None else config, options)
    return model._replace(params=weights.load(folder, model.params, arrange=arrange))


def with_prediction(config: dict, scheduler: SchedulerFile) -> dict:
    """A denoiser's config.json that says of it what its pipeline's scheduler says."""
    config = {name: value for name, value in config.items() if name != V_PREDICTION}
    if not predicts_v(scheduler):
        return config
    betas = Betas(NUM_TRAIN_TIMESTEPS, **betas_of(*scheduler))
    return config | {V_PREDICTION: dataclasses.asdict(betas)}


def load_denoiser(
    folder: Path,
    family: Family,
    scheduler: SchedulerFile,
    options: Options = PLAIN,
) -> Model:
    """As `load_model`, of a network that is to run in a pipeline.

    Args: the pipeline's family and scheduler.
    Raises: UserError for a network that is not the family's denoiser, too.
    """
    classes = family.parts[DENOISER].classes
    if class_name(read_config(folder)) not in classes:
        raise UserError(
            f"{folder} holds no denoiser of {family.name}; give the folder of a {classes[0]}"
        )
    return load_model(folder, options, config=with_prediction(read_config(folder), scheduler))


def _check_prediction(
    around: Path,
    own: dict | None,
    reference: dict | None,
) -> None:
    """Raises: UserError where one of two networks predicts v and the other noise, or v of another
    schedule. Args: around, the pipeline of the first; what stands under V_PREDICTION.
    """
    if own == reference:
        return
    ours = "noise" if own is None else "v"
    if own is not None and reference is not None:
        ours = "v, of another schedule"
    raise UserError(
        f"the denoiser of {around} predicts {ours} (its {'/'.join(folders.SCHEDULER)} says so), "
        f"but the reference predicts {'noise' if reference is None else 'v'}; give a network that "
        "predicts what the reference does"
    )


def check_like(folder: Path, config: dict) -> None:
    """Looks whether a folder's weights may be run as a network of another folder.

    Whether it predicts eps or v, the pipeline around it says; alone, it is taken for the other's.

    Args: the folder, which may lack config.json; the config.json of the network.
    Raises: UserError where its settings are others, which shapes of weights need not show.
    """
    if not (folder / "config.json").is_file():
        return
    own = read_config(folder)
    around = folder.parent
    if not folders.is_pipeline(around):
        own |= {name: config[name] for name in (V_PREDICTION,) if name in config}
    elif is_denoiser(class_name(own)):
        own = with_prediction(own, check_pipeline(around)[1])
        _check_prediction(around, own.get(V_PREDICTION), config.get(V_PREDICTION))
    _, found = model_class(own)
    _, expected = model_class(config)
    if type(found) is not type(expected):
        raise UserError(
            f"{folder / 'config.json'} is of {class_name(read_config(folder))}, expected "
            f"{class_name(config)}; give the folder of one"
        )
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(expected, field.name), getattr(found, field.name)
        if field.compare and ours != theirs:
            raise UserError(
                f"{folder / 'config.json'} has {field.name}={shown(theirs)}, but the reference has "
                f"{shown(ours)}; give a network of the reference's kind"
            )


def load_pipeline(
    folder: Path,
    default: Options = PLAIN,
    options: Mapping[str, Options] = types.MappingProxyType({}),
    of_empty: Condition | None = None,
) -> Pipeline:
    """Reads a pipeline folder.

    Args:
      options: by component; the default for one that is not named.
      of_empty: what the text encoders make of "", where they are to be left out.
    Raises: UserError for whatever is wrong with the folder.
    """
    family, scheduler = check_pipeline(folder)
    left_out = () if of_empty is None else family.tokenizers.values()
    configs = {name: read_config(folder, part.folder) for name, part in family.parts.items()}
    configs[DENOISER] = with_prediction(configs[DENOISER], scheduler)
    models = {
        name: load_model(folder / part.folder, options.get(name, default), config=configs[name])
        for name, part in family.parts.items()
        if name not in left_out
    }
    return Pipeline(
        folder,
        family,
        models,
        load_tokenizers(folder, family),
        schedule_from_json(*scheduler),
        form_of(scheduler.config, family.one_step),
        scheduler,
        of_empty,
    )


def check_pipeline(folder: Path) -> tuple[Family, SchedulerFile]:
    """Looks at all settings of a pipeline folder, before any weights are read.

    Returns: its family, and the settings of its scheduler.
    Raises: UserError, naming file and field, for a pipeline that is not ported, for a part that is
      missing or of another class, for a field that is not followed, and for parts that do not go
      together.
    """
    file = str(folder / "model_index.json")
    index = folders.read_config(folder, name="model_index.json")
    family = family_of(index, file)
    parts = [part.folder for part in family.parts.values()]
    needed = (*parts, *family.tokenizers, folders.SCHEDULER[0])
    for name in needed:
        kind = index.get(name)
        if (
            not isinstance(kind, list)
            or len(kind) != 2
            or not all(isinstance(k, str) for k in kind)
        ):
            raise UserError(
                f"{file} has {name}={shown(kind)}, expected the library and the class of a "
                f"component that {family.name} needs; give the folder of a whole pipeline"
            )
    check_others(family.index, index, file, needed)
    configs = {name: read_config(folder, part.folder) for name, part in family.parts.items()}
    for name, part in family.parts.items():
        found = class_name(configs[name])
        if found not in part.classes:
            raise UserError(
                f"{folder / part.folder / 'config.json'} is of a {found}, expected a "
                f"{part.classes[0]}; give the folder of a whole {family.name} pipeline"
            )
    _check_fits(family, configs, folder)
    scheduler = folders.read_config(folder, *folders.SCHEDULER)
    scheduler_file = SchedulerFile(scheduler, str(folder.joinpath(*folders.SCHEDULER)))
    schedule_from_json(*scheduler_file)
    if predicts_v(scheduler_file) and class_name(configs[DENOISER]) != "UNet2DConditionModel":
        raise UserError(
            f"{scheduler_file.file} has prediction_type='v_prediction', which the port has for the "
            f"UNets of SDXL and SD 1.5, not for {family.name}; give a pipeline that predicts eps"
        )
    return family, scheduler_file


def _check_fits(
    family: Family,
    configs: dict[str, dict],
    folder: Path,
) -> None:
    file = folder / family.parts[DENOISER].folder / "config.json"
    for fit in family.fits(configs):
        if fit.found != fit.expected:
            raise UserError(
                f"{file} has {fit.field}={fit.found!r}, expected {fit.expected!r} as {fit.of}; "
                f"give the parts of one {family.name} pipeline"
            )


def load_tokenizers(folder: Path, family: Family) -> dict[str, Tokenizer | T5Tokenizer]:
    """Of a pipeline's folder. Raises: UserError for one that its text encoder has no tables for."""
    found = {}
    for name, part in family.tokenizers.items():
        config = folders.read_config(folder, part)
        file = str(folder / part / "config.json")
        port = _port(config, file)
        found[name] = port.tokenizer(folder / name)
        found[name].check_fits(port.settings.from_json(config, file), part)
    return found
