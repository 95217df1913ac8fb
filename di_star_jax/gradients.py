# SPDX-License-Identifier: Apache-2.0
"""Both gradients of a Diff-Instruct* step, of one device's part of the batch.

`of_generator` and `of_samples` are the step as the paper has it, the two losses sharing x0 alone;
schemes.py rearranges them for cost, and configs/sdxl.py takes its `looped`. But for `draw`, all
here runs inside `sharding.on_each`: b is the images of this device, K the generator's steps;
latents are [b, h, w, 4], images [b, H, W, 3]. Sums over devices are the caller's: a device returns
its share of the gradients of the whole batch's mean, and per-sample figures.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from di_star_jax import objectives, sharding
from di_star_jax.diffusion import (
    FewStep,
    Schedule,
    add_noise,
    eps_to_x0,
    first_input,
    guide,
    per_sample,
)
from di_star_jax.models.unet import Condition
from di_star_jax.objectives import OBJECTIVES, Point, Scores

Params = Any
Trained = tuple[Params, Params]  # of generator and assistant
Gradients = tuple[Params, Params]
# Of the score networks: (x_t, t) -> eps, or the noise predictions by name.
Psi = Callable[[jax.Array, jax.Array], jax.Array]
Reference = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Plain values of a step; see configs/sdxl.py for units, ranges and reasons."""

    objective: str
    omega: float
    constants: objectives.Constants
    weighting: str
    reduction: str  # of the regulariser over a sample: "sum" or "mean"
    generator_times: tuple[int, int]  # first and last, both included
    assistant_times: tuple[int, int]
    assistant_updates: int
    scheme: str  # "separate", or a key of schemes.SCHEMES
    generator: FewStep  # what learns is of this form
    latent_shape: tuple[int, ...]
    ema_half_life: float  # in images
    assistant_first: bool = False
    warmup_steps: int = 0
    clip_norms: tuple[float, float] = (math.inf, math.inf)  # of both networks' gradients
    balance: float = 0.0  # of reward and regulariser; 0 leaves the reward's scale as it is
    microbatches: int = 1  # parts that a device's images are taken in, one after the other


class Network(NamedTuple):
    """A denoiser that learns: `learnt` does, on top of a frozen base; None where it is all."""

    learnt: Params
    base: Params | None = None

    def having(self, learnt: Params) -> Params:
        """All parameters, with others that are learnt; the base gets no gradient."""
        return learnt if self.base is None else self.base | learnt

    @property
    def params(self) -> Params:
        """All parameters."""
        return self.having(self.learnt)


def _without_bases(frozen: dict) -> tuple[None, None]:
    """Generator and assistant learn as a whole."""
    del frozen
    return None, None


@dataclasses.dataclass(frozen=True)
class Method:
    """What a step is made of, bound once.

    denoiser: parameters -> network (x_t [b, h, w, 4], t [b], Condition) -> eps [b, h, w, 4],
      float32.
    encode_text: (frozen, token_ids) -> (Condition, null Condition).
    reward: (frozen, x0 [b, h, w, 4], token_ids, crop [b, 2]) -> (alpha_rew r(x0, c) summed over the
      rewards [b], each reward by name [b]), through the VAE decoder. Only the sum is
      differentiated.
    score_denoiser: as denoiser, in the precision of the scores; None is the same.
    bases: frozen parameters -> those that generator and assistant learn adapters to; see `Network`.
    """

    denoiser: Callable[[Params], Callable[..., jax.Array]]
    encode_text: Callable[[dict, dict], tuple[Condition, Condition]]
    reward: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    schedule: Schedule
    settings: Settings
    score_denoiser: Callable[[Params], Callable[..., jax.Array]] | None = None
    bases: Callable[[dict], tuple[Params | None, Params | None]] = _without_bases

    def networks(self, trained: Trained, frozen: dict) -> tuple[Network, Network]:
        """Generator and assistant."""
        generator, assistant = self.bases(frozen)
        return Network(trained[0], generator), Network(trained[1], assistant)

    def score(self, params: Params) -> Callable[..., jax.Array]:
        """A score network of the generator's loss, assistant or reference."""
        return (self.score_denoiser or self.denoiser)(params)

    @property
    def objective(self) -> objectives.Objective:
        """The row of OBJECTIVES that the settings name."""
        return OBJECTIVES[self.settings.objective]

    def noise(
        self,
        x0: jax.Array,
        t: jax.Array,
        eps: jax.Array,
    ) -> Point:
        """x0 at the times t, int32 [b], with x_t = alpha_t x0 + sigma_t eps."""
        alpha_t = self.schedule.alpha[t]
        sigma_t = self.schedule.sigma[t]
        return Point(x0, add_noise(x0, eps, alpha_t, sigma_t), eps, alpha_t, sigma_t)


class Draws(NamedTuple):
    """All that is random in one step beside its prompts (`PromptStream`), the batch first.

    noise: [B, K, h, w, 4] standard normal; the first of K is z.
    step: scalar int32, the generator's step that learns, the same for the whole batch.
    t, eps: [B] int32 and [B, h, w, 4], of the generator's loss.
    t_psi, eps_psi: [B] int32 and [B, h, w, 4], of the assistant's loss.
    crop: [B, 2] in [0, 1), where the reward looks, if it looks at a part.
    """

    noise: jax.Array
    step: jax.Array
    t: jax.Array
    eps: jax.Array
    t_psi: jax.Array
    eps_psi: jax.Array
    crop: jax.Array


def draw(
    key: jax.Array,
    batch: int,
    settings: Settings,
) -> Draws:
    """The draws of one batch: all its random streams, and from which key each comes.

    Args: key, of the batch; batch, of all devices together.
    """
    key_z, key_generator, key_assistant = jax.random.split(key, 3)
    shape = (batch, *settings.latent_shape)
    steps = len(settings.generator.timesteps)
    t, eps = times_and_noise(key_generator, settings.generator_times, shape)
    t_psi, eps_psi = times_and_noise(key_assistant, settings.assistant_times, shape)
    return Draws(
        noise=jnp.moveaxis(jax.random.normal(key_z, (steps, *shape)), 0, 1),
        step=jax.random.randint(jax.random.fold_in(key_z, 1), (), 0, steps),
        t=t,
        eps=eps,
        t_psi=t_psi,
        eps_psi=eps_psi,
        crop=jax.random.uniform(jax.random.fold_in(key_z, 2), (batch, 2)),
    )


def times_and_noise(
    key: jax.Array,
    times: tuple[int, int],
    shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Uniform integer times, both ends included, and noise."""
    key_t, key_eps = jax.random.split(key)
    first, last = times
    t = jax.random.randint(key_t, shape[:1], first, last + 1)
    return t, jax.random.normal(key_eps, shape)


class Pull(NamedTuple):
    """What acts on each sample, [b], to log.

    kept: 0 where its gradient was not finite, and it was dropped.
    regulariser, reward: the norms of their gradients at x0; the reward's before it is balanced.
    cosine: between the two, of descent; 1 where they pull the same way.
    """

    kept: jax.Array
    regulariser: jax.Array
    reward: jax.Array
    cosine: jax.Array


class Figures(NamedTuple):
    """What a gradient leaves per sample. x0: [b, h, w, 4]; the others [b], to log.

    reward: alpha_rew r, summed over the rewards. rewards: each by itself. t: of the regulariser.
    gap: rms of eps_psi - eps_ref, an element; 0 for an objective without scores. assistant: its
    loss an element. condition: of the prompts, where the assistant is still to learn from x0.
    """

    x0: jax.Array
    reward: jax.Array
    rewards: dict[str, jax.Array]
    regulariser: jax.Array
    pull: Pull
    t: jax.Array
    gap: jax.Array
    assistant: jax.Array
    condition: Condition | tuple[()] = ()


def mean_share(per_sample_loss: jax.Array) -> jax.Array:
    """This device's share of the whole batch's mean."""
    return jnp.sum(per_sample_loss) / (per_sample_loss.shape[0] * sharding.size(*sharding.BATCH))


def simulate(
    method: Method,
    generator: Params,
    draws: Draws,
    condition: Condition,
) -> tuple[jax.Array, jax.Array]:
    """DMD2's backward simulation: what the generator's step `draws.step` is given.

    Returns: (x_t [b, h, w, 4] without gradient, t [b] int32). With one step, its input and time.
    """
    form = method.settings.generator
    timesteps = jnp.array(form.timesteps)
    noise = jnp.moveaxis(draws.noise, 1, 0)
    first = first_input(noise[0], form, method.schedule)

    def for_all(t) -> jax.Array:
        return jnp.full(noise.shape[1:2], t)

    if len(timesteps) == 1:
        return first, for_all(timesteps[0])
    denoiser = method.denoiser(generator)

    def earlier(k, x_t) -> jax.Array:
        t = for_all(timesteps[k])
        x0 = x0_of(method, x_t, t, denoiser(x_t, t, condition))
        return method.noise(x0, for_all(timesteps[k + 1]), noise[k + 1]).x_t

    x_t = jax.lax.fori_loop(0, draws.step, earlier, first)
    return x_t, for_all(timesteps[draws.step])


def x0_of(
    method: Method,
    x_t: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """x_0 [b, h, w, 4] of a noise prediction at x_t and the times t [b]."""
    return eps_to_x0(x_t, eps, method.schedule.alpha[t], method.schedule.sigma[t])


def generate(
    method: Method,
    generator: Network,
    draws: Draws,
    condition: Condition,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[Params]]]:
    """x_0 [b, h, w, 4] of the step that learns, and from its cotangent to (what is learnt's,)."""
    z, t = simulate(method, generator.params, draws, condition)

    def x0_by(learnt) -> jax.Array:
        return x0_of(method, z, t, method.denoiser(generator.having(learnt))(z, t, condition))

    return jax.vjp(x0_by, generator.learnt)


def score_networks(
    method: Method,
    assistant: Params,
    reference: Params,
    conditions: tuple[Condition, Condition],
) -> tuple[Psi, Reference]:
    """The assistant, and the reference by the names of `objectives.Scores`.

    The reference evaluates conditional and unconditional as one batch of 2b. At omega = 1 guided is
    the conditional alone, at omega = 0 the unconditional; then what is left of cond and null, which
    nothing flows through, has a pass of its own, and none where the objective does not want it.
    """
    condition, null = conditions
    omega = method.settings.omega
    wants_parts = "cond" in method.objective.scores

    def psi(x_t, t) -> jax.Array:
        return method.score(assistant)(x_t, t, condition)

    def guided(x_t, t) -> dict[str, jax.Array]:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)
        x_t, t = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
        eps_cond, eps_null = jnp.split(method.score(reference)(x_t, t, both), 2)
        return {"guided": guide(eps_cond, eps_null, omega), "cond": eps_cond, "null": eps_null}

    def single(x_t, t) -> dict[str, jax.Array]:
        names = ("cond", "null") if omega == 1.0 else ("null", "cond")
        of = {"cond": condition, "null": null}
        eps = method.score(reference)(x_t, t, of[names[0]])
        if not wants_parts:
            return {"guided": eps}
        other = method.score(reference)(jax.lax.stop_gradient(x_t), t, of[names[1]])
        return {"guided": eps, names[0]: eps, names[1]: other}

    return psi, single if omega in (0.0, 1.0) else guided


def evaluate(
    objective: objectives.Objective,
    networks: tuple[Psi, Reference],
    t: jax.Array,
    x_t: jax.Array,
) -> Scores:
    """The noise predictions that an objective wants, each without gradient where it wants none."""
    if not objective.scores:
        return Scores()
    psi, reference = networks
    still = jax.lax.stop_gradient(x_t)
    of_reference = reference(x_t if "guided" in objective.through else still, t)
    found = {name: of_reference[name] for name in objective.scores if name != "psi"}
    return Scores(psi=psi(x_t if "psi" in objective.through else still, t), **found)


def regulariser(
    method: Method,
    scores: Scores,
    point: Point,
) -> jax.Array:
    """L_reg [b] (Eq. 3.4), weighted and reduced as the settings say."""
    s = method.settings
    loss = objectives.regulariser(method.objective, s.weighting, scores, point, s.constants)
    return loss / point.x0[0].size if s.reduction == "mean" else loss


def regulariser_gradient(
    method: Method,
    x0: jax.Array,
    draws: Draws,
    scores: Scores,
    pull_back: Callable[[Scores], tuple[jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """d/dx0 of the mean of L_reg(x0), and L_reg [b].

    Args: scores, at x_t = alpha_t x0 + sigma_t eps; pull_back, from their cotangents to (x_t's,).
    """

    def mean_loss(x0, scores):
        loss = regulariser(method, scores, method.noise(x0, draws.t, draws.eps))
        return mean_share(loss), loss

    gradient = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
    (_, loss), (directly, of_scores) = gradient(x0, scores)
    if not method.objective.through:
        return directly, loss
    alpha_t = method.schedule.alpha[draws.t]
    (of_x_t,) = pull_back(of_scores)
    return directly + per_sample(alpha_t, x0) * of_x_t, loss


def reward_gradient(
    method: Method,
    x0: jax.Array,
    frozen: dict,
    token_ids: dict,
    crop: jax.Array,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """d/dx0 of the mean of -alpha_rew r(x0, c), and both results of `method.reward`."""

    def mean_loss(x0):
        total, each = method.reward(frozen, x0, token_ids, crop)
        return mean_share(-total), (total, each)

    (_, (total, each)), dx0 = jax.value_and_grad(mean_loss, has_aux=True)(x0)
    return dx0, total, each


def combine(
    of_regulariser: jax.Array,
    of_reward: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, Pull]:
    """d/dx0 [b, h, w, 4] of the generator's loss, without samples whose gradient is not finite.

    Args: gradients at x0 of the batch's means; scale, of the reward's. A sample that is dropped
    leaves the others as they are, as in SiD's code.
    """
    total = of_regulariser + scale * of_reward
    kept = jnp.isfinite(total).all(axis=tuple(range(1, total.ndim)))
    batch = len(kept) * sharding.size(*sharding.BATCH)
    norms = [batch * _norm(gradient) for gradient in (of_regulariser, of_reward)]
    product = jnp.sum(of_regulariser * of_reward, axis=tuple(range(1, total.ndim))) * batch**2
    cosine = product / jnp.maximum(norms[0] * norms[1], 1e-30)
    pull = Pull(kept.astype(jnp.float32), *norms, cosine)
    return jnp.where(per_sample(kept, total), total, 0.0), pull


def _norm(x: jax.Array) -> jax.Array:
    """[b, ...] -> [b]."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))


def gap_of(scores: Scores, like: jax.Array) -> jax.Array:
    """rms of eps_psi - eps_ref an element, [b]; 0 without scores. Args: like, [b, ...]."""
    if scores.psi is None:
        return jnp.zeros(len(like))
    return _norm(scores.psi - scores.guided) / like[0].size ** 0.5


def assistant_gradient(
    method: Method,
    assistant: Network,
    point: Point,
    t: jax.Array,
    condition: Condition,
) -> tuple[Params, jax.Array]:
    """The gradient of denoising score matching at x_t (Eq. 2.2), and its loss [b] per element."""

    def mean_loss(learnt):
        eps_psi = method.denoiser(assistant.having(learnt))(point.x_t, t, condition)
        loss = objectives.denoising_score_matching(eps_psi, point.eps)
        return mean_share(loss), loss

    (_, loss), grads = jax.value_and_grad(mean_loss, has_aux=True)(assistant.learnt)
    return grads, loss / point.x0[0].size


def gradient_at_x0(
    method: Method,
    x0: jax.Array,
    scored: tuple[Scores, Callable[[Scores], tuple[jax.Array]]],
    given: tuple[dict, dict, Draws],
    scale: jax.Array,
) -> tuple[jax.Array, Figures]:
    """d/dx0 of the generator's loss, and what it leaves.

    Args: scored, scores and from their cotangents to (x_t's,); given, frozen parameters, token ids
    and draws; scale, of the reward.
    """
    frozen, token_ids, draws = given
    of_regulariser, loss = regulariser_gradient(method, x0, draws, *scored)
    of_reward, reward, rewards = reward_gradient(method, x0, frozen, token_ids, draws.crop)
    of_x0, pull = combine(of_regulariser, of_reward, scale)
    gap = gap_of(scored[0], x0)
    return of_x0, Figures(x0, reward, rewards, loss, pull, draws.t, gap, jnp.zeros(len(x0)))


def of_generator(
    method: Method,
    trained: Trained,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    scale: jax.Array,
) -> tuple[Params, Figures]:
    """The generator's gradient and figures, without a loss of the assistant.

    What acts on x0 is differentiated there first, one part after the other, so that the decoder's
    activations and the score networks' need not be held together.

    Args: scale, of the reward.
    """
    generator, assistant = method.networks(trained, frozen)
    conditions = method.encode_text(frozen, token_ids)
    x0, pull_back = generate(method, generator, draws, conditions[0])
    networks = score_networks(method, assistant.params, frozen["reference"], conditions)
    predict = functools.partial(evaluate, method.objective, networks, draws.t)
    scored = jax.vjp(predict, method.noise(x0, draws.t, draws.eps).x_t)
    of_x0, figures = gradient_at_x0(method, x0, scored, (frozen, token_ids, draws), scale)
    return pull_back(of_x0)[0], figures._replace(condition=conditions[0])


def noised_for_assistant(
    method: Method,
    x0: jax.Array,
    draws: Draws,
) -> tuple[Point, jax.Array]:
    """(x0 noised for the assistant's loss, its times)."""
    return method.noise(x0, draws.t_psi, draws.eps_psi), draws.t_psi


def of_samples(
    method: Method,
    assistant: Params,
    frozen: dict,
    condition: Condition,
    draws: Draws,
    x0: jax.Array,
) -> tuple[Params, jax.Array]:
    """`assistant_gradient` on samples that are there. Args: assistant, what is learnt of it."""
    network = Network(assistant, method.bases(frozen)[1])
    point, t = noised_for_assistant(method, x0, draws)
    return assistant_gradient(method, network, point, t, condition)


def of_assistant(
    method: Method,
    networks: tuple[Params, Params, dict],
    token_ids: dict,
    draws: Draws,
) -> tuple[Params, jax.Array]:
    """`assistant_gradient` on samples of the generator, which has no gradient.

    Args: networks, what is learnt of assistant and generator, and the frozen parameters.
    """
    assistant, generator, frozen = networks
    generator, assistant = method.networks((generator, assistant), frozen)
    condition = method.encode_text(frozen, token_ids)[0]
    x_t, t = simulate(method, generator.params, draws, condition)
    x0 = x0_of(method, x_t, t, method.denoiser(generator.params)(x_t, t, condition))
    return assistant_gradient(
        method, assistant, *noised_for_assistant(method, x0, draws), condition
    )
