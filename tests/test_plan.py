# SPDX-License-Identifier: Apache-2.0
import pytest
from test_config import dry

from di_star_jax import plan
from di_star_jax.config import UserError


def test_dry_run_of_sdxl_counts_parameters_and_memory_without_weights_or_devices():
    text = "\n".join(plan.describe(dry(), device_count=1))
    assert "16 devices; this machine has 1" in text
    assert "parameters: unet 2,567,463,684" in text
    assert "parameters: reward 986,109,441" in text
    assert "memory per chip: generator, assistant (float32) 1.28 GB" in text


def test_state_is_what_two_networks_with_adam_and_average_take():
    counts = {"unet": 2_567_463_684}
    memory = plan.memory_per_chip(dry(), counts, fsdp=1, per_device=1)
    state = sum(memory[name] for name in ("generator, assistant (float32)", "moments of both", "average (EMA)"))
    assert state == 2_567_463_684 * 4 * 7  # 72 GB, what a checkpoint holds
    assert plan.memory_per_chip(dry(), counts, fsdp=16, per_device=1)["moments of both"] == 2_567_463_684


def test_unknown_weights_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="weights.reward=some/model is no local folder and not known here"):
        plan.model_configs(dry(**{"weights.reward": "some/model"}))
