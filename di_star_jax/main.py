# SPDX-License-Identifier: Apache-2.0
"""Aligns a one-step generator with a reward, by Diff-Instruct* and its siblings.

    di-star train --config=shapes --workdir=runs/first
    di-star train --config=sdxl:sim --config.dry_run=True    # sizes and memory; no weights

The same command again goes on where a run stopped. `--config=shapes --help` lists the presets
and fields of a config.
"""

import os
import sys

import jax
from absl import flags
from ml_collections import config_flags

from di_star_jax.checks import check, check_workdir
from di_star_jax.command import run as run_command
from di_star_jax.cost.plan import planned_devices
from di_star_jax.errors import UserError
from di_star_jax.hosts import connect, keep_compiled
from di_star_jax.storage.buckets import is_remote

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to do: shapes, sdxl, or the path of a file; :PRESET may follow."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the run, or a gs:// address: checkpoints, logs and results."
)


def main() -> None:
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=shapes")
    if config.dry_run:
        from di_star_jax.cost import plan

        count, kind = jax.device_count(), jax.devices()[0].device_kind
        check(config, planned_devices(config, count))
        print("\n".join(plan.describe(plan.make(config, count, kind))))
        return
    workdir = os.path.expanduser(_WORKDIR.value or "")  # expand() would change gs://
    check_workdir(workdir)
    connect(os.environ)
    check(config, jax.device_count())
    if jax.process_count() > 1 or is_remote(workdir):  # only the first writes, all see the workdir
        keep_compiled(f"{workdir}/compiled")
    # After distributed start-up, before which no device may be touched.
    from di_star_jax import train

    train.run(config, workdir, sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
