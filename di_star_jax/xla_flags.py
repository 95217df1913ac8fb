# SPDX-License-Identifier: Apache-2.0
"""XLA flags per platform, as others publish them:

`LIBTPU_INIT_ARGS="$(python -m di_star_jax.xla_flags v5e)"`.

TPU flags belong in LIBTPU_INIT_ARGS, those of GPUs in XLA_FLAGS. A process whose XLA does not know
a flag dies at start-up: libtpu 0.0.41 and jaxlib 0.10.1 compile with all of these; try again with
each release, for flags come and go. What they bring on this network is not measured; those of
reduce-scatters find none in it (sharding.gather_param). This module does not import jax.
"""

import sys

from di_star_jax.errors import MISTAKE, UserError

# MaxText's CF_FOR_ALL_GATHER (the next layer's parameters are gathered while this one computes),
# but for its fusions, and DATA_PARALLEL_OVERLAP (sums of gradients over the data axis are pipelined
# over iterations).
_OVERLAP = (
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# The fusions of CF_FOR_ALL_GATHER. None of all-reduces: with the overlap they gave NaN on v6e (jax
# #38741).
_FUSE_ALL_GATHER = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)

PRESETS: dict[str, tuple[str, ...]] = {
    # MaxText, MaxText/configs/2xv4-128.sh.
    "v4": ("--xla_enable_async_all_gather=true",),
    # MaxText, maxtext_v5e_model_configs.py: the dense models.
    "v5e": _OVERLAP + _FUSE_ALL_GATHER,
    # tpu-recipes, training/v5p/SDXL-MaxDiffusion: for this very UNet, in training. Less its
    # async_collective_fusion flags: newer recipes beside it dropped theirs, for libtpu refuses them
    # on a real v5p at start-up.
    "v5p": _OVERLAP
    + (
        "--xla_enable_async_reduce_scatter_fusion=true",
        "--xla_enable_async_collective_permute=true",
        "--xla_tpu_enable_ag_backward_pipelining=true",
        # The recipe turns off fusion across the two cores of a chip, and of gathers into it.
        "--xla_tpu_enable_megacore_fusion=false",
        "--xla_tpu_megacore_fusion_allow_ags=false",
        "--xla_tpu_spmd_threshold_for_allgather_cse=1000000",
        # never cut a matmul into a ring of small ones
        "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
    ),
    # MaxText, dense models (Llama 3.1 8B), less its SparseCore and host offload: the former
    # excludes the fusions.
    "v6e": _OVERLAP
    + _FUSE_ALL_GATHER
    + (
        # DENSE_VMEM_LIMIT: larger tiles of matmuls and flash attention
        "--xla_tpu_scoped_vmem_limit_kib=98304",
        # LAYOUT_FOR_ALL_REDUCE_SCATTER: gradients in the layout in which they are scattered,
        # without a copy.
        "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
        "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
        "--xla_tpu_assign_all_reduce_scatter_layout=true",
    ),
    # tpu-recipes, training/ironwood: what its dense models (gemma4-2b, llama3.1-70b) share.
    # Collectives are the SparseCores' work, beside that of the TensorCores.
    "tpu7x": (
        "--xla_tpu_scoped_vmem_limit_kib=65536",
        "--xla_tpu_bf16_emission_mode=NATIVE_EMISSION",
        "--xla_enable_async_all_gather=true",
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false",
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
        "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true",
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
        "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
        "--xla_tpu_use_tc_device_shape_on_sc=true",
        "--xla_sc_disable_megacore_partitioning=true",
    ),
    # MaxText's a3 (H100) scripts; the H200 is the same chip with more memory.
    "h100": (
        # collectives run while matmuls do, and go first
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_highest_priority_async_stream=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
        # a scan's gathers hide behind the iteration before
        "--xla_gpu_enable_while_loop_double_buffering=true",
        # small collectives are joined up to so many bytes
        "--xla_gpu_all_reduce_combine_threshold_bytes=1073741824",
        "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
        "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
        "--xla_gpu_enable_triton_gemm=false",  # cuBLAS for every matmul
    ),
}


def variable(platform: str) -> str:
    """The value of LIBTPU_INIT_ARGS (TPUs) or XLA_FLAGS (GPUs), one line.

    Raises: UserError for an unknown platform.
    """
    if platform not in PRESETS:
        raise UserError(f"got platform {platform!r}, expected {', '.join(PRESETS)}")
    return " ".join(PRESETS[platform])


if __name__ == "__main__":
    try:
        print(variable(" ".join(sys.argv[1:])))
    except UserError as error:  # exit_on_user_error would need absl; a bare Python is enough here
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
