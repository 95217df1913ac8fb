# SPDX-License-Identifier: Apache-2.0
"""Trains: `python -m di_star_jax.main --config=configs/shapes.py --workdir=runs/shapes`."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from di_star_jax.config import (
    UserError,
    check,
    check_workdir,
    exit_on_user_error,
    parse_flags,
    planned_devices,
)
from di_star_jax.objectives import OBJECTIVES, OUTSIDE
from di_star_jax.rewards import REWARDS

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:PRESET."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and results.")
SILENCE = 30  # seconds without a sign of life after which the other processes end too


def launcher(env: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that it started several processes, or None.

    Raises: UserError in a Slurm allocation of several tasks outside of srun, where this process
      would be alone.
    """
    if int(env.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_NODELIST" not in env:
            raise UserError(
                f"SLURM_NTASKS={env['SLURM_NTASKS']}, but srun did not start this process; use srun (see "
                "launch/slurm.sbatch), or unset SLURM_NTASKS to run alone"
            )
        return "SLURM_NTASKS"
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES"
    return "JAX_COORDINATOR_ADDRESS" if "JAX_COORDINATOR_ADDRESS" in env else None


def connect(env: Mapping[str, str]) -> None:
    """Makes this process one of those its launcher started:

    Cloud TPU, GKE, Slurm, or JAX_* variables (launch/).

    Raises: UserError where the others are not seen.
    """
    variable = launcher(env)
    if variable is None:
        return
    count, index = (
        env.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )  # which JAX does not read itself
    jax.distributed.initialize(
        num_processes=count and int(count),
        process_id=index and int(index),
        heartbeat_timeout_seconds=SILENCE,
    )
    if jax.process_count() == 1:
        raise UserError(
            f"{variable}={env[variable]} says that there are several processes, but only this one is seen; "
            f"start the command on every host, or unset {variable} to run alone"
        )


def keep_compiled(workdir: str) -> None:
    """Keeps what is compiled in the workdir, for the next start; JAX_COMPILATION_CACHE_DIR names
    another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=configs/shapes.py")
    if config.dry_run:
        from di_star_jax.cost import plan

        check(
            config,
            planned_devices(config, jax.device_count()),
            objectives=OBJECTIVES,
            outside=OUTSIDE,
            rewards=REWARDS,
        )
        print("\n".join(plan.describe(config, jax.device_count())))
        return
    check_workdir(_WORKDIR.value)
    connect(os.environ)
    check(config, jax.device_count(), objectives=OBJECTIVES, outside=OUTSIDE, rewards=REWARDS)
    keep_compiled(_WORKDIR.value)
    from di_star_jax import (
        train,
    )  # after distributed start-up, before which no device may be touched

    train.run(config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
