# SPDX-License-Identifier: Apache-2.0
"""The benchmark's opponent: the same work in PyTorch with diffusers and transformers, on one
device.

Written from the paper (Eq. 3.4, 3.8, 2.2), not from our step, so that tests/test_peer.py proves one
by the other. Images and latents are NCHW here; B is the batch, h and w are a latent's sides. Only
this module imports torch.
"""

import contextlib
import functools
from collections import namedtuple
from collections.abc import Callable

import diffusers
import torch
import transformers
from torch import Tensor, nn

from di_star_jax.errors import UserError
from di_star_jax.gradients import Settings
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD, resize_matrix

# torch.compile gets these, one at a time, as diffusers advises: many of SDXL's are alike and share
# their code, and a whole UNet would take minutes for each of the three ways in which a step uses
# one.
COMPILED = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
FULL_SIZE = (
    10**9
)  # parameters; a UNet of more is recomputed in the backward pass on a GPU, as ours is
DECODED_PIXELS = 2**21  # decoded at a time: for the backward pass a 1024-pixel image keeps 13 GB


# Networks; generator and assistant have float32 parameters, the others are frozen and stored in the
# compute dtype.
Modules = namedtuple(
    "Modules", "generator assistant reference vae text_encoder text_encoder_2 reward"
)
# All that is random in a step: z, eps, eps_psi [B, 4, h, w] standard normal; t, t_psi [B] integer
# times.
Draws = namedtuple("Draws", "z t eps t_psi eps_psi")
Condition = namedtuple("Condition", "context pooled time_ids")  # [B, L, D], [B, P], [B, 6], float32


def network(config: dict, *, dtype: torch.dtype, device: str, compile: bool = False) -> nn.Module:
    """The published code's network for a config.json, frozen, with random weights."""
    name = config.get("_class_name") or config["architectures"][0]
    cls, blocks = (
        getattr(diffusers, name, None) or getattr(transformers, name),
        len(config.get("block_out_channels", ())),
    )
    if name == "AutoencoderKL":  # whose file names them, while our table of published ones does not
        config = {
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            **config,
        }
    with torch.device(device):
        net = (
            cls(cls.config_class.from_dict(config))
            if name.startswith("CLIP")
            else cls.from_config(config)
        )
    net = (
        nn.Module.to(net, dtype=dtype, memory_format=torch.channels_last)
        .eval()
        .requires_grad_(False)
    )
    if device == "cuda" and name == "UNet2DConditionModel" and net.num_parameters() > FULL_SIZE:
        net.enable_gradient_checkpointing()
    if compile:
        torch._dynamo.config.recompile_limit = (
            256  # of a class: each shape, dtype and kind of gradient needs one
        )
        for block in net.modules():
            if type(block).__name__ in COMPILED:
                block.forward = torch.compile(block.forward, dynamic=False)
    return net


def dtype_of(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def schedule(device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """(alpha, sigma), [1000] float32 each: SDXL's scheduler_config.json."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)


def _at(values: Tensor, t: Tensor) -> Tensor:
    return values[t][:, None, None, None]  # [B, 1, 1, 1]


def predict_eps(
    unet: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, dtype: torch.dtype
) -> Tensor:
    """eps [B, 4, h, w] float32, computed in dtype: by autocast where the parameters have another."""
    stored = dtype_of(unet)
    # A context for each call: until its end autocast keeps what it cast, with or without a
    # gradient.
    with torch.autocast(x_t.device.type, dtype) if stored != dtype else contextlib.nullcontext():
        (eps,) = unet(
            x_t.to(stored, memory_format=torch.channels_last),
            t,
            condition.context.to(stored),
            return_dict=False,
            added_cond_kwargs={
                "text_embeds": condition.pooled.to(stored),
                "time_ids": condition.time_ids,
            },
        )
    return eps.float()


def one_step(
    unet: nn.Module,
    z: Tensor,
    condition: Condition,
    settings: Settings,
    alpha: Tensor,
    sigma: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """x0 [B, 4, h, w] of the one-step generator."""
    t = torch.full((len(z),), settings.generator_timesteps[0], device=z.device)
    return (z - _at(sigma, t) * predict_eps(unet, z, t, condition, dtype)) / _at(alpha, t)


@torch.no_grad()
def encode_text(
    first: nn.Module, second: nn.Module, token_ids: dict, pixels: int
) -> tuple[Condition, Condition]:
    """SDXL's (condition, null condition).

    Args: both text encoders; token_ids [B, L]; the image's side, not cropped.
    """
    one = first(token_ids["tokenizer"], output_hidden_states=True)
    two = second(token_ids["tokenizer_2"], output_hidden_states=True)
    context = torch.cat(
        [one.hidden_states[-2], two.hidden_states[-2]], dim=-1
    ).float()  # [B, L, 768 + 1280]
    pooled = two.text_embeds.float()
    time_ids = pooled.new_tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(len(pooled), 6)
    return (
        Condition(context, pooled, time_ids),
        Condition(torch.zeros_like(context), torch.zeros_like(pooled), time_ids),
    )


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] to images [B, 3, H, W] in [-1, 1], float32."""
    z = (latents / vae.config.scaling_factor).to(dtype_of(vae), memory_format=torch.channels_last)
    return vae.decode(z, return_dict=False)[0].float()


@torch.no_grad()
def embed_text(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """[B, L] -> [B, P] float32 of length 1."""
    return nn.functional.normalize(
        clip.text_projection(clip.text_model(token_ids).pooler_output).float(), dim=-1
    )


def make_score(vae: nn.Module, clip: nn.Module, pixels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns score(latents [B, 4, h, w], text [B, P] of length 1) -> PickScore's cosine [B] of the
    decoded images.
    """
    matrix, mean, std = (
        torch.from_numpy(v).to(clip.device)
        for v in (
            resize_matrix(pixels, clip.config.vision_config.image_size),
            CLIP_MEAN[:, None, None],
            CLIP_STD[:, None, None],
        )
    )

    def score(latents, text):
        x = ((decode(vae, latents) + 1) / 2).clamp(0, 1)
        x = (x @ matrix.T).clamp(0, 1)  # [B, 3, H, S]; Pillow stores 8 bits after each axis
        x = (matrix @ x).clamp(0, 1)  # [B, 3, S, S]
        seen = ((x - mean) / std).to(dtype_of(clip), memory_format=torch.channels_last)
        features = clip.visual_projection(
            clip.vision_model(pixel_values=seen).pooler_output
        ).float()
        return (nn.functional.normalize(features, dim=-1) * text).sum(-1)

    return score


def value_and_gradient(
    fn: Callable, pixels: int, latents: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """(fn(latents, *others) [B], its gradient [B, 4, h, w]), of as many images at a time as
    DECODED_PIXELS holds.
    """
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
    settings: Settings,
    alpha: Tensor,
    sigma: Tensor,
) -> Tensor:
    """-w(t) d'(y_t)^T (s_psi(x_t) - grad log q(x_t | x_0)) (Eq. 3.4 and 3.8, in scores as there),
    [B].

    The gradient flows through x_t into both networks and into d'(y_t); their parameters are the
    caller's to freeze.
    """
    dtype, size = dtype_of(modules.reference), x0[0].numel()
    alpha_t, sigma_t = _at(alpha, t), _at(sigma, t)
    x_t = alpha_t * x0 + sigma_t * eps
    s_psi = -predict_eps(modules.assistant, x_t, t, conditions[0], dtype) / sigma_t
    if settings.omega == 1:
        s_ref = -predict_eps(modules.reference, x_t, t, conditions[0], dtype) / sigma_t
    else:
        both = Condition(*(torch.cat(pair) for pair in zip(*conditions)))
        eps_c, eps_0 = predict_eps(
            modules.reference, x_t.repeat(2, 1, 1, 1), t.repeat(2), both, dtype
        ).chunk(2)
        s_ref = -(eps_0 + settings.omega * (eps_c - eps_0)) / sigma_t
    y_t = s_psi - s_ref
    c = settings.constants.huber_c * size**0.5 / sigma_t  # it is given in units of eps
    d_prime = y_t / (y_t.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
    w_t = {"eps": sigma_t, "score": torch.ones_like(sigma_t), "x0": sigma_t**2 / alpha_t}[
        settings.weighting
    ]
    loss = -(w_t * d_prime * (s_psi + eps / sigma_t)).sum((1, 2, 3))
    return loss / size if settings.reduction == "mean" else loss


def step_gradients(
    modules: Modules,
    settings: Settings,
    schedule_alpha: Tensor,
    schedule_sigma: Tensor,
    token_ids: dict[str, Tensor],
    draws: Draws,
    reward_scale: float,
):
    """Both gradients of the batch's mean losses; they stay in the parameters' `grad`.

    Args: token_ids, int64 [B, L] under 'tokenizer', 'tokenizer_2' and 'reward'; reward_scale,
      alpha_rew; others, see there.
    Returns: (generator's gradients by name, assistant's, reward [B], regulariser [B], assistant's
      loss an element [B]).
    """
    generator, assistant, dtype = modules.generator, modules.assistant, dtype_of(modules.reference)
    generator.requires_grad_(True).zero_grad(set_to_none=True)
    # Frozen while it only passes a gradient on: compiled blocks would work out their weights'
    # gradients too.
    assistant.requires_grad_(False).zero_grad(set_to_none=True)
    pixels = draws.z.shape[-1] * 2 ** (len(modules.vae.config.block_out_channels) - 1)
    conditions = encode_text(modules.text_encoder, modules.text_encoder_2, token_ids, pixels)
    x0 = one_step(
        generator, draws.z, conditions[0], settings, schedule_alpha, schedule_sigma, dtype
    )

    # The gradient is found at x0 first, term by term: one term's activations are gone before the
    # next one's come.
    leaf = x0.detach().requires_grad_()
    loss = regulariser(
        leaf, draws.t, draws.eps, conditions, modules, settings, schedule_alpha, schedule_sigma
    )
    (dx0,) = torch.autograd.grad(loss.mean(), leaf)
    score, text = (
        make_score(modules.vae, modules.reward, pixels),
        embed_text(modules.reward, token_ids["reward"]),
    )
    if reward_scale:
        reward, d_reward = value_and_gradient(score, pixels, x0, text)
        dx0 = dx0 - reward_scale / len(x0) * d_reward
    else:
        with torch.no_grad():
            reward = score(x0, text)
    x0.backward(dx0)

    assistant.requires_grad_(True)
    x_t = (
        _at(schedule_alpha, draws.t_psi) * x0.detach()
        + _at(schedule_sigma, draws.t_psi) * draws.eps_psi
    )
    error = predict_eps(assistant, x_t, draws.t_psi, conditions[0], dtype) - draws.eps_psi
    denoising = error.square().sum((1, 2, 3))  # Eq. 2.2 with lambda(t) = sigma_t^2
    denoising.mean().backward()
    grads = [{name: p.grad for name, p in net.named_parameters()} for net in (generator, assistant)]
    return *grads, reward, loss.detach(), denoising.detach() / error[0].numel()


def _train(
    net: Callable,
    settings: Settings,
    ids: dict,
    normal: Callable,
    times: Callable,
    pixels: int,
    *,
    reward_scale: float,
) -> Callable:
    """The whole step: both gradients, clipped, AdamW on both networks, the generator's average."""
    modules = Modules(
        net("unet", torch.float32),
        net("unet", torch.float32),
        net("unet"),
        *map(net, Modules._fields[3:]),
    )
    alpha_sigma = schedule(ids["reward"].device)
    trained = [list(unet.parameters()) for unet in modules[:2]]
    average = [p.clone() for p in trained[0]]
    optimizers = [
        torch.optim.AdamW(params, lr=5e-7, betas=(0.0, 0.999), weight_decay=0.01, fused=True)
        for params in trained
    ]

    def run():
        draws = Draws(
            normal(),
            times(*settings.generator_times),
            normal(),
            times(*settings.assistant_times),
            normal(),
        )
        step_gradients(modules, settings, *alpha_sigma, ids, draws, reward_scale)
        for params, optimizer in zip(trained, optimizers):
            nn.utils.clip_grad_norm_(params, 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, trained[0], 1 - settings.ema_decay)

    return run


def _sample(
    net: Callable, settings: Settings, ids: dict, normal: Callable, times: Callable, pixels: int
) -> Callable:
    """Prompts to 8-bit images [B, 3, H, W]."""
    unet, vae, *encoders = map(net, ("unet", "vae", "text_encoder", "text_encoder_2"))
    alpha_sigma = schedule(ids["tokenizer"].device)

    @torch.no_grad()
    def run():
        x0 = one_step(
            unet,
            normal(),
            encode_text(*encoders, ids, pixels)[0],
            settings,
            *alpha_sigma,
            dtype_of(unet),
        )
        return ((decode(vae, x0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    return run


def _unet(
    net: Callable, settings: Settings, ids: dict, normal: Callable, times: Callable, pixels: int
) -> Callable:
    """A trained UNet forward and backward to its float32 parameters."""
    unet, encoders = (
        net("unet", torch.float32).requires_grad_(True),
        [net("text_encoder"), net("text_encoder_2")],
    )
    given = normal(), times(0, 999), encode_text(*encoders, ids, pixels)[0], dtype_of(encoders[0])

    def run():
        unet.zero_grad(set_to_none=True)
        predict_eps(unet, *given).square().mean().backward()

    return run


def _vae(
    net: Callable, settings: Settings, ids: dict, normal: Callable, times: Callable, pixels: int
) -> Callable:
    """The decoder forward and backward to the latents."""
    vae, latents = net("vae"), normal()
    return lambda: value_and_gradient(
        lambda x: decode(vae, x).square().sum((1, 2, 3)), pixels, latents
    )


def _reward(
    net: Callable, settings: Settings, ids: dict, normal: Callable, times: Callable, pixels: int
) -> Callable:
    """Decoder and reward forward and backward to the latents, with the prompts' half of the score."""
    vae, clip, latents = net("vae"), net("reward"), normal()
    score = make_score(vae, clip, pixels)
    return lambda: value_and_gradient(score, pixels, latents, embed_text(clip, ids["reward"]))


WORK = {"train": _train, "sample": _sample, "unet": _unet, "vae": _vae, "reward": _reward}


def make(
    what: str,
    configs: dict[str, dict],
    settings: Settings,
    *,
    batch: int,
    resolution: int,
    dtype: str,
    device: str,
    compile: bool,
    reward_scale: float,
) -> Callable[[], None]:
    """One of the benchmark's works on random weights and inputs: a function that does it once and
    waits until it is done.

    Args: what, a key of WORK; configs, config.json by component; batch, images of resolution x
      resolution pixels; dtype, "bfloat16" (trained UNets by autocast over float32 parameters) or
      "float32"; device, "cuda" or "cpu"; reward_scale, alpha_rew of "train".
    Raises: UserError for settings that change the work and that this side does not have.
    """
    if len(settings.generator_timesteps) != 1:
        raise UserError(
            f"{len(settings.generator_timesteps)} generator steps, expected 1: PyTorch's side has no other"
        )
    for field, known in (
        ("objective", ("di_star",)),
        ("assistant_updates", (1,)),
        ("sharing", ("x0", "loops")),
    ):
        if what == "train" and getattr(settings, field) not in known:
            raise UserError(
                f"{field}={getattr(settings, field)!r}, expected {known[0]!r}: PyTorch's side has no other"
            )
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in float32's products, as XLA does
        torch.backends.cudnn.benchmark = True

    def net(part, stored=getattr(torch, dtype)):
        return network(configs[part], dtype=stored, device=device, compile=compile)

    def token_ids(part):
        text = configs[part].get("text_config", configs[part])
        shape = (batch, text.get("max_position_embeddings", 77))
        return torch.randint(text.get("vocab_size", 49408), shape, device=device)

    side = resolution // 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    ids = {
        "tokenizer": token_ids("text_encoder"),
        "tokenizer_2": token_ids("text_encoder_2"),
        "reward": token_ids("reward"),
    }
    work = functools.partial(_train, reward_scale=reward_scale) if what == "train" else WORK[what]
    once = work(
        net,
        settings,
        ids,
        lambda: torch.randn(
            batch, configs["unet"].get("in_channels", 4), side, side, device=device
        ),
        lambda first, last: torch.randint(first, last + 1, (batch,), device=device),
        resolution,
    )

    def run():
        once()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
