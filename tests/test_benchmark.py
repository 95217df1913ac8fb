# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the known constants, the step compiled for a TPU slice, and what a measurement
holds.
"""

import dataclasses
import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from test_config import dry
from test_config import load as load_config
from test_step import CONFIGS, TEXT
from test_train import UNET

from di_star_jax import benchmark, sharding
from di_star_jax.cost import chips, flops, gpus, plan, slices
from di_star_jax.cost import compile as aot
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import folder as pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.json files of a tiny SDXL whose self-attention is long enough for a flash kernel; no
    weights.
    """
    out = tmp_path_factory.mktemp("configs")
    unet = {
        **UNET,
        "block_out_channels": [64],
        "projection_class_embeddings_input_dim": 64,
        "attention_head_dim": [1],
    }
    for name, config in {**CONFIGS, "unet": unet}.items():
        (out / name).mkdir()
        (out / name / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (out / "model_index.json").write_text(json.dumps(index))
    return out


def tiny(folder, **changes):
    config = load_config("sdxl")
    config.update_from_flattened_dict(
        {
            "weights.reference": str(folder),
            "weights.pickscore": str(folder / "reward"),
            "data.resolution": 64,
            "data.batch_size": 4,
            "mesh.fsdp": 4,
            "eval.prompts": "",
            **changes,
        }
    )
    return config


@pytest.mark.long
def test_flop_counts_are_the_known_constants():
    vae = pipeline.abstract_model(published.VAE_SDXL)
    decode = flops.count(
        lambda p, x: nnx.merge(vae.graphdef, p).decode(x),
        vae.params,
        jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32),
    )
    assert decode == pytest.approx(10.47e12, rel=1e-3)
    config = dry(**{"mesh.fsdp": 1, "data.batch_size": 1})
    assert aot.model_flop("train", config, jax.devices()[0]) == pytest.approx(102.9e12, rel=0.05)


def sd15_forward(unet, x):
    return unet(x((64, 64, 4)), x((), jnp.int32), Condition(x((77, 768))))


# PixArt's own two are in tests/test_pixart.py. T5's follows from its 4,630,511,616 weights in
# products and its attention, the others are PyTorch's own count.
@pytest.mark.parametrize(
    "config, call, expected",
    [
        pytest.param(published.UNET_SD15, sd15_forward, 0.803e12, marks=pytest.mark.long),
        (published.VAE_SD15, lambda vae, x: vae.decode(x((64, 64, 4))), 2.515e12),
        (published.T5_XXL, lambda t5, x: t5(x((120,), jnp.int32), x((120,), bool)), 1.117e12),
    ],
    ids=["SD 1.5", "VAE at 512", "T5-XXL"],
)
def test_flop_counts_of_the_second_papers_models_are_the_known_constants(config, call, expected):
    model = pipeline.abstract_model(config)

    def one(shape, dtype=jnp.float32):
        return jnp.ones((1, *shape), dtype)

    found = flops.count(lambda params: call(nnx.merge(model.graphdef, params), one), model.params)
    print(f"{found:.4e} FLOP, expected {expected:.3e}")
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.long
def test_model_flop_do_not_depend_on_how_memory_is_saved(folder):
    plain = aot.model_flop("train", tiny(folder), jax.devices()[0])
    saving = tiny(
        folder,
        **{"compute.loop_networks": False, "compute.remat_denoiser": "none", "data.batch_size": 8},
    )
    assert aot.model_flop("train", saving, jax.devices()[0]) == plain


@pytest.fixture
def shallow(tmp_path):
    """As folder, with a layer of each kind: a compiler does the same with it, in less time."""
    one = {**TEXT, "num_hidden_layers": 1}
    vision = {**CONFIGS["reward"]["vision_config"], "num_hidden_layers": 1}
    configs = {
        "unet": {**UNET, "block_out_channels": [64]},
        "vae": CONFIGS["vae"],
        "reward": {**CONFIGS["reward"], "text_config": one, "vision_config": vision},
        **{name: {**CONFIGS[name], **one} for name in ("text_encoder", "text_encoder_2")},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.slow
def test_the_step_compiles_for_a_tpu_slice_with_its_kernels_and_doubles_nothing(shallow):
    folder, config = shallow, tiny(shallow)
    request = benchmark.Request("train", "tiny", topology="v5e:2x2", ops=True)
    result = benchmark.run(config, request)
    assert result["attention"] == "splash" and result["environment"]["device"] == "TPU v5 lite"
    kinds = result["collectives"]
    assert kinds["all-gather"]["count"] > 0 and kinds["all-gather"]["bytes"] > 0
    memory = result["memory"]
    state = plan.parameters(
        pipeline.abstract_model(json.loads((folder / "unet" / "config.json").read_text())).params
    )
    # Two networks, their second moments and the average, a quarter of each large leaf on a chip;
    # buffers are padded.
    assert memory["aliased"] >= 5 * 4 * state / 4
    assert memory["peak"] < result["chip_gb"] * 1e9
    text = benchmark.report(result)
    assert "v5" in text and "GB arguments" in text and "roofline" in text
    assert "flags for v5e, not set; python -m di_star_jax.xla_flags v5e prints it" in text
    check_ops(result)


def check_ops(result):
    """Of a whole step, on devices whose limits are known."""
    found = json.loads(json.dumps(result))["ops"]
    assert found["endless_loops"] == 0 and found["unnamed"] < 0.05
    model = result["model_flop"] * result["batch_size"] / result["environment"]["devices"]
    assert found["padded_flop"] >= found["flop"] >= model
    assert found["seconds"] >= result["roofline"]["compute_s"]
    for name in ("seconds", "flop", "bytes", "received_bytes", "runs"):
        assert sum(row[name] for row in found["modules"]) == pytest.approx(found[name])
    modules = {row["module"] for row in found["modules"]}
    assert modules >= {"resnets", "attention", "norms", "VAE", "reward", "optimizer"}
    text = benchmark.report(result)
    assert "one after the other" in text and "by module" in text


@pytest.mark.long
def test_gradients_cross_slices_once_a_step_and_nothing_else_does(folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 512)  # so that leaves of the tiny UNet are split, too
    config = tiny(
        folder,
        **{"reward.pickscore": 0.0, "data.batch_size": 16, "compute.microbatches": 2},
    )
    mesh = sharding.make_mesh(-1, 4, devices=aot.topology_devices("2xv5e:2x2"))
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    work = aot.train_work(config, mesh)
    text = aot.compile_work(work, config, effort=-1.0).run.as_text()

    # Of the entry, that is outside of all loops: once a step.
    send = r"= \((\w+)\[([\d,]*)\].*?\) send\(.*_xla_megascale_reduce_operation=\"(\w+)"
    sent = re.findall(send, text)
    assert len(sent) == len(re.findall(r" send\(", text[text.index("\nENTRY ") :]))
    assert len(sent) == len(re.findall(r" send\(", text))
    assert {(kind, operation) for kind, _, operation in sent} == {("f32", "SUM")}
    numbers = sum(math.prod(map(int, shape.split(","))) for _, shape, _ in sent)
    # A chip sends its quarter of both gradients; small leaves are padded to tiles.
    quarter = 2 * plan.parameters(work.args[0].generator) / 4
    assert quarter <= numbers <= 1.5 * quarter
    # All else stays in a slice of four.
    assert set(re.findall(r"replica_groups=(\S+?),? ", text)) == {"{{0,1,2,3}}"}


def test_all_gathers_are_those_of_the_split_weights(folder):
    mesh = sharding.make_mesh(2, 4)
    gathered = sharding.on_each(
        mesh,
        lambda w: sharding.gather_param(w, (512, 256), jnp.bfloat16).sum(keepdims=True),
        (PartitionSpec(sharding.PARAMS),),
        PartitionSpec(),
    )
    closed = jax.make_jaxpr(gathered)(jnp.ones((512, 256)))
    assert dict(flops.collectives(closed)) == {
        ("all-gather", "count"): 1,
        ("all-gather", "bytes"): 512 * 256 * 2 * 3 // 4,
    }


@pytest.mark.long
def test_a_measurement_holds_times_settings_and_environment(folder, tmp_path):
    config = tiny(folder, **{"mesh.fsdp": 8, "data.batch_size": 8, "compute.dtype": "float32"})
    request = benchmark.Request("vae", "tiny", repeats=3, ops=True, profile=str(tmp_path))
    result = benchmark.run(config, request)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    assert len(result["samples"]) == 3 and result["ours"]["median_s"] > 0
    assert result["ours"]["samples_per_s_per_device"] == pytest.approx(
        1 / result["ours"]["median_s"]
    )
    assert result["environment"]["mesh"] == {"data": 1, "fsdp": 8, "context": 1}
    assert json.loads(json.dumps(result))["settings"]["remat_denoiser"] == "full"
    assert "mfu" not in result and "seconds" not in result["ops"]  # a CPU is not in the table
    assert result["ops"]["flop"] > 0 and "no seconds: " in benchmark.report(result)


def test_random_weights_differ_where_their_shapes_do_not():
    kernel, vector = np.zeros((64, 32), np.float32), np.zeros(32, np.float32)
    state = {
        "generator": {
            "a": {"kernel": kernel, "bias": vector, "scale": vector},
            "b": {"kernel": kernel, "embedding": kernel},
        },
        "opt_generator": {"a": {"kernel": kernel}},
    }
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    args = sharding.abstract((state,), sharding.replicated(mesh))
    (made,) = benchmark.materialise(args)
    (again,) = benchmark.materialise(args)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    a, b = made["generator"]["a"], made["generator"]["b"]
    assert abs(np.corrcoef(a["kernel"].ravel(), b["kernel"].ravel())[0, 1]) < 0.1
    assert a["kernel"].std() == pytest.approx(64**-0.5, rel=0.1)
    assert (a["bias"] == 0).all() and (a["scale"] == 1).all()
    assert b["embedding"].std() == pytest.approx(1, rel=0.2)
    assert (made["opt_generator"]["a"]["kernel"] == 0).all()


@pytest.mark.case("faults 15")
@pytest.mark.long
def test_no_two_random_leaves_of_a_run_are_equal(folder):
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    work = aot.train_work(tiny(folder, **{"mesh.fsdp": 1}), mesh)
    (made,) = benchmark.materialise(((work.args[0].generator, work.args[1]["reference"]),))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(made)]
    random = [leaf.tobytes() for leaf in leaves if leaf.size > 1 and np.ptp(leaf) > 0]
    assert len(random) > 40 and len(set(random)) == len(random)
    kernels = [leaf.ravel()[:256] for leaf in leaves if leaf.size >= 256 and np.ptp(leaf) > 0]
    alike = np.corrcoef(kernels) - np.eye(len(kernels))
    assert np.abs(alike).max() < 0.5  # nor a multiple of another


@pytest.mark.case("first hour 27")
def test_a_ratio_comes_with_its_spread_and_says_when_it_is_worth_nothing():
    def rows(ours, theirs):
        measured = {
            "ours": benchmark.summary(ours, 1, 1),
            "torch": benchmark.summary(theirs, 1, 1),
            **benchmark.ratio_of(ours, theirs),
        }
        assert json.loads(json.dumps(measured))["ratio_quartiles"]
        return dict(benchmark._measured_rows(measured))["ours / torch"]

    steady = rows([1.2, 1.24, 1.2, 1.2], [1.0, 1.0, 1.0, 1.0])
    assert steady == "1.200, half of 4 in 1.200 to 1.210"
    # Both slow down together under other work, which takes nothing from the ratio.
    assert rows([1.0, 2.0, 4.0, 8.0], [2.0, 4.0, 8.0, 16.0]).startswith("0.500, half of 4 in 0.500")
    assert "worth nothing" in rows([1.0, 1.0, 3.0, 4.0], [1.0, 3.0, 1.0, 9.0])


@pytest.mark.case("first hour 27", "first hour 10")
def test_calls_that_are_compared_take_turns_and_say_how_far_they_are(capsys):
    made = []
    calls = {name: lambda name=name: made.append(name) for name in ("ours", "torch")}
    seconds = benchmark.times_of(calls, 2)
    assert made == ["ours", "torch"] * (benchmark.WARM_UP + 2)
    assert {name: len(of_one) for name, of_one in seconds.items()} == {"ours": 2, "torch": 2}
    assert "timing ours and torch: call 5/5" in capsys.readouterr().out


@pytest.mark.case("first hour 27")
def test_a_missing_torch_is_said_before_any_work(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    config = tiny(folder, **{"decode.view": "crop"})
    with pytest.raises(UserError, match="(?s)decode.view='crop'.*; also --vs=torch: .*pip install"):
        benchmark.run(config, benchmark.Request("vae", "tiny", versus="torch"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data.cache": "a/cache"}, "data.cache='a/cache', expected ''"),
        ({"reward.imagereward": 1.0}, "rewards imagereward, pickscore, expected pickscore alone"),
        ({"reward.pickscore": 0.0, "eval.metrics": ("imagereward",)}, "rewards imagereward, exp"),
    ],
)
def test_what_pytorchs_side_would_do_otherwise_is_refused(folder, monkeypatch, changes, said):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match=re.escape(said)):
        benchmark._check_torch(tiny(folder, **changes))
    benchmark._check_torch(tiny(folder))
    benchmark._check_torch(tiny(folder, **{"reward.pickscore": 0.0, "eval.metrics": ()}))


@pytest.mark.case("faults 26", "faults 11")
def test_a_file_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert benchmark._json_file("~/a/b.json") == tmp_path / "a" / "b.json"
    for path in ("/proc/x/y.json", f"{tmp_path}/{'a' * 300}/b.json", str(tmp_path)):
        with pytest.raises(UserError, match="--json="):
            benchmark._json_file(path)


def test_products_in_programs_inside_of_programs_are_counted_once():
    @jax.custom_vjp
    def product(a, b):
        return jax.jit(jnp.matmul)(a, b)

    product.defvjp(lambda a, b: (product(a, b), None), lambda saved, g: (g, g))

    def three_times(a):
        return jax.lax.scan(lambda x, _: (product(x, a), None), a, length=3)[0]

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops.count(jax.jit(three_times), square) == 3 * 2 * 8**3


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:7x5x3", "0xv5e:2x2", "v5e:7x5"])
def test_an_unknown_topology_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=f"topology='{name}'.*v5e:4x4"):
        aot.topology_devices(name)


def test_a_missing_tpu_compiler_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '.\[tpu\]'"):
        aot.topology_devices("v5e:2x2")


def test_an_unknown_gpu_is_told_which_are_known():
    with pytest.raises(UserError, match=r"topology='h1000:1', .*\(a100, h100, h200, rtx4090\)"):
        aot.topology_devices("h1000:1")


@pytest.mark.parametrize("name", ["h100", "h100:9", "h100:16", "h100:x", "a100:0", "h200:1x2"])
def test_another_number_of_gpus_than_a_host_has_is_refused(name):
    with pytest.raises(UserError, match=f"topology='{name}', expected how many .* 1 to 8"):
        aot.topology_devices(name)


def test_a_missing_cuda_compiler_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '.\[cuda\]'"):
        aot.topology_devices("h100:1")


@pytest.mark.parametrize("name", gpus.GPUS)
def test_gpus_have_the_limits_of_the_table_of_chips(name):
    gpu = gpus.GPUS[name]
    chip = chips.CHIPS[chips.chip_of(gpu.kind)]
    assert f"memory_bandwidth: {chip.bandwidth:.0f}\n" in gpus.description(gpu)
    assert gpu.memory == pytest.approx(chip.memory, rel=0.02)
    assert f"device_memory_size: {gpu.memory}\n" in gpus.description(gpu)


def prepared(name, topology, **changes):
    """The plan of a config's benchmark on an RTX 4090 that is not here; raises as that does."""
    config = load_config(name)
    config.update_from_flattened_dict({"mesh.fsdp": 1, "data.batch_size": 1, **changes})
    card = types.SimpleNamespace(device_kind=gpus.GPUS["rtx4090"].kind)
    request = benchmark.Request("train", name, topology=topology)
    return benchmark._prepare(config, request, [card]), request


def test_a_step_far_too_large_is_refused_before_the_compile_with_the_fields_that_fit():
    said = (
        "the step needs 92.3 GB a device, NVIDIA GeForce RTX 4090 has 25.2; set "
        "data.cache=./text_cache, lora.rank=64 for about 20.6, or take devices with more memory"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        prepared("sdxl", "rtx4090:1")


def test_a_step_that_may_fit_is_compiled_and_not_started(monkeypatch):
    planned, _ = prepared("sdxl_lora", "rtx4090:1")
    monkeypatch.setattr(plan, "make", lambda *_: planned)  # which takes seconds, as advice does
    say = benchmark.advice
    monkeypatch.setattr(say, "out_of_memory", lambda _, *sizes: plan.OutOfMemory("", *sizes))
    known = chips.CHIPS["RTX 4090"]

    def refused(over, topology):
        memory = planned.bytes / (1 + over)
        monkeypatch.setitem(chips.CHIPS, "RTX 4090", known._replace(memory=memory))
        try:
            prepared("sdxl_lora", topology)
        except plan.OutOfMemory:
            return True
        return False

    assert not refused(0.14, "rtx4090:1") and refused(0.16, "rtx4090:1")
    assert not refused(-0.01, "") and refused(0.01, "")


def test_a_step_that_the_cuda_compiler_finds_too_large_is_told_which_fields_would_fit():
    planned, request = prepared("sdxl_lora", "rtx4090:1")
    assert benchmark._lacks(planned, request, 25.2e9) is None
    said = str(benchmark._lacks(planned, request, 26e9))
    # 8 bits take 15.4 GB by the plan, which was 26 / 20.57 too low.
    assert said == (
        "the step needs 26.0 GB a device, NVIDIA GeForce RTX 4090 has 25.2; set lora.int8=True "
        "for about 19.5, or take devices with more memory"
    )
    assert "no list of fields is enough" in str(benchmark._lacks(planned, request, 99e9))
    for other in ({"what": "vae"}, {"topology": ""}, {"topology": "v5e:2x2"}):
        assert benchmark._lacks(planned, dataclasses.replace(request, **other), 26e9) is None


def test_what_was_compiled_in_vain_is_printed_and_kept(monkeypatch, tmp_path, capsys):
    class Flags(types.SimpleNamespace):
        def __getitem__(self, name):
            return types.SimpleNamespace(config_filename="sdxl.py")

    given = {"config": 0, "what": "train", "topology": "h100:1", "vs": None, "repeats": 1}
    given |= {"effort": None, "per_device": None, "ops": False, "profile": None}
    given["json"] = f"{tmp_path}/a.json"
    monkeypatch.setattr(benchmark.flags, "FLAGS", Flags(**given))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(benchmark, "run", lambda *_: {"lacks": "needs more"})
    monkeypatch.setattr(benchmark, "report", lambda _: "what it takes")
    with pytest.raises(UserError, match="needs more"):
        benchmark.main()
    assert capsys.readouterr().out == "what it takes\n"
    assert json.loads((tmp_path / "a.json").read_text()) == {"lacks": "needs more"}


def test_the_compilers_out_of_memory_becomes_what_to_do():
    error = aot._too_large(
        RuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."
        ),
        dry(),
        "TPU v5 lite",
    )
    assert isinstance(error, UserError)
    assert (
        "needs 21.5 GB a device, TPU v5 lite has 16.9; in this order raise compute.microbatches=1"
        in str(error)
    )


def test_a_batch_that_a_device_cannot_hold_is_predicted_before_anything_is_loaded():
    fits = plan.make(dry(**{"data.batch_size": 16}), 16, "TPU v5 lite")
    plan.check_memory(fits)
    with pytest.raises(
        UserError, match="raise compute.microbatches=1, set compute.remat_denoiser='full'"
    ):
        plan.check_memory(dataclasses.replace(fits, config=dry(**{"data.batch_size": 128})))


def test_chips_are_found_by_their_device_kind():
    assert chips.chip_of("TPU v5 lite") == "v5e" and chips.chip_of("NVIDIA H200") == "H200"
    assert chips.chip_of("NVIDIA A100-SXM4-80GB") == "A100" and chips.chip_of("cpu") is None
    assert math.isclose(chips.CHIPS["v6e"].flops, 918e12)
    assert chips.chip_of("TPU v4") == "v4" and chips.chip_of("TPU7x") == "tpu7x"
    assert 2 * chips.CHIPS["tpu7x"].flops == 2307e12  # two devices a chip


@pytest.mark.parametrize(
    "name, count, kind",
    [
        ("v4:2x2x1", 4, "TPU v4"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
        ("2xv5e:2x2", 8, "TPU v5 lite"),
        ("v5p:2x2x1", 4, "TPU v5"),
        ("v6e:2x4", 8, "TPU v6 lite"),
    ],
)
def test_a_topology_has_the_devices_that_jax_sees_there(name, count, kind):
    devices = aot.topology_devices(name)
    assert (len(devices), devices[0].device_kind) == (count, kind)
    wanted = slices.parse(name)
    assert (wanted.devices, wanted.device_kind) == (count, kind)
    assert len(sharding.slice_sizes(devices)) == wanted.count


def test_the_small_pipelines_of_the_docs_are_written(tmp_path):
    import small_pipelines

    assert small_pipelines.TEXT["vocab_size"] == small_pipelines.VOCAB
