# SPDX-License-Identifier: Apache-2.0
"""GPUs by name, and XLA's CUDA compiler for GPUs that are not here.

The compiler asks no driver; it needs CUDA's plugin and libraries (`.[cuda]`), and a description of
the GPU. Without a device nothing is tuned by trying, so kernels are XLA's defaults.
"""

import importlib.util
import re
from typing import NamedTuple

import jax

from di_star_jax.cost.chips import CHIPS, chip_of
from di_star_jax.errors import UserError

EXAMPLES = "h100:1, h200:8 or rtx4090:1"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class Gpu(NamedTuple):
    """What the compiler wants to know of a GPU.

    kind: as its driver names it. capability: CUDA's, (major, minor). cores: multiprocessors.
    lanes: of float32 in each. threads: that a core holds. shared: bytes of shared memory a core,
    1024 of them the system's. cache: bytes of L2. clock: GHz. memory: bytes. Its bandwidth is in
    `chips.CHIPS`.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    cache: int
    clock: float
    memory: int


# NVIDIA's data sheets and CUDA's table of compute capabilities; memory as drivers show it.
_H100 = Gpu(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    cores=132,
    lanes=128,
    threads=2048,
    shared=233472,
    cache=50 * 2**20,
    clock=1.98,
    memory=84_942_979_072,
)
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        cores=108,
        lanes=64,
        threads=2048,
        shared=167936,
        cache=40 * 2**20,
        clock=1.41,
        memory=85_097_971_712,
    ),
    "h100": _H100,
    "h200": _H100._replace(kind="NVIDIA H200", memory=151_397_597_184),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        cores=128,
        lanes=128,
        threads=1536,
        shared=102400,
        cache=72 * 2**20,
        clock=2.52,
        memory=25_393_692_672,
    ),
}


class Gpus(NamedTuple):
    """name: a key of GPUS; count: of one host."""

    name: str
    count: int


def parse(name: str) -> Gpus | None:
    """Args: name, as "h100:8". Returns: None for what is none of GPUS. Raises: UserError."""
    gpu, _, count = name.partition(":")
    if gpu not in GPUS:
        return None
    if not re.fullmatch("[1-8]", count):
        raise UserError(
            f"topology={name!r}, expected how many of one host's GPUs, 1 to 8, e.g. {EXAMPLES}"
        )
    return Gpus(gpu, int(count))


def description(gpu: Gpu) -> str:
    """Text form of XLA's `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    bandwidth = CHIPS[chip_of(gpu.kind)].bandwidth
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{gpu.kind}"
"""


def devices(wanted: Gpus) -> list:
    """Of one host, for the compiler alone. Raises: UserError where CUDA's plugin is not there."""
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        raise UserError(
            "the CUDA compiler is not installed; pip install -e '.[cuda]' (4 GB; no GPU is needed)"
        )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=description(GPUS[wanted.name]),
        topology=f"1x1x{wanted.count}",
    )
    return found.devices
