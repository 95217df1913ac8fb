# SPDX-License-Identifier: Apache-2.0
"""Trains: `python -m di_star_jax.main --config=configs/shapes.py --workdir=runs/shapes`."""

import os

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from di_star_jax.config import UserError, check, exit_on_user_error, parse_flags
from di_star_jax.objectives import OBJECTIVES

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py or configs/NAME.py:PRESET.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and results.")


def _many_hosts() -> bool:
    """Whether a launcher started several processes: Slurm, a TPU pod, or an explicit coordinator."""
    env = os.environ
    return (int(env.get("SLURM_NTASKS", "1")) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", "")
            or "JAX_COORDINATOR_ADDRESS" in env)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=configs/shapes.py")
    if not (config.dry_run or _WORKDIR.value):
        raise UserError("no --workdir; give a folder for checkpoints and results, e.g. --workdir=runs/first")
    if "://" in (_WORKDIR.value or ""):
        raise UserError(f"workdir={_WORKDIR.value}, expected a folder; mount the bucket (gcsfuse) and give its folder")
    logging.set_verbosity(logging.INFO)
    if _many_hosts():
        jax.distributed.initialize()
    from di_star_jax import plan  # after distributed start-up
    if config.dry_run:
        planned = config.mesh.fsdp * max(config.mesh.data, 1) if config.mesh.fsdp > 0 else jax.device_count()
        check(config, planned, objectives=OBJECTIVES)
        print("\n".join(plan.describe(config, jax.device_count())))
        return
    check(config, jax.device_count(), objectives=OBJECTIVES)
    from di_star_jax import train
    train.run(config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
