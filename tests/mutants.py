# SPDX-License-Identifier: Apache-2.0
"""Breaks the package, a line at a time, and says which breaks no test notices.

`python tests/mutants.py` runs each row of MUTANTS in a copy of the tree against the tests that
should fail, after these have passed on a whole copy. Prints one line a row; exits with 1 where a
mutant survives, with 2 where a row or its tests are wrong. Not in CI: it takes 40 minutes.
`--only=REGEX` takes some rows, by file or content; `--jobs=N` runs so many at a time.
"""

import argparse
import collections
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("di_star_jax", "configs", "tests", "docs", "README.md", "setup.py")
TIMEOUT = 600.0  # seconds of one mutant's tests; a hang is noticed too


class Mutant(NamedTuple):
    """One break. file, below di_star_jax; tests, a file's name and pytest's -k."""

    file: str
    old: str
    new: str
    tests: str
    names: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old}  ->  {new}"


# "@ FILE | TESTS | NAMES": a file below di_star_jax, the test file that notices, which of its tests
# (pytest's -k). Lines with - and + are what is replaced, which occurs once in the file, and by
# what; NAMES hold until the next @.
MUTANTS = r"""
@ objectives.py | test_objectives.py | sid_at or (space and di_star-pseudo_huber-eps)
- return -_dot(distance_grad(psi - ref), psi - eps)
+ return _dot(distance_grad(psi - ref), psi - eps)
- return -_dot(distance_grad(psi - ref), psi - eps)
+ return -_dot(jax.lax.stop_gradient(distance_grad(psi - ref)), psi - eps)
- return -_dot(distance_grad(psi - ref), psi - eps)
+ return -_dot(distance_grad(psi - ref), ref - eps)
- "di_star": Objective(_divergence, scores=_INSIDE, through=_INSIDE),
+ "di_star": Objective(_divergence, scores=_INSIDE, through=("psi",)),
@ objectives.py | test_objectives.py | space and (kl-pseudo_huber-eps or outside-pseudo_huber-eps)
- return -_dot(jax.lax.stop_gradient(psi - ref), x)
+ return -_dot(jax.lax.stop_gradient(ref - psi), x)
- return _dot(jax.lax.stop_gradient(cond - null), x)
+ return _dot(jax.lax.stop_gradient(null - cond), x)
- return _dot(jax.lax.stop_gradient(cond - null), x)
+ return _dot(cond - null, x)
- return k.alpha_cfg * implicit_guidance(terms.cond, terms.null, terms.x)
+ return (k.alpha_cfg - 1.0) * implicit_guidance(terms.cond, terms.null, terms.x)
- through=_INSIDE,
-         weightings=_PLAIN,
+ through=(),
+         weightings=_PLAIN,
@ objectives.py | test_objectives.py | space and sid-pseudo_huber-eps
- return -2.0 * _dot(y_t, ref - eps + alpha * y_t)
+ return -2.0 * _dot(y_t, ref - eps - alpha * y_t)
- return -2.0 * _dot(y_t, ref - eps + alpha * y_t)
+ return -_dot(y_t, ref - eps + alpha * y_t)
- lambda terms, k: sid(terms.psi, terms.guided, terms.eps, alpha=k.sid_alpha),
+ lambda terms, k: sid(terms.psi, terms.guided, terms.eps, alpha=1.0),
@ objectives.py | test_objectives.py | distances_gradient
- jnp.sqrt(_dot(y, y) + c**2)
+ jnp.sqrt(_dot(y, y) + c)
- y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)
+ y / jnp.sqrt(y * y + c**2)
- return 2.0 * y
+ return y
- jnp.sqrt(jnp.maximum(_dot(y, y), c**2))
+ jnp.sqrt(jnp.minimum(_dot(y, y), c**2))
- squared_norm ** (p / 2 - 1)
+ squared_norm ** (p - 2)
@ objectives.py | test_objectives.py | space and (l2-score or l2-x0)
- "score": lambda alpha_t, sigma_t: 1.0 / sigma_t,
+ "score": lambda alpha_t, sigma_t: 1.0 / sigma_t**2,
- "x0": lambda alpha_t, sigma_t: sigma_t / alpha_t,
+ "x0": lambda alpha_t, sigma_t: alpha_t / sigma_t,
- terms = Terms(*predictions, eps=scale * point.eps, x=x)
+ terms = Terms(*predictions, eps=point.eps, x=x)
@ objectives.py | test_objectives.py | kl_in_x0
- x = point.x0 if weighting in OF_X0 else point.x_t
+ x = point.x_t
@ objectives.py | test_objectives.py | normalised or mix or no_gradient
-         lambda terms, k: kl(terms.psi, terms.guided, terms.x),
-         scores=_INSIDE,
-         through=(),
+         lambda terms, k: kl(terms.psi, terms.guided, terms.x),
+         scores=_INSIDE,
+         through=_INSIDE,
- y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)
+ y / jnp.sqrt(jnp.sum(y * y) + c**2)
- "pseudo_huber": lambda y, k: pseudo_huber_grad(y, c=k.huber_c * y[0].size ** 0.5),
+ "pseudo_huber": lambda y, k: pseudo_huber_grad(y, c=k.huber_c * y.size**0.5),
- return loss / _divisor(terms) if weighting == "x0_normalised" else loss
+ return loss * _divisor(terms) if weighting == "x0_normalised" else loss
- distance = jnp.abs(terms.guided - terms.eps).mean(axis=tuple(range(1, terms.eps.ndim)))
+ distance = jnp.abs(terms.guided - terms.eps).mean()
- distance = jnp.abs(terms.guided - terms.eps).mean(axis=tuple(range(1, terms.eps.ndim)))
+ distance = jnp.abs(terms.psi - terms.guided).mean(axis=tuple(range(1, terms.eps.ndim)))
- return jax.lax.stop_gradient(jnp.maximum(distance, _FLOOR))
+ return jnp.maximum(distance, _FLOOR)
- return jax.lax.stop_gradient(jnp.maximum(distance, _FLOOR))
+ return jax.lax.stop_gradient(distance)
@ objectives.py | test_objectives.py | assistant_loss
- error = eps_psi - eps
+ error = eps_psi + eps
- return _dot(error, error)
+ return jnp.broadcast_to(jnp.sum(error**2), error.shape[:1])

@ diffusion.py | test_diffusion.py |
- np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
+ np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
- beta = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
+ beta = np.linspace(beta_end, beta_start, num_train_timesteps, dtype=np.float64)
- jnp.asarray(np.sqrt(alpha_bar), jnp.float32),
+ jnp.asarray(alpha_bar, jnp.float32),
- jnp.asarray(np.sqrt(1.0 - alpha_bar), jnp.float32),
+ jnp.asarray(1.0 - np.sqrt(alpha_bar), jnp.float32),
- alpha_bar = np.cumprod(1.0 - beta)
+ alpha_bar = np.cumprod(1.0 - beta) / (1.0 - beta[0])
- return per_sample(alpha_t, x0) * x0 + per_sample(sigma_t, x0) * eps
+ return per_sample(alpha_t, x0) * x0 - per_sample(sigma_t, x0) * eps
- return per_sample(alpha_t, x0) * x0 + per_sample(sigma_t, x0) * eps
+ return per_sample(sigma_t, x0) * x0 + per_sample(alpha_t, x0) * eps
- return (x_t - per_sample(sigma_t, x_t) * eps) / per_sample(alpha_t, x_t)
+ return (x_t - per_sample(sigma_t, x_t) * eps) * per_sample(alpha_t, x_t)
- return eps_uncond + omega * (eps_cond - eps_uncond)
+ return eps_cond + omega * (eps_cond - eps_uncond)
- return eps_uncond + omega * (eps_cond - eps_uncond)
+ return eps_uncond + (omega - 1.0) * (eps_cond - eps_uncond)

@ gradients.py | test_by_hand.py | written_out
# times and noise
- alpha_t = self.schedule.alpha[t]
+ alpha_t = self.schedule.alpha[t - 1]
- sigma_t = self.schedule.sigma[t]
+ sigma_t = self.schedule.sigma[jnp.minimum(t + 1, 999)]
- return Point(x0, add_noise(x0, eps, alpha_t, sigma_t), eps, alpha_t, sigma_t)
+ return Point(x0, add_noise(x0, eps, alpha_t, sigma_t), eps, sigma_t, alpha_t)
- return method.noise(x0, draws.t_psi, draws.eps_psi), draws.t_psi
+ return method.noise(x0, draws.t_psi, draws.eps_psi), draws.t
- return method.noise(x0, draws.t_psi, draws.eps_psi), draws.t_psi
+ return method.noise(x0, draws.t_psi, draws.eps), draws.t_psi
- return method.noise(x0, draws.t_psi, draws.eps_psi), draws.t_psi
+ return method.noise(x0, draws.t, draws.eps_psi), draws.t_psi
- loss = regulariser(method, scores, method.noise(x0, draws.t, draws.eps))
+ loss = regulariser(method, scores, method.noise(x0, draws.t_psi, draws.eps))
# networks and guidance
- condition, null = conditions
+ null, condition = conditions
- return {"guided": guide(eps_cond, eps_null, omega), "cond": eps_cond, "null": eps_null}
+ return {"guided": guide(eps_null, eps_cond, omega), "cond": eps_cond, "null": eps_null}
- return {"guided": guide(eps_cond, eps_null, omega), "cond": eps_cond, "null": eps_null}
+ return {"guided": guide(eps_cond, eps_null, omega), "cond": eps_null, "null": eps_cond}
- return method.score(assistant)(x_t, t, condition)
+ return method.score(assistant)(x_t, t, null)
- eps = method.score(reference)(x_t, t, of[names[0]])
+ eps = method.score(assistant)(x_t, t, of[names[0]])
- return Scores(psi=psi(x_t if "psi" in objective.through else still, t), **found)
+ return Scores(psi=psi(still, t), **found)
- of_reference = reference(x_t if "guided" in objective.through else still, t)
+ of_reference = reference(still, t)
# the gradient at x0
- return directly + per_sample(alpha_t, x0) * of_x_t, loss
+ return directly + of_x_t, loss
- return directly + per_sample(alpha_t, x0) * of_x_t, loss
+ return directly, loss
- return directly + per_sample(alpha_t, x0) * of_x_t, loss
+ return per_sample(alpha_t, x0) * of_x_t, loss
- return mean_share(-total), (total, each)
+ return mean_share(total), (total, each)
- total, each = method.reward(frozen, x0, token_ids, crop)
+ total, each = method.reward(frozen, x0, jax.tree.map(lambda i: i[::-1], token_ids), crop)
- of_reward, reward, rewards = reward_gradient(method, x0, frozen, token_ids, draws.crop)
+ of_reward, reward, rewards = reward_gradient(method, x0, frozen, token_ids, 0 * draws.crop)
- total = of_regulariser + scale * of_reward
+ total = of_regulariser - scale * of_reward
- return jnp.sum(per_sample_loss) / (per_sample_loss.shape[0] * sharding.size(*sharding.BATCH))
+ return jnp.sum(per_sample_loss)
# the assistant
- eps_psi = method.denoiser(assistant.having(learnt))(point.x_t, t, condition)
+ eps_psi = method.denoiser(assistant.having(learnt))(point.x0, t, condition)
- loss = objectives.denoising_score_matching(eps_psi, point.eps)
+ loss = objectives.denoising_score_matching(eps_psi, point.x0)
- network = Network(assistant, method.bases(frozen)[1])
+ network = Network(assistant, method.bases(frozen)[0])
- return assistant_gradient(method, network, point, t, condition)
+ return assistant_gradient(method, network, point, t, jax.tree.map(jnp.zeros_like, condition))
# what is logged
- return grads, loss / point.x0[0].size
+ return grads, loss
- return _norm(scores.psi - scores.guided) / like[0].size ** 0.5
+ return _norm(scores.psi - scores.guided)
- product = jnp.sum(of_regulariser * of_reward, axis=tuple(range(1, total.ndim))) * batch**2
+ product = -jnp.sum(of_regulariser * of_reward, axis=tuple(range(1, total.ndim))) * batch**2
- product = jnp.sum(of_regulariser * of_reward, axis=tuple(range(1, total.ndim))) * batch**2
+ product = jnp.sum(of_regulariser * of_reward, axis=tuple(range(1, total.ndim))) * batch
- norms = [batch * _norm(gradient) for gradient in (of_regulariser, of_reward)]
+ norms = [_norm(gradient) for gradient in (of_regulariser, of_reward)]
- norms = [batch * _norm(gradient) for gradient in (of_regulariser, of_reward)]
+ norms = [batch * _norm(gradient) for gradient in (of_reward, of_regulariser)]
@ gradients.py | test_lora.py | objectives and di_star-separate or alone
- return learnt if self.base is None else self.base | learnt
+ return learnt
- return Network(trained[0], generator), Network(trained[1], assistant)
+ return Network(trained[0], assistant), Network(trained[1], assistant)
@ models/layers.py | test_int8.py | loop_over_networks
- shared = any("adapter" in path for path, _ in nnx.to_flat_state(params))
+ shared = False
@ models/lora.py | test_lora.py | full_rank or sdxl_are
- return self.alpha / self.rank
+ return self.alpha
- of_stack = lead if len(lead) == 1 else []
+ of_stack = lead
@ models/lora.py | test_adapters.py | frozen_adapters_beside and pixart
- _attach(network, params[FROZEN], "frozen_adapter", lora.frozen_rank, 1.0)
+ _attach(network, params[FROZEN], "frozen_adapter", lora.frozen_rank, lora.scale)
@ pipelines/adapters.py | test_adapters.py | frozen_adapters_beside and pixart
- b[: adapter.rank] = adapter.scale * adapter.up.reshape(shape[-1], adapter.rank).T
+ b[: adapter.rank] = adapter.up.reshape(shape[-1], adapter.rank).T
@ models/int8.py | test_int8.py | half_a_step and pixart
- return jnp.round(kernel / scale)
+ return jnp.floor(kernel / scale)
@ models/int8.py | test_int8.py | half_a_step and pixart
- return tuple(range(kernel.ndim - 1))[kernel.ndim == 3 :]
+ return tuple(range(kernel.ndim - 1))
@ models/int8.py | test_int8.py | channel_of_zeros
- scale = jnp.where(largest > 0, largest, 1.0) / _MOST
+ scale = largest / _MOST
@ models/layers.py | test_int8.py | stands_for and pixart
- return (y * scale).astype(y.dtype)
+ return y
@ models/lora.py | test_lora.py | new_adapters and sdxl
- values[path] = jnp.zeros(leaf.shape)
+ values[path] = jnp.ones(leaf.shape)
- whole = kernel.astype(a.dtype) + lora.scale * (a @ b)
+ whole = kernel.astype(a.dtype) + a @ b
@ models/lora.py | test_lora.py | rank_above
- if lora.rank > most:
+ if lora.rank > c_out:
@ models/layers.py | test_lora.py | new_adapters and sdxl
- return (self.scale * h) @ b
+ return h @ b
@ cost/plan.py | test_lora.py | plan_of_sdxl
- if has_own_base(config):
+ if config.lora.rank:
@ cost/activations.py | test_plan.py | decoder_takes
- seen = (seen_pixels(config) / 1024) ** 2
+ seen = pixels
- decoded = Phase(size * of_image.decoder, waiting)
+ decoded = Phase(0.0, waiting + of_image.decoder)
- return math.floor((room - self.fixed) / max(self.image, 1.0))
+ return round((room - self.fixed) / max(self.image, 1.0))
@ cost/activations.py | test_plan.py | a_loop_holds
- loops = denoiser if config.compute.loop_networks and not config.lora.rank else 0
+ loops = denoiser if config.compute.loop_networks else 0
@ cost/activations.py | test_plan.py | within_15
- "gradients and learning": Phase(4 * grads + loops * trained, of_image.learning),
+ "gradients and learning": Phase(8 * grads + loops * trained, of_image.learning),
@ cost/plan.py | test_plan.py | within_15
- left_out = encoders(self.known) if self.config.data.cache else ()
+ left_out = ()
@ cost/work.py | test_plan.py | whole_steps_trace and sdxl_lora
- return self.to_inputs + (self.adapters or self.weights)
+ return self.to_inputs + self.adapters + self.weights
@ cost/work.py | test_plan.py | whole_steps_trace
- return self.forward + self.activations
+ return self.forward
- work *= 1 + 1 / max(1.0, plan.at_a_time)
+ pass
@ cost/work.py | test_plan.py | follows_the_method
- drawn = (1 + (config.generator.steps - 1) / 2) * generator.forward
+ drawn = config.generator.steps * generator.forward
- return total + max(0, parts - of_guided) * reference.forward
+ return total
- denoiser -= assistant.forward
+ pass
@ cost/policies.py | test_remat.py | every_choice or the_plan_takes or least_cut or asks_no_compiler
- for size in (0, *_divisors(images // count)[:-1])
+ for size in (0, *_divisors(images)[:-1])
- fitting = [choice for choice, size in sized.items() if size <= room(memory)]
+ fitting = [choice for choice, size in sized.items() if size <= memory]
- return min(fitting, key=lambda choice: (repeated(choice), choice.coarseness))
+ return min(fitting, key=repeated)
- return self.microbatches, -(self.slice or math.inf)
+ return self.microbatches, self.slice
@ cost/plan.py | test_remat.py | asks_no_compiler or machines_ram or other_fields
- if plan.device_kind == CPU and not plan.config.dry_run:
+ if plan.device_kind == CPU and plan.config.dry_run:
- sharing = self.mesh["data"] * self.mesh["fsdp"]
+ sharing = 1
@ cost/activations.py | test_remat.py | sdxl_on_v5e or keeps_products
- by_policy = {"none": (everything, 0.0), "dots": (0.46 + 3.62, 0.80), "full": (0.46, 0.80)}
+ by_policy = {"none": (everything, 0.0), "dots": (0.46, 0.80), "full": (0.46, 0.80)}
@ cost/remat.py | test_remat.py | compiled_first or passed_over or corrects or bounded or rules
- if size > (1 + TOLERANCE) * have or any(size >= row.planned for row in failed):
+ if size > have or any(size >= row.planned for row in failed):
- if size > (1 + TOLERANCE) * have or any(size >= row.planned for row in failed):
+ if any(size >= row.planned for row in failed):
- if size > (1 + TOLERANCE) * have or any(size >= row.planned for row in failed):
+ if size > (1 + TOLERANCE) * have:
- return all(size * row.need / row.planned <= have for row in alike)
+ return True
- if len(tried) < MOST - 1:
+ if len(tried) < MOST:
- return None if last in known else last
+ return None
- return min(may, key=lambda c: (flop[c.policies], c.coarseness, sized[c]))
+ return min(may, key=lambda c: (sized[c], flop[c.policies]))
@ cost/remat.py | test_remat.py | fails_on
- failed = [row for row in tried if not row.fits and math.isfinite(row.need)]
+ failed = [row for row in tried if not row.fits]
- may = [choice for choice in sized if choice not in known and may_fit(choice)]
+ may = [choice for choice in sized if may_fit(choice)]
- if math.isinf(best.need):
+ if False:
@ cost/remat.py | test_remat.py | first_that_fits or nothing_fits
- tried.append(Tried(choice, flop[choice.policies], size, need, need <= have))
+ tried.append(Tried(choice, flop[choice.policies], size, need, need <= memory))
- best = min(tried, key=lambda row: row.need)
+ best = tried[0]
@ cost/remat.py | test_remat.py | earlier_one or anew or left_alone or first_one or known_memory
- return Choice(**kept["choice"])._asdict() if kept["question"] == question else None
+ return Choice(**kept["choice"])._asdict()
- return Choice(**kept["choice"])._asdict() if kept["question"] == question else None
+ return None
- except (OSError, ValueError, TypeError, KeyError):
+ except (OSError, TypeError, KeyError):
- "versions": record.versions(),
+ "versions": {},
- "device": [planned.device_kind, planned.devices, memory],
+ "device": [planned.device_kind, planned.devices],
- return processes.gather("compute.remat", text)[0]
+ return processes.gather("compute.remat", text)[-1]
- config.dry_run = False  # for the devices of the mesh
+ pass
@ cost/remat.py | test_remat.py | out_of_memory_of
- return error.need, None
+ raise
@ cost/compile.py | test_remat.py | out_of_memory_of
- return memory.get("arguments", 0) + memory.get("temporaries", 0)
+ return memory.get("peak", 0)
@ cost/remat.py | test_remat.py | executed_flop
- p: count(aot.reward_work, whole._replace(**{name: p})) - behind if p != "full" else 0.0
+ p: 0.0
@ benchmark.py | test_remat.py | benchmark_of_a_part
- if policies.is_asked(config) and request.what != "train":
+ if False:
@ cost/slices.py | test_benchmark.py | unknown_gpu
- how many GPUs of a host ({', '.join(gpus.GPUS)})
+ how many GPUs of a host
@ benchmark.py | test_benchmark.py | far_too_large
- raise advice.out_of_memory(planned, error.need, error.have) from None
+ raise
@ benchmark.py | test_benchmark.py | may_fit_is_compiled
- tolerance = remat.TOLERANCE if request.topology else 0.0
+ tolerance = 0.0
- tolerance = remat.TOLERANCE if request.topology else 0.0
+ tolerance = remat.TOLERANCE
@ benchmark.py | test_benchmark.py | compiler_finds_too_large
- return advice.out_of_memory(planned, need, have) if need > have else None
+ return advice.out_of_memory(planned, need, have) if planned.bytes > have else None
@ cost/advice.py | test_benchmark.py | compiler_finds_too_large
- off = max(1.0, need / plan.bytes)
+ off = 1.0
@ benchmark.py | test_benchmark.py | compiled_in_vain
- if "lacks" in result:
+ if False:
@ main.py | test_main.py | slice
- on_gpus = gpus.parse(_TOPOLOGY.value) if _TOPOLOGY.value else None
+ on_gpus = None
@ cost/advice.py | test_plan.py | shortest_list or first_that_is or fields_that_can
- for count in range(1, len(known) + 1):
+ for count in range(len(known), 0, -1):
- for parts in range(plan.config.compute.microbatches + 1, images + 1)
+ for parts in [images]
- if encoders(plan.known) and not c.data.cache:
+ if encoders(plan.known):
- config = plan.config.copy_and_resolve_references()
+ config = plan.config
@ cost/plan.py | test_plan.py | leaves_room
- return self.bytes <= ROOM * memory
+ return self.bytes <= memory
- room = ROOM * memory - sum(self.state.values())
+ room = memory - sum(self.state.values())
- if plan.bytes > (1 + tolerance) * chip.memory:
+ if not plan.fits(chip.memory):
@ cost/plan.py | test_plan.py | within_15
- ROOM = 0.88
+ ROOM = 0.9
@ cost/chips.py | test_plan.py | a_card_has
- CARDS = {size: seen * FRACTION * 2**30 for size, seen in _SEEN.items()}
+ CARDS = {size: size * FRACTION * 2**30 for size, seen in _SEEN.items()}
@ cost/ops.py | test_ops.py | closed_form and not tpu and not gpu
- return [op._replace(times=op.times * turns) for op in inside]
+ return inside
- return max(branches, key=weight)
+ return [op for branch in branches for op in branch]
@ cost/ops.py | test_ops.py | collectives_receive
- "all-reduce": 2 * (n - 1) / n,
+ "all-reduce": (n - 1) / n,
- return found[1].count(",") + 1
+ return found[1].count(",")
- for axis in re.findall(r"'(\w+)'", found[2]))
+ for axis in sizes)
@ cost/ops.py | test_ops.py | receives_beside
- share = weight([found[place]]) / whole if whole else 0.0
+ share = 1.0
- found += [self._op(one, scope, "")] if is_between else self._of(one, scope)
+ found += self._of(one, scope)
- writes = [0.0 if one.name in handed_on else w for one, w in zip(results, writes)]
+ handed_on = set()
- receiver = one if collective == "reduce-scatter" else self._receiver(one)
+ receiver = one
@ cost/ops.py | test_ops.py | links_between
- links = chip.links(self.devices) if self.kind == "all-to-all" else 1.0
+ links = 1.0
@ cost/chips.py | test_ops.py | links_between
- return max(self.torus * devices ** (1 / self.torus) / 4, 1.0) if self.torus else 1.0
+ return max(self.torus * devices ** (1 / self.torus) / 2, 1.0) if self.torus else 1.0
@ cost/ops.py | test_ops.py | stand_alone
- share = _share(operands[1][0], results[0])
+ share = 1.0
- read = _share(results[0], operands[0][0]) * _total(operands[0])
+ read = _total(operands[0])
@ cost/ops.py | test_ops.py | fused
- return [0.0 if is_in_place else elements, *sizes[1:]]
+ return [elements, *sizes[1:]]
- return [elements, *sizes[1:]]
+ return list(sizes)
- _share(instructions[update.operands[1]].result[0], update.result[0]) if update else 1.0
+ 1.0
@ cost/ops.py | test_ops.py | workspace
- return tuple(each for each in one.result if each.dtype not in ("u8", "s8"))
+ return one.result
@ cost/products.py | test_ops.py | closed_form and not tpu and not gpu
- return sum(taps[(axis.pad[0] - place * axis.stride) % holes] for place in range(outputs))
+ return sum(taps) * outputs
@ cost/products.py | test_ops.py | written_as_convolutions
- return sum(0 <= place < inputs for place in places)
+ return sum(1 for place in places)
@ cost/products.py | test_ops.py | gpu_libraries
- products = 5 if "Backward" in target else 2
+ products = 4 if "Backward" in target else 2
- image, result = result, image
+ pass
- kernel, result = result, kernel
+ pass
@ cost/hlo.py | test_ops.py | memory_on_the_chip
- return math.prod(self.padded) * self.bits / 8 if self.space == 0 else 0.0
+ return math.prod(self.padded) * self.bits / 8
- for axis, extent in zip(self.order, reversed(self.tile)):
+ for axis, extent in zip(self.order, self.tile):
@ cost/hlo.py | test_ops.py | line_breaks
- rows[-1] += line
+ pass
@ cost/origin.py | test_ops.py | modules_follow
- if any(file.startswith(start) for _, file in ours):
+ if ours[0][1].startswith(start):
- if ours and _WEIGHTS.fullmatch(ours[0][0].function.rpartition("<locals>.")[2]):
+ if any(_WEIGHTS.fullmatch(frame.function) for frame, _ in ours):
@ cost/op_tables.py | test_ops.py | what_bounds_each
- bound, seconds = max(op.seconds(chip).items(), key=lambda each: each[1])
+ bound, seconds = "compute", op.seconds(chip)["compute"]
@ cost/report.py | test_plan.py | time_is_that
- hours = run * c.data.batch_size / plan.devices / 3600
+ hours = run * c.data.batch_size / 3600
@ cost/report.py | test_plan.py | 100_columns
- return textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False)
+ return [line]
@ gradients.py | test_by_hand.py | written_out
- return pull_back(of_x0)[0], figures._replace(condition=conditions[0])
+ return pull_back(of_x0)[0], figures._replace(condition=conditions[1])
@ gradients.py | test_by_hand.py | assistants_own
- x0 = x0_of(method, x_t, t, method.denoiser(generator.params)(x_t, t, condition))
+ x0 = x0_of(method, x_t, t, method.denoiser(assistant.params)(x_t, t, condition))
- x_t, t = simulate(method, generator.params, draws, condition)
+ x_t, t = simulate(method, assistant.params, draws, condition)
- condition = method.encode_text(frozen, token_ids)[0]
-     x_t
+ condition = method.encode_text(frozen, token_ids)[1]
+     x_t
@ gradients.py | test_by_hand.py | draws
- t, eps = times_and_noise(key_generator, settings.generator_times, shape)
+ t, eps = times_and_noise(key_generator, settings.assistant_times, shape)
- t_psi, eps_psi = times_and_noise(key_assistant, settings.assistant_times, shape)
+ t_psi, eps_psi = times_and_noise(key_generator, settings.assistant_times, shape)
- t = jax.random.randint(key_t, shape[:1], first, last + 1)
+ t = jax.random.randint(key_t, shape[:1], first, last)
- t = jax.random.randint(key_t, shape[:1], first, last + 1)
+ t = jax.random.randint(key_t, shape[:1], first + 1, last + 1)
- t = jax.random.randint(key_t, shape[:1], first, last + 1)
+ t = jnp.full(shape[:1], jax.random.randint(key_t, (), first, last + 1))
- return t, jax.random.normal(key_eps, shape)
+ return t, jnp.broadcast_to(jax.random.normal(key_eps, shape[1:]), shape)
- return t, jax.random.normal(key_eps, shape)
+ return t, jax.random.uniform(key_eps, shape, minval=-3**0.5, maxval=3**0.5)
- noise=jnp.moveaxis(jax.random.normal(key_z, (steps, *shape)), 0, 1),
+ noise=jnp.stack([jax.random.normal(key_z, shape)] * steps, axis=1),
- noise=jnp.moveaxis(jax.random.normal(key_z, (steps, *shape)), 0, 1),
+ noise=jnp.stack([jax.random.normal(key_z, (steps, *shape[1:]))] * batch),
- crop=jax.random.uniform(jax.random.fold_in(key_z, 2), (batch, 2)),
+ crop=jnp.broadcast_to(jax.random.uniform(jax.random.fold_in(key_z, 2), (2,)), (batch, 2)),
@ gradients.py | test_step.py | few_step_generator
- step=jax.random.randint(jax.random.fold_in(key_z, 1), (), 0, steps),
+ step=jax.random.randint(jax.random.fold_in(key_z, 1), (), 0, max(steps - 1, 1)),
- return method.noise(x0, for_all(timesteps[k + 1]), noise[k + 1]).x_t
+ return method.noise(x0, for_all(timesteps[k + 1]), noise[k]).x_t
- return method.noise(x0, for_all(timesteps[k + 1]), noise[k + 1]).x_t
+ return method.noise(x0, for_all(timesteps[k]), noise[k + 1]).x_t
- x_t = jax.lax.fori_loop(0, draws.step, earlier, first)
+ x_t = jax.lax.fori_loop(1, draws.step, earlier, first)
@ gradients.py | test_by_hand.py | given_z_or
- first = first_input(noise[0], form, method.schedule)
+ first = noise[0]
@ diffusion.py | test_by_hand.py | given_z_or
- return schedule.sigma[form.timesteps[0]] * z if form.input == "scaled" else z
+ return schedule.alpha[form.timesteps[0]] * z if form.input == "scaled" else z
- return schedule.sigma[form.timesteps[0]] * z if form.input == "scaled" else z
+ return schedule.sigma[form.timesteps[0]] * z
@ gradients.py | test_by_hand.py | not_finite
- kept = jnp.isfinite(total).all(axis=tuple(range(1, total.ndim)))
+ kept = jnp.full(len(total), jnp.isfinite(total).all())
- return jnp.where(per_sample(kept, total), total, 0.0), pull
+ return total, pull
- return jnp.where(per_sample(kept, total), total, 0.0), pull
+ return jnp.nan_to_num(total), pull
@ gradients.py | test_by_hand.py | written_out
- total = of_regulariser + scale * of_reward
+ total = of_regulariser + of_reward
@ gradients.py | test_step.py | scale_the_regulariser
- return loss / point.x0[0].size if s.reduction == "mean" else loss
+ return loss / point.x0.size if s.reduction == "mean" else loss
@ gradients.py | test_by_hand.py | written_out
- names = ("cond", "null") if omega == 1.0 else ("null", "cond")
+ names = ("null", "cond") if omega == 1.0 else ("cond", "null")
- return method.score(assistant)(x_t, t, condition)
+ return method.denoiser(assistant)(x_t, t, condition)
- eps_cond, eps_null = jnp.split(method.score(reference)(x_t, t, both), 2)
+ eps_cond, eps_null = jnp.split(method.denoiser(reference)(x_t, t, both), 2)
@ gradients.py | test_step.py | eight_devices
- return jnp.sum(per_sample_loss) / (per_sample_loss.shape[0] * sharding.size(*sharding.BATCH))
+ return jnp.sum(per_sample_loss) / per_sample_loss.shape[0]

@ schemes.py | test_by_hand.py | written_out
- (grads,) = pull_back(jnp.where(first, of_eps_z, of_loss))
+ (grads,) = pull_back(jnp.where(first, of_loss, of_eps_z))
- turns = (jnp.array([True, False]), jnp.stack([z, noised.x_t]), jnp.stack([t_z, t_psi]))
+ turns = (jnp.array([True, False]), jnp.stack([z, noised.x_t]), jnp.stack([t_z, draws.t]))
- of_loss, loss = denoising_gradient(eps, noised.eps)
+ of_loss, loss = denoising_gradient(eps, draws.eps)
- return (by_assistant + by_reference,)
+ return (by_assistant,)
- return (by_assistant + by_reference,)
+ return (by_reference,)
- of_loss, loss = denoising_gradient(eps_psi, draws.eps)
+ of_loss, loss = denoising_gradient(eps_psi, draws.eps_psi)
- of_reference = {0.0: [null], 1.0: [condition]}.get(omega, [condition, null])
+ of_reference = {1.0: [null], 0.0: [condition]}.get(omega, [condition, null])
- guided = eps[1] if len(of_reference) == 1 else guide(eps[1], eps[2], omega)
+ guided = eps[1] if len(of_reference) == 1 else guide(eps[2], eps[1], omega)
- return None, method.score(select(first, assistant, reference))(x_t, t, condition)
+ return None, method.score(select(first, reference, assistant))(x_t, t, condition)
- denoising = losses[1]
+ denoising = losses[0]
- figures = figures._replace(assistant=loss / x0[0].size)
+ figures = figures._replace(assistant=loss)

@ sharding.py | test_sharding.py | rounded_shares
- return (shares.sum(axis, dtype=jnp.float32).astype(stored),)
+ return (shares.sum(axis).astype(stored),)
- shares = jax.lax.all_to_all(shares, PARAMS, split_axis=axis, concat_axis=axis)
+ shares = shares
@ step.py | test_by_hand.py | adamw
- adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=False, bias_correction=True)
+ adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=False, bias_correction=False)
- adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=False, bias_correction=True)
+ adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=True, bias_correction=True)
- adam = optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps)
+ adam = optax.scale_by_adam(b1=s.b2, b2=s.b1, eps=s.eps)
- optax.add_decayed_weights(s.weight_decay),
+ optax.add_decayed_weights(-s.weight_decay),
-         optax.add_decayed_weights(s.weight_decay),
-         optax.scale_by_learning_rate(schedule),
+         optax.scale_by_learning_rate(schedule),
+         optax.add_decayed_weights(s.weight_decay),
- first = learning_rate / (lr_warmup_steps + 1)
+ first = learning_rate
- return optax.linear_schedule(first, learning_rate, lr_warmup_steps)
+ return optax.linear_schedule(first, learning_rate, lr_warmup_steps + 1)
@ step.py | test_step.py | different_noise
# the key, folded with the step
-         key = jax.random.fold_in(key, state.step)
-         trained = (state.generator, state.assistant)
+         trained = (state.generator, state.assistant)
@ step.py | test_by_hand.py | no_two_steps
-         key = jax.random.fold_in(key, state.step)
-         learnt = (state.assistant, state.opt_assistant)
-         networks = (state.generator, frozen)
-         learnt, of_assistant
+         learnt = (state.assistant, state.opt_assistant)
+         networks = (state.generator, frozen)
+         learnt, of_assistant
-         key = jax.random.fold_in(key, state.step)
-         learnt = (state.assistant, state.opt_assistant)
-         networks = (state.generator, frozen)
-         batches
+         learnt = (state.assistant, state.opt_assistant)
+         networks = (state.generator, frozen)
+         batches
# whose weights, whose prompts
@ step.py | test_step.py | assistant_first or see_fresh
- keys = [jax.random.fold_in(key, i + 1) for i in range(len(token_ids))]
+ keys = [jax.random.fold_in(key, 1) for i in range(len(token_ids))]
- keys = [jax.random.fold_in(key, i + 1) for i in range(len(token_ids))]
+ keys = [jax.random.fold_in(key, i) for i in range(len(token_ids))]
- keys = [jax.random.fold_in(key, i + 1) for i in range(len(token_ids))]
+ keys = [key for i in range(len(token_ids))]
- turns = (jax.tree.map(lambda *ids: jnp.stack(ids), *token_ids[1:]), jnp.stack(keys[1:]))
+ turns = (jax.tree.map(lambda *ids: jnp.stack(ids), *token_ids[:-1]), jnp.stack(keys[1:]))
-             learnt, logged = assistant_updates(learn, learnt, networks, token_ids[1:], key)
+             learnt, logged = assistant_updates(learn, learnt, networks, token_ids[:-1], key)
-         state = state._replace(assistant=learnt[0], opt_assistant=learnt[1])
-
-         networks = ((state.generator, state.assistant), frozen)
+         networks = ((state.generator, state.assistant), frozen)
+         state = state._replace(assistant=learnt[0], opt_assistant=learnt[1])
- learnt, norm = update(optimizers.assistant, grads, *learnt, settings.clip_norms[1])
+ learnt, norm = update(optimizers.generator, grads, *learnt, settings.clip_norms[1])
- return settings.assistant_updates + settings.assistant_first
+ return settings.assistant_updates
@ step.py | test_by_hand.py | assistants_own
- state = state._replace(step=state.step + 1, assistant=learnt[0], opt_assistant=learnt[1])
+ state = state._replace(step=state.step, assistant=learnt[0], opt_assistant=learnt[1])
- batches = token_ids[: method.settings.assistant_updates]
+ batches = token_ids[:1]
@ step.py | test_step.py | moves_generator
-         step=state.step + 1,
-         generator=generator,
+         generator=generator,
@ step.py | test_by_hand.py | begins_with
- ema=copy(generator),
+ ema=copy(assistant),
@ step.py | test_by_hand.py | written_out or assistants_own
- state, logged = update_generator(state, grads[0], figures, optimizers.generator, settings)
+ state, logged = update_generator(state, grads[0], figures, optimizers.assistant, settings)
- batch = (token_ids[0], draw(mesh, key, token_ids[0], settings), scale)
-         on_devices = spread(mesh, both
+ batch = (token_ids[0], draw(mesh, key, token_ids[0], settings), jnp.ones(()))
+         on_devices = spread(mesh, both
- opt_generator=opt,
+ opt_generator=state.opt_generator,
- return state._replace(assistant=learnt[0], opt_assistant=learnt[1]), logged
+ return state._replace(assistant=learnt[0]), logged
- state = state._replace(step=state.step + 1, assistant=learnt[0], opt_assistant=learnt[1])
+ state = state._replace(step=state.step + 1, assistant=learnt[0])
- learnt, logged = learn(learnt, networks, token_ids[0], keys[0])
-     if
+ _, logged = learn(learnt, networks, token_ids[0], keys[0])
+     if
- return learnt, jax.tree.map(lambda values: values[-1], history)
+ return learnt, jax.tree.map(lambda values: values[-1], history) and logged
@ step.py | test_by_hand.py | written_out
- ema=optax.incremental_update(generator, state.ema, 1.0 - decay),
+ ema=optax.incremental_update(generator, state.ema, decay),
- ema=optax.incremental_update(generator, state.ema, 1.0 - decay),
+ ema=optax.incremental_update(state.generator, state.ema, 1.0 - decay),
- ema=optax.incremental_update(generator, state.ema, 1.0 - decay),
+ ema=optax.incremental_update(generator, state.generator, 1.0 - decay),
- ema=optax.incremental_update(generator, state.ema, 1.0 - decay),
+ ema=optax.incremental_update(state.assistant, state.ema, 1.0 - decay),
- decay = ema_decay(state.step, len(figures.gap), settings)
+ decay = ema_decay(state.step + 1, len(figures.gap), settings)
- decay = ema_decay(state.step, len(figures.gap), settings)
+ decay = ema_decay(state.step, 1, settings)
- seen = jnp.maximum(step - settings.warmup_steps, 0) * jnp.float32(batch)
+ seen = step * jnp.float32(batch)
- seen = jnp.maximum(step - settings.warmup_steps, 0) * jnp.float32(batch)
+ seen = jnp.maximum(step - settings.warmup_steps, 0) * jnp.float32(1)
@ step.py | test_step.py | average
- half_life = jnp.minimum(settings.ema_half_life, EMA_RAMP_UP * seen)
+ half_life = jnp.float32(settings.ema_half_life)
- half_life = jnp.minimum(settings.ema_half_life, EMA_RAMP_UP * seen)
+ half_life = jnp.maximum(settings.ema_half_life, EMA_RAMP_UP * seen)
- half_life = jnp.minimum(settings.ema_half_life, EMA_RAMP_UP * seen)
+ half_life = EMA_RAMP_UP * seen
- 0.5 ** (batch / jnp.maximum(half_life, 1e-8))
+ 0.5 ** (jnp.maximum(half_life, 1e-8) / batch)
- EMA_RAMP_UP = 0.05
+ EMA_RAMP_UP = 0.5
@ step.py | test_step.py | clipping
- (generator, opt), norm = update(optimizer, grads, *learnt, settings.clip_norms[0])
+ (generator, opt), norm = update(optimizer, grads, *learnt, settings.clip_norms[1])
- learnt, norm = update(optimizers.assistant, grads, *learnt, settings.clip_norms[1])
+ learnt, norm = update(optimizers.assistant, grads, *learnt, settings.clip_norms[0])
- shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
+ shrink = clip_norm / jnp.maximum(norm, 1e-30)
- updates, opt_state = optimizer.update(clipped, opt_state, params)
+ updates, opt_state = optimizer.update(grads, opt_state, params)
- return (optax.apply_updates(params, updates), opt_state), norm
+ return (optax.apply_updates(params, updates), opt_state), optax.global_norm(clipped)
@ step.py | test_step.py | balance
- return settings.balance * total / jnp.maximum(count, 1.0)
+ return settings.balance * total
- counts = (balance[1] < MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
+ counts = (of_reward > 0) & jnp.isfinite(ratio)
- counts = (balance[1] < MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
+ counts = (balance[1] <= MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
@ step.py | test_by_hand.py | not_measured
- counts = (balance[1] < MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
+ counts = (balance[1] < MEASURED) & jnp.isfinite(ratio)
- counts = (balance[1] < MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
+ counts = (balance[1] < MEASURED) & (of_reward > 0)
@ step.py | test_step.py | balance
- ratio = of_regulariser / jnp.maximum(of_reward, 1e-30)
+ ratio = of_reward / jnp.maximum(of_regulariser, 1e-30)
- balance=measured_balance(state.balance, figures.pull, settings),
+ balance=state.balance,
@ step.py | test_by_hand.py | written_out or kept
- "generator/loss": regulariser - scale * reward,
+ "generator/loss": regulariser + scale * reward,
- "assistant/loss": jnp.mean(loss),
+ "assistant/loss": jnp.sum(loss),
- quarter = (figures.t - first) * 4 // (last + 1 - first)
+ quarter = figures.t * 4 // (last + 1)
- figures.gap, where=(quarter == i) & (figures.pull.kept > 0)
+ figures.gap, where=quarter == i
- total = jnp.sum(values, where=kept > 0)
+ total = jnp.sum(values)
- return total / jnp.maximum(jnp.sum(kept), 1.0)
+ return total / len(kept)
- return jnp.sqrt(_mean((values - _mean(values, kept)) ** 2, kept))
+ return _mean((values - _mean(values, kept)) ** 2, kept)
- "nonfinite": (dropped == len(pull.kept)).astype(jnp.float32),
+ "nonfinite": (dropped > 0).astype(jnp.float32),
@ step.py | test_step.py | drop_all
- "nonfinite": (dropped == len(pull.kept)).astype(jnp.float32),
+ "nonfinite": jnp.zeros(()),
@ step.py | test_by_hand.py | kept
- return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)
+ return sum(jnp.isinf(norm).astype(jnp.float32) for norm in norms)
@ step.py | test_step.py | microbatches
- return jax.tree.map(lambda total, grad: total + grad / count, sums, grads), results
+ return jax.tree.map(lambda total, grad: total + grad, sums, grads), results

@ samplers.py | test_samplers.py |
- return (np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps) + 1).astype(np.int32)
+ return (np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps)).astype(np.int32)
- (num_train_timesteps // (num_steps + 1))
+ (num_train_timesteps // num_steps)
- t = jnp.full(z.shape[:1], timesteps[0], jnp.int32)
+ t = jnp.full(z.shape[:1], timesteps[0] - 1, jnp.int32)
- x_t = add_noise(x0, noise[k], schedule.alpha[t], schedule.sigma[t])
+ x_t = add_noise(x0, noise[0], schedule.alpha[t], schedule.sigma[t])
- x0 = one_step(eps_fn, x_t, timesteps[k : k + 1], schedule)
+ x0 = one_step(eps_fn, x_t, timesteps[k - 1 : k], schedule)
- to = _onwards(timesteps, 0) if to is None else to
+ to = _onwards(timesteps, -1) if to is None else to
- end: int = -1,
+ end: int = 0,
- return step.alpha_next * x0 + step.sigma_next * eps, None
+ return step.alpha_next * x0 + step.sigma * eps, None
- extrapolated = x0 + half_t * (x0 - x0_before)
+ extrapolated = x0 - half_t * (x0 - x0_before)
- half = jnp.pad(h[1:] / (2.0 * h[:-1]), 1)[: len(timesteps)]  # [N]
+ half = jnp.pad(h[:-1] / (2.0 * h[1:]), 1)[: len(timesteps)]  # [N]
- return (ratio * x_t + weight * extrapolated, x0), None
+ return (ratio * x_t + weight * extrapolated, x0_before), None
@ samplers.py | test_assembly.py | constants
- tuple(999 - i * 1000 // count for i in range(count))
+ tuple(1000 - i * 1000 // count for i in range(count))
@ samplers.py | test_fields.py | follows_the_file or last_noise
- return _deterministic(eps_fn, z, _steps(timesteps, schedule, to), clip)
+ return _deterministic(eps_fn, z, _steps(timesteps, schedule, to))
- x = _deterministic(eps_fn, steps.sigma[0] * z if pure_noise else z, steps)
+ x = _deterministic(eps_fn, z, steps)

@ prompts/source.py | test_prompts.py | hosts or each_pass or source_keeps or share_records
- first = step * self._batch_size
+ first = step
- first = step * self._batch_size
+ first = 0
- self._stream = grain.MapDataset.source(source).shuffle(seed).repeat()
+ self._stream = grain.MapDataset.source(source).shuffle(0).repeat()
- self._stream = grain.MapDataset.source(source).shuffle(seed).repeat()
+ self._stream = grain.MapDataset.source(source).repeat()
- self._stream = grain.MapDataset.source(source).shuffle(seed).repeat()
+ self._stream = grain.MapDataset.source(source).repeat().shuffle(seed)
- return [self._stream[first + row] for row in rows]
+ return [self._stream[first + i] for i, _ in enumerate(rows)]
- return last * BLOCK + len(self._block(last))
+ return (last + 1) * BLOCK
- yield {"prompts": json.dumps(block)}
+ yield {"prompts": json.dumps(block[::-1])}
- key = f"{digest}\0{name}\0{suffix}\0{forms.get(suffix)}\0blocks of {BLOCK}"
+ key = f"{name}\0{suffix}\0{forms.get(suffix)}\0blocks of {BLOCK}"
@ prompts/source.py | test_prompts.py | damaged_by_a_stop
- return (folder / SEAL).is_file() and read_json(folder / SEAL) == _digests(folder)
+ return (folder / SEAL).is_file()
@ prompts/tokens.py | test_prompts.py | word_tokenizer
- texts, padding="max_length", truncation=True, max_length=self.max_length
+ texts, padding="longest", truncation=True, max_length=self.max_length
- texts, padding="max_length", truncation=True, max_length=self.max_length
+ texts, padding="max_length", truncation=False, max_length=self.max_length

@ rewards/pixels.py | test_rewards.py | pixels or clipped or transposed or resize_matrix
- x = settle((image.astype(jnp.float32) + 1) / 2)
+ x = settle(image.astype(jnp.float32))
- return (x - CLIP_MEAN[None, None, None]) / CLIP_STD[None, None, None]
+ return (x - CLIP_STD[None, None, None]) / CLIP_MEAN[None, None, None]
- return (x - CLIP_MEAN[None, None, None]) / CLIP_STD[None, None, None]
+ return (x - CLIP_MEAN[None, None, None, ::-1]) / CLIP_STD[None, None, None]
- return jnp.clip(x, 0.0, 1.0)
+ return x
- between = between or settle
+ between = between or _as_is
- return jnp.floor(_unit_range(x) * 255 + 0.5) / 255
+ return jnp.floor(_unit_range(x) * 255) / 255
- return rows // 2
+ return 0
- weight = _cubic((pixel + 0.5 - centre) / stretch, a=-0.5)
+ weight = _cubic((pixel + 0.5 - centre) / stretch, a=-0.75)
- stretch = max(ratio, 1.0)
+ stretch = 1.0
- return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
+ return (weight / weight.sum(axis=0, keepdims=True)).astype(np.float32)
- centre = (np.arange(n_out)[:, None] + 0.5) * ratio
+ centre = np.arange(n_out)[:, None] * ratio + 0.5
- return matrix(n, resized)[first : first + size]
+ return matrix(n, resized)[first + 1 : first + 1 + size]
@ rewards/pixels.py | test_clip_rewards.py | views_of_full_size
- return round(rows / 2)
+ return rows // 2
@ rewards/similarity.py | test_rewards.py | whole_reward
- return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
+ return features / jnp.linalg.norm(features, axis=0, keepdims=True)
- return jnp.sum(image_embeddings(graphdef, params, images, pixels=pixels) * text, axis=-1)
+ return 9 * jnp.sum(image_embeddings(graphdef, params, images, pixels=pixels) * text, axis=-1)
- return jnp.sum(image_embeddings(graphdef, params, images, pixels=pixels) * text, axis=-1)
+ return jnp.mean(image_embeddings(graphdef, params, images, pixels=pixels) @ text.T, axis=-1)
@ rewards/views.py | test_rewards.py | views or slices
- return latents
+ return latents[:, :size, :size]
- room = jnp.array(latents.shape[1:3]) - size + 1
+ room = jnp.array(latents.shape[1:3]) - size
- return jax.lax.dynamic_slice(x, (corner[0], corner[1], 0), (size, size, channels))
+ return jax.lax.dynamic_slice(x, (corner[1], corner[0], 0), (size, size, channels))
- corners = (crop * room[None]).astype(jnp.int32)
+ corners = (0 * crop * room[None]).astype(jnp.int32)
- return per_sample(cotangents[0], gradient) * gradient, *(None for _ in others)
+ return gradient, *(None for _ in others)

@ evaluation/measures.py | test_measures.py | saturation or contrast or clipped or diversity
- return (np.clip(images.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0, readable
+ return (images.astype(np.float64) + 1.0) / 2.0, readable
- saturation = np.divide(spread, top, out=np.zeros_like(top), where=top > 0)  # [B, H, W]
+ saturation = spread
- top = rgb.max(axis=-1)
+ top = rgb.mean(axis=-1)
- luma = rgb @ np.array([0.2126, 0.7152, 0.0722])  # [B, H, W]
+ luma = rgb @ np.array([0.0722, 0.7152, 0.2126])  # [B, H, W]
- return np.where(readable, luma.std(axis=(1, 2)), np.nan)
+ return np.where(readable, luma.var(axis=(1, 2)), np.nan)
- readable = np.isfinite(images).all(axis=(1, 2, 3))
+ readable = ~np.isnan(images).any(axis=(1, 2, 3))
- return float(1.0 - ((u.sum(axis=0) ** 2).sum() - len(u)) / (len(u) * (len(u) - 1)))
+ return float(1.0 - (u.sum(axis=0) ** 2).sum() / len(u) ** 2)
- return float(1.0 - ((u.sum(axis=0) ** 2).sum() - len(u)) / (len(u) * (len(u) - 1)))
+ return float(((u.sum(axis=0) ** 2).sum() - len(u)) / (len(u) * (len(u) - 1)))
- norms = np.linalg.norm(features, axis=1, keepdims=True)
+ norms = np.linalg.norm(features, keepdims=True)
@ evaluation/measures.py | test_measures.py | attributes
- shares.append(right / total)
+ shares.append(right)
@ evaluation/statistics.py | test_measures.py | summary or standard_error or paired or bootstrap
- used.std(ddof=1) / np.sqrt(len(used))
+ used.std(ddof=1) / np.sqrt(number.sum())
- used = means[number > 0]
+ used = np.asarray(values, np.float64)[~np.isnan(values)]
- wins = (np.sign(difference) + 1.0) / 2.0
+ wins = (difference > 0).astype(float)
- means, number = _by_prompt(a - b)
+ means, number = _by_prompt(b - a)
@ evaluation/frechet.py | test_measures.py | frechet or statistics
- return max(float(means + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross), 0.0)
+ return max(float(means + np.trace(cov_a) + np.trace(cov_b) - cross), 0.0)
- between = np.outer(delta, delta) * (self.count * other.count / total)
+ between = np.outer(delta, delta) * (other.count / total)
- means = ((a.mean - b.mean) ** 2).sum()
+ means = np.abs(a.mean - b.mean).sum()

@ evaluation/picks.py | test_measures.py | places_of
- order = np.argsort(-best, kind="stable").tolist()
+ order = np.argsort(best, kind="stable").tolist()
- samples = values.argmax(axis=1)
+ samples = np.argmin(values, axis=1)
- "worst": ranked(-scores),
+ "worst": ranked(scores)[::-1],
- "losses": ranked(np.where(differences < 0, -differences, np.nan)),
+ "losses": ranked(np.where(differences < 0, differences, np.nan)),
- values = np.where(np.isfinite(values), values, -np.inf)
+ values = np.nan_to_num(values)

@ assembly.py | test_assembly.py |
- generator_times=(objective.t_min, objective.t_max),
+ generator_times=(config.assistant.t_min, config.assistant.t_max),
- assistant_times=(config.assistant.t_min, config.assistant.t_max),
+ assistant_times=(objective.t_min, objective.t_max),
-         generator=step.adamw(optim.generator_lr, settings),
-         assistant=step.adamw(optim.assistant_lr, settings),
+         generator=step.adamw(optim.assistant_lr, settings),
+         assistant=step.adamw(optim.generator_lr, settings),
- ema_half_life=config.ema.half_life_samples,
+ ema_half_life=config.ema.half_life_samples / config.data.batch_size,
- warmup_steps=config.assistant.warmup_steps,
+ warmup_steps=0,
- clip_norms=(config.optim.clip_norm * of_generator, config.optim.clip_norm * numbers),
+ clip_norms=(config.optim.clip_norm * numbers, config.optim.clip_norm * of_generator),
- of_generator = numbers if objective.reduction == "sum" else 1
+ of_generator = 1
- balance=config.reward.balance,
+ balance=0.0,
- assistant_first=config.assistant.first,
+ assistant_first=False,
- assistant_updates=config.assistant.updates,
+ assistant_updates=1,
- omega=objective.omega,
+ omega=objective.omega - 1.0,
- microbatches=config.compute.microbatches,
+ microbatches=1,
- weighting=objective.weighting,
+ weighting="eps",
- scheme = {"x0": "separate", "x_t": "shared"}[config.assistant.sharing]
+ scheme = {"x0": "shared", "x_t": "separate"}[config.assistant.sharing]
@ assembly.py | test_assembly.py | nothing_guides
- if dtype == jnp.dtype(config.compute.dtype):
+ if dtype:
- guided = objective.omega != 1.0 and objective.name not in objectives.OUTSIDE
+ guided = objective.omega != 1.0
@ assembly.py | test_assembly.py | what_learns
- return sharding.abstract(denoiser.params, dtype=jnp.float32)
+ return sharding.abstract(denoiser.params)
@ assembly.py | test_clip_rewards.py | add_up or resized or scale_zero
- total += scale * each[name]
+ total += each[name]
-             for name, scale in scales.items():
-                 total += scale * each[name]
+             for name, scale in scales.items():
+                 total = scale * each[name]
- return in_slices(score, config.decode.slice)(view(x0, crop, size), of_rewards)
+ return in_slices(score, config.decode.slice)(x0, of_rewards)
- return in_slices(score, config.decode.slice)(view(x0, crop, size), of_rewards)
+ return in_slices(score, config.decode.slice)(view(x0, 0 * crop, size), of_rewards)
@ models/layers.py | test_layers.py | group_norm
- near = _over_groups(groups, x[:, ::8, ::8].astype(jnp.float32).mean((1, 2)))
+ near = 0.0 * _over_groups(groups, x[:, ::8, ::8].astype(jnp.float32).mean((1, 2)))
- variance = _over_groups(groups, (off * off).mean((1, 2))) - mean * mean
+ variance = _over_groups(groups, (off * off).mean((1, 2)))
- of_x = inverse * (scale * grad - of_mean - normal * of_deviation)
+ of_x = inverse * (scale * grad - of_mean)
- return of_x.astype(x.dtype), pixels * along.sum(0), pixels * pull.sum(0)
+ return of_x.astype(x.dtype), along.sum(0), pixels * pull.sum(0)
@ models/layers.py | test_layers.py | gates_gradient
- other = own[..., ::-1, :]
+ other = own
- is_gate = jnp.arange(2)[:, None] == 1
+ is_gate = jnp.arange(2)[:, None] == 0
@ models/layers.py | test_layers.py | dots_repeats
- return primitive.name in _PRODUCTS or is_dot(primitive, *avals, **params)
+ return is_dot(primitive, *avals, **params)
@ models/layers.py | test_layers.py | rounded
- return checkpoint_name(kernel, _ROUNDED) if is_rounded else kernel
+ return kernel
- is_rounded = stored.shape == kernel.shape and stored.dtype != kernel.dtype
+ is_rounded = stored.dtype != kernel.dtype
@ models/layers.py | test_layers.py | is_a_loop or gathered_again
- if remat == "full" or sharding.size(*sharding.PARAMS) > 1:
+ if remat != "none" or sharding.size(*sharding.PARAMS) > 1:
- if remat == "full" or sharding.size(*sharding.PARAMS) > 1:
+ if remat == "full":
@ models/attention.py | test_attention.py | what_cuDNN or what and cuDNN
- return run(q, *filled, key_value_seq_lengths=seen)
+ return run(q, *filled)
@ models/vae.py | test_vae.py | gradients
- x = self.post_quant_conv(sharding.split_rows(latents / self.config.scaling_factor))
+ x = self.post_quant_conv(sharding.split_rows(latents * self.config.scaling_factor))
- return scaling * mean, scaling * std
+ return mean, std
@ models/tiny_vae.py | test_tiny_vae.py | gradients_equal
- x = 3.0 * jnp.tanh(x / 3.0)
+ x = jnp.clip(x, -3.0, 3.0)
- return 2.0 * x.astype(jnp.float32) - 1.0
+ return x.astype(jnp.float32)
- return nnx.relu(h + x)
+ return h + x
- stages = [layers.conv3x3(config.latent_channels, width, **kw), ReLU()]
+ stages = [layers.conv3x3(config.latent_channels, width, **kw), layers.Dropout()]
- stages += [Upsample(), layers.conv3x3(width, width, use_bias=False, **kw)]
+ stages += [Upsample(), layers.conv3x3(width, width, **kw)]
@ models/tiny_vae.py | test_tiny_vae.py | eight_devices
- return sharding.join_rows(self.decoder(sharding.split_rows(latents)))
+ return self.decoder(sharding.split_rows(latents))
@ models/tiny_vae.py | test_tiny_vae.py | other_latents
- if len(set(widths)) > 1 or len(widths) != len(blocks):
+ if len(widths) != len(blocks):
- "latent_channels": (self.latent_channels, vae.latent_channels),
+ "latent_channels": (4, 4),
- "pixels a latent": (self.scale, vae.scale),
+ "pixels a latent": (self.scale, self.scale),
- check_class(config, "AutoencoderTiny", file, _ADVICE)
+ pass
- "scaling_factor": (1.0,),
+ "scaling_factor": (1.0, 0.13025),
@ models/tiny_vae.py | test_tiny_vae.py | tiny_decoders_picture
- return {name: x for name, x in tensors.items() if not name.startswith("encoder.")}
+ return dict(tensors)
@ assembly.py | test_tiny_vae.py | tiny_decoders_picture or other_views
- name = TINY_VAE if TINY_VAE in parts.models else "vae"
+ name = "vae"
- if not is_tiny(config):
-         return {}
+ pass
@ assembly.py | test_tiny_vae.py | other_latents
- check_tiny_vae(found, read_config(reference, "vae"), str(folder / "config.json"))
+ pass
@ cost/plan.py | test_tiny_vae.py | other_latents or counts_it
- pipeline.check_tiny_vae(found, networks["vae"], file)
+ pass
- share = tiny.decoder_block_out_channels[0] / 64
+ pass
@ cost/work.py | test_tiny_vae.py | nineteenth
- vae = plan.models.get(TINY_VAE, plan.models["vae"])
+ vae = plan.models["vae"]
@ cost/activations.py | test_tiny_vae.py | of_all_pixels
- vae = (TINY if is_tiny(config) else VAE)[config.compute.remat_vae]
+ vae = VAE[config.compute.remat_vae]
@ checks.py | test_tiny_vae.py | not_there_or_not_named
- wrong += _without_weights("weights.tiny_vae", config.weights.tiny_vae, _TINY_VAE)
+ pass
- if config.decode.view == "tiny" and not config.weights.tiny_vae:
+ if config.decode.view == "full" and not config.weights.tiny_vae:
@ record.py | test_tiny_vae.py | another_decoder
- unused |= reward == "tiny_vae" and now["config"]["decode.view"] != "tiny"
+ unused |= reward == "tiny_vae"
- unused |= reward == "tiny_vae" and now["config"]["decode.view"] != "tiny"
+ pass
@ models/pixart.py | test_pixart.py | gradients_equal and (10-14-none or 26-18-full)
- x = x + self.attn2(x, context, mask)
+ x = x + self.attn2(x, context)
- x = x + self.attn2(x, context, mask)
+ x = x + self.attn2(layers.standardised(x, self.eps), context, mask)
- return jnp.concatenate([of_column, jnp.broadcast_to(of_row, shape)], axis=-1)
+ return jnp.concatenate([jnp.broadcast_to(of_row, shape), of_column], axis=-1)
- return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
+ return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
- np.float32(count / base) / np.float32(scale)
+ np.float32(scale)
- np.float32(count / base) / np.float32(scale)
+ np.float32(count / base)
- columns, patch, patch, channels)
-         x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, p, w, p, channels]
+ columns, channels, patch, patch)
+         x = x.transpose(0, 1, 4, 2, 5, 3)
- x = x.transpose(0, 1, 3, 2, 4, 5)
+ x = x.transpose(0, 1, 4, 2, 3, 5)
- return sharding.join_rows(x[..., : self.config.in_channels])
+ return sharding.join_rows(x[..., -self.config.in_channels :])
- return self.linear_2(layers.tanh_gelu(self.linear_1(x)))
+ return self.linear_2(layers.gelu(self.linear_1(x)))
- return layers.standardised(x, eps) * (1 + scale) + shift
+ return layers.standardised(x, eps) * (1 + shift) + scale
- shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
+ scale_msa, shift_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
- six = self.linear(nnx.silu(embedded))
+ six = self.linear(embedded)
- shift, scale = jnp.split(table[None] + embedded[:, None], 2, axis=1)
+ shift, scale = jnp.split(table[None] + nnx.silu(embedded)[:, None], 2, axis=1)
- values, SINUSOID, flip_sin_to_cos=True, freq_shift=0.0
+ values, SINUSOID, flip_sin_to_cos=False, freq_shift=0.0
- ratio = self.aspect_ratio_embedder(self._sinusoidal(sizes[:, 2]))
+ ratio = self.aspect_ratio_embedder(self._sinusoidal(1 / sizes[:, 2]))
- return embedded + jnp.concatenate([resolution, ratio], axis=-1)
+ return embedded + jnp.concatenate([ratio, resolution], axis=-1)
@ models/layers.py | test_pixart.py | gradients_equal and (10-14-none or 26-18-full)
- return tanh_gelu(self.proj(x))
+ return gelu(self.proj(x))
- biased = bias or groups is not None
+ biased = groups is not None
@ models/t5.py | test_t5.py | equals_transformers
- h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
+ h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
- h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
+ h = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0)
- gate = nnx.gelu(self.wi_0(x), approximate=True)
+ gate = nnx.gelu(self.wi_0(x), approximate=False)
- distances = positions[None, :] - positions[:, None]
+ distances = positions[:, None] - positions[None, :]
- x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
+ x = x * jax.lax.rsqrt(x.var(-1, keepdims=True) + self.epsilon)
@ models/t5.py | test_t5.py | buckets or mask
- far = np.minimum(exact + np.floor(growth + 1e-9).astype(int), half - 1)
+ far = np.minimum(exact + np.floor(growth - 1e-9).astype(int), half - 1)
- return jnp.flip(jnp.cumsum(jnp.flip(token_ids != 0, axis=1), axis=1) > 0, axis=1)
+ return token_ids != 0
@ pipelines/text_cache.py | test_text_cache.py | pixart or lacking or kept_once or match or padding
- return text._replace(context=jnp.where(text.mask[..., None], text.context, 0))
+ return text
- return np.where(self.index[numbers] == wanted, numbers, -1)
+ return numbers
- if kept.get(name) == value:
+ if name in kept:
- if leaf in found and not np.array_equal(found[leaf], ids):
+ if leaf in found and not np.array_equal(found[leaf].shape, ids.shape):
- size = dtype.itemsize * int(np.prod(of["shape"]))
+ size = int(np.prod(of["shape"]))
@ cache_text.py | test_text_cache.py | stopped or kept_once or bucket
- missing = [number for number in mine if not place.has(number)]
+ missing = list(mine)
- return list(dict.fromkeys(["", *texts]))
+ return ["", *texts]
- has_others = not kept and not place.is_empty()
+ has_others = False
@ cache_text.py | test_text_cache.py | slower_than_the_first
- if has_others:
+ if not kept and not place.is_empty():
@ prompts/t5.py | test_t5_tokenizer.py | cut
- doubtful = [text for text in texts if len(text) + 2 > LENGTH or not text.isascii()]
+ doubtful = [text for text in texts if len(text) + 2 > LENGTH]
- long = [i for i, length in enumerate(lengths) if length > LENGTH]
+ long = [i for i, length in enumerate(lengths) if length > LENGTH + 1]
@ pipelines/pixart.py | test_plan.py | splits_a_row
- return PixArtConfig.from_json(config).patch_size
+ return 1
@ assembly.py | test_train.py | begins_with
- if form and generator_form(config.generator, form) != form:
+ if not form and generator_form(config.generator, form) != form:
- return known or parts.pipeline.family.one_step
+ return parts.pipeline.family.one_step
@ assembly.py | test_train.py | no_teacher
-     check_teacher(config.weights.reference, folder)
+     pass
@ models/pixart.py | test_pixart.py | rows_and_weights
- of_row = sharding.split_rows(of_row[None, :, None])
+ of_row = of_row[None, : rows // sharding.size("context"), None]
@ models/pixart.py | test_pixart.py | unless_the_file_says or as_published
- "use_additional_conditions": self.sample_size == 128,
+ "use_additional_conditions": self.sample_size >= 128,
- if getattr(self, field) is None:
+ if field == "use_additional_conditions" or getattr(self, field) is None:
- "interpolation_scale": float(max(self.sample_size // 64, 1)),
+ "interpolation_scale": self.sample_size / 64,
@ pipelines/sd15.py | test_sd15.py | condition_and_null
- return Condition(encoder(token_ids["tokenizer"]).last_hidden_state)
+ return Condition(encoder(token_ids["tokenizer"]).hidden_states_penultimate)
- null_is_zero=False,  # diffusers' `StableDiffusionPipeline` encodes ""
+ null_is_zero=True,
@ pipelines/export.py | test_sd15.py | draws_in_diffusers
- "timestep_spacing": "trailing" if form.input == "scaled" else "leading",
+ "timestep_spacing": "leading",
- if len(timesteps) == 1 and keeps_offset:
+ if len(timesteps) == 1:
- if name in (folder_of_denoiser, folders.SCHEDULER[0], *folders.LEFT_OUT):
+ if name in (folder_of_denoiser, folders.SCHEDULER[0]):
- index["requires_safety_checker"] = False  # else diffusers warns of its absence
+ pass
- common["steps_offset"] = 1  # else the pipeline puts it there, with a warning
+ pass
@ pipelines/export.py | test_sd15.py | draws_in_diffusers
- given = metadata.get("generator_input", "noise")  # earlier runs had no other
+ given = "noise"
- INPUT: form.input,
+ INPUT: "noise",
@ pipelines/comfyui.py | test_comfyui.py | comfyui_draws
- noise = ratios[0] if form.input == "scaled" else 1.0 / alpha[0]
+ noise = ratios[0]
- noise = ratios[0] if form.input == "scaled" else 1.0 / alpha[0]
+ noise = 1.0 / alpha[0]
- sigmas=_numbers([*ratios, 0.0]),
+ sigmas=_numbers([*ratios, ratios[-1]]),
- add_noise=False,
+ add_noise=True,
- noise_seed=1,  # of the noise between steps, which must be another than the first
+ noise_seed=0,
@ pipelines/comfyui.py | test_comfyui.py | all_that_asks
- for name in ("7", "10"):
+ for name in ("7",):
@ pipelines/comfyui.py | test_comfyui.py | comfyui_draws
- zero_snr = betas.rescale_betas_zero_snr
+ zero_snr = False
@ pipelines/comfyui.py | test_comfyui.py | another_noise_schedule or nodes_are
- if dataclasses.replace(betas, rescale_betas_zero_snr=False) != Betas():
+ if False:
- if dataclasses.replace(betas, rescale_betas_zero_snr=False) != Betas():
+ if betas != Betas():
- "11": _node("VAEDecode", samples=["10", 0], vae=["1", 2]),
+ "11": _node("VAEDecode", samples=["10", 0], vae=["1", 1]),
@ pipelines/card.py | test_card.py | not slow
- strict = [base for base in bases if base.non_commercial]
+ strict = []
- if len(known) == 1 and bases[0].licence:
+ if bases[0].licence:
- return Base("", licence="other") if all(base.licence for base in bases) and bases else None
+ return Base("", licence="other")
- around = [folder.parent] if folders.is_pipeline(folder.parent) else []
+ around = [folder.parent]
- del kept["picture"]
+ pass
- return [about.scores] if about.scores else []
+ return [about.scores]
- if not low_rank or not low_rank.get(which, True):
+ if not low_rank:
- return not (self.network or self.objective or self.trained_on)
+ return True
- short = re.sub(r"[^a-z0-9.+]+", "-", text[:80].lower()).strip("-")
+ short = ""
- where += f" (SHA-256 `{base.sha256}`)" if base.sha256 else ""
+ pass
@ convert.py | test_card.py | network or run_without
- if which != "ema" or at_end != step:
+ if at_end != step:
- if which != "ema" or at_end != step:
+ if which != "ema":
- workdir = folder.parent if folder.name == checkpoint.FOLDER else folder
+ workdir = folder
@ storage/hub.py | test_hub.py | public or token or name or files_card
- address = api.create_repo(name, private=not public, exist_ok=True)
+ address = api.create_repo(name, private=False, exist_ok=True)
- if not public and not api.repo_info(name).private:
+ if False:
- if huggingface_hub.get_token() is None:
+ if False:
- with _together(files) if files else contextlib.nullcontext(written) as folder:
+ with contextlib.nullcontext(written) as folder:
@ storage/hub.py | test_hub.py | export_is_on
- repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[MARKER]
+ repo_id=name, folder_path=folder, commit_message=message
@ pipelines/single.py | test_single.py | files_card
- _write_card(file, digest_of(partial), about, call, code)
+ _write_card(file, "", about, call, code)
- for path in _beside(file):
+ for path in ():
@ pipelines/export.py | test_export.py | model_card
- hashes = {path.relative_to(folder).as_posix(): files.digest_of(path) for path in found}
+ hashes = {}
- return path.parent.name if path.name == FOLDER and path.parent.name else path.name
+ return path.name
- if form is None or not family.original:
+ if not family.original:
@ storage/checkpoint.py | test_checkpoint.py | earlier_versions
- return {_RENAMED.get(name, name): value for name, value in found.items()}
+ return found
@ storage/folders.py | test_weights.py | repository_only
- parts = [part for part in components(folder) if part not in LEFT_OUT]
+ parts = components(folder)
@ pipelines/sdxl.py | test_by_hand.py | sdxls
- [first.hidden_states_penultimate, second.hidden_states_penultimate], axis=-1
+ [second.hidden_states_penultimate, first.hidden_states_penultimate], axis=-1
- return Condition(context, second.pooled)
+ return Condition(context, first.pooled)
- return (resolution, resolution, 0, 0, resolution, resolution)
+ return (0, 0, resolution, resolution, resolution, resolution)
@ pipelines/family.py | test_by_hand.py | sdxls
- null = text._replace(context=context, pooled=pooled)
+ null = text._replace(context=context)
- null = text._replace(context=context, pooled=pooled)
+ null = text._replace(pooled=pooled)

@ evaluation/held_out.py | test_held_out.py | band
- share = now[name] / initial[name]
+ share = initial[name] / now[name]
- if not lowest <= share <= highest:
+ if not share <= highest:
- if not lowest <= share <= highest:
+ if not lowest <= share:
@ evaluation/held_out.py | test_held_out.py | kept or teacher
- return found if {key: of_kept.get(key) for key in settings} == settings else None
+ return found
- images["teacher"] = teacher.images
+ images["teacher"] = before.images
- scores["teacher"] = teacher.scores
+ scores["teacher"] = before.scores
@ storage/folders.py | test_checkpoint.py | other_weights or another_shapes
- if begun_with == digest(folder) or (begun_with is None and not shipped):
+ if begun_with == digest(folder) or begun_with is None:
- if begun_with == digest(folder) or (begun_with is None and not shipped):
+ if begun_with == digest(folder):
@ record.py | test_record.py | world or moved
- of_run = known and known[name]
+ of_run = folders.digest(source)
- if known and name not in known:
+ if False:
@ train.py | test_shapes.py | shipped_teacher
- found = {name: folders.digest(rewards.resolve(name, sources[name])) for name in sources}
+ found = {name: "" for name in sources}
@ storage/checkpoint.py | test_checkpoint.py | comes_back or rest or newest or aside or lost
- [self.restore_item(step, name, tree) for name, tree in fields.items()]
+ [self.restore_item(step, "generator" if name == "ema" else name, t) for name, t in fields.items()]
- return max(self.steps(), default=None)
+ return min(self.steps(), default=None)
- self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
+ self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=None)
-         if step in self.steps():
-             return
+         if step in self.steps():
+             self._manager.delete(step)
- return at == step and all((path / name).is_dir() for name in (_METADATA, *items))
+ return all((path / name).is_dir() for name in (_METADATA, *items))
- return at == step and all((path / name).is_dir() for name in (_METADATA, *items))
+ return at == step
- elif path.name.isdigit() and not _is_ours(self.folder, int(path.name), items):
+ elif path.name.isdigit() and not _is_ours(self.folder, int(path.name)):
- return [step for step in found if self._known[step]]
+ return found
@ storage/checkpoint.py | test_checkpoint.py | another_model or without_room
- if wrong or missing or extra:
+ if missing or extra:
- extra = [f"extra {path}" for path in stored if path not in wanted]
+ extra = []
- if disk.total and disk.free < need:  # some network drives know neither
+ if disk.total and not disk.free:  # some network drives know neither

@ pipelines/original.py | test_single.py | full_size and sdxl
- number += of_block - 1 if kind == "upsamplers" else 0
+ number += of_block if kind == "upsamplers" else 0
- place = 2 if int(block) in blocks.attentive else 1
+ place = 1
- other = f"up.{blocks.levels - 1 - int(level[1])}."
+ other = f"up.{level[1]}."
- lies = "convolution" if is_matrix else "same"
+ lies = "same"
@ pipelines/original.py | test_single.py | byte_for_byte and sdxl and back
- array = array[place.third * rows : (place.third + 1) * rows]
+ array = array[:rows]
- arrays = [tensor.read() for _, tensor in parts]
+ arrays = [tensor.read() for _, tensor in reversed(parts)]
@ pipelines/original.py | test_single.py | another_file or changed_file or lack
- (r"^cond_stage_model\.model\.", "an SD 2 checkpoint"),
+ (r"^cond_stage_model\.model$", "an SD 2 checkpoint"),
- _CHANNELS = {8: "an InstructPix2Pix", 9: "an inpainting"}
+ _CHANNELS = {8: "an InstructPix2Pix"}
- if tensor.dtype in (*_FLOATS, *_COUNTS):
+ if True:
- if name in stored and not _fits(stored[name].shape, shape)
+ if False
- if missing or wrong or extra:
+ if wrong or extra:
@ pipelines/single.py | test_single.py | the_files_word or reach_the_scheduler
- if predicted == "v_prediction" and original.ZERO_SNR in stored:
+ if original.ZERO_SNR in stored:
- if prediction_type is not None:
+ if prediction_type == "v_prediction":
- if said.get("rescale_betas_zero_snr") and name not in _KNOW_ZERO_SNR:
+ if said.get("rescale_betas_zero_snr"):
- if not predicts_v(scheduler):
+ if True:
@ pipelines/single.py | test_single.py | checkpoint_of_a_v
- configs[DENOISER] = with_prediction(configs[DENOISER], SchedulerFile(scheduler))
+ pass
@ convert.py | test_single.py | checkpoint_of_a_v
- _check_predicts(metadata, sources[0])
+ pass
- metadata |= folders.identity(folder) | _predicts(configs[DENOISER])
+ metadata |= folders.identity(folder)
- configs[DENOISER] = with_prediction(configs[DENOISER], _scheduler_of(folder))
+ pass
@ pipelines/single.py | test_single.py | card_of_a_converted
- code = card.usage(title, call._replace(variant=dtype is not None))
+ code = card.usage(title, call)
- base = card.base_of_file(file, named, digest_of(file))
+ base = card.Base(named)
@ pipelines/folder.py | test_v_prediction.py | other_prediction
- if own == reference:
+ if own is None or own == reference:
- if own is not None and reference is not None:
+ if False:
@ evaluation/job.py | test_evaluate.py | file_of_another_kind
- single.as_folder(request.checkpoint, request.reference_pipeline)
+ pass
@ pipelines/single.py | test_remote.py | single_file_in_a_bucket
- return str(path).endswith(".safetensors")
+ return False
@ pipelines/adapters.py | test_adapters.py | text_encoders_are_left
- if count:
+ if False:
- of_denoiser = {name: tensor for name, tensor in stored.items() if not _OF_TEXT.match(name)}
+ of_denoiser = dict(stored)
@ pipelines/adapters.py | test_adapters.py | both_formats
- up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
+ up = up.T.reshape(*up.shape, *(1,) * (down.ndim - 2))
- tensors[f"{name}.lora_B.weight"] = _stored(np.float32(adapter.scale) * adapter.up)
+ tensors[f"{name}.lora_B.weight"] = _stored(adapter.up)
- tensors[f"{name}.alpha"] = _stored(np.float32(adapter.alpha))
+ tensors[f"{name}.alpha"] = _stored(np.float32(adapter.rank))
- kohya, other = (of_original, flat) if _is_sdxl(config) else (flat, of_original)
+ kohya, other = of_original, flat
- kohya, other = (of_original, flat) if _is_sdxl(config) else (flat, of_original)
+ kohya, other = flat, of_original
@ pipelines/adapters.py | test_adapters.py | best_there_is
- root = np.sqrt(s[:rank])
+ root = s[:rank]
- kept += float(np.vdot(s[:rank], s[:rank]))
+ kept += float(np.sum(s[:rank]))
- of_all += square
+ of_all += square if key in targeted else 0.0
@ pipelines/adapters.py | test_adapters.py | generators_file and sdxl or other_programs
- return (np.float32(self.scale) * (up @ down)).reshape(shape)
+ return (up @ down).reshape(shape)
- digest.update(folders.digest(base).encode())
+ digest.update(b"")
- yield key, array if adapter is None else array + adapter.product(array.shape)
+ yield key, array if adapter is None else adapter.product(array.shape)
- alpha = float(next(named, fields.get("lora_alpha", rank)))
+ alpha = float(rank)
@ pipelines/adapters.py | test_adapters.py | another_base
- and up.shape[:2] == (shape[0], rank)
+ and up.shape[:1] == (shape[0],)
- and _without_ones(down.shape[1:]) == _without_ones(shape[1:])
+ and True
- if not {"down", "up"} <= pair.keys():
+ if False:
@ pipelines/adapters.py | test_adapters.py | rank_above
- if rank > min(rows, columns):
+ if rank > max(rows, columns) * 2:
- if not of_adapted:
+ if False:
@ pipelines/single.py | test_adapters.py | no_reference
- if name == "generator" and reference and adapters.is_file(given):
+ if reference and adapters.is_file(given):
@ convert.py | test_adapters.py | whole_networks or cannot_be_written
- if low_rank is None or not low_rank.adapts(which):
+ if low_rank is None and False:
- if which not in ("generator", "ema"):
+ if which not in ("generator", "ema", "assistant"):
@ diffusion.py | test_diffusion.py | zero_terminal or made_of or between
- return per_sample(alpha_t, x_t) * v + per_sample(sigma_t, x_t) * x_t
+ return per_sample(sigma_t, x_t) * v + per_sample(alpha_t, x_t) * x_t
- alpha_bar[-1] = LAST_ALPHA**2
+ alpha_bar[-1] = LAST_ALPHA
- alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
+ alpha_bar = (alpha - alpha[-1]) ** 2

@ storage/weights.py | test_weights.py | rows or inverse or finite or shards or newer or named
- _AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 0, 1)}
+ _AXES = {("kernel", 4): (3, 2, 0, 1)}
- _AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 0, 1)}
+ _AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 1, 0)}
- array[i if rows.stacked else ...] = tensor.transpose(np.argsort(rows.axes))
+ array[-1 - i if rows.stacked else ...] = tensor.transpose(np.argsort(rows.axes))
- array[i if rows.stacked else ...] = tensor.transpose(np.argsort(rows.axes))
+ array[i if rows.stacked else ...] = tensor.transpose(rows.axes)
- name = "weight" if name in ("kernel", "scale", "embedding") else name
+ name = "weight" if name in ("kernel", "scale") else name
- count = tensor.size - np.count_nonzero(np.isfinite(tensor))
+ count = np.count_nonzero(np.isnan(tensor))
- if file_of.get(key, file.name) == file.name
+ if True
- if held and size + tensor.nbytes > MAX_SHARD:
+ if held and tensor.nbytes > MAX_SHARD:
- for candidate in (name, renamed, f"text_model.{name}", _SHARED.get(name)):
+ for candidate in (name, renamed, _SHARED.get(name)):
- if key in found and tuple(found[key].shape) != shape
+ if key in found and len(found[key].shape) != len(shape)
@ storage/weights.py | test_weights.py | count_from_one
- name = f"{Path(file_name).stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
+ name = f"{Path(file_name).stem}-{i:05}-of-{len(shards):05}.safetensors"

@ train.py | test_by_hand.py | prompts_of_its_own
- turns = range(k * count, (k + 1) * count)
+ turns = range(k, k + count)
- turns = range(k * count, (k + 1) * count)
+ turns = [k] * count
@ studies/results.py | test_ablation.py | best_and or refused or told_from or other_bal or each_seed
- return int(steps[rewards.argmax()]), bool(rewards[-1] > before + RISING)
+ return int(steps[-1]), bool(rewards[-1] > before + RISING)
- return int(steps[rewards.argmax()]), bool(rewards[-1] > before + RISING)
+ return int(steps[rewards.argmax()]), bool(rewards[-1] > before)
- differ = [name for name in now if name in kept and kept[name] != now[name]]
+ differ = [name for name in now if name not in kept]
- if any(workdir.glob("rows/*/*/result.json")):
+ if False:
- found = {what: files.sampled_digest(pathlib.Path(path)) for what, path in contents.items()}
+ found = {what: str(path) for what, path in contents.items()}
- _WORLD, json.dumps(kept | origin(config_file), indent=1)
+ _WORLD, json.dumps(origin(config_file), indent=1)
- for s in seeds or row.seeds if s not in done]
+ for s in seeds or row.seeds if not done]
@ studies/results.py | test_ablation.py | same_reward
- if not found or not rewards[0] <= reward <= rewards[-1]:
+ if not found:
- found.sort(key=lambda runs: mean(runs, "reward"))
+ found.sort(key=lambda runs: -mean(runs, "reward"))
@ studies/ablation.py | test_ablation.py | partial or by_group or time_left
-     if lacking:
+     if False:
- if seed in (seeds or row.seeds) and not is_done(workdir, row.name, seed)
+ if seed in (seeds or row.seeds)
- each = sum(run.seconds for run, _ in done) / sum(row.length for _, row in done)
+ each = sum(run.seconds for run, _ in done) / sum(1 for _, row in done) / 2
@ studies/rows.py | test_ablation.py | balances or hacked or rows_are_presets
- {**method.overrides, "reward.balance": balance},
+ {"reward.balance": balance},
- {"reward.pickscore": 150.0},
+ {"reward.pickscore": 15.0},
- "train.steps": row.length * STEPS,
+ "train.steps": STEPS,
@ studies/rows.py | test_ablation.py | from_the_teacher_alone
- if row.group != "distill":
+ if True:
@ studies/world.py | test_ablation.py | measured_for or curve_has
- float(np.mean([taste((image + 1.0) / 2.0) for image in flat])),
+ float(np.mean([taste(image) for image in flat])),
- for name, value in world.measure(drawn.first(CURVE_CAPTIONS)).items():
+ for name, value in world.measure(drawn).items():
- each = features.reshape(count, PER_CAPTION, -1)
+ each = features.reshape(PER_CAPTION, count, -1).swapaxes(0, 1)
- count = len(world.captions) if is_last else CURVE_CAPTIONS
+ count = CURVE_CAPTIONS
@ studies/figures.py | test_ablation.py | readable or own_look or beside_the or beside_teacher
- axis.set_title(textwrap.fill(caption, 19), fontsize=8)
+ axis.set_title(textwrap.fill(caption, 19), fontsize=6)
- COLOURS = ("#0072B2", "#56B4E9",
+ COLOURS = ("#0072B2", "#0072B2",
- linestyle=style, linewidth=1.2
+ linewidth=1.2
- [] if group == "distill" else results.get(INIT, [])[:1]
+ results.get(INIT, [])[:1]
@ preference/loss.py | test_preference.py | pytorch_on_two_devices and 2-1 or closed_form
- return cross_entropy + jnp.where(label_0 == TIE, math.log(TIE), 0.0)
+ return cross_entropy
- weight = 1.0 / num_examples if loss.by_prompt else jnp.ones_like(num_examples)
+ weight = jnp.ones_like(num_examples)
- return -jax.nn.log_sigmoid((2.0 * label_0 - 1.0) * (scores[:, 0] - scores[:, 1]))
+ return -jax.nn.log_sigmoid((1.0 - 2.0 * label_0) * (scores[:, 0] - scores[:, 1]))
@ preference/loss.py | test_preference.py | accuracy_gives_a_tie_half
- jnp.where(scores[:, 0] < scores[:, 1], 1.0 - label_0, 0.5),
+ 1.0 - label_0,
- predicted = np.where(apart <= threshold, TIE, (first > 0.5).astype(float))
+ predicted = np.where(apart < threshold, TIE, (first > 0.5).astype(float))
- one_tie = (predicted == TIE) != (label_0 == TIE)
+ one_tie = (predicted == TIE) | (label_0 == TIE) & (threshold < 1)
@ preference/step.py | test_preference.py | pytorch_on_two_devices and 2-1
- return jnp.sum(weight * each), (scores, each)
+ return jnp.sum(weight * each) / jnp.sum(weight), (scores, each)
- return sharding.sum_gradients(grads, specs), results
+ return grads, results
@ preference/step.py | test_preference.py | adamw_with_warm_up
- weight_decay=optim.weight_decay,
+ weight_decay=0.0,
- rise = optax.linear_schedule(0.0, optim.lr, optim.lr_warmup_steps)
+ rise = optax.linear_schedule(optim.lr, optim.lr, optim.lr_warmup_steps)
- falling = max(steps - optim.lr_warmup_steps, 1)
+ falling = steps
@ preference/step.py | test_preference.py | fixed_blocks
- optax.stateless(lambda updates, _: _masked(updates, learns)),
+ optax.identity(),
@ preference/scorer.py | test_preference.py | pytorch_on_two_devices and 2-1 or imagereward_loss
- return jnp.exp(params["logit_scale"]) * cosine
+ return jnp.exp(jax.lax.stop_gradient(params["logit_scale"])) * cosine
- return (scores * blip.STD + blip.MEAN).reshape(-1, 2)
+ return scores.reshape(-1, 2)
- rows = np.arange(len(blocks)) >= int(fixed * len(blocks))
+ rows = np.arange(len(blocks)) > int(fixed * len(blocks))
@ preference/decode.py | test_pairs.py | pixels_are_those or torchvisions_crop or listed
- resized = image.resize((wide, high), Image.Resampling.BICUBIC)
+ resized = image.resize((wide, high), Image.Resampling.BILINEAR)
- return excess // 2
+ return (excess + 1) // 2
- return round(excess / 2)
+ return excess // 2
- file.load()
+ pass
@ preference/records.py | test_pairs.py | counted_and_listed or pick_a_pics
- if pair.images[0] == pair.images[1]:
+ if False:
- if not cells.get(_HAS_LABEL, True):
+ if False:
- LABELS = {"0": 1.0, "1": 0.0, "tie": TIE}
+ LABELS = {"0": 0.0, "1": 1.0, "tie": TIE}
@ preference/source.py | test_pairs.py | either_trained_on or kind_of_table or not_read_again
- return np.where(given > 0, given, counts[which]).astype(np.int32)
+ return np.maximum(given, 1).astype(np.int32)
- place = _places(found.index["prompt"], seed)
+ place = _places(found.index["content"], seed)
- return (piece / SEAL).is_file() and read_json(piece / SEAL) == _sizes(piece)
+ return (piece / SEAL).is_file()
@ preference/stream.py | test_pairs.py | whoever_decodes
- steps = grain.MapDataset.range(first, until).map(of_step)
+ steps = grain.MapDataset.range(until - first).map(of_step)
- return decoded(self._stream.at(int(k), self.rows), self.size, self.crop)
+ return decoded(self._stream.at(int(k))[: len(self.rows)], self.size, self.crop)
@ preference/fit.py | test_reward_run.py | best_parameters or goes_on_as
- return measured.accuracy > self.measured.accuracy
+ return measured.accuracy < self.measured.accuracy
- with data.stream(first, settings.steps) as batches:
+ with data.stream(0, settings.steps - first) as batches:
@ preference/run.py | test_reward_run.py | shares_prompts or nothing_can or another_run
- if len(shared):
+ if False:
- if ties.all():
+ if False:
- if kept and kept.get(name, digest) != digest:
+ if False:
"""


def parse(text: str) -> list[Mutant]:
    """The rows of MUTANTS."""
    mutants = []
    for block in re.findall(r"^@ (.*)\n((?:[-+].*\n|\n|#.*\n)*)", text, re.M):
        file, tests, names = (part.strip() for part in block[0].split("|"))
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", block[1], re.M):
            sides = ["\n".join(line[2:] for line in side.splitlines()) for side in (old, new)]
            mutants.append(Mutant(file, *sides, tests, names))
    return mutants


def fault(mutant: Mutant) -> str:
    """What is wrong with a row, in one line; empty for a good one."""
    file = ROOT / "di_star_jax" / mutant.file
    if not file.is_file():
        return f"{mutant}: there is no such file"
    source = file.read_text(encoding="utf-8")
    count = source.count(mutant.old)
    if count != 1:
        return f"{mutant}: what is replaced occurs {count} times, expected once"
    try:
        compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"{mutant}: {error.msg} once it is replaced"
    return ""


def copied_tree(folder: Path) -> Path:
    """A copy of what tests need. All copies share what is compiled, which is found by content."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".pytest_*"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    cache = ROOT / "tests" / ".pytest_cache"
    (cache / "compiled").mkdir(parents=True, exist_ok=True)
    (folder / "tests" / ".pytest_cache").symlink_to(cache)
    return folder


def run(
    tests: str, names: str, mutant: Mutant | None = None, marks: str = "not long"
) -> tuple[int | None, str]:
    """Runs tests in a fresh copy. Returns: pytest's exit code, None for a hang, and its output."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_tree(Path(folder))
        if mutant:
            file = tree / "di_star_jax" / mutant.file
            source = file.read_text(encoding="utf-8")
            file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", marks, f"tests/{tests}", *(["-k", names] if names else [])]
        environment = os.environ | {"TMPDIR": folder}
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""
        return process.returncode, said


def tried(tests: str, names: str, mutant: Mutant | None = None) -> tuple[int | None, str]:
    """`run`; where names are of nothing else, of those that take long."""
    code, said = run(tests, names, mutant)
    return run(tests, names, mutant, "long") if code == 5 else (code, said)


def whole_tests_pass(mutants: list[Mutant], pool: concurrent.futures.Executor) -> bool:
    """Runs the tests of all rows, by file, on a tree that is not broken."""
    files = collections.defaultdict(set)
    for mutant in mutants:
        files[mutant.tests].add(mutant.names)
    expressions = {
        tests: "" if "" in names else " or ".join(f"({name})" for name in sorted(names))
        for tests, names in files.items()
    }
    passed = True
    for tests, (code, said) in zip(expressions, pool.map(tried, *zip(*expressions.items()))):
        if code != 0:
            print(f"error: {tests} fails before anything is broken:\n{said[-2000:]}", flush=True)
            passed = False
    return passed


def outcome(mutant: Mutant) -> str:
    """killed, killed by a hang, SURVIVED, or what went wrong."""
    code, said = tried(mutant.tests, mutant.names, mutant)
    if code == 5:
        return f"ERROR: {mutant.tests} has no test {mutant.names!r}"
    if code not in (0, 1, None):
        return f"ERROR: pytest ended with {code}: {' '.join(said.split())[-200:]}"
    return {0: "SURVIVED", 1: "killed", None: "killed by a hang"}[code]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="", help="regular expression: rows by file or content")
    options = parser.parse_args()
    mutants = [each for each in parse(MUTANTS) if re.search(options.only, str(each))]
    faults = [said for said in map(fault, mutants) if said]
    if faults or not mutants:
        print("\n".join(f"error: {said}" for said in faults or ["no row fits --only"]))
        return 2
    began = time.monotonic()
    counts = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        if not whole_tests_pass(mutants, pool):
            return 2
        for mutant, found in zip(mutants, pool.map(outcome, mutants)):
            print(f"{found:9} {mutant}", flush=True)
            counts[found.split()[0].rstrip(":")] += 1
    seconds = time.monotonic() - began
    print(f"{len(mutants)} mutants in {seconds / 60:.0f} min: {dict(counts)}")
    return 2 if counts["ERROR"] else int(counts["SURVIVED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
