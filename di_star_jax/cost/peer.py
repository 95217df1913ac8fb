# SPDX-License-Identifier: Apache-2.0
"""The benchmark's opponent: the same work in PyTorch with diffusers and transformers, one device.

Written from the paper (Eq. 3.4, 3.8, 2.2), not from our step, so that tests/test_peer.py proves one
by the other. Images and latents are NCHW here; B is the batch, h and w are a latent's sides. Only
the functions of this module import torch, so that the package can be walked without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from di_star_jax.errors import UserError
from di_star_jax.gradients import Settings
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD, resize_matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# torch.compile gets these, one at a time, as diffusers advises: many of SDXL's are alike and share
# their code, and a whole UNet would take minutes for each of the three ways in which a step uses
# one.
COMPILED = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
# Parameters; a UNet of more is recomputed in the backward pass on a GPU, as ours is.
FULL_SIZE = 10**9
DECODED_PIXELS = 2**21  # decoded at a time: for the backward pass a 1024-pixel image keeps 13 GB


class Modules(NamedTuple):
    """Networks: the first two with float32 parameters, the others frozen in the compute dtype."""

    generator: nn.Module
    assistant: nn.Module
    reference: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    reward: nn.Module


class Draws(NamedTuple):
    """All that is random in a step: noises [B, 4, h, w], standard normal; integer times [B]."""

    z: Tensor
    t: Tensor
    eps: Tensor
    t_psi: Tensor
    eps_psi: Tensor


class Condition(NamedTuple):
    """Of a UNet: [B, L, D], [B, P], [B, 6], float32."""

    context: Tensor
    pooled: Tensor
    time_ids: Tensor


class Method(NamedTuple):
    """What the equations need besides networks: settings; alpha and sigma by timestep [1000]."""

    settings: Settings
    alpha: Tensor
    sigma: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t, sigma_t [B, 1, 1, 1] at times [B]."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]


def method_of(settings: Settings, device: str) -> Method:
    """Settings with SDXL's schedule, as in its scheduler_config.json, float32."""
    import torch

    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return Method(settings, alpha.float().to(device), sigma.float().to(device))


def network(
    config: dict,
    *,
    dtype: torch.dtype,
    device: str,
    compile: bool = False,
) -> nn.Module:
    """The published code's network for a config.json, frozen, with random weights."""
    import torch

    name = config.get("_class_name") or config["architectures"][0]
    net = _built(name, config, device).eval().requires_grad_(False)
    torch.nn.Module.to(net, dtype=dtype, memory_format=torch.channels_last)
    if device == "cuda" and name == "UNet2DConditionModel" and net.num_parameters() > FULL_SIZE:
        net.enable_gradient_checkpointing()
    if compile:
        # Of a class: each shape, dtype and kind of gradient needs one.
        torch._dynamo.config.recompile_limit = 256
        for block in net.modules():
            if type(block).__name__ in COMPILED:
                block.forward = torch.compile(block.forward, dynamic=False)
    return net


def _built(
    name: str,
    config: dict,
    device: str,
) -> nn.Module:
    import diffusers
    import torch
    import transformers

    with torch.device(device):
        if name.startswith("CLIP"):
            cls = getattr(transformers, name)
            return cls(cls.config_class.from_dict(config))
        if name == "AutoencoderKL":  # whose file names them; our table of published ones does not
            blocks = len(config["block_out_channels"])
            down, up = ["DownEncoderBlock2D"] * blocks, ["UpDecoderBlock2D"] * blocks
            config = {"down_block_types": down, "up_block_types": up, **config}
        return getattr(diffusers, name).from_config(config)


def dtype_of(net: nn.Module) -> torch.dtype:
    """That of its parameters."""
    return next(net.parameters()).dtype


def predict_eps(
    unet: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    dtype: torch.dtype,
) -> Tensor:
    """eps [B, 4, h, w] float32, computed in dtype: by autocast where the parameters differ."""
    import torch

    stored = dtype_of(unet)
    added = {"text_embeds": condition.pooled.to(stored), "time_ids": condition.time_ids}
    # A context for each call: until its end autocast keeps what it cast, with or without a
    # gradient.
    with torch.autocast(x_t.device.type, dtype) if stored != dtype else contextlib.nullcontext():
        x_t = x_t.to(stored, memory_format=torch.channels_last)
        context = condition.context.to(stored)
        (eps,) = unet(x_t, t, context, return_dict=False, added_cond_kwargs=added)
    return eps.float()


def one_step(
    unet: nn.Module,
    z: Tensor,
    condition: Condition,
    method: Method,
    dtype: torch.dtype,
) -> Tensor:
    """x0 [B, 4, h, w] of the one-step generator."""
    import torch

    t = torch.full((len(z),), method.settings.generator.timesteps[0], device=z.device)
    alpha_t, sigma_t = method.at(t)
    return (z - sigma_t * predict_eps(unet, z, t, condition, dtype)) / alpha_t


def encode_text(
    first: nn.Module,
    second: nn.Module,
    token_ids: dict,
    pixels: int,
) -> tuple[Condition, Condition]:
    """SDXL's (condition, null condition).

    Args: both text encoders; token_ids [B, L]; the image's side, not cropped.
    """
    import torch

    with torch.no_grad():
        one = first(token_ids["tokenizer"], output_hidden_states=True)
        two = second(token_ids["tokenizer_2"], output_hidden_states=True)
    layers = [one.hidden_states[-2], two.hidden_states[-2]]
    context = torch.cat(layers, dim=-1).float()  # [B, L, 768 + 1280]
    pooled = two.text_embeds.float()
    time_ids = pooled.new_tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(len(pooled), 6)
    null = Condition(torch.zeros_like(context), torch.zeros_like(pooled), time_ids)
    return Condition(context, pooled, time_ids), null


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] to images [B, 3, H, W] in [-1, 1], float32."""
    import torch

    z = (latents / vae.config.scaling_factor).to(dtype_of(vae), memory_format=torch.channels_last)
    return vae.decode(z, return_dict=False)[0].float()


def embed_text(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """[B, L] -> [B, P] float32 of length 1."""
    import torch

    with torch.no_grad():
        features = clip.text_projection(clip.text_model(token_ids).pooler_output).float()
    return torch.nn.functional.normalize(features, dim=-1)


def make_score(
    vae: nn.Module,
    clip: nn.Module,
    pixels: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """PickScore's cosine of decoded images.

    Returns: score(latents [B, 4, h, w], text [B, P] of length 1) -> [B].
    """
    import torch

    resize = resize_matrix(pixels, clip.config.vision_config.image_size)
    constants = (resize, CLIP_MEAN[:, None, None], CLIP_STD[:, None, None])
    matrix, mean, std = (torch.from_numpy(value).to(clip.device) for value in constants)

    def score(latents: Tensor, text: Tensor) -> Tensor:
        x = ((decode(vae, latents) + 1) / 2).clamp(0, 1)
        x = (x @ matrix.T).clamp(0, 1)  # [B, 3, H, S]; Pillow stores 8 bits after each axis
        x = (matrix @ x).clamp(0, 1)  # [B, 3, S, S]
        seen = ((x - mean) / std).to(dtype_of(clip), memory_format=torch.channels_last)
        pooled = clip.vision_model(pixel_values=seen).pooler_output
        features = clip.visual_projection(pooled).float()
        return (torch.nn.functional.normalize(features, dim=-1) * text).sum(-1)

    return score


def value_and_gradient(
    fn: Callable,
    pixels: int,
    latents: Tensor,
    *others: Tensor,
) -> tuple[Tensor, Tensor]:
    """(fn(latents, *others) [B], its gradient [B, 4, h, w]).

    Of as many images at a time as DECODED_PIXELS holds.
    """
    import torch

    values, grads = [], []
    at_once = max(1, DECODED_PIXELS // pixels**2)
    for part, *rest in zip(latents.detach().split(at_once), *(x.split(at_once) for x in others)):
        value = fn(part.requires_grad_(), *rest)
        grads.append(torch.autograd.grad(value.sum(), part)[0])
        values.append(value.detach())
    return torch.cat(values), torch.cat(grads)


def regulariser(
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    conditions: tuple[Condition, Condition],
    modules: Modules,
    method: Method,
) -> Tensor:
    """-w(t) d'(y_t)^T (s_psi(x_t) - grad log q(x_t | x_0)), [B].

    Eq. 3.4 and 3.8, in scores as there. The gradient flows through x_t into both networks and into
    d'(y_t); their parameters are the caller's to freeze.
    """
    settings, size = method.settings, x0[0].numel()
    alpha_t, sigma_t = method.at(t)
    x_t = alpha_t * x0 + sigma_t * eps
    dtype = dtype_of(modules.reference)
    s_psi = -predict_eps(modules.assistant, x_t, t, conditions[0], dtype) / sigma_t
    s_ref = -guided_eps(modules.reference, x_t, t, conditions, settings.omega) / sigma_t
    y_t = s_psi - s_ref
    # Of scores, w(t) and c are those of the weighting's space.
    w_t = {"eps": sigma_t, "score": 1.0, "x0": sigma_t**2 / alpha_t}[settings.weighting]
    c = settings.constants.huber_c * size**0.5 / w_t
    d_prime = y_t / (y_t.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
    loss = -(w_t * d_prime * (s_psi + eps / sigma_t)).sum((1, 2, 3))
    return loss / size if settings.reduction == "mean" else loss


def guided_eps(
    unet: nn.Module,
    x_t: Tensor,
    t: Tensor,
    conditions: tuple[Condition, Condition],
    omega: float,
) -> Tensor:
    """A frozen UNet's classifier-free guided eps [B, 4, h, w]; of omega = 1 the conditional one."""
    import torch

    dtype = dtype_of(unet)
    if omega == 1:
        return predict_eps(unet, x_t, t, conditions[0], dtype)
    both = Condition(*(torch.cat(pair) for pair in zip(*conditions)))
    eps = predict_eps(unet, x_t.repeat(2, 1, 1, 1), t.repeat(2), both, dtype)
    eps_c, eps_0 = eps.chunk(2)
    return eps_0 + omega * (eps_c - eps_0)


class Results(NamedTuple):
    """Of a step: gradients by parameter's name, then [B] each, the last one an element's."""

    generator: dict[str, Tensor]
    assistant: dict[str, Tensor]
    reward: Tensor
    regulariser: Tensor
    denoising: Tensor


def step_gradients(
    method: Method,
    modules: Modules,
    token_ids: dict[str, Tensor],
    draws: Draws,
    reward_scale: float,
) -> Results:
    """Both gradients of the batch's mean losses; they stay in the parameters' `grad`.

    Args: token_ids, int64 [B, L] under 'tokenizer', 'tokenizer_2' and 'reward'; reward_scale,
      alpha_rew; others, see there.
    """
    generator, assistant = modules.generator, modules.assistant
    generator.requires_grad_(True).zero_grad(set_to_none=True)
    # Frozen while it only passes a gradient on: compiled blocks would work out their weights'
    # gradients too.
    assistant.requires_grad_(False).zero_grad(set_to_none=True)
    pixels = draws.z.shape[-1] * 2 ** (len(modules.vae.config.block_out_channels) - 1)
    conditions = encode_text(modules.text_encoder, modules.text_encoder_2, token_ids, pixels)
    x0 = one_step(generator, draws.z, conditions[0], method, dtype_of(modules.reference))
    # The gradient is found at x0 first, term by term: one term's activations are gone before the
    # next one's come.
    loss, d_loss = _regulariser_at(x0, draws, conditions, modules, method)
    reward, d_reward = _reward_at(x0, modules, token_ids["reward"], pixels, reward_scale)
    x0.backward(d_loss - reward_scale / len(x0) * d_reward)
    denoising = _train_assistant(x0.detach(), draws, conditions[0], modules, method)
    grads = [{name: p.grad for name, p in net.named_parameters()} for net in (generator, assistant)]
    return Results(*grads, reward, loss, denoising)


def _regulariser_at(
    x0: Tensor,
    draws: Draws,
    conditions: tuple[Condition, Condition],
    modules: Modules,
    method: Method,
) -> tuple[Tensor, Tensor]:
    """The regulariser [B], and its mean's gradient at x0."""
    import torch

    leaf = x0.detach().requires_grad_()
    loss = regulariser(leaf, draws.t, draws.eps, conditions, modules, method)
    (gradient,) = torch.autograd.grad(loss.mean(), leaf)
    return loss.detach(), gradient


def _reward_at(
    x0: Tensor,
    modules: Modules,
    token_ids: Tensor,
    pixels: int,
    reward_scale: float,
) -> tuple[Tensor, Tensor | float]:
    """The reward [B], and its gradient at x0 where it has a scale."""
    import torch

    score = make_score(modules.vae, modules.reward, pixels)
    text = embed_text(modules.reward, token_ids)
    if reward_scale:
        return value_and_gradient(score, pixels, x0, text)
    with torch.no_grad():
        return score(x0, text), 0.0


def _train_assistant(
    x0: Tensor,
    draws: Draws,
    condition: Condition,
    modules: Modules,
    method: Method,
) -> Tensor:
    """Eq. 2.2 with lambda(t) = sigma_t^2, backward; its value an element [B]."""
    modules.assistant.requires_grad_(True)
    alpha_t, sigma_t = method.at(draws.t_psi)
    x_t = alpha_t * x0 + sigma_t * draws.eps_psi
    dtype = dtype_of(modules.reference)
    eps = predict_eps(modules.assistant, x_t, draws.t_psi, condition, dtype)
    denoising = (eps - draws.eps_psi).square().sum((1, 2, 3))
    denoising.mean().backward()
    return denoising.detach() / x0[0].numel()


@dataclasses.dataclass(frozen=True)
class Job:
    """What the works run on: random weights and inputs.

    Args:
      configs: config.json by component.
      settings: of the step.
      batch, resolution: images of resolution x resolution pixels.
      dtype: "bfloat16" (trained UNets by autocast over float32 parameters) or "float32".
      device: "cuda" or "cpu".
      compile: blocks by torch.compile.
      reward_scale: alpha_rew of "train".
    """

    configs: dict[str, dict]
    settings: Settings
    batch: int
    resolution: int
    dtype: str
    device: str
    compile: bool
    reward_scale: float

    def frozen(self, part: str) -> nn.Module:
        """A network in the compute dtype."""
        return self._network(part, self.dtype)

    def trained(self, part: str) -> nn.Module:
        """A network with float32 parameters."""
        return self._network(part, "float32").requires_grad_(True)

    def _network(self, part: str, dtype: str) -> nn.Module:
        import torch

        options = {"dtype": getattr(torch, dtype), "device": self.device, "compile": self.compile}
        return network(self.configs[part], **options)

    def token_ids(self) -> dict[str, Tensor]:
        """[B, L] by tokenizer, and the reward's."""
        import torch

        parts = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "reward": "reward"}
        ids = {}
        for name, part in parts.items():
            text = self.configs[part].get("text_config", self.configs[part])
            shape = (self.batch, text.get("max_position_embeddings", 77))
            ids[name] = torch.randint(text.get("vocab_size", 49408), shape, device=self.device)
        return ids

    def normal(self) -> Tensor:
        """Standard normal latents [B, 4, h, w]."""
        import torch

        side = self.resolution // 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)
        channels = self.configs[DENOISER].get("in_channels", 4)
        return torch.randn(self.batch, channels, side, side, device=self.device)

    def times(self, first: int, last: int) -> Tensor:
        """Times [B] from first to last."""
        import torch

        return torch.randint(first, last + 1, (self.batch,), device=self.device)

    def draws(self) -> Draws:
        """Of one step."""
        t, t_psi = (
            self.times(*bounds)
            for bounds in (self.settings.generator_times, self.settings.assistant_times)
        )
        return Draws(self.normal(), t, self.normal(), t_psi, self.normal())


def _train(job: Job) -> Callable[[], None]:
    """The whole step: both gradients, clipped, AdamW on both networks, the generator's average."""
    import torch

    generator, assistant = job.trained(DENOISER), job.trained(DENOISER)
    frozen = (DENOISER, "vae", "text_encoder", "text_encoder_2", "reward")
    modules = Modules(generator, assistant, *map(job.frozen, frozen))
    method, token_ids = method_of(job.settings, job.device), job.token_ids()
    trained = [list(unet.parameters()) for unet in (generator, assistant)]
    average = [p.detach().clone() for p in trained[0]]
    share = 1 - 0.5 ** (job.batch / job.settings.ema_half_life)
    adam = functools.partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=0.01, fused=True)
    optimizers = [adam(params, lr=5e-7) for params in trained]

    def run() -> None:
        step_gradients(method, modules, token_ids, job.draws(), job.reward_scale)
        for params, optimizer, limit in zip(trained, optimizers, job.settings.clip_norms):
            torch.nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, trained[0], share)

    return run


def _sample(job: Job) -> Callable[[], Tensor]:
    """Prompts to 8-bit images [B, 3, H, W]."""
    import torch

    unet, vae = job.frozen(DENOISER), job.frozen("vae")
    encoders = job.frozen("text_encoder"), job.frozen("text_encoder_2")
    method, token_ids = method_of(job.settings, job.device), job.token_ids()

    @torch.no_grad()
    def run() -> Tensor:
        condition, _ = encode_text(*encoders, token_ids, job.resolution)
        x0 = one_step(unet, job.normal(), condition, method, dtype_of(unet))
        return ((decode(vae, x0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    return run


def _denoiser(job: Job) -> Callable[[], None]:
    """A trained UNet forward and backward to its float32 parameters."""
    unet = job.trained(DENOISER)
    encoders = job.frozen("text_encoder"), job.frozen("text_encoder_2")
    condition, _ = encode_text(*encoders, job.token_ids(), job.resolution)
    given = job.normal(), job.times(0, 999), condition, dtype_of(encoders[0])

    def run() -> None:
        unet.zero_grad(set_to_none=True)
        predict_eps(unet, *given).square().mean().backward()

    return run


def _vae(job: Job) -> Callable[[], tuple[Tensor, Tensor]]:
    """The decoder forward and backward to the latents."""
    vae = job.frozen("vae")

    def squares(latents: Tensor) -> Tensor:
        return decode(vae, latents).square().sum((1, 2, 3))

    return functools.partial(value_and_gradient, squares, job.resolution, job.normal())


def _reward(job: Job) -> Callable[[], tuple[Tensor, Tensor]]:
    """Decoder and reward forward and backward to the latents, and the prompts' side of it."""
    clip, latents, token_ids = job.frozen("reward"), job.normal(), job.token_ids()["reward"]
    score = make_score(job.frozen("vae"), clip, job.resolution)

    def run() -> tuple[Tensor, Tensor]:
        return value_and_gradient(score, job.resolution, latents, embed_text(clip, token_ids))

    return run


WORK = {"train": _train, "sample": _sample, DENOISER: _denoiser, "vae": _vae, "reward": _reward}
# What "train" here has of the settings that change the work: the first, or what equals it.
_KNOWN = {
    "objective": ("di_star",),
    "weighting": ("x0", "eps", "score"),
    "assistant_updates": (1,),
    "assistant_first": (False,),
    "balance": (0.0,),
    "scheme": ("separate", "looped"),
}


def make(what: str, job: Job) -> Callable[[], None]:
    """One of the benchmark's works: a function that does it once and waits until it is done.

    Args: what, a key of WORK.
    Raises: UserError for settings, or a pipeline, that change the work and that this side does not
      have.
    """
    import torch

    if "text_encoder_2" not in job.configs:
        raise UserError("one text encoder, expected SDXL's two: PyTorch's side has no other")
    form = job.settings.generator
    if len(form.timesteps) != 1 or form.input != "noise":
        raise UserError(
            f"{len(form.timesteps)} generator steps that begin with input={form.input!r}, expected "
            "1 and 'noise': PyTorch's side has no other"
        )
    for field, known in _KNOWN.items() if what == "train" else ():
        value = getattr(job.settings, field)
        if value not in known:
            expected = f"expected {known[0]!r}: PyTorch's side has no other"
            raise UserError(f"{field}={value!r}, {expected}")
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in float32's products, as XLA does
        torch.backends.cudnn.benchmark = True
    once = WORK[what](job)

    def run() -> None:
        once()
        if job.device == "cuda":
            torch.cuda.synchronize()

    return run
