# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong is said in one line, before anything is compiled or downloaded."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from di_star_jax.config import UserError, check, fields, suggest
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
    assert load("sdxl", "sim").objective.reward_scale == 0.0


@pytest.mark.parametrize("changes, devices, message", [
    ({"data.batch_size": 6, "mesh.fsdp": 4}, 4, r"data.batch_size=6 .*4 devices.*use 4 or 8"),
    ({"mesh.fsdp": 16}, 12, r"fsdp=16 does not make up the 12 devices"),
    ({"mesh.data": 3, "mesh.fsdp": 2}, 8, r"data=3 x fsdp=2 does not make up the 8 devices"),
    ({"data.resolution": 1000}, 16, r"1000 is not a multiple of 64; use 1024"),
    ({"objective.name": "distar"}, 16, r"objective.name='distar', expected one of 'di_star'"),
    ({"objective.huber_c": 0.0}, 16, r"objective.huber_c=0.0, expected more than 0"),
    ({"objective.reward_scale": -1.0}, 16, r"objective.reward_scale=-1.0, expected 0 or more"),
    ({"objective.t_max": 1000}, 16, r"objective.t_min=20, objective.t_max=1000, expected 0 <= t_min <= t_max <= 999"),
    ({"assistant.t_min": 500, "assistant.t_max": 400}, 16, r"assistant.t_min=500"),
    ({"generator.timestep": -1}, 16, r"generator.timestep=-1, expected 0..999"),
    ({"compute.dtype": "float16"}, 16, r"compute.dtype='float16', expected one of 'bfloat16', 'float32'"),
    ({"train.save_every": 0}, 16, r"train.save_every=0, expected more than 0"),
    ({"dry_run": False, "data.prompts": "nowhere.txt"}, 16, r"data.prompts=nowhere.txt: no such file"),
])
def test_a_config_that_cannot_run_is_refused_in_one_line(changes, devices, message):
    with pytest.raises(UserError, match=message) as error:
        check(dry(**changes), devices, objectives=OBJECTIVES)
    assert "\n" not in str(error.value)


def test_a_missing_weights_folder_is_refused_before_the_network_is_asked(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    with pytest.raises(UserError, match="weights.generator=./nowhere: no such folder"):
        check(dry(**{"dry_run": False, "data.prompts": str(prompts), "weights.generator": "./nowhere"}), 16,
              objectives=OBJECTIVES)


def test_suggestions_search_full_dotted_names():
    known = list(fields(load("sdxl")))
    assert suggest("trian.steps", known) == ", did you mean train.steps?"
    assert suggest("batch_size", known) in (", did you mean data.batch_size?", ", did you mean eval.batch_size?")
    assert suggest("zzz", known) == ""


@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/sdxl.py", "--config.dry_run=True", "--config.trian.steps=3"],
     "unknown config field trian.steps, did you mean train.steps?"),
    (["--config=configs/sdxl.py", "--config.dry_run=True", "--config.data.batch_size=many"],
     "--config.data.batch_size=many"),
    (["--config=configs/nowhere.py"], "no config file configs/nowhere.py"),
    (["--config=configs/sdxl.py:nothing", "--config.dry_run=True"], "unknown preset 'nothing', expected one of di_star"),
    (["--config=configs/shapes.py"], "no --workdir"),
    (["--config=configs/shapes.py", "--workdri=x"], "unknown flag --workdri, did you mean workdir?"),
])
def test_the_command_line_ends_with_one_line_and_exit_code_2(arguments, message):
    done = subprocess.run([sys.executable, "-m", "di_star_jax.main", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(lines) == 1 and message in lines[0], done.stderr


def test_readme_explains_every_field_with_its_default():
    table = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    for name, value in fields(load("sdxl")).items():
        assert table.get(name) == f"`{value!r}`", f"README's field table has {table.get(name)} for {name}, not {value!r}"
