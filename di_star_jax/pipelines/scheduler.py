# SPDX-License-Identifier: Apache-2.0
"""scheduler_config.json: the noise schedule, and what a sampler takes from it.

A sampler follows the file as diffusers' class of that sampler does where it is built from it with
`from_config`, whichever class the file names: what is absent is that class's default.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from di_star_jax.diffusion import Schedule, make_schedule
from di_star_jax.errors import UserError
from di_star_jax.models.config import Fields, from_json, shown

NUM_TRAIN_TIMESTEPS = 1000  # times in configs, flags and exports are in 0..999
# Where a pipeline says the guidance that it is to be drawn with. diffusers passes over what begins
# with an underscore, and keeps it.
GUIDANCE_SCALE = "_guidance_scale"
# Of the classes with other defaults than DDPM's.
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_HEUN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
# diffusers' classes of a noise schedule like ours, with their defaults for it.
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _HEUN,
    "KDPM2AncestralDiscreteScheduler": _HEUN,
    "KDPM2DiscreteScheduler": _HEUN,
    "LCMScheduler": _LATENT,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "TCDScheduler": _LATENT,
    "UniPCMultistepScheduler": {},
}
# What samplers and their times depend on, looked at where a sampler is chosen (`_FIELDS`).
_OF_SAMPLERS = frozenset(
    {
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "original_inference_steps",
        "predict_x0",
        "sample_max_value",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
# What the noise schedule and the meaning of the denoiser's output depend on.
FIELDS = Fields(
    fixed={
        "prediction_type": ("epsilon", "v_prediction"),
        "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
        "timestep_type": ("discrete",),
        "trained_betas": (None,),
        "use_dynamic_shifting": (False, None),
        "use_flow_sigmas": (False, None),
    },
    harmless=_OF_SAMPLERS,
    file="scheduler_config.json",
)


class SchedulerFile(NamedTuple):
    """A parsed scheduler_config.json, and its path for errors."""

    config: dict = {"_class_name": "EulerDiscreteScheduler"}
    file: str = FIELDS.file


@dataclasses.dataclass(frozen=True)
class _Betas:
    """diffusers' defaults of most classes."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    rescale_betas_zero_snr: bool | None = False


def predicts_v(scheduler: SchedulerFile) -> bool:
    """Whether a pipeline's denoiser predicts v, and not eps."""
    return scheduler.config.get("prediction_type") == "v_prediction"


def guidance_scale_of(scheduler: SchedulerFile, default: float) -> float:
    """Omega that a pipeline says it is to be drawn with, or the default.

    Raises: UserError for what is no such number.
    """
    found = scheduler.config.get(GUIDANCE_SCALE, default)
    if type(found) not in (int, float) or not 0 <= found < np.inf:
        raise UserError(
            f"{scheduler.file} has {GUIDANCE_SCALE}={shown(found)}, expected a number from 0 on; "
            "give --guidance_scale, or change the file"
        )
    return float(found)


def schedule_from_json(config: Mapping[str, Any], file: str | None = None) -> Schedule:
    """The noise schedule of a parsed scheduler_config.json.

    Args: file, its path, for errors.
    Raises: UserError for a field that is not followed, or a class of another kind.
    """
    return make_schedule(num_train_timesteps=NUM_TRAIN_TIMESTEPS, **betas_of(config, file))


def betas_of(config: Mapping[str, Any], file: str | None = None) -> dict[str, Any]:
    """beta_start, beta_end and beta_schedule, with the defaults of the class that is named; and
    rescale_betas_zero_snr where it is on.

    Args, Raises: as of `schedule_from_json`.
    """
    file = file or FIELDS.file
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str) or name not in _CLASSES:
        raise UserError(
            f"{file} has _class_name={shown(name)}, expected one of "
            f"{', '.join(name.removesuffix('Scheduler') for name in _CLASSES)}, each with "
            "Scheduler at its end; give the folder of an SDXL pipeline"
        )
    built = from_json(_Betas, {**_CLASSES[name], **config}, FIELDS, file)
    if built.beta_schedule not in ("linear", "scaled_linear"):
        raise UserError(
            f"{file} has beta_schedule={built.beta_schedule!r}, the port implements "
            "'scaled_linear' and 'linear' only"
        )
    zero_snr = bool(built.rescale_betas_zero_snr)
    if zero_snr and config.get("prediction_type") != "v_prediction":
        raise UserError(
            f"{file} has rescale_betas_zero_snr=True without prediction_type='v_prediction', but a "
            "noise prediction says nothing of an image at pure noise; change one of them"
        )
    found = dataclasses.asdict(built)
    del found["rescale_betas_zero_snr"]
    return found | ({"rescale_betas_zero_snr": True} if zero_snr else {})


# What each sampler's class follows, with diffusers' defaults.


@dataclasses.dataclass(frozen=True)
class _Euler:
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    final_sigmas_type: str = "zero"


@dataclasses.dataclass(frozen=True)
class _Ddim:
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True)
class _DpmSolver:
    timestep_spacing: str = "linspace"
    steps_offset: int = 0


@dataclasses.dataclass(frozen=True)
class _FewStep:
    """Its times are the generator's own."""


_OFF = (False, None)


def _fields(followed: type, fixed: dict[str, tuple[Any, ...]]) -> Fields:
    """All else is another sampler's, or the noise schedule's, which was looked at before."""
    followed_names = {field.name for field in dataclasses.fields(followed)}
    of_noise = {*FIELDS.fixed, *(field.name for field in dataclasses.fields(_Betas))}
    return Fields(fixed, _OF_SAMPLERS - followed_names - set(fixed) | of_noise, FIELDS.file)


_FIELDS: dict[str, tuple[type, Fields]] = {
    "euler": (
        _Euler,
        _fields(
            _Euler,
            {
                "interpolation_type": ("linear",),
                "use_beta_sigmas": _OFF,
                "use_exponential_sigmas": _OFF,
                "use_karras_sigmas": _OFF,
            },
        ),
    ),
    "ddim": (_Ddim, _fields(_Ddim, {"thresholding": _OFF})),
    "dpm_solver_pp": (
        _DpmSolver,
        _fields(
            _DpmSolver,
            {
                "algorithm_type": ("dpmsolver++", "deis"),  # diffusers takes the second for it
                "final_sigmas_type": ("zero",),
                "lambda_min_clipped": (-np.inf, None),
                "solver_order": (2,),
                "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # as above
                "thresholding": _OFF,
                "use_beta_sigmas": _OFF,
                "use_exponential_sigmas": _OFF,
                "use_karras_sigmas": _OFF,
                "use_lu_lambdas": _OFF,
                "variance_type": (
                    None,
                    "fixed_small",
                ),  # neither is a second output of the denoiser
            },
        ),
    ),
    "few_step": (
        _FewStep,
        _fields(_FewStep, {"clip_sample": _OFF, "thresholding": _OFF, "timestep_scaling": (10.0,)}),
    ),
}
# The sampler that is a file's class, where there is one.
OWN = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm_solver_pp",
    "EulerDiscreteScheduler": "euler",
    "LCMScheduler": "few_step",
}


class Spacing(NamedTuple):
    """What a sampler is called with.

    timesteps: falling, in 0..999, int32, or float32 where a time lies between two.
    settings: keyword arguments of the sampler in samplers.py.
    """

    timesteps: np.ndarray
    settings: dict[str, Any]


def _leading(count: int, steps: int) -> np.ndarray:
    """Multiples of 1000 // count from 0 on, the largest first; `steps` of them."""
    return (np.arange(count)[::-1] * (NUM_TRAIN_TIMESTEPS // count)).astype(np.int32)[:steps]


def _trailing(steps: int) -> np.ndarray:
    top = NUM_TRAIN_TIMESTEPS
    return np.round(np.arange(top, 0, -top / steps)).astype(np.int32) - 1


def _linspace(count: int) -> np.ndarray:
    return np.linspace(0, NUM_TRAIN_TIMESTEPS - 1, count)[::-1]


def _spaced_by(kinds: Mapping[str, Callable[[], np.ndarray]], of: Any, file: str) -> np.ndarray:
    if of.timestep_spacing not in kinds:
        raise UserError(
            f"{file} has timestep_spacing={shown(of.timestep_spacing)}, expected one of "
            f"{', '.join(kinds)}"
        )
    return kinds[of.timestep_spacing]()


def _euler(steps: int, of: _Euler, file: str) -> Spacing:
    """Source: diffusers `EulerDiscreteScheduler.set_timesteps` and `init_noise_sigma`."""
    times = _spaced_by(
        {
            "linspace": lambda: _linspace(steps).astype(np.float32),
            "leading": lambda: _leading(steps, steps) + of.steps_offset,
            "trailing": lambda: _trailing(steps),
        },
        of,
        file,
    )
    if of.final_sigmas_type not in ("zero", "sigma_min"):
        raise UserError(
            f"{file} has final_sigmas_type={shown(of.final_sigmas_type)}, expected 'zero' or "
            "'sigma_min'"
        )
    if (times == np.round(times)).all():
        times = times.astype(np.int32)
    end = -1 if of.final_sigmas_type == "zero" else 0
    return Spacing(times, {"end": end, "pure_noise": of.timestep_spacing != "leading"})


def _ddim(steps: int, of: _Ddim, file: str) -> Spacing:
    """Source: diffusers `DDIMScheduler.set_timesteps` and `step`."""
    times = _spaced_by(
        {
            "linspace": lambda: np.round(_linspace(steps)).astype(np.int32),
            "leading": lambda: _leading(steps, steps) + of.steps_offset,
            "trailing": lambda: _trailing(steps),
        },
        of,
        file,
    )
    to = times - NUM_TRAIN_TIMESTEPS // steps
    to = np.where(to < 0, -1 if of.set_alpha_to_one else 0, to).astype(np.int32)
    return Spacing(times, {"to": to, "clip": of.clip_sample_range if of.clip_sample else None})


def _dpm_solver(steps: int, of: _DpmSolver, file: str) -> Spacing:
    """Source: diffusers `DPMSolverMultistepScheduler.set_timesteps`, whose grid has one time more,
    the lowest, which it leaves out.
    """
    times = _spaced_by(
        {
            "linspace": lambda: np.round(_linspace(steps + 1)).astype(np.int32)[:-1],
            "leading": lambda: _leading(steps + 1, steps) + of.steps_offset,
            "trailing": lambda: _trailing(steps),
        },
        of,
        file,
    )
    return Spacing(times, {})


_SPACED = {"euler": _euler, "ddim": _ddim, "dpm_solver_pp": _dpm_solver}


def check(scheduler: SchedulerFile, sampler: str) -> Any:
    """The fields that a sampler follows. Raises: UserError for one that it does not."""
    followed, fields = _FIELDS[sampler]
    advice = f"; for --sampler={sampler}, so give another, or change the file"
    return from_json(
        followed, scheduler.config, dataclasses.replace(fields, advice=advice), scheduler.file
    )


def spacing(
    scheduler: SchedulerFile,
    sampler: str,
    steps: int,
) -> Spacing:
    """What euler, ddim or dpm_solver_pp is called with.

    Args: sampler, a key of samplers.SAMPLERS; steps, of the sampler.
    Raises: UserError for a field that it does not follow, or steps that the schedule has no room
      for.
    """
    of = check(scheduler, sampler)
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        raise UserError(f"steps={steps}, expected a number in 1..{NUM_TRAIN_TIMESTEPS}")
    found = _SPACED[sampler](steps, of, scheduler.file)
    times = found.timesteps
    if times[0] >= NUM_TRAIN_TIMESTEPS or (np.diff(times) >= 0).any():
        raise UserError(
            f"{scheduler.file} has timestep_spacing={of.timestep_spacing!r} and "
            f"steps_offset={of.steps_offset}, which in {steps} steps begins at {times[0]:g} and "
            f"ends at {times[-1]:g}, expected falling times up to {NUM_TRAIN_TIMESTEPS - 1}; "
            "take fewer steps"
        )
    return found
