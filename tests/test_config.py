# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong is said in one line, before anything is compiled or downloaded."""

import importlib.util
import re
from pathlib import Path

import pytest

from di_star_jax.config import UserError, check, check_workdir, fields, planned_devices, suggest
from di_star_jax.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent


def load(name, *preset):
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


def dry(**changes):
    config = load("sdxl")
    config.dry_run = True
    config.update_from_flattened_dict(changes)
    return config


def test_defaults_pass_and_both_configs_have_the_same_fields():
    check(dry(), 16, objectives=OBJECTIVES)
    assert fields(load("sdxl")).keys() == fields(load("shapes")).keys()
    assert load("sdxl", "sim").objective.reward_scale == load("shapes", "sim").objective.reward_scale == 0.0


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="unknown preset 'nothing', expected one of di_star, sim"):
        load("sdxl", "nothing")


@pytest.mark.parametrize("changes, devices, message", [
    ({"data.batch_size": 6, "mesh.fsdp": 4}, 4, r"data.batch_size=6 .*4 devices.*use 4 or 8"),
    ({"data.batch_size": 24, "mesh.fsdp": 8}, 16, r"data.batch_size=24 .*16 devices of mesh data=2 x fsdp=8; use 16"),
    ({"mesh.fsdp": 16}, 12, r"fsdp=16 does not make up the 12 devices"),
    ({"mesh.data": 3, "mesh.fsdp": 2}, 8, r"data=3 x fsdp=2 does not make up the 8 devices.*fsdp to 1 or 2 or 4 or 8"),
    ({"mesh.fsdp": 0}, 8, r"mesh.fsdp=0, expected 1 or more"),
    ({"mesh.data": -2}, 8, r"mesh.data=-2, expected 1 or more"),
    ({"mesh.fsdp": -1}, 8, r"mesh.data=-1 and mesh.fsdp=-1: expected one of them at most"),
    ({"data.resolution": 1000}, 16, r"1000 is not a multiple of 64; use 1024"),
    ({"objective.name": "distar"}, 16, r"objective.name='distar', expected one of 'di_star', did you mean di_star"),
    ({"objective.huber_c": 0.0}, 16, r"objective.huber_c=0.0, expected more than 0"),
    ({"objective.reward_scale": -1.0}, 16, r"objective.reward_scale=-1.0, expected 0 or more"),
    ({"objective.t_max": 1000}, 16, r"objective.t_min=20, objective.t_max=1000, expected 0 <= t_min <= t_max <= 999"),
    ({"assistant.t_min": 500, "assistant.t_max": 400}, 16, r"assistant.t_min=500"),
    ({"generator.timestep": -1}, 16, r"generator.timestep=-1, expected 0..999"),
    ({"compute.dtype": "float16"}, 16, r"compute.dtype='float16', in which SDXL's VAE overflows; use 'bfloat16'"),
    ({"compute.dtype": "half"}, 16, r"compute.dtype='half', expected one of 'bfloat16', 'float32'"),
    ({"optim.b2": 1.0}, 16, r"optim.b2=1.0, expected a number in \[0, 1\)"),
    ({"objective.omega": float("nan")}, 16, r"objective.omega=nan, expected 0 or more"),
    ({"eval.num_per_prompt": 1}, 16, r"eval.num_per_prompt=1, expected 2 or more"),
    ({"eval.prompts": "some.txt", "eval.batch_size": 20}, 16, r"eval.batch_size=20 .*use 16 or 32"),
    ({"train.save_every": 0}, 16, r"train.save_every=0, expected more than 0"),
    ({"dry_run": False, "data.prompts": "nowhere.txt"}, 16, r"data.prompts=nowhere.txt: no such file"),
])
def test_a_config_that_cannot_run_is_refused_in_one_line(changes, devices, message):
    with pytest.raises(UserError, match=message) as error:
        check(dry(**changes), devices, objectives=OBJECTIVES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", load("sdxl").weights.generator, "/no/where", "a/b/c"])
def test_a_missing_weights_folder_is_refused_before_the_network_is_asked(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    with pytest.raises(UserError, match=f"weights.generator={name}: no such folder"):
        check(dry(**{"dry_run": False, "data.prompts": str(prompts), "weights.generator": name}), 16,
              objectives=OBJECTIVES)


def test_a_dry_run_is_for_this_machine_only_where_the_mesh_fits_it():
    assert planned_devices(dry(), 1) == 16
    assert planned_devices(dry(), 64) == 64
    assert planned_devices(dry(**{"mesh.data": 2}), 64) == 32
    assert planned_devices(dry(**{"mesh.data": 4, "mesh.fsdp": -1}), 1) == 4


@pytest.mark.parametrize("name, message", [
    ("", "no --workdir"),
    ("gs://bucket/run", "expected a folder; mount the bucket"),
    ("file", "file is a file, expected a folder"),
    ("file/run", "file is a file, expected a folder"),
])
def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        check_workdir(name)
    check_workdir("new/folder")
    assert not (tmp_path / "new").exists()


def test_suggestions_search_full_dotted_names():
    known = list(fields(load("sdxl")))
    assert suggest("trian.steps", known) == ", did you mean train.steps?"
    assert suggest("batch_size", known) == ", did you mean data.batch_size?"
    assert suggest("optimizer.b3", known) in (", did you mean optim.b1?", ", did you mean optim.b2?")
    assert suggest("asistant.t_min", known) == ", did you mean assistant.t_min?"
    assert suggest("zzz", known) == ""


def test_readme_explains_every_field_with_its_default():
    table = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    for name, value in fields(load("sdxl")).items():
        assert table.get(name) == f"`{value!r}`", f"README has {table.get(name)} for {name}, the config {value!r}"
