# SPDX-License-Identifier: Apache-2.0
"""What compiled programs cost by operation, on programs whose cost is known in closed form."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from di_star_jax import sharding, step
from di_star_jax.cost import compile as aot
from di_star_jax.cost import gpus, hlo, op_tables, ops, origin, products
from di_star_jax.cost.chips import Chip
from di_star_jax.models import attention, layers

GPU = Path(__file__).parent / "programs" / "gpu.txt"  # compiled for an H100, see `of_gpu`
no_cuda = not any(importlib.util.find_spec(plugin) for plugin in gpus.PLUGINS)
no_tpu = importlib.util.find_spec("libtpu") is None


def text_of(fn, *shapes, dtype=jnp.float32, topology=""):
    """A function's compiled program. Args: shapes, of its arguments."""
    place, platform = None, "cpu"
    if topology:
        device = aot.topology_devices(topology)[0]
        place = jax.sharding.SingleDeviceSharding(device)
        platform = "cuda" if device.platform == "gpu" else device.platform
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).compile().as_text()


def counted(text):
    found, endless = ops.of_program(hlo.parse(text))
    assert endless == 0
    return found


def total(found, field):
    return sum(op.times * getattr(op, field) for op in found)


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scanned(x, kernels):
    """A product with each of the kernels."""
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


PRODUCTS = {
    "a product": (jnp.matmul, [(64, 32), (32, 48)], 2 * 64 * 32 * 48),
    "a product in a fusion": (
        lambda x, w, b: jax.nn.gelu(x @ w + b),
        [(64, 32), (32, 48), (48,)],
        2 * 64 * 32 * 48,
    ),
    "a batch of products": (jnp.matmul, [(5, 64, 32), (5, 32, 48)], 5 * 2 * 64 * 32 * 48),
    "a convolution": (conv, [(2, 16, 16, 8), (3, 3, 8, 12)], 2 * 2 * 16 * 16 * 9 * 8 * 12),
    "a convolution with strides": (
        lambda x, kernel: conv(x, kernel, 2),
        [(2, 16, 16, 8), (3, 3, 8, 12)],
        2 * 2 * 8 * 8 * 9 * 8 * 12,
    ),
    # Each place of the result meets a quarter of the taps, or the image is full of holes.
    "a convolution's gradient to its image": (
        lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel, 2), x)[1](g)[0],
        [(2, 16, 16, 8), (3, 3, 8, 12), (2, 8, 8, 12)],
        2 * 2 * 8 * 8 * 9 * 8 * 12,
    ),
    "a convolution's gradient to its kernel": (
        lambda x, kernel, g: jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](g)[0],
        [(2, 16, 16, 8), (3, 3, 8, 12), (2, 16, 16, 12)],
        2 * 2 * 16 * 16 * 9 * 8 * 12,
    ),
    "a scan": (scanned, [(64, 32), (7, 32, 32)], 7 * 2 * 64 * 32 * 32),
    "a scan in a loop": (
        lambda x, kernels: jax.lax.fori_loop(0, 3, lambda _, x: scanned(x, kernels), x),
        [(64, 32), (7, 32, 32)],
        3 * 7 * 2 * 64 * 32 * 32,
    ),
    "the costlier branch": (
        lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w @ w, lambda: x @ w),
        [(64, 32), (32, 32)],
        3 * 2 * 64 * 32 * 32,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flop_are_those_of_the_closed_form(name):
    fn, shapes, expected = PRODUCTS[name]
    assert total(counted(text_of(fn, *shapes)), "flop") == expected


def test_a_product_reads_its_operands_and_writes_its_result_once():
    text = text_of(jnp.matmul, (64, 32), (32, 48))
    assert total(counted(text), "bytes") == 4 * (64 * 32 + 32 * 48 + 64 * 48)


def test_an_elementwise_chain_goes_through_memory_once():
    text = text_of(lambda x, y: jnp.tanh(x * 2 + y) * jnp.exp(-x), (256, 512), (256, 512))
    assert total(counted(text), "bytes") == 4 * 3 * 256 * 512


def test_a_reduction_reads_all_and_writes_little():
    text = text_of(lambda x: jnp.sum(x, axis=1), (256, 512))
    assert total(counted(text), "bytes") == pytest.approx(4 * 256 * 512, rel=0.02)


def row_by_row(count, width):
    """Writes each row of [count, width] in a loop of its own length."""

    def body(i, out):
        return jax.lax.dynamic_update_index_in_dim(out, jnp.full(width, i, out.dtype), i, 0)

    return text_of(lambda x: jax.lax.fori_loop(0, count, body, x), (count, width))


def test_an_update_in_place_writes_its_slice_alone():
    rows = 4 * 64 * 1024
    # The slice, made and written, and a copy of the argument, which is not donated.
    assert rows <= total(counted(row_by_row(64, 1024)), "bytes") <= 5 * rows


def test_a_loop_reads_of_a_stack_one_slice_at_a_time():
    kernels = 4 * 32 * 32
    each = 4 * 64 * 32  # tokens in and out, around the product and in tanh
    for count in (8, 64):
        bytes_ = total(counted(text_of(scanned, (64, 32), (count, 32, 32))), "bytes")
        assert count * kernels <= bytes_ <= count * (3 * kernels + 5 * each) + 4 * each


def test_a_loop_that_ends_by_its_data_counts_as_one_turn_and_is_said():
    text = text_of(
        lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 1.0, lambda x: x @ w, x),
        (64, 32),
        (32, 32),
    )
    found = op_tables.of_text(text, None)
    assert (found["endless_loops"], found["flop"]) == (1, 2 * 64 * 32 * 32)
    ((_, said),) = op_tables.rows(found, None)
    assert "1 loops of unknown length are counted as one turn" in said


def test_a_line_knows_its_source_and_its_module():
    def fn(x, w):
        return layers.standardised(x, 1e-5) @ w

    found = counted(text_of(fn, (64, 32), (32, 48)))
    norms = [op for op in found if op.module == "norms"]
    assert norms and all(re.match(r"models/layers.py:\d+ standardised$", op.place) for op in norms)
    product = max(found, key=lambda op: op.flop)
    assert re.fullmatch(r"test_ops.py:\d+ fn", product.place) and product.module == "others"


def stack_of(*places):
    return [hlo.Frame(f"/home/me/di_star_jax/{file}", function, 7) for file, function in places]


@pytest.mark.parametrize(
    "places, expected",
    [
        ([("models/layers.py", "Linear.__call__")], "others"),
        ([("models/layers.py", "Attention.__call__"), ("models/unet.py", "f")], "attention"),
        ([("models/layers.py", "Attention.__call__"), ("models/vae.py", "f")], "VAE"),
        ([("models/layers.py", "Conv.__call__"), ("models/tiny_vae.py", "f")], "VAE"),
        ([("models/clip.py", "CLIPMLP.__call__"), ("step.py", "f")], "text encoders"),
        ([("models/clip.py", "CLIPMLP.__call__"), ("rewards/similarity.py", "f")], "reward"),
        ([("models/layers.py", "ResnetBlock2D.f"), ("rewards/views.py", "_map_slices")], "VAE"),
        ([("models/layers.py", "LayerNorm.f"), ("rewards/views.py", "_map_slices")], "reward"),
        ([("models/layers.py", "GroupNorm.f"), ("models/layers.py", "ResnetBlock2D.f")], "norms"),
        ([("models/layers.py", "scan_blocks"), ("models/layers.py", "Attention.f")], "weights"),
        ([("models/layers.py", "Attention.f"), ("models/layers.py", "scan_blocks")], "attention"),
        ([("step.py", "update_generator")], "optimizer"),
        ([("step.py", "train_step")], "others"),
    ],
)
def test_modules_follow_from_who_called(places, expected):
    assert origin.module(stack_of(*places)) == expected


def test_an_operation_without_a_line_has_xlas_name():
    assert origin.place("jit(f)/mul", []) == "jit(f)/mul"
    assert origin.place("", []) == origin.NO_NAME


# Of a compile for an H100, without Triton's products:
#   jax.grad of jnp.sum(conv(x, kernel, stride=2)) ** 2 for x [2, 16, 16, 32], kernel [3, 3, 32, 64]
#   jax.grad of cuDNN attention for q [2, 128, 4, 64], k and v [2, 256, 4, 64]
#   a [256, 128] @ b [128, 256], and both as [4, 64, 128] @ [4, 128, 64]; all in bfloat16.
LIBRARIES = {
    "cudnn-conv.2": ("convolution", 2 * 2 * 8 * 8 * 9 * 32 * 64),
    "cudnn-conv-bw-filter.2": ("convolution", 2 * 2 * 8 * 8 * 9 * 32 * 64),
    "cudnn-conv-bw-input.2": ("convolution", 2 * 2 * 8 * 8 * 9 * 32 * 64),
    "dot_product_attention_fwd.5": ("attention", 2 * 2 * 2 * 4 * 128 * 256 * 64),
    "dot_product_attention_bwd.8": ("attention", 5 * 2 * 2 * 4 * 128 * 256 * 64),
    "custom-call.8": ("matmul", 2 * 256 * 128 * 256),
    "custom-call.9": ("matmul", 4 * 2 * 64 * 128 * 64),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_flop_of_gpu_libraries_follow_from_their_shapes(name):
    program = hlo.parse(GPU.read_text())
    instructions = program.computations[program.entry].instructions
    one = instructions[name]
    found = products.of(one, [instructions[operand].result[0] for operand in one.operands])
    assert (found.kind, found.flop) == LIBRARIES[name]
    assert found.padded == found.flop  # all its axes are multiples of 16


def test_a_librarys_workspace_is_no_traffic():
    found = counted(GPU.read_text())
    assert total(found, "flop") == sum(flop for _, flop in LIBRARIES.values())
    matmuls = [op for op in found if op.kind == "matmul"]
    assert sorted(op.bytes for op in matmuls) == [
        2 * (4 * 2 * 64 * 128 + 4 * 64 * 64),
        2 * (2 * 256 * 128 + 256 * 256),
    ]


HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"


def entry(*lines):
    """A program of so many lines, the last of which is its result."""
    body = [*(f"  %{line}" for line in lines[:-1]), f"  ROOT %{lines[-1]}"]
    return HEADER + "ENTRY %main (a: f32[8]) -> f32[8] {\n" + "\n".join(body) + "\n}\n"


def fused(*lines):
    """A program of one fusion of so many lines; the entry gives it a stack, a row and a place."""
    body = [*(f"  %{line}" for line in lines[:-1]), f"  ROOT %{lines[-1]}"]
    inside = "%f (s: f32[64,1024], r: f32[1,1024], i: s32[]) -> f32[8] {\n" + "\n".join(body)
    result = lines[-1].split(" = ")[1].split(" ")[0]
    call = f"x = {result} fusion(%stack, %row, %place), kind=kLoop, calls=%f"
    arguments = (
        "stack = f32[64,1024]{1,0} parameter(0)",
        "row = f32[1,1024]{1,0} parameter(1)",
        "place = s32[] parameter(2)",
    )
    text = entry(*arguments, call)
    return text.replace("ENTRY", f"{inside}\n}}\n\nENTRY")


ARGUMENTS = (
    "s = f32[64,1024]{1,0} parameter(0)",
    "r = f32[1,1024]{1,0} parameter(1)",
    "i = s32[] parameter(2)",
    "zero = s32[] constant(0)",
)
ROW = 4 * 1024


@pytest.mark.parametrize(
    "lines, expected",
    [
        # The update is read, its place is written.
        (["x = f32[64,1024]{1,0} dynamic-update-slice(%s, %r, %i, %zero)"], 2 * ROW + 4),
        # What an update is made of comes from the stack: all of it is read, a row is written.
        (
            [
                "m = f32[1024]{0} reduce(%s, %zero), dimensions={0}, to_apply=%add",
                "u = f32[1,1024]{1,0} bitcast(%m)",
                "x = f32[64,1024]{1,0} dynamic-update-slice(%s, %u, %i, %zero)",
            ],
            64 * ROW + ROW + 4,
        ),
        # No place to be written: all of it is another array.
        (
            [
                "n = f32[64,1024]{1,0} negate(%s)",
                "x = f32[64,1024]{1,0} dynamic-update-slice(%n, %r, %i, %zero)",
            ],
            64 * ROW + ROW + 4 + 64 * ROW,
        ),
        # Of what is cut out of, or of what is computed for that alone, a row.
        (
            [
                "n = f32[64,1024]{1,0} negate(%s)",
                "c = f32[1,1024]{1,0} dynamic-slice(%n, %i, %zero), dynamic_slice_sizes={1,1024}",
                "x = f32[1,1024]{1,0} add(%c, %r)",
            ],
            3 * ROW + 4,
        ),
        # Two rows of one stack.
        (
            [
                "a = f32[1,1024]{1,0} slice(%s), slice={[0:1], [0:1024]}",
                "b = f32[1,1024]{1,0} slice(%s), slice={[1:2], [0:1024]}",
                "x = f32[1,1024]{1,0} add(%a, %b)",
            ],
            3 * ROW,
        ),
    ],
)
def test_what_is_fused_reads_and_writes_what_it_must(lines, expected):
    (op,) = counted(fused(*ARGUMENTS, *lines))
    assert op.bytes == expected


def test_slices_that_stand_alone_cost_what_they_cut_out():
    read, written = counted(
        entry(
            *ARGUMENTS,
            "c = f32[1,1024]{1,0} dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,1024}",
            "x = f32[64,1024]{1,0} dynamic-update-slice(%s, %c, %i, %zero)",
        )
    )
    assert (read.bytes, written.bytes) == (2 * ROW + 8, 2 * ROW)


@pytest.mark.parametrize(
    "groups, members",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[2,4]T(1,0)", 4),
        ("mesh['a'=4,'b'=2] {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("{}", 8),
    ],
)
@pytest.mark.parametrize(
    "opcode, result, expected",
    [
        ("all-reduce", "f32[1024]", lambda n: 2 * (n - 1) / n * 4096),
        ("all-gather", "f32[{more}]", lambda n: (n - 1) * 4096),
        ("reduce-scatter", "f32[{fewer}]", lambda n: (n - 1) / n * 4096),
    ],
)
def test_collectives_receive_what_the_others_hold(groups, members, opcode, result, expected):
    result = result.format(more=1024 * members, fewer=1024 // members)
    text = entry(
        "a = f32[1024]{0} parameter(0)",
        f"x = {result}{{0}} {opcode}(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}",
    )
    (op,) = counted(text)
    assert op.received == pytest.approx(expected(members))
    assert op.module == origin.COLLECTIVES


def test_a_collective_that_has_started_is_counted_once():
    text = entry(
        "a = f32[256]{0} parameter(0)",
        "s = (f32[256]{0}, f32[1024]{0}) all-gather-start(%a), replica_groups=[2,4]<=[8]",
        "x = f32[1024]{0} all-gather-done(%s)",
    )
    (op,) = counted(text)
    assert (op.kind, op.received, op.bytes) == ("all-gather", 3 * 1024, 1024 + 4096)


# A gather of 4 KB by four devices that a TPU begins, goes on with beside two products, and ends.
GATHER = "g = f32[1024]{0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8]"
STARTED = "(f32[256]{0}, f32[1024]{0})"
HANDED_ON = "(f32[64,64]{1,0}, f32[256]{0}, f32[1024]{0})"
BESIDE = f"""
%start (a: f32[256]) -> (f32[256], f32[1024]) {{
  %a = f32[256]{{0}} parameter(0)
  %{GATHER}
  ROOT %r = {STARTED} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%between (a: f32[256], h: f32[1024], x: f32[64,64]) -> (f32[64,64], f32[256], f32[1024]) {{
  %x = f32[64,64]{{1,0}} parameter(2)
  %d = f32[64,64]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %a = f32[256]{{0}} parameter(0)
  %h = f32[1024]{{0}} parameter(1)
  %{GATHER}
  ROOT %r = {HANDED_ON} tuple(%d, %a, %g)
}}

%done (a: f32[256], h: f32[1024]) -> f32[1024] {{
  %a = f32[256]{{0}} parameter(0)
  %h = f32[1024]{{0}} parameter(1)
  %{GATHER}
  ROOT %r = f32[1024]{{0}} custom-call(%a, %h, %g), custom_call_target="AsyncCollectiveDone"
}}
"""


@pytest.mark.parametrize("products", [0, 2])
def test_what_a_tpu_receives_beside_products_counts_once_and_with_these(products):
    lines = [
        "a0 = f32[256]{0} parameter(0)",
        "x = f32[64,64]{1,0} parameter(1)",
        f"s = {STARTED} fusion(%a0), kind=kCustom, calls=%start",
        "a = f32[256]{0} get-tuple-element(%s), index=0",
        "h = f32[1024]{0} get-tuple-element(%s), index=1",
    ]
    for i in range(products):
        lines.append(f"b{i} = {HANDED_ON} fusion(%a, %h, %x), kind=kOutput, calls=%between")
    lines.append("y = f32[1024]{0} fusion(%a, %h), kind=kCustom, calls=%done")
    text = entry(*lines).replace(HEADER, HEADER + BESIDE)
    start, *between, done = counted(text)
    assert total([start, *between, done], "received") == 3 * 1024
    assert {start.kind, done.kind} == {"all-gather"}
    assert len(between) == products
    for op in between:
        assert (op.kind, op.flop, op.received) == ("matmul", 2 * 64**3, 3 * 1024 / 2)
        assert op.bytes == 2 * 4 * 64 * 64  # what is received is written by those that end it
        assert op.module != origin.COLLECTIVES


def test_what_all_have_for_all_goes_over_the_links_between_them():
    text = entry(
        "a = bf16[16,512]{1,0} parameter(0)",
        "x = bf16[16,512]{1,0} all-to-all(%a), replica_groups=[1,16]<=[16], dimensions={0}",
    )
    (op,) = counted(text)
    assert (op.kind, op.received) == ("all-to-all", 15 * 1024)
    # From a place on a ring of four to another it is a link on average, its own included.
    square, switch = Chip(1.0, 1.0, 1.0, 10.0, 2), Chip(1.0, 1.0, 1.0, 10.0)
    assert op.seconds(square)["network"] == pytest.approx(2 * 15 * 1024 / 10)
    assert op.seconds(switch)["network"] == pytest.approx(15 * 1024 / 10)


def test_memory_on_the_chip_is_no_traffic_and_tiles_are():
    text = entry(
        "a = bf16[10,100]{1,0:T(8,128)(2,1)} parameter(0)",
        "b = bf16[10,100]{1,0:T(8,128)(2,1)S(1)} copy(%a)",
        "x = bf16[10,100]{0,1:T(8,128)(2,1)} negate(%b)",
    )
    copy, negate = counted(text)
    assert copy.bytes == 2 * 16 * 128
    assert negate.bytes == 2 * 128 * 104


def test_a_kernels_attributes_may_have_line_breaks():
    shape = "bf16[2,4,1024,64]{3,2,1,0:T(8,128)(2,1)}"
    text = entry(
        f"q = {shape} parameter(0)",
        f"k = {shape} parameter(1)",
        f'x = {shape} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, '
        'metadata={op_name="jit(f)/vmap(jit(_splash_attention))/splash_mha_fwd/pallas_call"}',
    )
    (op,) = counted(text)
    flop = 2 * 2 * 2 * 4 * 1024 * 1024 * 64
    assert (op.kind, op.flop, op.padded) == ("attention", flop, 2 * flop)


@pytest.mark.parametrize(
    "kernel, result, window, labels, flop",
    [
        # As XLA writes for TPUs a product with the kernels of 20 heads, and a batch of products.
        ("20,64,128", "32,20,64", "size=20 pad=19_19 rhs_reversal=1", "bf0_0oi->b0f", 20 * 64),
        ("4,16,128", "4,32,16", "size=4 stride=3 lhs_dilate=4", "0bf_0oi->0bf", 4 * 16),
    ],
)
def test_products_that_are_written_as_convolutions(kernel, result, window, labels, flop):
    image = "4,32,128" if "lhs_dilate" in window else "32,128,1"
    (op,) = counted(
        entry(
            f"a = f32[{image}] parameter(0)",
            f"b = f32[{kernel}] parameter(1)",
            f"x = f32[{result}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}",
        )
    )
    assert op.flop == 2 * 32 * 128 * flop


LIMITS = Chip(flops=1e9, memory=0.0, bandwidth=1e6, network=1e3)


def test_the_sum_is_of_what_bounds_each_operation():
    text = entry(
        "a = f32[100,100]{1,0} parameter(0)",
        "b = f32[100,100]{1,0} negate(%a)",
        "c = f32[100,100]{1,0} all-reduce(%b), replica_groups={{0,1}}",
        "x = f32[100,100]{1,0} dot(%a, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    fast = LIMITS._replace(flops=1e6)
    found = op_tables.of_text(text, fast)
    padded = 2 * 104 * 104 * 112  # tiles of tensor cores
    by = {"compute": padded / 1e6, "bytes": 0.08, "network": 40.0}
    assert found["seconds_by"] == pytest.approx(by)
    assert found["seconds"] == pytest.approx(sum(by.values()))
    assert found["unnamed"] == 1.0
    assert [row["module"] for row in found["modules"]] == [origin.COLLECTIVES, "others"]
    said = dict(op_tables.rows(found, 2.0))
    assert said["operation by operation"] == (
        "42.5 s a step, one after the other, 21.25 times the roofline of compute"
    )
    assert said["bound"] == "2.42 s of it by compute, 0.08 s of it by bytes, 40 s of it by network"
    assert "100.0 %" in said["without a source line"]
    assert "gathers and sums" in "\n".join(op_tables.tables(found))


def test_without_the_limits_of_a_device_there_are_no_seconds():
    found = op_tables.of_text(text_of(jnp.matmul, (64, 32), (32, 48)), None)
    assert "seconds" not in found
    ((_, said),) = op_tables.rows(found, None)
    assert "no seconds: the bandwidth of this device's memory is not known" in said
    shown = "\n".join(op_tables.tables(found))
    assert "GB" in shown and " ms " not in shown


# Compiled for devices that are not here


@pytest.mark.skipif(no_tpu, reason="needs the TPU compiler, .[tpu]")
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRODUCTS if "convolution" not in name])
def test_flop_on_a_tpu_are_those_of_the_closed_form(name):
    fn, shapes, expected = PRODUCTS[name]
    found = counted(text_of(fn, *shapes, dtype=jnp.bfloat16, topology="v5e:2x2"))
    assert total(found, "flop") == expected
    assert total(found, "padded") > expected  # 32 and 48 of 128 lanes


@pytest.mark.skipif(no_tpu, reason="needs the TPU compiler, .[tpu]")
@pytest.mark.slow
def test_a_tpu_pads_to_lanes_and_goes_through_memory_once():
    text = text_of(jnp.matmul, (1024, 64), (64, 256), dtype=jnp.bfloat16, topology="v5e:2x2")
    found = counted(text)
    assert total(found, "padded") == 2 * total(found, "flop") == 2 * 2 * 1024 * 64 * 256
    chain = text_of(lambda x: jnp.tanh(x * 2 + 1), (4096, 4096), topology="v5e:2x2")
    assert total(counted(chain), "bytes") == 4 * 2 * 4096 * 4096
    sum_ = text_of(lambda x: jnp.sum(x * x, axis=1), (4096, 4096), topology="v5e:2x2")
    assert total(counted(sum_), "bytes") == pytest.approx(4 * 4096 * 4096, rel=0.01)


@pytest.mark.skipif(no_tpu, reason="needs the TPU compiler, .[tpu]")
@pytest.mark.slow
def test_splash_attention_on_a_tpu_is_counted():
    def loss(q, k, v):
        return jnp.sum(attention.splash(q, k, v).astype(jnp.float32) ** 2)

    shapes = [(2, 1024, 4, 64)] * 3
    text = text_of(jax.grad(loss, (0, 1, 2)), *shapes, dtype=jnp.bfloat16, topology="v5e:2x2")
    kernels = [op for op in counted(text) if op.kind == "attention"]
    one = 2 * 2 * 4 * 1024 * 1024 * 64
    assert sorted(op.flop / one for op in kernels) == [2, 3, 4]
    assert {op.module for op in kernels} == {"attention"}


@pytest.mark.skipif(no_tpu, reason="needs the TPU compiler, .[tpu]")
@pytest.mark.slow
def test_a_gather_over_a_slice_receives_what_the_others_hold():
    mesh = sharding.make_mesh(1, 4, devices=aot.topology_devices("v5e:2x2"))
    whole = sharding.on_each(
        mesh,
        lambda w: sharding.gather_param(w, (4096, 1024), jnp.bfloat16) * 2,
        (P(sharding.PARAMS),),
        P(),
    )
    places = jax.sharding.NamedSharding(mesh, P(sharding.PARAMS))
    arg = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=places)
    text = jax.jit(whole).trace(arg).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert total(counted(text), "received") == 3 / 4 * 2 * 4096 * 1024


@pytest.mark.skipif(no_cuda, reason="needs the CUDA compiler, .[cuda]")
@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_flop_on_a_gpu_are_those_of_the_closed_form(name):
    fn, shapes, expected = PRODUCTS[name]
    found = counted(text_of(fn, *shapes, dtype=jnp.bfloat16, topology="h100:1"))
    assert total(found, "flop") == expected


@pytest.mark.skipif(no_cuda, reason="needs the CUDA compiler, .[cuda]")
@pytest.mark.slow
def test_a_gpu_goes_through_memory_once():
    text = text_of(lambda x: jnp.tanh(x * 2 + 1), (1024, 1024), topology="h100:1")
    assert total(counted(text), "bytes") == 4 * 2 * 1024 * 1024
    loop = text_of(scanned, (64, 32), (512, 32, 32), topology="h100:1")
    # A slice is copied out and read again, tokens go in and out of the product and of a copy.
    assert total(counted(loop), "bytes") <= 512 * 4 * (3 * 32 * 32 + 5 * 64 * 32) + 2**20


@pytest.mark.skipif(no_cuda, reason="needs the CUDA compiler, .[cuda]")
@pytest.mark.slow
def test_a_gpu_updates_a_convolutions_kernel_in_the_layout_that_it_has():
    def updated(kernel, moment, x, dy):
        wide = kernel.astype(jnp.bfloat16)
        (grad,) = jax.vjp(lambda kernel: conv(x, kernel), wide)[1](dy)
        grad = step.row_major({"kernel": grad.astype(jnp.float32)})["kernel"]
        moment = 0.9 * moment + grad * grad
        return jax.lax.optimization_barrier((kernel - grad / jnp.sqrt(moment), moment))

    device = aot.topology_devices("h100:1")[0]
    place = jax.sharding.SingleDeviceSharding(device)
    kernel = jax.ShapeDtypeStruct((3, 3, 256, 256), jnp.float32, sharding=place)
    image = jax.ShapeDtypeStruct((4, 32, 32, 256), jnp.bfloat16, sharding=place)
    traced = jax.jit(updated, donate_argnums=(0, 1)).trace(kernel, kernel, image, image)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    # Kernel and moment are read and written; the gradient, of 2 bytes, is read, as is the new
    # moment. Turned to another layout and back it is 40.
    passes = [op for op in counted(text) if op.kind == "fusion"]
    assert total(passes, "bytes") / (9 * 256 * 256) < 25
