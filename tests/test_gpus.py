# SPDX-License-Identifier: Apache-2.0
"""The whole step compiled for GPUs that are not here, by XLA's CUDA compiler.

It needs no PyTorch, so that the compiler's 4 GB can have an environment of their own:
`pip install -e '.[cuda]' pytest`.
"""

import importlib.util
import json
import re

import pytest
from test_benchmark import check_ops
from test_config import load as load_config
from test_step import CONFIGS, TEXT
from test_train import UNET

from di_star_jax import benchmark, sharding
from di_star_jax.cost import compile as aot
from di_star_jax.cost import gpus, plan
from di_star_jax.pipelines import folder as pipeline

pytestmark = [
    pytest.mark.skipif(
        not any(importlib.util.find_spec(plugin) for plugin in gpus.PLUGINS),
        reason="needs the CUDA compiler, .[cuda]",
    ),
    pytest.mark.slow,
]
# One layer of each kind: what the compiler does with it is the same, and takes minutes. 64 pixels
# are 32 x 32 tokens, with which attention is cuDNN's.
SHALLOW = {**TEXT, "num_hidden_layers": 1}
SMALL = {
    **CONFIGS,
    "unet": {**UNET, "block_out_channels": [64]},
    "text_encoder": {**CONFIGS["text_encoder"], **SHALLOW},
    "text_encoder_2": {**CONFIGS["text_encoder_2"], **SHALLOW},
    "reward": {
        **CONFIGS["reward"],
        "text_config": SHALLOW,
        "vision_config": {**CONFIGS["reward"]["vision_config"], "num_hidden_layers": 1},
    },
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config with config.json files of a small SDXL; no weights."""
    out = tmp_path_factory.mktemp("configs")
    for name, content in SMALL.items():
        (out / name).mkdir()
        (out / name / "config.json").write_text(json.dumps(content))
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (out / "model_index.json").write_text(json.dumps(index))
    config = load_config("sdxl")
    config.update_from_flattened_dict(
        {
            "weights.reference": str(out),
            "weights.pickscore": str(out / "reward"),
            "data.resolution": 64,
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "eval.prompts": "",
            "compute.loop_networks": False,
        }
    )
    return config


@pytest.mark.parametrize("count", [1, 2])
def test_the_step_compiles_for_gpus_with_their_kernels_and_doubles_nothing(
    small, count, monkeypatch
):
    monkeypatch.setattr(sharding, "SMALL", 512)  # so that leaves of a small UNet are split, too
    compile_work, programs = aot.compile_work, []

    def kept(*args, **options):
        compiled = compile_work(*args, **options)
        programs.append(compiled.run.as_text())
        return compiled

    monkeypatch.setattr(aot, "compile_work", kept)
    request = benchmark.Request("train", "small", topology=f"h100:{count}", ops=True)
    result = benchmark.run(small, request)
    check_ops(result)
    text = benchmark.report(result)
    assert f"over {count} NVIDIA H100 80GB HBM3" in text and "attention cudnn" in text
    assert re.search(r"GB arguments, .* GB at the peak of 85\.0 GB", text)
    assert "flags for h100, not set" in text and "lacks" not in result

    (program,) = programs
    # Kernels of the library's own, in both directions.
    assert "__cudnn$fmhaSoftmax" in program and "__cudnn$fmhaSoftmaxBackward" in program
    assert "__cudnn$convForward" in program
    # Generator and assistant, their second moments and the average: each large leaf on one device.
    unet = pipeline.abstract_model(SMALL["unet"]).params
    state = 5 * 4 * plan.parameters(unet) / count
    assert state <= result["memory"]["aliased"] <= result["memory"]["arguments"]

    kinds = set(re.findall(r" (all-gather|all-to-all|all-reduce)(?:-start)?\(", program))
    if count == 1:
        assert not result["collectives"] and not kinds
        assert "received by a device" not in text
    else:
        assert {"all-gather", "all-to-all"} <= set(result["collectives"]) & kinds
        assert result["ops"]["received_bytes"] > 0
        assert re.search(r"all-gather a step +\d+, 0\.\d\d GB received by a device", text)
