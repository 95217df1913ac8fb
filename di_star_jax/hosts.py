# SPDX-License-Identifier: Apache-2.0
"""Processes that make up one run, and what they keep compiled."""

import os
import sys
import tempfile
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


def keep_compiled(folder: str | None = None) -> None:
    """Keeps what is compiled for later starts of any command.

    It goes to the folder that JAX_COMPILATION_CACHE_DIR names, else to `folder`, else to the
    user's cache. One that cannot be written is said in a line. Either may be a gs:// address.
    """
    # Else XLA's own cache beside it, by its path, is part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and "://" in given:
        return
    if folder and "://" in folder and not given:
        # Every program is asked for there, but only what takes long to compile is worth a copy.
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
        return
    try:
        where = Path(given or folder or _user_cache()).absolute()
        where.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=where).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        print(f"what is compiled is not kept for the next start: {error}", file=sys.stderr)
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(where))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _user_cache() -> Path:
    of_user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(of_user) / "di_star_jax" / "compiled"
