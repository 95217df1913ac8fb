# SPDX-License-Identifier: Apache-2.0
"""The plain gradient of gradients.py rearranged: fewer forward passes, or fewer traced networks."""

import jax
import jax.numpy as jnp

from di_star_jax import objectives, samplers, sharding
from di_star_jax.diffusion import Schedule, add_noise, guide
from di_star_jax.gradients import (
    Draws,
    Figures,
    Networks,
    Params,
    Settings,
    _generate,
    _mean,
    apart,
    denoise,
    generator_gradient,
    reference_scores,
    simulate,
)
from di_star_jax.models.unet import Condition


def _linearised(psi_of_params, assistant: Params, x_t: jax.Array, eps: jax.Array):
    """The assistant evaluated and linearised once, for both losses on the same x_t.

    Args: psi_of_params: (params, x_t) -> its noise prediction; assistant, its parameters; x_t, eps.
    Returns:
      (psi, loss, grads): the noise prediction as a function of (x_t, t), at this x_t and t only,
      with its gradient; the denoising score matching loss per sample, and the gradient of its mean
      with respect to the assistant. Each gradient is a pull-back of the one linearisation: with
      respect to the input for psi, to the parameters for grads.
    """
    eps_psi, pull_back = jax.vjp(psi_of_params, assistant, x_t)

    @jax.custom_vjp
    def psi(x_t, t):
        return eps_psi

    psi.defvjp(lambda x_t, t: (eps_psi, None), lambda _, cotangent: (pull_back(cotangent)[1], None))

    def mean_loss(eps_psi):
        loss = objectives.denoising_score_matching(eps_psi, eps)
        return _mean(loss), loss

    (_, loss), cotangent = jax.value_and_grad(mean_loss, has_aux=True)(eps_psi)
    return psi, loss, pull_back(cotangent)[0]


def together(
    generator: Params,
    assistant: Params,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
) -> tuple[tuple[Params, Params], Figures]:
    """As `apart`, where the two losses share x0, times, noise and the assistant's forward pass."""
    common = dict(networks=networks, schedule=schedule)
    conditions = jax.lax.stop_gradient(networks.encode_text(frozen, token_ids))
    x0, pull_back = _generate(generator, draws, conditions[0], settings=settings, **common)
    x_t = add_noise(x0, draws.eps, schedule.alpha[draws.t], schedule.sigma[draws.t])
    psi, loss, assistant_grads = _linearised(
        lambda params, x_t: networks.unet(params, x_t, draws.t, conditions[0]),
        assistant,
        x_t,
        draws.eps,
    )
    scores = objectives.one_by_one(
        psi, *reference_scores(networks.unet, frozen["unet"], conditions, settings.omega)
    )
    dx0, reward, loss_reg = generator_gradient(
        x0, draws, scores=scores, frozen=frozen, token_ids=token_ids, settings=settings, **common
    )
    (grads,) = pull_back(dx0)
    return (grads, assistant_grads), Figures(x0, *reward, loss_reg, loss / x0[0].size)


def _pick(first: jax.Array, a: Params, b: Params) -> Params:
    """`a` where `first`, else `b`; large leaves in b's dtype, small ones (norms) in the wider of
    both.
    """

    def leaf(a, b):
        dtype = b.dtype if a.size >= sharding.SMALL else jnp.promote_types(a.dtype, b.dtype)
        return jnp.where(first, a.astype(dtype), b.astype(dtype))

    return jax.tree.map(leaf, a, b)


def scanned_scores(
    assistant: Params,
    reference: Params,
    conditions: tuple[Condition, Condition],
    *,
    unet,
    omega: float,
) -> objectives.Scores:
    """`objectives.one_by_one` as a loop: one traced network is the assistant, then the reference
    with each condition.
    """
    passes = [conditions[0], *([conditions[0]] if omega == 1.0 else conditions)]
    stacked = jax.tree.map(lambda *c: jnp.stack(c), *passes)

    def one(x_t, t, first, condition):
        return unet(_pick(first, assistant, reference), x_t, t, condition)

    def psi_and_guided(x_t, t):
        first = jnp.arange(len(passes)) == 0
        _, eps = jax.lax.scan(lambda _, turn: (None, one(x_t, t, *turn)), None, (first, stacked))
        return eps[0], (eps[1] if omega == 1.0 else guide(eps[1], eps[2], omega))

    psi = lambda x_t, t: unet(assistant, x_t, t, conditions[0])
    return objectives.Scores(
        psi_and_guided, psi, *reference_scores(unet, reference, conditions, omega)[1:]
    )


def in_loops(
    generator: Params,
    assistant: Params,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
) -> tuple[tuple[Params, Params], Figures]:
    """As `apart` with a UNet traced three times in place of seven, for compilers that need minutes
    for each.

    Once forward for x0, once as a loop over the score networks, once as a loop over the two that
    learn. The generator's forward pass is made twice.
    """
    common = dict(networks=networks, schedule=schedule)
    conditions = jax.lax.stop_gradient(networks.encode_text(frozen, token_ids))
    z, t_z = simulate(generator, draws, conditions[0], settings=settings, **common)
    x0 = denoise(generator, z, t_z, conditions[0], **common)
    scores = scanned_scores(
        assistant, frozen["unet"], conditions, unet=networks.unet, omega=settings.omega
    )
    dx0, reward, loss_reg = generator_gradient(
        x0, draws, scores=scores, frozen=frozen, token_ids=token_ids, settings=settings, **common
    )
    # x0 is linear in the generator's noise prediction: what its gradient is there.
    _, to_eps = jax.vjp(lambda eps: samplers.one_step(lambda x, t: eps, z, t_z[None], schedule), z)
    x_t = add_noise(x0, draws.eps_psi, schedule.alpha[draws.t_psi], schedule.sigma[draws.t_psi])
    times = jnp.stack([jnp.full_like(draws.t_psi, t_z), draws.t_psi])

    def mean_loss(eps_psi):
        loss = objectives.denoising_score_matching(eps_psi, draws.eps_psi)
        return _mean(loss), loss

    def one(_, turn):
        first, x, t = turn
        eps, pull_back = jax.vjp(
            lambda params: networks.unet(params, x, t, conditions[0]),
            _pick(first, generator, assistant),
        )
        (_, loss), of_loss = jax.value_and_grad(mean_loss, has_aux=True)(eps)
        return None, (*pull_back(jnp.where(first, *to_eps(dx0), of_loss)), loss)

    _, (grads, loss) = jax.lax.scan(
        one, None, (jnp.array([True, False]), jnp.stack([z, x_t]), times)
    )
    grads = tuple(jax.tree.map(lambda g, i=i: g[i], grads) for i in range(2))
    return grads, Figures(x0, *reward, loss_reg, loss[1] / x0[0].size)


GRADIENTS = {"x0": apart, "x_t": together, "loops": in_loops}
