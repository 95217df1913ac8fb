# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
from test_config import dry, load

from di_star_jax.cost import activations, advice, chips, plan, report, work
from di_star_jax.errors import UserError
from di_star_jax.models import published

SDXL = {"denoiser": 2_567_463_684}


@pytest.fixture(scope="module", autouse=True)
def build_once():
    """Models of the same config.json are built once for all tests."""
    built, plain = {}, plan.abstract_models

    def abstract_models(known):
        found = {}
        for kind in ("networks", "rewards"):
            for name, config in getattr(known, kind).items():
                if json.dumps(config) not in built:
                    one = known._replace(networks={}, rewards={})._replace(**{kind: {name: config}})
                    built[json.dumps(config)] = plain(one)[name]
                found[name] = built[json.dumps(config)]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "abstract_models", abstract_models)
        yield


def lines_of(config, device_count, device_kind="cpu"):
    return report.describe(plan.make(config, device_count, device_kind))


@pytest.fixture(scope="module")
def sdxl():
    return "\n".join(lines_of(dry(), 1))


def test_dry_run_of_sdxl_counts_parameters_without_weights_or_devices(sdxl):
    assert (
        "mesh: data=1 x fsdp=16 x context=1; this machine has 1 device (cpu), the plan assumes 16"
        in sdxl
    )
    for line in (
        "2,567,463,684 denoiser\n",
        "   83,653,863 vae\n",
        "  123,060,480 text_encoder\n",
        "694,659,840 text_encoder_2\n",
        "986,109,441 pickscore\n",
    ):
        assert line in sdxl


def test_dry_run_says_on_which_chips_it_fits(sdxl):
    lines = sdxl.splitlines()
    # eight images a chip, 42.02 GB: 87 % of what a GPU of 48 GB gives
    assert "fits, with 12% to spare: v5p, tpu7x, GPUs of 48, 80, 141 GB" in lines
    assert next(line for line in lines if "fit a TPU" in line).endswith(
        "v4 5, v5e 2, v5p 18, v6e 5, tpu7x 18"
    )
    one_each = lines_of(dry(**{"mesh.data": 8}), 1)
    assert "v5e" in next(line for line in one_each if line.startswith("fits, "))


def test_state_is_what_two_networks_with_adam_and_average_take():
    memory = plan.memory_per_chip(dry(), SDXL, shards=1)
    state = sum(
        size
        for name, size in memory.items()
        if name.split()[0] in ("generator", "Adam's", "average")
    )
    assert state == SDXL["denoiser"] * 4 * 5  # 51 GB, what a checkpoint holds
    assert (
        plan.memory_per_chip(dry(), SDXL, shards=16)["Adam's moments of both"]
        == SDXL["denoiser"] / 2
    )


def test_where_nothing_guides_the_reference_is_counted_in_float32():
    guided, plain = (
        plan.memory_per_chip(dry(**{"objective.omega": omega}), SDXL, shards=1)
        for omega in (7.5, 1.0)
    )
    assert guided["reference, bfloat16"] == 2 * SDXL["denoiser"]
    assert plain["reference, float32"] == 4 * SDXL["denoiser"]
    guided, plain = (
        activations.activations(dry(**{"objective.omega": omega})) for omega in (7.5, 1.0)
    )
    assert plain.scores == 2 * guided.scores and plain.decoder == guided.decoder


def most(*widths, **changes):
    """Bytes of an image when they are most."""
    return max(activations.activations(dry(**changes), *widths))


def test_activations_follow_pixels_dtype_and_recomputation():
    whole = most()
    assert most(**{"data.resolution": 512}) == pytest.approx(whole / 4)
    assert most(**{"compute.dtype": "float32"}) == pytest.approx(2 * whole)
    assert most(0.1, 0.1) == pytest.approx(whole / 10)
    for network in ("denoiser", "vae"):
        assert most(**{f"compute.remat_{network}": "none"}) > 2 * whole


def test_a_narrow_denoiser_leaves_the_decoders_part_as_it_is():
    assert most(0.4, 1.0) == most() and most(1.0, 0.1) > 0.6 * most()


def test_the_decoder_takes_what_the_reward_sees_and_as_many_images_as_are_decoded_at_a_time():
    whole, seen = (
        activations.activations(dry(**{"decode.view": view, "decode.resolution": 512}))
        for view in ("full", "resized")
    )
    assert seen == whole._replace(decoder=whole.decoder / 4)
    unrewarded = dry(**{"reward.pickscore": 0.0, "eval.metrics": ()})
    assert activations.activations(unrewarded) == whole._replace(decoder=0.0)
    sizes = SDXL["denoiser"], 2 * SDXL["denoiser"]
    at_once, sliced = (
        activations.phases(dry(**{"decode.slice": size}), *sizes, whole)["decoder and reward"]
        for size in (0, 2)
    )
    assert at_once.bytes(2) == sliced.bytes(2)
    assert sliced.bytes(8) - sliced.bytes(2) == pytest.approx(6 * whole.generator)
    assert sliced.images(sliced.bytes(8) + 1) == 8 and sliced.images(sliced.bytes(8) - 1) == 7


def test_a_loop_holds_a_copy_of_the_network_that_it_picks_but_for_bases():
    numbers = SDXL["denoiser"]

    def held(**changes):
        config = dry(**changes)
        of_image = activations.activations(config)
        phases = activations.phases(config, numbers, 2 * numbers, of_image)
        return [round(phase.fixed / numbers) for phase in phases.values()]

    assert held(**{"compute.loop_networks": False}) == [0, 0, 8]
    assert held() == [2, 0, 8 + 4]
    assert held(**{"lora.rank": 64}) == [0, 0, 8]


# What the TPU compiler says of whole steps, GB a chip at the peak; the commands are those of
# docs/performance.md.
COMPILED = [
    ("sdxl", "v5e", 16, {"data.batch_size": 16}, 7.72),
    ("sdxl", "v6e", 8, {"data.batch_size": 8, "mesh.fsdp": 8}, 13.21),
    ("sdxl", "v5p", 4, {"data.batch_size": 16, "mesh.fsdp": 4}, 35.83),
    ("sdxl:inside_0_0", "v5e", 16, {"data.batch_size": 16}, 10.21),
    ("sd15", "v5e", 4, {"data.batch_size": 16, "compute.microbatches": 4}, 11.02),
    ("pixart", "v5e", 4, {"data.batch_size": 16}, 11.51),
    ("pixart", "v5e", 4, {"data.batch_size": 16, "data.cache": "cache/pixart"}, 8.86),
]


@pytest.mark.parametrize("name, chip, count, changes, peak", COMPILED)
def test_the_peak_is_within_15_percent_of_the_compilers(name, chip, count, changes, peak):
    config = load(*name.split(":"))
    config.update_from_flattened_dict(changes | {"dry_run": True})
    found = plan.make(config, count, chips.device_kind(chip), count).bytes / 1e9
    print(f"{found:.2f} GB, {found / peak - 1:+.1%}")
    assert found == pytest.approx(peak, rel=0.15)
    assert found / peak > plan.ROOM, "else a chip that it is said to fit need not hold it"


def test_gradients_are_held_twice_where_they_are_summed_over_microbatches():
    one, four = (
        plan.memory_per_chip(dry(**{"compute.microbatches": count}), SDXL, shards=1)
        for count in (1, 4)
    )
    assert sum(four.values()) - sum(one.values()) == 2 * 4 * SDXL["denoiser"]


def test_models_that_are_neither_here_nor_published_are_said_to_be_unknown():
    lines = lines_of(dry(**{"weights.reference": "some/model"}), 1)
    assert (
        "parameters: unknown before its config.json is here: weights.reference=some/model" in lines
    )
    assert not [line for line in lines if line.startswith("memory")]


@pytest.fixture
def sd15(tmp_path):
    """A folder of a pipeline of the class of SD 1.5, with nothing else in it."""
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_sizes_come_from_the_folders_that_are_there(sd15):
    for part, config in (("unet", published.UNET_SD15), ("reward", published.CLIP_H14)):
        (sd15 / part).mkdir()
        (sd15 / part / "config.json").write_text(json.dumps(config))
    lines = lines_of(
        dry(**{"weights.reference": str(sd15), "weights.pickscore": str(sd15 / "reward")}),
        16,
    )
    assert "parameters:   859,520,964 denoiser" in lines
    assert "mesh: data=1 x fsdp=16 x context=1 over 16 devices (cpu)" in lines


def test_a_folder_without_a_denoiser_or_an_index_is_refused(sd15):
    for file in ("unet/config.json", "model_index.json"):
        with pytest.raises(UserError, match=f"no file .*{file}"):
            lines_of(dry(**{"weights.reference": str(sd15)}), 1)
        (sd15 / "model_index.json").unlink(missing_ok=True)


def test_a_mesh_that_cannot_split_the_denoiser_is_refused():
    with pytest.raises(
        UserError, match="mesh.fsdp x mesh.context = 3 divides no axis of .*kernel with shape"
    ):
        lines_of(dry(**{"mesh.fsdp": 3, "data.batch_size": 3}), 1)


def test_memory_is_said_of_a_known_chip_and_of_a_dry_run_only():
    planned = plan.make(dry(), 16, "cpu")

    def has_memory(dry_run, device_kind):
        changes = {"config": dry(dry_run=dry_run), "device_kind": device_kind}
        lines = report.describe(dataclasses.replace(planned, **changes))
        return any("memory" in line for line in lines)

    assert not has_memory(False, "cpu")
    assert has_memory(False, "TPU v5 lite") and has_memory(True, "cpu")


@pytest.mark.case("first hour 22")
def test_a_run_that_needs_more_ram_than_the_machine_has_is_refused_before_the_hub_is_asked():
    sdxl = dry(**{"dry_run": False, "mesh.fsdp": 1, "data.batch_size": 1})
    planned = plan.make(sdxl, 1, "cpu")
    with pytest.raises(
        UserError, match=r"needs about \d+\.\d GB of RAM, this machine has 16"
    ) as error:
        plan.check_memory(planned, ram=16e9)
    assert "\n" not in str(error.value) and planned.ram > 60e9
    plan.check_memory(planned, ram=512e9)
    assert any(line.startswith("RAM: about") for line in report.describe(planned))
    assert 5e8 < plan.ram_here() < 1e14
    dry_run = plan.make(dry(), 1, "cpu")
    assert not any(line.startswith("RAM") for line in report.describe(dry_run))


def test_a_config_json_may_leave_out_what_diffusers_has_as_defaults(sd15):
    (sd15 / "unet").mkdir()
    short = {k: v for k, v in published.UNET_SD15.items() if k != "block_out_channels"}
    (sd15 / "unet" / "config.json").write_text(json.dumps(short))
    planned = plan.make(dry(**{"weights.reference": str(sd15)}), 16, "cpu")
    assert planned.parameters["denoiser"] == 859_520_964
    assert plan.widths(planned.known) == (1.0, 1.0)  # SD 1.5 is as wide as SDXL


@pytest.mark.parametrize(
    "config, context, least", [("sdxl", 64, 2048), ("sd15", 16, 1024), ("pixart", 64, 1024)]
)
def test_a_context_that_splits_a_row_is_refused(config, context, least):
    one = {"mesh.context": context, "mesh.fsdp": 1, "data.batch_size": 1}
    asked = load(config)
    asked.update_from_flattened_dict(one | {"dry_run": True})
    with pytest.raises(UserError, match=f"rows of data.resolution.*multiple of {least}, or"):
        plan.make(asked, context, "cpu", context)
    asked.mesh.context = 8
    plan.make(asked, 8, "cpu", 8)


# What a sample takes, and which fields make a run fit.


# TFLOP a sample on the whole step's trace, as `di-star benchmark` prints them.
@pytest.mark.parametrize(
    "name, changes, traced",
    [
        ("sdxl", {}, 105.73),
        pytest.param("sdxl_lora", {}, 96.21, marks=pytest.mark.long),
        ("sd15", {}, 12.59),
        ("pixart", {"data.batch_size": 4}, 18.70),
        ("pixart", {"data.cache": "cache/pixart"}, 16.47),
    ],
)
def test_the_work_of_a_sample_is_that_of_the_whole_steps_trace(name, changes, traced):
    found = work.of_plan(planned_of(name, **changes)).sample / 1e12
    print(f"{found:.2f} TF")
    assert found == pytest.approx(traced, rel=0.01)


def planned_of(name, **changes):
    config = load(name)
    config.update_from_flattened_dict(changes | {"dry_run": True})
    return plan.make(config, 1, "cpu")


@pytest.fixture(scope="module")
def shapes():
    return planned_of("shapes")


# In forward passes of the denoiser, as tests/test_step.py counts them on the trace.
@pytest.mark.parametrize(
    "changes, forwards, text, warmup",
    [
        ({}, 12, 1, 4),
        ({"assistant.sharing": "x_t"}, 11, 1, 4),
        ({"objective.name": "di_star_outside", "objective.omega": 1.0}, 11, 1, 4),
        ({"objective.name": "kl"}, 9, 1, 4),
        ({"objective.name": "reward_only"}, 6, 1, 4),
        ({"assistant.updates": 3}, 20, 3, 12),
        ({"assistant.first": True}, 13, 2, 4),
        ({"generator.steps": 3}, 13, 1, 5),
    ],
    ids=str,
)
def test_the_work_follows_the_method(shapes, monkeypatch, changes, forwards, text, warmup):
    one = work.Pass(1.0, 0.0)
    monkeypatch.setattr(work, "_passes", lambda plan, condition: (one, {}))
    monkeypatch.setattr(work, "_encoded", lambda plan: (None, 100.0))
    config = load("shapes")
    config.update_from_flattened_dict(changes)
    found = work.of_plan(dataclasses.replace(shapes, config=config))
    assert (found.denoiser, found.text) == (forwards, 100.0 * text)
    assert found.warmup == warmup + 100.0 * config.assistant.updates


def test_work_of_unknown_models_is_not_guessed():
    unknown = plan.make(dry(**{"weights.pickscore": "some/model"}), 1, "cpu")
    assert work.of_plan(unknown) is None and unknown.bytes > 1e9
    assert not any(line.startswith("work") for line in report.describe(unknown))


ALONE = {"mesh.fsdp": 1, "data.batch_size": 1}


def fields_of(steps):
    return [field for _, field in steps]


def test_the_shortest_list_of_fields_makes_it_fit_and_is_what_the_config_then_takes():
    whole = plan.make(dry(**ALONE), 1, "cpu")
    steps = advice.to_fit(whole, chips.CARDS[24])
    # With adapters alone it is 22.2 of 24.1 GB, which is more than an estimate may fill.
    assert fields_of(steps) == ["data.cache=./text_cache", "lora.rank=64"]
    assert fields_of(advice.to_fit(whole, chips.CARDS[48])) == ["lora.rank=64"]
    steps = advice.to_fit(whole, 20e9)
    assert fields_of(steps) == ["lora.rank=64", "lora.int8=True"]
    anew = plan.make(dry(**ALONE, **{"lora.rank": 64, "lora.int8": True}), 1, "cpu")
    assert steps[-1][0].bytes == anew.bytes <= plan.ROOM * 20e9
    assert advice.to_fit(whole, 8e9) == []


def test_of_a_fields_values_the_first_that_is_enough_is_named(sdxl):
    eight_each = plan.make(dry(), 16, "TPU v5 lite", 16)
    assert fields_of(advice.to_fit(eight_each, 17e9)) == ["compute.microbatches=4"]
    assert fields_of(advice.to_fit(eight_each, 16e9)) == ["compute.microbatches=8"]
    sliced = dry(**{"decode.slice": 4})
    assert advice.options(plan.make(sliced, 1, "cpu"))[0] == ("compute.microbatches", [2])
    assert "to fit 24 GB: compute.microbatches=4 (-27.3 GB); then 14.7 of 24.1 GB" in sdxl


def test_only_fields_that_can_be_set_are_named(shapes):
    assert [name for name, _ in advice.options(planned_of("sdxl_lora"))] == [
        "decode.view",
        "lora.int8",
    ]
    pods = plan.make(dry(), 128, "TPU v5 lite", 128)
    assert dict(advice.options(pods))["mesh.fsdp"] == [32, 64, 128]
    moved = advice.changed(pods, "mesh.fsdp", 64)
    assert moved.mesh == {"data": 2, "fsdp": 64, "context": 1} and moved.bytes < pods.bytes
    assert pods.config.mesh.fsdp == 16
    own = advice.options(plan.make(dry(**{"weights.assistant": "./a"}), 1, "cpu"))
    assert "lora.rank" not in dict(own)
    # A rank that is more than a matrix has, and a mesh that splits nothing, are passed over.
    assert advice._fits(shapes, [("compute.microbatches", 2)], 1e12)
    assert not advice._fits(shapes, [("lora.rank", 4096), ("compute.microbatches", 2)], 1e12)
    assert not advice._fits(pods, [("mesh.fsdp", 3)], 1e12)


def test_a_card_has_what_cuda_shows_of_it_less_what_xla_leaves():
    assert {size: round(memory / 1e9, 1) for size, memory in chips.CARDS.items()} == {
        16: 15.9,
        24: 24.1,
        32: 32.0,
        48: 48.4,
        80: 80.8,
        141: 142.6,
    }


@pytest.mark.parametrize(
    "name",
    ["sdxl", pytest.param("sdxl_lora", marks=pytest.mark.long), "sd15", "pixart", "shapes"],
)
def test_a_dry_run_is_read_on_a_terminal_of_100_columns(name):
    lines = report.describe(planned_of(name))
    assert max(map(len, lines)) <= 100 and len(lines) <= 32
    begin = {line.split(":")[0] for line in lines}
    assert {"memory per device", "fits, with 12% to spare", "checkpoint", "work"} <= begin
    assert any(line.startswith(("seconds a sample at 40 %", "time: not known")) for line in lines)


def test_time_is_that_of_the_peak_and_the_utilisation_that_is_assumed(monkeypatch):
    monkeypatch.setattr(work, "of_plan", lambda plan: work.Work(197e12, 0.0, 0.0, 0.0))
    lines = report.describe(plan.make(dry(), 16, "TPU v5 lite", 16))
    assert "seconds a sample at 40 % of the bfloat16 peak, assumed: v5e 2.5" in lines
    # 256,000 images at 2.5 s on 16 chips
    assert "hours of the run on 16 devices, likewise: v5e 11" in lines


def test_a_chip_that_the_plan_does_not_fit_is_told_which_fields_would():
    lines = report.describe(plan.make(dry(dry_run=False), 16, "TPU v5 lite"))
    assert lines[-2].startswith("on v5e: 42.02 of 16.91 GB, does not fit")
    assert lines[-1] == "to fit v5e: compute.microbatches=4 (-27.3 GB); then 14.7 of 16.9 GB"
    assert not any(line.startswith("work") for line in lines)  # which takes seconds


def test_what_fits_leaves_room_in_the_verdict_in_the_images_and_in_the_advice(monkeypatch):
    """An estimate that fills a chip to the brim is said to be tight, and is not refused."""
    eight_each = plan.make(dry(dry_run=False), 16, "TPU v5 lite")
    known = chips.CHIPS["v5e"]

    def verdict(share):
        memory = eight_each.bytes / share
        monkeypatch.setitem(chips.CHIPS, "v5e", known._replace(memory=memory))
        assert eight_each.fits(memory) is (eight_each.images_in(memory) >= 8)
        return "\n".join(report.describe(eight_each)).partition("on v5e: ")[2]

    assert verdict(plan.ROOM - 0.01).endswith("GB, fits")
    tight = verdict(0.99)
    assert "GB, has less than 12% to spare, which a compiler may need\nto fit v5e: " in tight
    plan.check_memory(eight_each)
    assert "GB, does not fit\nto fit v5e: " in verdict(1.01)
    with pytest.raises(UserError, match="the step needs 42.0 GB a device"):
        plan.check_memory(eight_each)
