# SPDX-License-Identifier: Apache-2.0
"""What a workdir says of its run, and which other runs it refuses."""

import json
import platform

import jax
import pytest
from test_config import load, presets

from di_star_jax import record
from di_star_jax.errors import UserError
from di_star_jax.objectives import OBJECTIVES


def shapes(preset="di_star", **changes):
    config = load("shapes", preset)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def begun(tmp_path):
    """A workdir whose run has a checkpoint at step 40."""
    record.agree(shapes(), tmp_path, ["--config=shapes"], "digest", None)
    return tmp_path


def again(folder, config, prompts="digest"):
    record.agree(config, folder, [], prompts, 40)
    return json.loads((folder / record.FILE).read_text())


@pytest.mark.case("first hour 5")
def test_a_workdir_says_config_versions_devices_and_what_the_command_line_changed(tmp_path):
    config = shapes("dmd", **{"train.steps": 7})
    given = ["--workdir=x", "--config=shapes:dmd", "--config.train.steps=7"]
    record.agree(config, tmp_path, given, "digest", None)
    said = json.loads((tmp_path / record.FILE).read_text())
    assert said["config"]["objective.name"] == "kl" and said["config"]["train.steps"] == 7
    assert said["arguments"] == given[1:]
    assert said["versions"]["python"] == platform.python_version()
    assert said["versions"]["jax"] == jax.__version__
    assert said["devices"]["count"] == jax.device_count() and "git" in said
    assert said["run"].endswith("changed: train.steps=7")


@pytest.mark.case("first hour 5")
def test_a_run_is_said_in_one_line_of_words():
    line = record.sentence(shapes(), ["--config=shapes", "--config.seed", "3"])
    assert line.startswith(
        "di_star: pseudo-Huber score divergence in x0, guidance 2 inside; reward 15 x pickscore; "
        "learning rates 0.0001 (generator) and 0.0002 (assistant); batch 32, seed 0; 200 steps "
        "after 40 of the assistant alone; prompts "
    )
    assert line.endswith("; changed: seed=0") and "\n" not in line
    outside = record.sentence(shapes("di_star_outside"))
    assert "guidance 2 outside" in outside
    assert "no guidance; no reward" in record.sentence(shapes("inside_0_0"))
    for preset in presets("shapes"):
        assert record.sentence(shapes(preset)).split(":")[0] in OBJECTIVES


@pytest.mark.case("first hour 4")
def test_another_config_in_the_same_workdir_is_refused_with_the_differences(begun):
    with pytest.raises(UserError) as error:
        again(begun, shapes("dmd"))
    line = str(error.value)
    assert "\n" not in line and f"{begun} holds another run: " in line
    assert "objective.name was 'di_star', is 'kl'; " in line
    assert "reward.pickscore was 15.0, is 0.0" in line
    assert line.endswith("give another --workdir, or the same values")
    record.agree(shapes("dmd"), begun, [], "digest", None)  # nothing is trained yet


def test_what_may_change_is_said_and_kept(begun, capsys):
    said = again(begun, shapes(**{"train.steps": 300, "optim.generator_lr": 5e-5, "mesh.fsdp": 2}))
    assert "changed since the last start: " in capsys.readouterr().out
    (change,) = said["changes"]
    assert change["step"] == 40 and change["train.steps"] == [200, 300]
    assert change["optim.generator_lr"] == [1e-4, 5e-5] and change["mesh.fsdp"] == [1, 2]
    said = again(begun, shapes(**{"train.steps": 300, "optim.generator_lr": 5e-5, "mesh.fsdp": 2}))
    assert capsys.readouterr().out == "" and said["changes"] == [change]


def test_prompts_are_known_by_their_content(begun, tmp_path):
    again(begun, shapes(**{"data.prompts": "elsewhere.txt"}))
    with pytest.raises(
        UserError, match="run on other prompts: data.prompts=.* has another content"
    ):
        again(begun, shapes(), prompts="another")


def test_weights_may_have_moved_but_not_be_others(begun, tmp_path):
    with pytest.raises(UserError, match="weights.reference was .*, is 'other/model'"):
        again(begun, shapes(**{"weights.reference": "other/model"}))
    gone = str(tmp_path / "gone")
    record.agree(shapes(**{"weights.reference": gone}), begun, [], "digest", None)
    again(begun, shapes())
    again(begun, shapes(**{"weights.hpsv2": "an/unused-reward"}))


def test_a_workdir_of_earlier_defaults_is_refused_with_the_differing_fields(begun):
    said = json.loads((begun / record.FILE).read_text())
    said["config"] |= {"objective.weighting": "eps", "objective.omega": 5.0}
    (begun / record.FILE).write_text(json.dumps(said))
    with pytest.raises(UserError) as error:
        again(begun, shapes())
    assert "objective.omega was 5.0, is 2.0; objective.weighting was 'eps', is 'x0'" in str(
        error.value
    )


def test_a_run_of_another_shapes_world_is_refused_with_both_versions(begun):
    said = json.loads((begun / record.FILE).read_text())
    said["versions"]["di_star_jax"] = "0.9.0"
    others = said["weights"] | {"weights.reference": "0123"}
    for weights in (others, None):  # an older version did not keep them
        (begun / record.FILE).write_text(json.dumps(said | {"weights": weights}))
        with pytest.raises(UserError, match="world of di_star_jax 0.9.0, this is .* other weights"):
            again(begun, shapes())


def test_a_workdir_of_an_older_version_goes_on_with_a_warning(tmp_path, capsys):
    said = again(tmp_path, shapes())
    assert "warning: " in capsys.readouterr().out and said["config"]["seed"] == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"config": 3}'])
def test_a_damaged_config_of_a_workdir_is_named(begun, content):
    (begun / record.FILE).write_text(content)
    with pytest.raises(UserError, match="config.json is not what a run wrote; delete it"):
        again(begun, shapes())
