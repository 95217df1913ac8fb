# SPDX-License-Identifier: Apache-2.0
"""What a step costs, and how far from the limit it is; random weights, nothing is downloaded.

    di-star benchmark --config=sdxl --topology=v5e:4x4  # no TPU needed
    di-star benchmark --config=sdxl_lora --topology=rtx4090:1 --ops  # where the time goes
    di-star benchmark --config=sdxl --config.mesh.fsdp=1 --config.data.batch_size=4 --vs=torch
    di-star benchmark --config=shapes --what=denoiser --vs=torch

For a slice XLA is told to make little effort (--effort=-1): that takes 4 minutes and 11 GB on two
cores; --effort=0, what a TPU would run, a quarter of an hour and over 22 GB. Compilation is timed
apart. Each call is blocked on everything it returns; the first three are not counted. Against
PyTorch on a CPU the calls take turns, so that other work on the machine slows both alike. FLOPs are
our own count (cost/flops.py), never XLA's.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import platform
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from di_star_jax import assembly, log, sharding, xla_flags
from di_star_jax.checks import check
from di_star_jax.command import run as run_command
from di_star_jax.cost import advice, gpus, op_tables, plan, policies, remat
from di_star_jax.cost import compile as aot
from di_star_jax.cost.chips import CHIPS, Chip, chip_of
from di_star_jax.errors import UserError, check_all
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.rewards import REWARDS, rewards_used, scales_of
from di_star_jax.storage import buckets, files

WARM_UP = 3
PROFILED = 3
# Third quartile over first of a ratio's repetitions, from which on it says little.
WIDE = 1.25
_MOMENTS = {"opt_generator", "opt_assistant"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure of a config.

    Args:
      what: a key of `compile.WORK`.
      name: of the config, for the result.
      topology: a TPU slice to compile for, running nothing; "" measures on this machine.
      versus: "torch" measures the same work in PyTorch too.
      repeats: calls that are timed.
      effort: of XLA; None is -1 for a topology, else 0.
      per_device: images, in place of data.batch_size; None is 1 for a topology, for the config's
        batch is meant for a larger one.
      ops: whether the compiled program's operations are counted one by one.
      profile: a folder for a trace of PROFILED calls; "" takes none.
    """

    what: str
    name: str
    topology: str = ""
    versus: str = ""
    repeats: int = 20
    effort: float | None = None
    per_device: int | None = None
    ops: bool = False
    profile: str = ""


def materialise(args: tuple, seed: int = 0) -> tuple:
    """Random arrays in place of abstract ones, where their shardings say.

    Kernels are as an initialiser has them, norms one, biases, moments and integers zero, everything
    else normal.
    """

    kinds = {(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(args)}
    with ThreadPoolExecutor() as pool:  # most of the time here is theirs
        makers = dict(zip(kinds, pool.map(lambda kind: _maker(*kind), kinds)))

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        make = makers[x.shape, x.dtype, x.sharding]
        *parents, name = (jax.tree_util.keystr((key,), simple=True) for key in path)
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        number = zlib.crc32(jax.tree_util.keystr(path).encode())  # the same in every process
        std, mean = _fan_in(x.shape) ** -0.5 if name == "kernel" else 1.0, 0.0
        if name == "bias" or not is_float or _MOMENTS.intersection(parents):
            std = 0.0
        elif name == "scale":
            std, mean = 0.0, 1.0
        return make(np.uint32(number ^ seed), np.float32(std), np.float32(mean))

    return jax.tree_util.tree_map_with_path(leaf, args)


def _maker(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding,
) -> Callable[[np.uint32, np.float32, np.float32], jax.Array]:
    """make(seed, std, mean) -> array, compiled: one program for all leaves that are alike.

    Zeros and ones are made by it too, with std 0.
    """

    def make(seed: jax.Array, std: jax.Array, mean: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        normal = jax.random.normal(jax.random.key(seed, impl="rbg"), shape)
        return (mean + std * normal).astype(dtype)

    number, value = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.uint32, jnp.float32))
    return jax.jit(make, out_shardings=sharding).lower(number, value, value).compile()


def _fan_in(shape: tuple[int, ...]) -> float:
    """Of a kernel, [..., C_in, C_out] or [..., H, W, C_in, C_out]."""
    return float(math.prod(shape[-4:-1]) if len(shape) > 3 else shape[-2])


def times_of(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls by name, after WARM_UP that are not counted.

    The calls take turns: what else the machine does slows them alike.

    Args: calls, which block until they are done.
    """
    names = " and ".join(calls)
    with log.waiting(f"first call of {names}"):
        for call in calls.values():
            call()
    total = WARM_UP + repeats
    seconds = {name: [] for name in calls}
    with log.Progress(total, 1, f"timing {names}: call") as progress:
        for done in range(2, total + 1):
            for name, call in calls.items():
                seconds[name].append(_seconds(call))
            progress.update(done, ", ".join(f"{n} {s[-1]:.3g} s" for n, s in seconds.items()))
    return {name: of_one[WARM_UP - 1 :] for name, of_one in seconds.items()}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ratio_of(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Ours over theirs, repetition by repetition: the median, the quartiles, and what it is worth.

    Args: seconds of equally many calls.
    """
    low, median, high = np.percentile(np.divide(ours, theirs), [25, 50, 75])
    return {
        "ratio": median,
        "ratio_quartiles": [low, high],
        "ratio_is_wide": bool(high > WIDE * low),
    }


def summary(
    seconds: list[float],
    samples: int,
    devices: int,
) -> dict[str, float]:
    """Median, p10 and p90, and what follows from the median.

    Args: seconds a call; samples of all devices together.
    """
    median, low, high = np.percentile(seconds, [50, 10, 90])
    return {
        "median_s": median,
        "p10_s": low,
        "p90_s": high,
        "s_per_sample": median / samples,
        "samples_per_s_per_device": samples / median / devices,
        "calls": len(seconds),
    }


def environment(mesh: Mesh) -> dict:
    """What a number is worth nothing without."""
    installed = {name: _version(name) for name in ("flax", "optax", "libtpu", "torch")}
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        **{name: version for name, version in installed.items() if version},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _preset(chip: str | None) -> dict:
    """The flags that others use on this kind of device, and whether they are set here."""
    platform = "h100" if chip in ("H100", "H200") else chip
    preset = xla_flags.PRESETS.get(platform, ())
    given = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    is_set = all(flag in given for flag in preset)
    return {"platform": platform, "preset": preset, "preset_set": is_set}


def roofline(
    flop: float,
    traffic: dict,
    chip: Chip,
) -> dict[str, float]:
    """Least seconds a call. Args: flop of one device's model; traffic of `flops.collectives`."""
    received = sum(size for (_, what), size in traffic.items() if what == "bytes")
    return {"compute_s": flop / chip.flops, "network_s": received / chip.network}


def report(result: dict) -> str:
    """The result as lines to read."""
    rows = [*_compiled_rows(result), *_measured_rows(result)]
    width = max(len(name) for name, _ in rows)
    tables = op_tables.tables(result["ops"]) if "ops" in result else []
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*_heading(result), *lines, *tables])


def _heading(result: dict) -> list[str]:
    env = result["environment"]
    mesh = " x ".join(f"{name}={size}" for name, size in env["mesh"].items())
    settings = [f"attention {result['attention']}, jax {env['jax']}"]
    if result["effort"]:
        settings.append(f"compiled with effort {result['effort']:g}")
    settings += [f"{name} {env[name]}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if env[name]]
    return [
        f"{result['what']} of {result['config']}: {result['resolution']} pixels, "
        f"{result['dtype']}, batch {result['batch_size']} over {env['devices']} {env['device']} "
        f"(mesh {mesh})",
        ", ".join(settings),
    ]


def _compiled_rows(result: dict) -> list[tuple[str, str]]:
    """What is known without running."""
    seconds = ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
    rows = [
        ("compilation", f"{seconds}; {result['host_gb']:.1f} GB of host memory"),
        ("model FLOP a sample", f"{result['model_flop'] / 1e12:.4g} TF"),
    ]
    if result["memory"]:
        memory = {name: size / 1e9 for name, size in result["memory"].items()}
        peak = memory.pop("peak")
        parts = [f"{size:.2f} GB {name}" for name, size in memory.items()]
        have = f" of {result['chip_gb']:.1f} GB" if result["chip_gb"] else ""
        rows.append(("memory a device", ", ".join([*parts, f"{peak:.2f} GB at the peak{have}"])))
    for kind, traffic in result["collectives"].items():
        received = f"{traffic['bytes'] / 1e9:.2f} GB received by a device"
        rows.append((f"{kind} a step", f"{traffic['count']:,}, {received}"))
    if result["preset"]:
        advice = f"not set; python -m di_star_jax.xla_flags {result['platform']} prints it"
        state = "set" if result["preset_set"] else advice
        count = len(result["preset"])
        rows.append(("XLA flag preset", f"{count} flags for {result['platform']}, {state}"))
    if "roofline" in result:
        least = result["roofline"]
        text = (
            f"{least['compute_s']:.3f} s of compute, {least['network_s']:.3f} s of network, "
            f"at least {max(least.values()):.3f} s a step"
        )
        rows.append(("roofline", text))
    if "ops" in result:
        rows += op_tables.rows(result["ops"], result.get("roofline", {}).get("compute_s"))
    return rows


def _measured_rows(result: dict) -> list[tuple[str, str]]:
    """What running told; [] where nothing ran."""
    rows = []
    for name in ("ours", "torch"):
        if name in result:
            t = result[name]
            text = (
                f"{t['median_s']:.4g} s (p10 {t['p10_s']:.4g}, p90 {t['p90_s']:.4g}, "
                f"{t['calls']} calls), {t['s_per_sample']:.4g} s a sample, "
                f"{t['samples_per_s_per_device']:.4g} samples/s a device"
            )
            rows.append((f"time, {name}", text))
    if "mfu" in result:
        rows.append(("model-FLOP utilisation", f"{100 * result['mfu']:.1f} %"))
    if "peak_bytes_in_use" in result:
        rows.append(("peak memory in use", f"{result['peak_bytes_in_use'] / 1e9:.2f} GB"))
    if "ratio" in result:
        low, high = result["ratio_quartiles"]
        text = (
            f"{result['ratio']:.3f}, half of {result['ours']['calls']} in {low:.3f} to {high:.3f}"
        )
        if result["ratio_is_wide"]:
            text += ": worth nothing, so wide; stop other work on this machine, raise --repeats"
        rows.append(("ours / torch", text))
    return rows


def run(config, request: Request) -> dict:
    """One benchmark; see `report` for what it holds.

    "lacks": why the step that was compiled does not fit GPUs that are not here, whose compiler
    finishes it all the same.

    Raises: UserError for what cannot run.
    """
    devices = aot.topology_devices(request.topology) if request.topology else jax.devices()
    planned = _prepare(config, request, devices)
    m = config.mesh
    mesh = sharding.make_mesh(m.data, m.fsdp, m.context, devices=devices)
    default = -1.0 if request.topology else 0.0
    effort = default if request.effort is None else request.effort
    chosen = None
    if policies.is_asked(config):
        memory = remat.memory_of(devices[0])
        chosen = remat.search(config, mesh, memory, effort)
        log.say(remat.told(chosen, memory, devices[0].device_kind))
        config = remat.with_choice(config, chosen.choice)
    theirs = {"torch": _torch_call(config, request.what)} if request.versus else {}
    with log.waiting("counting FLOP"):
        work = aot.WORK[request.what](config, mesh)
        model_flop = aot.model_flop(request.what, config, jax.devices()[0])
    # Two training states of SDXL are too much for one accelerator.
    apart = times_of(theirs, request.repeats) if theirs and not _on_cpu(devices) else {}
    if apart:
        theirs.clear()
        _forget_torch()
    compiled = chosen and chosen.compiled
    if compiled is None:
        estimate = _compile_estimate(request, effort)
        with _advised(planned, request), log.waiting(f"compiling {request.what}", estimate):
            compiled = aot.compile_work(work, config, effort=effort)
    result = {
        "what": request.what,
        "config": request.name,
        **_settings(config, mesh),
        "effort": effort,
        "model_flop": model_flop,
        **_compilation(compiled, mesh, model_flop * config.data.batch_size / len(devices)),
    }
    if request.ops:
        with log.waiting("counting operations"):
            chip = CHIPS.get(chip_of(devices[0].device_kind))
            result["ops"] = op_tables.of_text(compiled.run.as_text(), chip)
    lacks = _lacks(planned, request, aot.held(compiled.memory))
    if lacks:
        result["lacks"] = str(lacks)
    if not request.topology:
        calls = {"ours": _our_call(work, compiled), **theirs}
        result |= _measurement(work, result, apart | times_of(calls, request.repeats))
        if request.profile:
            with jax.profiler.trace(request.profile):
                for _ in range(PROFILED):
                    calls["ours"]()
    return result


def _prepare(
    config,
    request: Request,
    devices: list[jax.Device],
) -> plan.Plan:
    """Sets the batch, and refuses what cannot run, or is too large by far to be compiled."""
    if policies.is_asked(config) and request.what != "train":
        raise UserError(
            f"compute.remat='auto' with --what={request.what}, but it chooses for the whole step; "
            "use --what=train, or set compute.remat=''"
        )
    if request.versus:
        check_all(lambda: _check_torch(config), _check_torch_is_there)
    config.dry_run = True
    if request.per_device or request.topology:
        m = config.mesh
        data, fsdp, _ = sharding.mesh_shape(m.data, m.fsdp, m.context, len(devices))
        config.data.batch_size = (request.per_device or 1) * data * fsdp
    check(config, len(devices))
    planned = plan.make(config, len(devices), devices[0].device_kind)
    if planned.unknown:
        raise UserError(
            f"{planned.unknown[0]} is neither a folder nor a model whose sizes are known; give a "
            "folder"
        )
    if request.what == "train":
        tolerance = remat.TOLERANCE if request.topology else 0.0
        with _advised(planned, request):
            plan.check_memory(planned, tolerance=tolerance)
    return planned


@contextlib.contextmanager
def _advised(planned: plan.Plan, request: Request) -> Iterator[None]:
    """Says of a whole step that is too large which fields would change that."""
    try:
        yield
    except plan.OutOfMemory as error:
        if request.what != "train":
            raise
        raise advice.out_of_memory(planned, error.need, error.have) from None


def _lacks(
    planned: plan.Plan,
    request: Request,
    need: float,
) -> plan.OutOfMemory | None:
    """Of a whole step for GPUs that are not here. Args: need, bytes by their compiler."""
    if request.what != "train" or not request.topology or not gpus.parse(request.topology):
        return None
    have = CHIPS[chip_of(planned.device_kind)].memory
    return advice.out_of_memory(planned, need, have) if need > have else None


def _settings(config, mesh: Mesh) -> dict:
    return {
        "resolution": config.data.resolution,
        "dtype": config.compute.dtype,
        "batch_size": config.data.batch_size,
        "attention": assembly.kernel_of(config, mesh.devices.flat[0].platform),
        "settings": config.compute.to_dict() | {"decode": config.decode.to_dict()},
        "environment": environment(mesh),
    }


def _compilation(
    compiled: aot.Compiled,
    mesh: Mesh,
    flop: float,
) -> dict:
    """Args: flop of one device's model."""
    name = chip_of(mesh.devices.flat[0].device_kind)
    chip = CHIPS.get(name)
    result = {
        "seconds": compiled.seconds,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "memory": compiled.memory,
        "chip_gb": chip.memory / 1e9 if chip else None,
        "collectives": {
            kind: {part: compiled.traffic[kind, part] for part in ("count", "bytes")}
            for kind in sorted({kind for kind, _ in compiled.traffic})
        },
        **_preset(name),
    }
    if chip:
        result["roofline"] = roofline(flop, compiled.traffic, chip)
    return result


def _measurement(
    work: aot.Work,
    result: dict,
    seconds: dict[str, list[float]],
) -> dict:
    """Args: result, so far; seconds of calls, of ours and perhaps of torch."""
    device, count = work.mesh.devices.flat[0], work.mesh.devices.size
    ours = seconds["ours"]
    measured = {"ours": summary(ours, result["batch_size"], count), "samples": ours}
    if "torch" in seconds:
        theirs = seconds["torch"]
        measured |= {"torch": summary(theirs, result["batch_size"], 1), "torch_samples": theirs}
        measured |= ratio_of(ours, theirs)
    if "roofline" in result:
        measured["mfu"] = result["roofline"]["compute_s"] / measured["ours"]["median_s"]
    if device.memory_stats():
        measured["peak_bytes_in_use"] = device.memory_stats()["peak_bytes_in_use"]
    return measured


def _our_call(work: aot.Work, compiled: aot.Compiled) -> Callable[[], None]:
    """A call of compiled work with random arguments."""
    with log.waiting("drawing random weights"):
        args = jax.block_until_ready(materialise(work.args))

    def call() -> None:
        nonlocal args
        out = jax.block_until_ready(compiled.run(*args))
        if work.donates:
            args = (out[0], *args[1:])

    return call


def _on_cpu(devices: list[jax.Device]) -> bool:
    return devices[0].platform == "cpu"


def _compile_estimate(request: Request, effort: float) -> str:
    if not request.topology:
        return "a minute for the shapes world, many for SDXL"
    return "for SDXL about " + ("4 minutes" if effort < 0 else "a quarter of an hour")


def _check_torch_is_there() -> None:
    """Imports what the comparison needs, for a broken installation is found in no other way."""
    try:
        for name in ("torch", "diffusers"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--vs=torch: {error}; pip install torch diffusers accelerate, or leave --vs out"
        ) from None


def _forget_torch() -> None:
    """Gives the memory of a dropped call back."""
    import torch

    gc.collect()  # compiled modules are reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torch_call(config, what: str) -> Callable[[], None]:
    """A call of the same work in PyTorch, on one device."""
    import torch

    from di_star_jax.cost import peer

    cuda = torch.cuda.is_available() and jax.devices()[0].platform == "gpu"
    known = plan.known_models(config)
    scales = scales_of(config.reward)
    used = rewards_used(scales, config.eval.metrics)  # one, or none
    reward = {"reward": known.rewards[used[0]]} if used else {}
    configs = known.networks | reward
    side = config.data.resolution // 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    latent_shape = (side, side, configs[DENOISER].get("in_channels", 4))
    job = peer.Job(
        configs,
        known.family.tokenizers,
        assembly.settings_of(config, latent_shape, known.family.one_step),
        batch=config.data.batch_size,
        resolution=config.data.resolution,
        dtype=config.compute.dtype,
        device="cuda" if cuda else "cpu",
        compile=cuda,
        reward_scale=sum(scales[name] for name in used),
    )
    with log.waiting("building the networks in PyTorch"):
        return peer.make(what, job)


def _check_torch(config) -> None:
    if config.decode.view != "full":
        raise UserError(
            f"--vs=torch with decode.view={config.decode.view!r}, expected 'full', which is what "
            "it decodes"
        )
    if config.data.cache:
        raise UserError(
            f"--vs=torch with data.cache={config.data.cache!r}, expected '': PyTorch's side has "
            "text encoders; leave it out"
        )
    if jax.device_count() > 1:
        raise UserError(
            f"--vs=torch with {jax.device_count()} devices, expected one; "
            "set CUDA_VISIBLE_DEVICES=0"
        )
    used = rewards_used(scales_of(config.reward), config.eval.metrics)
    known = [name for name, entry in REWARDS.items() if entry.in_torch]
    if len(used) > 1 or not {*used} <= {*known}:
        raise UserError(
            f"--vs=torch with rewards {', '.join(used)}, expected {' or '.join(known)} alone, "
            "which is what it has, or none; set the others to 0 and take them out of eval.metrics"
        )


def main() -> None:
    args = flags.FLAGS
    if args.config is None:
        raise UserError("no --config; give e.g. --config=sdxl")
    jax.config.update("jax_enable_compilation_cache", False)  # for compilation is timed
    if args.topology and args.vs:
        raise UserError("--topology with --vs: nothing runs on a topology; give one of the two")
    if args.topology and args.profile:
        raise UserError("--topology with --profile: nothing runs on a topology; leave one out")
    if args.profile:
        files.writable_folder(args.profile, "--profile")
    if args.vs:  # or PyTorch would find no GPU memory left; JAX reads it at its first device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    request = Request(
        args.what,
        Path(args["config"].config_filename).name,
        topology=args.topology or "",
        versus=args.vs or "",
        repeats=args.repeats,
        effort=args.effort,
        per_device=args.per_device,
        ops=args.ops,
        profile=args.profile or "",
    )
    file = _json_file(args.json)
    result = run(args.config, request)
    print(report(result))
    if file:
        _write(file, result)
    if "lacks" in result:
        raise UserError(result["lacks"])


def _write(file: Path | str, result: dict) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if buckets.is_remote(file):
        buckets.write_text(str(file), text)
    else:
        files.write_text(file, text)


def _json_file(path: str | None) -> Path | str | None:
    """Raises: UserError where it cannot be written, which an hour of measuring must not show."""
    if not path:
        return None
    if buckets.is_remote(path):
        buckets.reach(path)
        return path
    file = files.expand(path)
    files.writable_folder(str(file.parent), "the folder of --json")
    if file.is_dir():
        raise UserError(f"--json={path} is a folder, expected a file; add a name, as result.json")
    return file


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file(
        "config", None, "What to measure: sdxl, sd15, shapes, or a file's path; :PRESET may follow."
    )
    flags.DEFINE_enum("what", "train", sorted(aot.WORK), "The whole step, or a part of it.")
    flags.DEFINE_string(
        "topology",
        None,
        "Compile for a TPU slice or GPUs and run nothing: v5e:4x4, v6e:2x4, h100:1, rtx4090:1, ...",
    )
    flags.DEFINE_float(
        "effort",
        None,
        "Effort of XLA's compiler; -1 for a topology and 0 else, if not given.",
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer(
        "per_device",
        None,
        "Images on each device, in place of data.batch_size; 1 for a topology, if not given.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "ops",
        False,
        "Also what each operation of the compiled program costs at least, by source line and "
        "module.",
    )
    flags.DEFINE_string(
        "profile",
        None,
        f"Folder for a trace of {PROFILED} further calls, for xprof or TensorBoard.",
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Measures the same work in PyTorch too.")
    flags.DEFINE_integer("repeats", 20, "Calls that are timed.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the result, with every sample and setting.")


if __name__ == "__main__":
    define_flags()
    run_command(main)
