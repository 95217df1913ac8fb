# SPDX-License-Identifier: Apache-2.0
"""Processes that make up one run, and what they keep compiled."""

import contextlib
import glob
import importlib.util
import os
import re
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from di_star_jax import processes
from di_star_jax.errors import LOST, UserError

SILENCE = 30  # seconds without a sign of life after which the other processes end too
PATIENCE = 300  # seconds that the processes of a run wait for each other at its start
HURRY = 10  # seconds after which it is said that they wait
TPU_PORT = "8482"  # of the first process where only hosts are named; JAX's own
_MORE_OF_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads beside
_MORE_OF_SLICES = ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
_METADATA = "computeMetadata/v1/instance/attributes"


class Group(NamedTuple):
    """The processes of a run; what is None JAX finds out.

    address: host:port of the first one; count: of all; index: this one's.
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None


def launcher(env: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that it started several processes, or None.

    Raises: UserError in a Slurm allocation of several tasks outside of srun, where this process
      would be alone, and for a variable that is not the number it should be.
    """
    count = _number(env, "JAX_NUM_PROCESSES", 1)
    if env.get("JAX_COORDINATOR_ADDRESS") and count is not None:
        return "JAX_COORDINATOR_ADDRESS" if count > 1 else None
    if (_number(env, "SLURM_NTASKS", 1) or 1) > 1:
        if "SLURM_STEP_NODELIST" not in env:
            raise UserError(
                f"SLURM_NTASKS={env['SLURM_NTASKS']}, but srun did not start this process; use "
                "srun (see launch/slurm.sbatch), or unset SLURM_NTASKS to run alone"
            )
        return "SLURM_NTASKS"
    if (_number(env, "MEGASCALE_NUM_SLICES", 1) or 1) > 1:
        return "MEGASCALE_NUM_SLICES"
    workers = _worker_list(env)
    if "," in env.get(workers, ""):
        return workers
    return "JAX_COORDINATOR_ADDRESS" if env.get("JAX_COORDINATOR_ADDRESS") else None


def _worker_list(env: Mapping[str, str]) -> str:
    """The variable that names a slice's hosts; JAX looks in this order."""
    return "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in env else "TPU_WORKER_HOSTNAMES"


def group(env: Mapping[str, str]) -> Group:
    """What the variables say of the processes of this run.

    Raises: UserError for one without the others that belong to it, and for one out of range.
    """
    variable = launcher(env)
    given = Group(
        env.get("JAX_COORDINATOR_ADDRESS") or None,
        _number(env, "JAX_NUM_PROCESSES", 1),
        _number(env, "JAX_PROCESS_ID", 0),
    )
    _check_devices(env)
    if variable == "SLURM_NTASKS":
        _needs(env, variable, _MORE_OF_SLURM)
        numbers = [_number(env, name, 0) for name in _MORE_OF_SLURM]
        _below(env, "SLURM_PROCID", numbers[1], int(env[variable]), variable)
    elif variable not in (None, "JAX_COORDINATOR_ADDRESS"):
        given = _of_slices(env, variable, given)
    elif variable and not (_found_by_jax(env) or None not in given):
        _needs(env, variable, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    elif variable is None and not tpus_here(env):
        _refuse_strays(env)
    return _checked(env, given)


def _of_slices(
    env: Mapping[str, str],
    variable: str,
    given: Group,
) -> Group:
    """Of TPU hosts, as GKE describes them. Args: given, what JAX's own variables say instead."""
    workers = _worker_list(env)
    slices = _number(env, "MEGASCALE_NUM_SLICES", 1) or 1
    if None not in given or (not env.get(workers) and tpus_here(env)):
        return given  # in the latter case JAX asks the metadata
    needed = [workers] if given.index is not None else [workers, "TPU_WORKER_ID"]
    _needs(env, variable, needed + (list(_MORE_OF_SLICES) if slices > 1 else []))
    hosts = env[workers].split(",")
    worker = _number(env, "TPU_WORKER_ID", 0) or 0
    of_slice = (_number(env, "MEGASCALE_SLICE_ID", 0) or 0) if slices > 1 else 0
    _below(env, "TPU_WORKER_ID", worker, len(hosts), workers)
    _below(env, "MEGASCALE_SLICE_ID", of_slice, slices, "MEGASCALE_NUM_SLICES")
    first = env["MEGASCALE_COORDINATOR_ADDRESS"] if slices > 1 else hosts[0]
    port = env.get("JAX_COORDINATOR_PORT", TPU_PORT)
    return Group(
        given.address or f"{first.split(':')[0]}:{port}",
        given.count or slices * len(hosts),
        of_slice * len(hosts) + worker if given.index is None else given.index,
    )


def _found_by_jax(env: Mapping[str, str]) -> bool:
    """Whether JAX finds out how many processes there are, and which this one is."""
    return "SLURM_STEP_NODELIST" in env or "," in env.get(_worker_list(env), "") or tpus_here(env)


def _number(
    env: Mapping[str, str],
    name: str,
    least: int,
) -> int | None:
    """A variable's whole number; None where it is not set. Raises: UserError."""
    if name not in env:
        return None
    if not re.fullmatch(r"\d{1,18}", env[name]) or int(env[name]) < least:
        raise UserError(
            f"{name}={env[name]!r}, expected a whole number from {least}; unset it to run alone"
        )
    return int(env[name])


def _needs(
    env: Mapping[str, str],
    variable: str,
    needed: Sequence[str],
) -> None:
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise UserError(
            f"{variable}={env.get(variable, '')} needs {' and '.join(missing)} beside it; a "
            f"launcher sets all of them (docs/clusters.md); unset {variable} to run alone"
        )


def _below(
    env: Mapping[str, str],
    name: str,
    value: int,
    limit: int,
    why: str,
) -> None:
    if value >= limit:
        raise UserError(
            f"{name}={value}, expected 0 to {limit - 1} by {why}={env.get(why, '')}; start each "
            "process with a number of its own"
        )


def _refuse_strays(env: Mapping[str, str]) -> None:
    """Variables of a process among several, without the one that says how to find the others."""
    for name, leader in (
        ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
        ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"),
        ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
        ("MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES"),
    ):
        alone = 1 if name == "JAX_NUM_PROCESSES" else 0
        if (_number(env, name, alone) or alone) > alone and not env.get(leader):
            _needs(env, name, (leader,))


def _check_devices(env: Mapping[str, str]) -> None:
    _number(env, "JAX_PARTITION_INDEX", 0)
    devices = env.get("JAX_LOCAL_DEVICE_IDS")
    if devices and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise UserError(
            f"JAX_LOCAL_DEVICE_IDS={devices}, expected numbers and commas, such as 0,1,2,3; unset "
            "it to take all devices"
        )


def _checked(env: Mapping[str, str], given: Group) -> Group:
    if given.count is not None and given.index is not None and given.index >= given.count:
        raise UserError(
            f"process {given.index} of {given.count}: expected 0 to {given.count - 1}; see "
            "JAX_PROCESS_ID and JAX_NUM_PROCESSES"
        )
    if given.address and not re.fullmatch(r"[^\s/]+:\d{1,5}", given.address):
        raise UserError(
            f"the first process's address is {given.address!r}, expected HOST:PORT such as "
            "10.0.0.1:8476; see JAX_COORDINATOR_ADDRESS and JAX_COORDINATOR_PORT"
        )
    return given


# A TPU's hosts.


def tpus_here(env: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs that JAX would use. Asks neither them nor JAX."""
    wanted = env.get("JAX_PLATFORMS", "tpu")
    devices = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(devices) and importlib.util.find_spec("libtpu") is not None


def is_one_of_several(env: Mapping[str, str]) -> bool:
    """Whether this machine is one of the hosts of a TPU slice, or of slices, by its metadata."""
    if not tpus_here(env) or "TPU_SKIP_MDS_QUERY" in env:
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES\W+(\d+)", metadata(env, "tpu-env"))
    several_slices = slices is not None and int(slices[1]) > 1
    return several_slices or "," in metadata(env, "worker-network-endpoints")


def metadata(env: Mapping[str, str], key: str) -> str:
    """What Google's clouds tell a machine of itself; "" elsewhere."""
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")  # as JAX does
    request = urllib.request.Request(
        f"http://{server}/{_METADATA}/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


# How they meet.


def connect(env: Mapping[str, str]) -> None:
    """Makes this process one of those its launcher started.

    A launcher is GKE, Cloud TPU (which says in its metadata how many hosts there are), Slurm, or
    whoever sets JAX_* variables (launch/). Where the others do not come within `PATIENCE` seconds
    the process ends with one line and the exit code `errors.LOST`.

    Raises: UserError for variables that contradict each other, and where the others are not seen.
    """
    found = group(env)
    variable = launcher(env)
    if variable is None and not is_one_of_several(env):
        return
    said = f"{variable}={env[variable]}" if variable else "the TPU's metadata"
    with _patience(found, said):
        try:
            jax.distributed.initialize(
                coordinator_address=found.address,
                num_processes=found.count,
                process_id=found.index,
                initialization_timeout=2 * PATIENCE,  # ended before, by a line instead of a trace
                heartbeat_timeout_seconds=SILENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{said} says that there are several processes, but they cannot meet: "
                f"{str(error).splitlines()[0]}"
            ) from None
    if jax.process_count() == 1:
        raise UserError(
            f"{said} says that there are several processes, but only this one is seen; start the "
            "command on every host" + (f", or unset {variable} to run alone" if variable else "")
        )
    processes.watch(SILENCE)


@contextlib.contextmanager
def _patience(found: Group, said: str) -> Iterator[None]:
    """Around a wait for the other processes, which JAX would end with a stack trace of C++."""
    met = threading.Event()

    def watch() -> None:
        if met.wait(HURRY):
            return
        where = f" at {found.address}" if found.address else ""
        print(
            f"waiting for the other processes{where}, up to {PATIENCE} s ({said})",
            file=sys.stderr,
            flush=True,
        )
        if not met.wait(max(PATIENCE - HURRY, 0)):
            print(f"error: {_why_not_met(found, said)}", file=sys.stderr, flush=True)
            os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _why_not_met(found: Group, said: str) -> str:
    count = f"the {found.count} processes" if found.count else "the processes"
    tell = f"{count} of this run did not meet within {PATIENCE} s ({said})"
    if found.address is None or found.index == 0:
        return f"{tell}: not all have come to the first one; see the others' logs"
    host, _, port = found.address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except socket.gaierror:
        return f"{tell}: no machine is called {host}; check the name, or start its process"
    except OSError:
        return (
            f"{tell}: nothing answers at {found.address}; start process 0 there, or open the port"
        )
    return f"{tell}: {found.address} answers, but others are missing; see the first one's log"


# What they keep.


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
