# SPDX-License-Identifier: Apache-2.0
"""The benchmark's opponent: the same work in PyTorch with diffusers and transformers, one device.

Written from the papers (2410.20898, Eq. 3.4, 3.8, 2.2, and Diff-Instruct's integral KL), not from
our step, so that tests/test_peer.py proves one by the other. What families of pipelines have of
their own is a row of KINDS. Images and latents are NCHW here; B is the batch, h and w are a
latent's sides. Only the functions of this module import torch, so that the package can be walked
without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from di_star_jax.cost.kinds import KINDS, Condition, Kind, Prompts, dtype_of
from di_star_jax.errors import UserError
from di_star_jax.gradients import Settings
from di_star_jax.pipelines.families import is_denoiser
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import class_name, model_class
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD, resize_matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# torch.compile gets these, one at a time, as diffusers advises: many of SDXL's are alike and share
# their code, and a whole UNet would take minutes for each of the three ways in which a step uses
# one.
COMPILED = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
# Parameters; a denoiser of more is recomputed in the backward pass on a GPU, as ours is.
FULL_SIZE = 5 * 10**8
DECODED_PIXELS = 2**21  # decoded at a time: for the backward pass a 1024-pixel image keeps 13 GB


class Modules(NamedTuple):
    """Networks: the first two with float32 parameters, the others frozen in the compute dtype.

    text_encoders: in the order of the family's tokenizers. reward: a CLIP, or None for no reward.
    """

    generator: nn.Module
    assistant: nn.Module
    reference: nn.Module
    vae: nn.Module
    text_encoders: list[nn.Module]
    reward: nn.Module | None


class Draws(NamedTuple):
    """All that is random in a step: noises [B, 4, h, w], standard normal; integer times [B]."""

    z: Tensor
    t: Tensor
    eps: Tensor
    t_psi: Tensor
    eps_psi: Tensor


class Method(NamedTuple):
    """What the equations need besides networks: settings; alpha and sigma by timestep [1000]."""

    settings: Settings
    kind: Kind
    alpha: Tensor
    sigma: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t, sigma_t [B, 1, 1, 1] at times [B]."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]


def method_of(
    settings: Settings,
    kind: Kind,
    device: str,
) -> Method:
    """Settings with the family's schedule, float32."""
    import torch

    first, last, power = kind.betas
    roots = torch.linspace(first ** (1 / power), last ** (1 / power), 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - roots**power, 0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return Method(settings, kind, alpha.float().to(device), sigma.float().to(device))


def network(
    config: dict,
    *,
    dtype: torch.dtype,
    device: str,
    compile: bool = False,
) -> nn.Module:
    """The published code's network for a config.json, frozen, with random weights."""
    import torch

    net = _built(class_name(config), config, device).eval().requires_grad_(False)
    torch.nn.Module.to(net, dtype=dtype, memory_format=torch.channels_last)
    if device == "cuda" and is_denoiser(class_name(config)) and net.num_parameters() > FULL_SIZE:
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
        if hasattr(transformers, name):
            cls = getattr(transformers, name)
            return cls(cls.config_class.from_dict(config))
        if name == "AutoencoderKL":  # whose file names them; our table of published ones does not
            blocks = len(config["block_out_channels"])
            down, up = ["DownEncoderBlock2D"] * blocks, ["UpDecoderBlock2D"] * blocks
            config = {"down_block_types": down, "up_block_types": up, **config}
        return getattr(diffusers, name).from_config(config)


def predict_eps(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    method: Method,
    dtype: torch.dtype,
) -> Tensor:
    """eps [B, 4, h, w] float32, computed in dtype: by autocast where the parameters differ."""
    import torch

    stored = dtype_of(denoiser)
    # A context for each call: until its end autocast keeps what it cast, with or without a
    # gradient.
    with torch.autocast(x_t.device.type, dtype) if stored != dtype else contextlib.nullcontext():
        x_t = x_t.to(stored, memory_format=torch.channels_last)
        told = condition._replace(context=condition.context.to(stored))
        return method.kind.predict(denoiser, x_t, t, told).float()


def one_step(
    denoiser: nn.Module,
    z: Tensor,
    condition: Condition,
    method: Method,
    dtype: torch.dtype,
) -> Tensor:
    """x0 [B, 4, h, w] of the one-step generator."""
    import torch

    form = method.settings.generator
    t = torch.full((len(z),), form.timesteps[0], device=z.device)
    alpha_t, sigma_t = method.at(t)
    first = sigma_t * z if form.input == "scaled" else z
    return (first - sigma_t * predict_eps(denoiser, first, t, condition, method, dtype)) / alpha_t


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
    """The objective's loss [B], in scores as the papers have it.

    DI*, Eq. 3.4 and 3.8: -w(t) d'(y_t)^T (s_psi(x_t) - grad log q(x_t | x_0)), whose gradient flows
    through x_t into both networks and into d'(y_t). Integral KL: w(t) y_t^T x_t, or x_0 in its
    space, y_t held fixed. The networks' parameters are the caller's to freeze.
    """
    import torch

    settings, size = method.settings, x0[0].numel()
    alpha_t, sigma_t = method.at(t)
    x_t = alpha_t * x0 + sigma_t * eps
    # Of scores, w(t) and c are those of the weighting's space.
    w_t = {"eps": sigma_t, "score": 1.0, "x0": sigma_t**2 / alpha_t}[settings.weighting]
    with torch.set_grad_enabled(settings.objective != "kl"):
        s_psi, s_ref = scores(x_t, t, conditions, modules, method)
    y_t = s_psi - s_ref
    if settings.objective == "kl":
        loss = w_t * y_t * (x0 if settings.weighting == "x0" else x_t)
    else:
        c = settings.constants.huber_c * size**0.5 / w_t
        d_prime = y_t / (y_t.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
        loss = -w_t * d_prime * (s_psi + eps / sigma_t)
    loss = loss.sum((1, 2, 3))
    return loss / size if settings.reduction == "mean" else loss


def scores(
    x_t: Tensor,
    t: Tensor,
    conditions: tuple[Condition, Condition],
    modules: Modules,
    method: Method,
) -> tuple[Tensor, Tensor]:
    """The assistant's and the guided reference's score [B, 4, h, w]."""
    _, sigma_t = method.at(t)
    dtype = dtype_of(modules.reference)
    eps_psi = predict_eps(modules.assistant, x_t, t, conditions[0], method, dtype)
    return -eps_psi / sigma_t, -guided_eps(modules.reference, x_t, t, conditions, method) / sigma_t


def guided_eps(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    conditions: tuple[Condition, Condition],
    method: Method,
) -> Tensor:
    """A frozen denoiser's classifier-free guided eps [B, 4, h, w]; at omega = 1 the conditional."""
    import torch

    dtype, omega = dtype_of(denoiser), method.settings.omega
    if omega == 1:
        return predict_eps(denoiser, x_t, t, conditions[0], method, dtype)
    both = Condition(*(None if c is None else torch.cat([c, null]) for c, null in zip(*conditions)))
    eps = predict_eps(denoiser, x_t.repeat(2, 1, 1, 1), t.repeat(2), both, method, dtype)
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
    prompts: Prompts,
    draws: Draws,
    reward_scale: float,
) -> Results:
    """Both gradients of the batch's mean losses; they stay in the parameters' `grad`.

    Args: reward_scale, alpha_rew; others, see there.
    """
    generator, assistant = modules.generator, modules.assistant
    generator.requires_grad_(True).zero_grad(set_to_none=True)
    # Frozen while it only passes a gradient on: compiled blocks would work out their weights'
    # gradients too.
    assistant.requires_grad_(False).zero_grad(set_to_none=True)
    pixels = draws.z.shape[-1] * 2 ** (len(modules.vae.config.block_out_channels) - 1)
    conditions = method.kind.encode(modules.text_encoders, prompts, pixels)
    x0 = one_step(generator, draws.z, conditions[0], method, dtype_of(modules.reference))
    # The gradient is found at x0 first, term by term: one term's activations are gone before the
    # next one's come.
    loss, d_loss = _regulariser_at(x0, draws, conditions, modules, method)
    reward, d_reward = _reward_at(x0, modules, prompts.reward, pixels, reward_scale)
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
    token_ids: Tensor | None,
    pixels: int,
    reward_scale: float,
) -> tuple[Tensor, Tensor | float]:
    """The reward [B], and its gradient at x0 where it has a scale; zeros where there is none."""
    import torch

    if modules.reward is None:
        return x0.new_zeros(len(x0)), 0.0
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
    eps = predict_eps(modules.assistant, x_t, draws.t_psi, condition, method, dtype)
    denoising = (eps - draws.eps_psi).square().sum((1, 2, 3))
    denoising.mean().backward()
    return denoising.detach() / x0[0].numel()


@dataclasses.dataclass(frozen=True)
class Job:
    """What the works run on: random weights and inputs.

    Args:
      configs: config.json by component, the reward's under "reward" if there is one.
      tokenizers: name of the text encoder by its tokenizer's, as of `Family`.
      settings: of the step.
      batch, resolution: images of resolution x resolution pixels.
      dtype: "bfloat16" (what is trained by autocast over float32 parameters) or "float32".
      device: "cuda" or "cpu".
      compile: blocks by torch.compile.
      reward_scale: alpha_rew of "train".
    """

    configs: dict[str, dict]
    tokenizers: dict[str, str]
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

    def text_encoders(self) -> list[nn.Module]:
        """Frozen, in the order of the tokenizers."""
        return [self.frozen(part) for part in self.tokenizers.values()]

    def method(self) -> Method:
        """The settings, with what the family has of its own."""
        return method_of(self.settings, self.kind(), self.device)

    def kind(self) -> Kind:
        """Raises: UserError for a family that is not a row of KINDS."""
        parts = self.tokenizers.values()
        classes = tuple(str(class_name(self.configs.get(part, {}))) for part in parts)
        if classes not in KINDS:
            known = " or ".join(" with ".join(names) for names in KINDS)
            raise UserError(
                f"text encoders {' with '.join(classes)}, expected {known}: PyTorch's side has no "
                "other"
            )
        return KINDS[classes]

    def prompts(self) -> Prompts:
        """Random token ids."""
        configs = [self.configs[part] for part in self.tokenizers.values()]
        sizes = [model_class(config)[1] for config in configs]
        ids, null = (
            [self._integers(s.vocab_size, batch, s.tokens) for s in sizes]
            for batch in (self.batch, 1)
        )
        if "reward" not in self.configs:
            return Prompts(ids, null, None)
        text = model_class(self.configs["reward"])[1].text_config
        return Prompts(ids, null, self._integers(text.vocab_size, self.batch, text.tokens))

    def normal(self) -> Tensor:
        """Standard normal latents [B, 4, h, w]."""
        import torch

        side = self.resolution // 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)
        channels = self.configs[DENOISER].get("in_channels", 4)
        return torch.randn(self.batch, channels, side, side, device=self.device)

    def times(self, first: int, last: int) -> Tensor:
        """Times [B] from first to last."""
        return first + self._integers(last + 1 - first, self.batch)

    def _integers(self, end: int, *shape: int) -> Tensor:
        import torch

        return torch.randint(end, shape, device=self.device)

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
    reference, vae = job.frozen(DENOISER), job.frozen("vae")
    reward = job.frozen("reward") if "reward" in job.configs else None
    modules = Modules(generator, assistant, reference, vae, job.text_encoders(), reward)
    method, prompts = job.method(), job.prompts()
    trained = [list(net.parameters()) for net in (generator, assistant)]
    average = [p.detach().clone() for p in trained[0]]
    share = 1 - 0.5 ** (job.batch / job.settings.ema_half_life)
    adam = functools.partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=0.01, fused=True)
    optimizers = [adam(params, lr=5e-7) for params in trained]

    def run() -> None:
        step_gradients(method, modules, prompts, job.draws(), job.reward_scale)
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

    denoiser, vae, encoders = job.frozen(DENOISER), job.frozen("vae"), job.text_encoders()
    method, prompts = job.method(), job.prompts()

    @torch.no_grad()
    def run() -> Tensor:
        condition, _ = method.kind.encode(encoders, prompts, job.resolution)
        x0 = one_step(denoiser, job.normal(), condition, method, dtype_of(denoiser))
        return ((decode(vae, x0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    return run


def _denoiser(job: Job) -> Callable[[], None]:
    """What is trained forward and backward to its float32 parameters."""
    denoiser, encoders, method = job.trained(DENOISER), job.text_encoders(), job.method()
    condition, _ = method.kind.encode(encoders, job.prompts(), job.resolution)
    given = job.normal(), job.times(0, 999), condition, method, dtype_of(encoders[0])

    def run() -> None:
        denoiser.zero_grad(set_to_none=True)
        predict_eps(denoiser, *given).square().mean().backward()

    return run


def _vae(job: Job) -> Callable[[], tuple[Tensor, Tensor]]:
    """The decoder forward and backward to the latents."""
    vae = job.frozen("vae")

    def squares(latents: Tensor) -> Tensor:
        return decode(vae, latents).square().sum((1, 2, 3))

    return functools.partial(value_and_gradient, squares, job.resolution, job.normal())


def _reward(job: Job) -> Callable[[], tuple[Tensor, Tensor]]:
    """Decoder and reward forward and backward to the latents, and the prompts' side of it."""
    clip, latents, token_ids = job.frozen("reward"), job.normal(), job.prompts().reward
    score = make_score(job.frozen("vae"), clip, job.resolution)

    def run() -> tuple[Tensor, Tensor]:
        return value_and_gradient(score, job.resolution, latents, embed_text(clip, token_ids))

    return run


WORK = {"train": _train, "sample": _sample, DENOISER: _denoiser, "vae": _vae, "reward": _reward}
# What "train" here has of the settings that change the work: the first, or what equals it.
_KNOWN = {
    "objective": ("di_star", "kl"),
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

    _check(what, job)
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in float32's products, as XLA does
        torch.backends.cudnn.benchmark = True
    once = WORK[what](job)

    def run() -> None:
        once()
        if job.device == "cuda":
            torch.cuda.synchronize()

    return run


def _check(what: str, job: Job) -> None:
    """Raises: UserError, as of `make`."""
    job.kind()
    steps = len(job.settings.generator.timesteps)
    if steps != 1:
        raise UserError(f"{steps} generator steps, expected 1: PyTorch's side has no other")
    if what == "reward" and "reward" not in job.configs:
        raise UserError("--what=reward without a reward; set reward.pickscore above 0")
    for field, known in _KNOWN.items() if what == "train" else ():
        value = getattr(job.settings, field)
        if value not in known:
            expected = f"expected {' or '.join(map(repr, known))}"
            raise UserError(f"{field}={value!r}, {expected}: PyTorch's side has no other")
