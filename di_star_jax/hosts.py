# SPDX-License-Identifier: Apache-2.0
"""Processes that make up one run, and what they keep compiled."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax

from di_star_jax.errors import UserError

SILENCE = 30  # seconds without a sign of life after which the other processes end too


def launcher(env: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that it started several processes, or None.

    Raises: UserError in a Slurm allocation of several tasks outside of srun, where this process
      would be alone.
    """
    if int(env.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_NODELIST" not in env:
            raise UserError(
                f"SLURM_NTASKS={env['SLURM_NTASKS']}, but srun did not start this process; use "
                "srun (see launch/slurm.sbatch), or unset SLURM_NTASKS to run alone"
            )
        return "SLURM_NTASKS"
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES"
    return "JAX_COORDINATOR_ADDRESS" if "JAX_COORDINATOR_ADDRESS" in env else None


def connect(env: Mapping[str, str]) -> None:
    """Makes this process one of those its launcher started.

    A launcher is Cloud TPU, GKE, Slurm, or whoever sets JAX_* variables (launch/).

    Raises: UserError where the others are not seen.
    """
    variable = launcher(env)
    if variable is None:
        return
    # JAX does not read these two itself.
    count = env.get("JAX_NUM_PROCESSES")
    index = env.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=count and int(count),
        process_id=index and int(index),
        heartbeat_timeout_seconds=SILENCE,
    )
    if jax.process_count() == 1:
        raise UserError(
            f"{variable}={env[variable]} says that there are several processes, but only this one "
            f"is seen; start the command on every host, or unset {variable} to run alone"
        )


def keep_compiled(workdir: str) -> None:
    """Keeps what is compiled for the next start.

    It goes to the workdir, or to the folder that JAX_COMPILATION_CACHE_DIR names.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
