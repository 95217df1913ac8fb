# SPDX-License-Identifier: Apache-2.0
"""Trains: `python -m di_star_jax.main --config=configs/shapes.py --workdir=runs/shapes`."""

import os
from collections.abc import Mapping

import jax
from absl import app, flags
from ml_collections import config_flags

from di_star_jax.config import (UserError, check, check_workdir, exit_on_user_error, parse_flags,
                                planned_devices)
from di_star_jax.objectives import OBJECTIVES, OUTSIDE

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py or configs/NAME.py:PRESET.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and results.")


def many_hosts(env: Mapping[str, str]) -> bool:
    """Whether a launcher started several processes: srun, TPU workers on GKE, or launch/tpu_pod.sh (coordinator)."""
    by_srun = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    return by_srun or "," in env.get("TPU_WORKER_HOSTNAMES", "") or "JAX_COORDINATOR_ADDRESS" in env


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=configs/shapes.py")
    if config.dry_run:
        from di_star_jax import plan
        check(config, planned_devices(config, jax.device_count()), objectives=OBJECTIVES, outside=OUTSIDE)
        print("\n".join(plan.describe(config, jax.device_count())))
        return
    check_workdir(_WORKDIR.value)
    if many_hosts(os.environ):
        jax.distributed.initialize()
    check(config, jax.device_count(), objectives=OBJECTIVES, outside=OUTSIDE)
    from di_star_jax import train  # after distributed start-up, before which no device may be touched
    train.run(config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
