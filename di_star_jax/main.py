# SPDX-License-Identifier: Apache-2.0
"""Aligns a one-step generator with a reward, by Diff-Instruct* and its siblings.

    di-star train --config=shapes --workdir=runs/first
    di-star train --config=sdxl:sim --config.dry_run=True    # sizes and memory; no weights
    di-star train --config=sdxl --config.dry_run=True --topology=v5e:8x16    # on 128 chips of v5e

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
from di_star_jax.cost import gpus, plan, report, slices
from di_star_jax.errors import UserError
from di_star_jax.hosts import connect, keep_compiled
from di_star_jax.pipelines.single import with_folders
from di_star_jax.processes import one_for_all
from di_star_jax.sharding import check_slices, mesh_shape
from di_star_jax.storage.buckets import is_remote

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to do: shapes, sdxl, sd15, or a file; :PRESET may follow."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the run, or a gs:// address: checkpoints, logs and results."
)
_CHIPS = flags.DEFINE_integer(
    "chips", None, "With --config.dry_run=True: how many devices to plan for.", lower_bound=1
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "With --config.dry_run=True: the TPU slice or GPUs to plan for, such as v5e:8x16 or h100:1.",
)


def main() -> None:
    config = _CONFIG.value
    if config is None:
        raise UserError("no --config; give e.g. --config=shapes")
    if "dry_run" not in config:
        raise UserError(
            "the config has no field dry_run, so it is of another command or not whole; "
            "--config=reward is for di-star reward, and see configs/sdxl.py"
        )
    if config.dry_run:
        with_folders(config)
        print("\n".join(planned(config)))
        return
    for flag in (_CHIPS, _TOPOLOGY):
        if flag.value is not None:
            raise UserError(
                f"--{flag.name}={flag.value} is what a dry run plans for; add "
                "--config.dry_run=True, or leave it out to run on the devices that are here"
            )
    workdir = os.path.expanduser(_WORKDIR.value or "")  # expand() would change gs://
    check_workdir(workdir)
    connect(os.environ)
    with one_for_all():
        with_folders(config)
        check(config, jax.device_count())
    if jax.process_count() > 1 or is_remote(workdir):  # only the first writes, all see the workdir
        keep_compiled(f"{workdir}/compiled")
    # After distributed start-up, before which no device may be touched.
    from di_star_jax import train

    train.run(config, workdir, sys.argv[1:])


def planned(config) -> list[str]:
    """What a dry run says: of the devices that are named, or else of those that are here."""
    if _CHIPS.value and _TOPOLOGY.value:
        raise UserError("--chips with --topology: give one of the two")
    if _CHIPS.value:
        check(config, _CHIPS.value)
        return report.describe(plan.make(config, _CHIPS.value, "of any kind", _CHIPS.value))
    on_gpus = gpus.parse(_TOPOLOGY.value) if _TOPOLOGY.value else None
    if on_gpus:
        check(config, on_gpus.count)
        kind = gpus.GPUS[on_gpus.name].kind
        return report.describe(plan.make(config, on_gpus.count, kind, on_gpus.count))
    if _TOPOLOGY.value:
        wanted = slices.parse(_TOPOLOGY.value)
        check(config, wanted.devices)
        mesh = mesh_shape(config.mesh.data, config.mesh.fsdp, config.mesh.context, wanted.devices)
        check_slices(mesh, [wanted.devices // wanted.count] * wanted.count)
        made = plan.make(config, wanted.devices, wanted.device_kind, wanted.devices)
        return [slices.describe(wanted), *report.describe(made)]
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    check(config, plan.planned_devices(config, count))
    return report.describe(plan.make(config, count, kind))


if __name__ == "__main__":
    run_command(main)
