# SPDX-License-Identifier: Apache-2.0
"""What a step costs, and how far from the limit it is; random weights, nothing is downloaded.

    python -m di_star_jax.benchmark --config=configs/sdxl.py --topology=v5e:4x4     # no TPU needed
    python -m di_star_jax.benchmark --config=configs/sdxl.py --config.mesh.fsdp=1
    --config.data.batch_size=4 --vs=torch python -m di_star_jax.benchmark --config=configs/shapes.py
    --what=unet --vs=torch

For a slice XLA is told to make little effort (--effort=-1): that takes 4 minutes and 11 GB on two
cores; --effort=0, what a TPU would run, a quarter of an hour and over 22 GB. Compilation is timed
apart. Each call is blocked on everything it returns; the first three are not counted. FLOPs are our
own count (flops.py), never XLA's.
"""

import gc
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

from di_star_jax import assembly

if any(arg.startswith("--vs") for arg in sys.argv):
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # or PyTorch would find no GPU memory left

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from di_star_jax import sharding, xla_flags
from di_star_jax.checks import check
from di_star_jax.config import parse_flags
from di_star_jax.cost import compile as aot
from di_star_jax.cost import plan
from di_star_jax.cost.chips import CHIPS, Chip, chip_of
from di_star_jax.errors import UserError
from di_star_jax.errors import run as run_command
from di_star_jax.rewards import rewards_used
from di_star_jax.sharding import mesh_shape

WARM_UP = 3


def materialise(args, seed: int = 0):
    """Random arrays in place of abstract ones, where their shardings say: kernels as an initialiser
    has them, norms one, moments and integers zero, everything else normal.
    """

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if "opt_" in name or "bias" in name or not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        if "'scale'" in name:
            return jnp.ones(x.shape, x.dtype)
        key = jax.random.fold_in(jax.random.key(seed), hash_of(name))
        fan_in = (
            float(np.prod(x.shape[-4 if len(x.shape) > 3 else -2 : -1]))
            if "kernel" in name
            else 1.0
        )
        return (jax.random.normal(key, x.shape) * fan_in**-0.5).astype(x.dtype)

    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(leaf, args),
        out_shardings=jax.tree.map(lambda x: x.sharding, args),
    )
    return make()


def hash_of(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode()[-8:], "little") % 2**31


def times_of(call, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after WARM_UP that are not counted.

    Args: call, which blocks until it is done.
    """
    for _ in range(WARM_UP):
        call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def summary(seconds: list[float], samples: int, devices: int) -> dict[str, float]:
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


def environment(mesh) -> dict:
    """What a number is worth nothing without."""
    from importlib import metadata

    import jaxlib

    device = mesh.devices.flat[0]
    versions = {
        name: metadata.version(name)
        for name in ("flax", "optax", "libtpu", "torch")
        if _installed(name)
    }
    return {
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        **versions,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def _installed(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _preset(chip: str | None) -> dict:
    """The flags that others use on this kind of device, and whether they are set here."""
    platform = "h100" if chip in ("H100", "H200") else chip
    preset = xla_flags.PRESETS.get(platform, ())
    given = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    return {
        "platform": platform,
        "preset": preset,
        "preset_set": all(flag in given for flag in preset),
    }


def roofline(flop: float, traffic: dict, chip: Chip) -> dict[str, float]:
    """Least seconds a call. Args: flop of one device's model; traffic of `flops.collectives`."""
    received = sum(size for (_, what), size in traffic.items() if what == "bytes")
    return {"compute_s": flop / chip.flops, "network_s": received / chip.network}


def report(result: dict) -> str:
    """The result as lines to read."""
    env = result["environment"]
    mesh = " x ".join(f"{name}={size}" for name, size in env["mesh"].items())
    lines = [
        f"{result['what']} of {result['config']}: {result['resolution']} pixels, {result['dtype']}, batch "
        f"{result['batch_size']} over {env['devices']} {env['device']} (mesh {mesh})",
        f"attention {result['attention']}, jax {env['jax']}"
        + (f", compiled with effort {result['effort']:g}" if result["effort"] else "")
        + (f", XLA_FLAGS {env['XLA_FLAGS']}" if env["XLA_FLAGS"] else "")
        + (f", LIBTPU_INIT_ARGS {env['LIBTPU_INIT_ARGS']}" if env["LIBTPU_INIT_ARGS"] else ""),
    ]
    rows = [
        (
            "compilation",
            ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
            + f"; {result['host_gb']:.1f} GB of host memory",
        )
    ]
    rows += [("model FLOP a sample", f"{result['model_flop'] / 1e12:.4g} TF")]
    memory = {name: size / 1e9 for name, size in result["memory"].items()}
    if memory:
        have = f" of {result['chip_gb']:.1f} GB" if result["chip_gb"] else ""
        rows += [
            (
                "memory a device",
                f"{memory['arguments']:.2f} GB arguments, {memory['temporaries']:.2f} GB temporaries, "
                f"{memory['aliased']:.2f} GB aliased, {memory['peak']:.2f} GB at the peak{have}",
            )
        ]
    rows += [
        (f"{kind} a step", f"{c['count']:,}, {c['bytes'] / 1e9:.2f} GB received by a device")
        for kind, c in result["collectives"].items()
    ]
    if result["preset"]:
        state = (
            "set"
            if result["preset_set"]
            else f"not set; python -m di_star_jax.xla_flags {result['platform']} prints it"
        )
        rows += [
            ("XLA flag preset", f"{len(result['preset'])} flags for {result['platform']}, {state}")
        ]
    if "roofline" in result:
        r = result["roofline"]
        rows += [
            (
                "roofline",
                f"{r['compute_s']:.3f} s of compute, {r['network_s']:.3f} s of network, at least "
                f"{max(r.values()):.3f} s a step",
            )
        ]
    for name in ("ours", "torch"):
        if name in result:
            t = result[name]
            rows += [
                (
                    f"time, {name}",
                    f"{t['median_s']:.4g} s (p10 {t['p10_s']:.4g}, p90 {t['p90_s']:.4g}, {t['calls']} "
                    f"calls), {t['s_per_sample']:.4g} s a sample, {t['samples_per_s_per_device']:.4g} samples/s a device",
                )
            ]
    if "mfu" in result:
        rows += [("model-FLOP utilisation", f"{100 * result['mfu']:.1f} %")]
    if "peak_bytes_in_use" in result:
        rows += [("peak memory in use", f"{result['peak_bytes_in_use'] / 1e9:.2f} GB")]
    if "ratio" in result:
        rows += [("ours / torch", f"{result['ratio']:.3f}")]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def run(
    config,
    what: str,
    *,
    name: str,
    topology: str,
    versus: str,
    repeats: int,
    effort: float | None = None,
    per_device: int | None = None,
) -> dict:
    """One benchmark; see `report` for what it holds.

    Args: effort, of XLA; None is -1 for a topology, else 0. per_device: images, in place of
    data.batch_size; None is 1 for a topology, for the config's batch is meant for a larger one.
    Raises: UserError for what cannot run.
    """
    effort = effort if effort is not None else -1.0 if topology else 0.0
    devices = aot.topology_devices(topology) if topology else jax.devices()
    config.dry_run = True
    m = config.mesh
    if per_device or topology:
        config.data.batch_size = (per_device or 1) * math.prod(
            mesh_shape(m.data, m.fsdp, m.context, len(devices))[:2]
        )
    check(config, len(devices))
    if what == "train":
        plan.check_memory(plan.make(config, len(devices), devices[0].device_kind))
    mesh = sharding.make_mesh(m.data, m.fsdp, m.context, devices=devices)
    device = devices[0]
    chip = CHIPS.get(chip_of(device.device_kind))
    work = aot.WORK[what](config, mesh)
    model_flop = aot.model_flop(what, config, jax.devices()[0])
    theirs = _torch_times(config, what, repeats) if versus else None
    compiled = aot.compile_work(work, config, effort=effort)
    kinds = sorted({kind for kind, _ in compiled.traffic})
    result = {
        "what": what,
        "config": name,
        "resolution": config.data.resolution,
        "dtype": config.compute.dtype,
        "batch_size": config.data.batch_size,
        "attention": assembly.kernel_of(config, device.platform),
        "settings": config.compute.to_dict() | {"decode": config.decode.to_dict()},
        "environment": environment(mesh),
        "seconds": compiled.seconds,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "memory": compiled.memory,
        "chip_gb": chip.memory / 1e9 if chip else None,
        "collectives": {
            kind: {part: compiled.traffic[kind, part] for part in ("count", "bytes")}
            for kind in kinds
        },
        "effort": effort,
        "model_flop": model_flop,
        **_preset(chip_of(device.device_kind)),
    }
    per_device = model_flop * config.data.batch_size / len(devices)
    if chip:
        result["roofline"] = roofline(per_device, compiled.traffic, chip)
    if topology:
        return result
    args = materialise(work.args)

    def call():
        nonlocal args
        out = jax.block_until_ready(compiled.run(*args))
        if work.donates:
            args = (out[0], *args[1:])

    seconds = times_of(call, repeats)
    result |= {"ours": summary(seconds, config.data.batch_size, len(devices)), "samples": seconds}
    if chip:
        result["mfu"] = per_device / result["ours"]["median_s"] / chip.flops
    if device.memory_stats():
        result["peak_bytes_in_use"] = device.memory_stats()["peak_bytes_in_use"]
    if theirs:
        result |= {"torch": summary(theirs, config.data.batch_size, 1), "torch_samples": theirs}
        result["ratio"] = result["ours"]["median_s"] / result["torch"]["median_s"]
    return result


def _torch_times(config, what: str, repeats: int) -> list[float]:
    """Seconds a call of the same work in PyTorch, on one device."""
    try:
        import torch

        from di_star_jax.cost import peer
    except ImportError as error:
        raise UserError(f"--vs=torch: {error}; pip install -e '.[test]'") from None
    if config.decode.view != "full":
        raise UserError(
            f"--vs=torch with decode.view={config.decode.view!r}, expected 'full', which is what it decodes"
        )
    if jax.device_count() > 1:
        raise UserError(
            f"--vs=torch with {jax.device_count()} devices, expected one; set CUDA_VISIBLE_DEVICES=0"
        )
    cuda = torch.cuda.is_available() and jax.devices()[0].platform == "gpu"
    if rewards_used(config) != ["pickscore"]:
        raise UserError(
            f"--vs=torch with rewards {', '.join(rewards_used(config)) or 'off'}, expected pickscore alone, which "
            "is what it has; set the others to 0 and eval.metrics to pickscore"
        )
    configs, _ = plan.model_configs(config)
    configs["reward"] = configs.pop("pickscore")
    latent = config.data.resolution // 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    settings = assembly.settings_of(config, (latent, latent, configs["unet"].get("in_channels", 4)))
    call = peer.make(
        what,
        configs,
        settings,
        batch=config.data.batch_size,
        resolution=config.data.resolution,
        dtype=config.compute.dtype,
        device="cuda" if cuda else "cpu",
        compile=cuda,
        reward_scale=config.reward.pickscore,
    )
    seconds = times_of(call, repeats)
    del call
    gc.collect()  # compiled modules are reference cycles
    if cuda:
        torch.cuda.empty_cache()
    return seconds


def main() -> None:
    args = flags.FLAGS
    if args.config is None:
        raise UserError("no --config; give e.g. --config=configs/sdxl.py")
    if args.topology and args.vs:
        raise UserError("--topology with --vs: nothing runs on a topology; give one of the two")
    result = run(
        args.config,
        args.what,
        name=Path(args["config"].config_filename).name,
        topology=args.topology or "",
        versus=args.vs or "",
        repeats=args.repeats,
        effort=args.effort,
        per_device=args.per_device,
    )
    print(report(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py or configs/NAME.py:PRESET.")
    flags.DEFINE_enum("what", "train", sorted(aot.WORK), "The whole step, or a part of it.")
    flags.DEFINE_string(
        "topology",
        None,
        "Compile for a TPU slice and run nothing: v5e:4x4, v6e:2x4, v5p:2x2x1, ...",
    )
    flags.DEFINE_float(
        "effort",
        None,
        "Of XLA's compiler; -1 for a topology and 0 else, if not given.",
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer(
        "per_device",
        None,
        "Images on each device, in place of data.batch_size; 1 for a topology, if not given.",
        lower_bound=1,
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Measures the same work in PyTorch too.")
    flags.DEFINE_integer("repeats", 20, "Calls that are timed.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the result, with every sample and setting.")
    run_command(main, parse_flags)
