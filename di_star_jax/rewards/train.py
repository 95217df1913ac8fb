# SPDX-License-Identifier: Apache-2.0
"""Trains a reward on preference pairs, as PickScore and ImageReward were.

    python -m di_star_jax.shapes.pairs --out=runs/pairs
    di-star reward --config=reward:shapes --workdir=runs/reward
    di-star reward --config=reward --workdir=runs/mine --config.data.pairs=my_pairs
    di-star reward --measure_data    # how many pairs a core reads and decodes

The same command again goes on where a run stopped. `--config=reward --help` lists the recipes and
fields. It is `python -m di_star_jax.rewards.train`; the trainer itself is di_star_jax/preference.
"""

import os
import sys

import jax
from absl import flags

from di_star_jax.checks import check_workdir
from di_star_jax.command import run as run_command
from di_star_jax.errors import UserError
from di_star_jax.hosts import connect, keep_compiled
from di_star_jax.preference.checks import check
from di_star_jax.processes import one_for_all
from di_star_jax.storage.buckets import is_remote


def main() -> None:
    if flags.FLAGS.measure_data:
        from di_star_jax.preference import measure

        print(measure.sentence())
        return
    config = flags.FLAGS.config
    if config is None:
        raise UserError("no --config; give e.g. --config=reward:shapes")
    workdir = os.path.expanduser(flags.FLAGS.workdir or "")  # expand() would change gs://
    check_workdir(workdir)
    connect(os.environ)
    with one_for_all():
        check(config, jax.device_count())
    if jax.process_count() > 1 or is_remote(workdir):  # only the first writes, all see the workdir
        keep_compiled(f"{workdir}/compiled")
    # After distributed start-up, before which no device may be touched.
    from di_star_jax.preference import run

    run.run(config, workdir, sys.argv[1:])


def define_flags() -> None:
    """The command's flags."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", None, "What to do: reward, or a file; :PRESET may follow."
    )
    flags.DEFINE_string(
        "workdir", None, "Folder for the run, or a gs:// address: checkpoints, logs and reward/."
    )
    flags.DEFINE_bool(
        "measure_data", False, "Says how many pairs a core decodes, and how many a step takes."
    )


if __name__ == "__main__":
    define_flags()
    run_command(main)
