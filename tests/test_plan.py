# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
from test_config import dry, load

from di_star_jax.cost import plan
from di_star_jax.errors import UserError
from di_star_jax.models import published

SDXL = {"denoiser": 2_567_463_684}


@pytest.fixture(scope="module", autouse=True)
def build_once():
    """Models of the same config.json are built once for all tests."""
    built, plain = {}, plan.abstract_params

    def abstract_params(known):
        found = {}
        for kind in ("networks", "rewards"):
            for name, config in getattr(known, kind).items():
                if json.dumps(config) not in built:
                    one = known._replace(networks={}, rewards={})._replace(**{kind: {name: config}})
                    built[json.dumps(config)] = plain(one)[name]
                found[name] = built[json.dumps(config)]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "abstract_params", abstract_params)
        yield


def lines_of(config, device_count, device_kind="cpu"):
    return plan.describe(plan.make(config, device_count, device_kind))


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
    fits = next(line for line in sdxl.splitlines() if "in all; fits" in line)
    assert "H100" in fits and "v5e" not in fits  # eight images a chip
    assert "v5e 2," in sdxl.splitlines()[-2]
    one_each = lines_of(dry(**{"mesh.data": 8}), 1)
    assert "v5e" in next(line for line in one_each if "in all; fits" in line)


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
    work = [plan.activation_bytes(dry(**{"objective.omega": omega})) for omega in (7.5, 1.0)]
    assert work[1] > work[0]


def test_activations_follow_pixels_dtype_and_recomputation():
    whole = plan.activation_bytes(dry())
    assert plan.activation_bytes(dry(**{"data.resolution": 512})) == pytest.approx(whole / 4)
    assert plan.activation_bytes(dry(**{"compute.dtype": "float32"})) == pytest.approx(2 * whole)
    assert plan.activation_bytes(dry(), 0.1, 0.1) == pytest.approx(whole / 10)
    for network in ("denoiser", "vae"):
        assert plan.activation_bytes(dry(**{f"compute.remat_{network}": "none"})) > 2 * whole


def test_a_narrow_denoiser_leaves_the_decoders_part_as_it_is():
    assert plan.activation_bytes(dry(), 0.4) > 0.8 * plan.activation_bytes(dry())
    assert plan.activation_bytes(dry(), 1.0, 0.1) > 0.6 * plan.activation_bytes(dry())


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
        lines = plan.describe(dataclasses.replace(planned, **changes))
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
    assert any(line.startswith("RAM: about") for line in plan.describe(planned))
    assert 5e8 < plan.ram_here() < 1e14
    dry_run = plan.make(dry(), 1, "cpu")
    assert not any(line.startswith("RAM") for line in plan.describe(dry_run))


def test_a_config_json_may_leave_out_what_diffusers_has_as_defaults(sd15):
    (sd15 / "unet").mkdir()
    short = {k: v for k, v in published.UNET_SD15.items() if k != "block_out_channels"}
    (sd15 / "unet" / "config.json").write_text(json.dumps(short))
    planned = plan.make(dry(**{"weights.reference": str(sd15)}), 16, "cpu")
    assert planned.parameters["denoiser"] == 859_520_964
    assert planned.image_bytes == plan.activation_bytes(dry())  # SD 1.5 is as wide as SDXL


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
