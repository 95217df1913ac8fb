# SPDX-License-Identifier: Apache-2.0
"""Both gradients of a step at once, for cost: fewer forward passes, or fewer traced networks.

Shapes are those of gradients.py; "apart" is its `of_generator`, then its `of_samples`.
"""

import functools

import jax
import jax.numpy as jnp

from di_star_jax import objectives, sharding
from di_star_jax.diffusion import guide
from di_star_jax.gradients import (
    Draws,
    Figures,
    Gradients,
    Method,
    Params,
    Trained,
    evaluate,
    generate,
    gradient_at_x0,
    mean_share,
    noised_for_assistant,
    score_networks,
    simulate,
    x0_of,
)
from di_star_jax.models import lora
from di_star_jax.models.unet import Condition
from di_star_jax.objectives import Scores


def shared(
    method: Method,
    trained: Trained,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    scale: jax.Array,
) -> tuple[Gradients, Figures]:
    """As apart, with one x_t, and one forward pass of the assistant, for both losses.

    The assistant learns at the generator's times, then, not at its own. The pass is linearised once
    and pulled back twice: to its input for the generator, to its parameters for itself.
    """
    generator, assistant = method.networks(trained, frozen)
    conditions = method.encode_text(frozen, token_ids)
    x0, pull_back = generate(method, generator, draws, conditions[0])
    x_t = method.noise(x0, draws.t, draws.eps).x_t
    eps_psi, of_assistant = jax.vjp(
        lambda learnt, x_t: method.score(assistant.having(learnt))(x_t, draws.t, conditions[0]),
        assistant.learnt,
        x_t,
    )
    _, reference = score_networks(method, assistant.params, frozen["reference"], conditions)
    networks = (lambda x_t, t: eps_psi, reference)
    scores, of_reference = jax.vjp(
        functools.partial(evaluate, method.objective, networks, draws.t), x_t
    )

    def to_x_t(cotangents):
        _, by_assistant = of_assistant(cotangents.psi)
        (by_reference,) = of_reference(cotangents)
        return (by_assistant + by_reference,)

    of_x0, figures = gradient_at_x0(method, x0, (scores, to_x_t), (frozen, token_ids, draws), scale)
    (generator_grads,) = pull_back(of_x0)
    of_loss, loss = denoising_gradient(eps_psi, draws.eps)
    figures = figures._replace(assistant=loss / x0[0].size)
    return (generator_grads, of_assistant(of_loss)[0]), figures


def denoising_gradient(eps_psi: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d/d eps_psi of the mean of the assistant's loss, and the loss [b]."""

    def mean_loss(eps_psi):
        loss = objectives.denoising_score_matching(eps_psi, eps)
        return mean_share(loss), loss

    (_, loss), gradient = jax.value_and_grad(mean_loss, has_aux=True)(eps_psi)
    return gradient, loss


def looped(
    method: Method,
    trained: Trained,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    scale: jax.Array,
) -> tuple[Gradients, Figures]:
    """As apart with a denoiser traced three times in place of seven, for slow compilers.

    Once forward for x0, once as a loop over the score networks (of objectives with guidance inside;
    others evaluate theirs one by one), once as a loop over the two that learn, unless these have
    different bases. The generator's forward pass is made twice.
    """
    generator, assistant = method.networks(trained, frozen)
    conditions = method.encode_text(frozen, token_ids)
    z, t_z = simulate(method, generator.params, draws, conditions[0])
    eps_z = method.denoiser(generator.params)(z, t_z, conditions[0])
    x0, to_eps_z = jax.vjp(functools.partial(x0_of, method, z, t_z), eps_z)
    predict = functools.partial(
        evaluate,
        method.objective,
        score_networks(method, assistant.params, frozen["reference"], conditions),
    )
    both = ("psi", "guided")
    if method.objective.scores == both and method.objective.through in (both, ()):
        reference = frozen["reference"]
        if assistant.base is not None:  # it is the reference, and adapters
            reference = lora.silenced(reference, assistant.learnt)
        predict = functools.partial(scanned_scores, method, assistant.params, reference, conditions)
    scores, to_x_t = jax.vjp(
        functools.partial(predict, draws.t), method.noise(x0, draws.t, draws.eps).x_t
    )
    of_x0, figures = gradient_at_x0(method, x0, (scores, to_x_t), (frozen, token_ids, draws), scale)
    (of_eps_z,) = to_eps_z(of_x0)
    noised, t_psi = noised_for_assistant(method, x0, draws)

    def learn(_, turn):
        first, x_t, t = turn
        network = select(first, generator, assistant)
        eps, pull_back = jax.vjp(
            lambda learnt: method.denoiser(network.having(learnt))(x_t, t, conditions[0]),
            network.learnt,
        )
        of_loss, loss = denoising_gradient(eps, noised.eps)
        (grads,) = pull_back(jnp.where(first, of_eps_z, of_loss))
        return None, (grads, loss)

    if generator.base is not assistant.base:  # a loop would copy the one that it picks
        _, (generator_grads, _) = learn(None, (True, z, t_z))
        _, (assistant_grads, denoising) = learn(None, (False, noised.x_t, t_psi))
    else:
        turns = (jnp.array([True, False]), jnp.stack([z, noised.x_t]), jnp.stack([t_z, t_psi]))
        _, (grads, losses) = jax.lax.scan(learn, None, turns)
        generator_grads = jax.tree.map(lambda g: g[0], grads)
        assistant_grads = jax.tree.map(lambda g: g[1], grads)
        denoising = losses[1]
    figures = figures._replace(assistant=denoising / x0[0].size)
    return (generator_grads, assistant_grads), figures


def scanned_scores(
    method: Method,
    assistant: Params,
    reference: Params,
    conditions: tuple[Condition, Condition],
    t: jax.Array,
    x_t: jax.Array,
) -> Scores:
    """psi and guided by one traced network, which is the assistant, then the reference."""
    omega = method.settings.omega
    condition, null = conditions
    of_reference = {0.0: [null], 1.0: [condition]}.get(omega, [condition, null])
    passes = [condition, *of_reference]
    x_t = x_t if method.objective.through else jax.lax.stop_gradient(x_t)

    def predict(_, turn):
        first, condition = turn
        return None, method.score(select(first, assistant, reference))(x_t, t, condition)

    turns = (jnp.arange(len(passes)) == 0, jax.tree.map(lambda *c: jnp.stack(c), *passes))
    _, eps = jax.lax.scan(predict, None, turns)
    guided = eps[1] if len(of_reference) == 1 else guide(eps[1], eps[2], omega)
    return Scores(psi=eps[0], guided=guided)


def select(
    first: jax.Array | bool,
    a: Params,
    b: Params,
) -> Params:
    """`a` where `first`, else `b`; one of them as it is where `first` is known.

    Large leaves are in b's dtype, small ones (norms) in the wider of both. What both share is not
    picked, and so not copied.
    """
    if isinstance(first, bool):
        return a if first else b

    def leaf(a, b):
        if a is b:
            return a
        dtype = b.dtype if a.size >= sharding.SMALL else jnp.promote_types(a.dtype, b.dtype)
        return jnp.where(first, a.astype(dtype), b.astype(dtype))

    return jax.tree.map(leaf, a, b)


SCHEMES = {"shared": shared, "looped": looped}
