# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong in a reward's config, refused before any compile or download."""

from di_star_jax.checks import check_signs, one_of
from di_star_jax.config import fields
from di_star_jax.errors import UserError
from di_star_jax.preference.loss import LOSSES
from di_star_jax.sharding import mesh_shape

_CHOICES = {
    "loss": LOSSES,
    "optim.decay": ("linear", "cosine"),
    "compute.dtype": ("bfloat16", "float32"),
    "compute.remat": ("none", "dots", "full"),
}
_POSITIVE = (
    "eval_every",
    "data.validation_pairs",
    "data.batch_size",
    "optim.lr",
    "optim.eps",
    "optim.clip_norm",
    "train.steps",
    "train.log_every",
    "train.save_every",
)
_NOT_NEGATIVE = ("seed", "data.workers", "optim.lr_warmup_steps", "optim.weight_decay")
_SHARES = ("data.held_out", "data.left_out", "optim.b1", "optim.b2", "optim.fixed_blocks")
_TEXTS = ("weights.model", "weights.tokenizer", "data.pairs", "data.validation", "data.records")
_ALL = (*_CHOICES, *_POSITIVE, *_NOT_NEGATIVE, *_SHARES, *_TEXTS, "mesh.data", "mesh.fsdp")


def check(config, device_count: int) -> None:
    """Refuses a config that cannot run.

    Args:
      config: ConfigDict with the fields of configs/reward.py.
      device_count: devices there are, over all hosts.
    Raises: UserError for the first thing that is wrong.
    """
    values = fields(config)
    missing = [name for name in _ALL if name not in values]
    if missing:
        raise UserError(
            f"the config has no field {missing[0]}, which training a reward needs; give "
            "--config=reward, or add it as configs/reward.py has it"
        )
    for name, known in _CHOICES.items():
        one_of(name, values[name], known)
    check_signs(values, _POSITIVE, _NOT_NEGATIVE, "configs/reward.py")
    for name in _SHARES:
        if not 0 <= values[name] < 1:
            raise UserError(
                f"{name}={values[name]}, expected a number in [0, 1); see configs/reward.py"
            )
    _check_data(config.data)
    data, fsdp, _ = mesh_shape(config.mesh.data, config.mesh.fsdp, 1, device_count)
    if config.data.batch_size % (data * fsdp):
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not divisible by the {data * fsdp} "
            f"devices; use {-(-config.data.batch_size // (data * fsdp)) * data * fsdp}"
        )


def _check_data(data) -> None:
    if not data.pairs:
        raise UserError(
            "no data.pairs; give --config.data.pairs=FOLDER, with pairs.csv and its images, or "
            "with Pick-a-Pic's .parquet files"
        )
    if not data.validation and not data.held_out:
        raise UserError(
            "data.held_out=0 without data.validation leaves nothing to measure by; give one"
        )
