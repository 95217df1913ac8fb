# SPDX-License-Identifier: Apache-2.0
"""Trains: `python -m di_star_jax.main --config=configs/shapes.py --workdir=runs/shapes`."""

import os
import sys

import jax
from absl import flags
from ml_collections import config_flags

from di_star_jax.checks import check, check_workdir
from di_star_jax.config import parse_flags
from di_star_jax.cost.plan import planned_devices
from di_star_jax.errors import UserError
from di_star_jax.errors import run as run_command
from di_star_jax.hosts import connect, keep_compiled

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:PRESET."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and results.")


def main() -> None:
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=configs/shapes.py")
    if config.dry_run:
        from di_star_jax.cost import plan

        count, kind = jax.device_count(), jax.devices()[0].device_kind
        check(config, planned_devices(config, count))
        print("\n".join(plan.describe(plan.make(config, count, kind))))
        return
    check_workdir(_WORKDIR.value)
    connect(os.environ)
    check(config, jax.device_count())
    keep_compiled(_WORKDIR.value)
    # After distributed start-up, before which no device may be touched.
    from di_star_jax import train

    train.run(config, _WORKDIR.value, sys.argv[1:])


if __name__ == "__main__":
    run_command(main, parse_flags)
