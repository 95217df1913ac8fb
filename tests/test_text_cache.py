# SPDX-License-Identifier: Apache-2.0
"""A cache of prompts: what is kept, who may train from it, and that it changes nothing."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
from test_config import dry
from test_convert import _error
from test_hosts import free_port, start
from test_pixart_pipeline import components
from test_sd15 import write_sd15
from test_train import config_for, write_pipeline

from di_star_jax import assembly, cache_text, train
from di_star_jax.cost import compile as cost_compile
from di_star_jax.cost import plan
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines import text_cache
from di_star_jax.pipelines.family import TEXT
from di_star_jax.prompts.tokens import token_batch
from di_star_jax.storage import buckets

PROMPTS = ["a red circle", "two", "a blue square, and a red one", "two", "A"]
HELD_OUT = ["blue", "a red circle"]
ALL = ["", "a red circle", "two", "a blue square, and a red one", "A", "blue"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def write_pixart(folder):
    diffusers.PixArtAlphaPipeline(**components(folder.parent)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of SDXL's family."""
    return write_prompts(write_pipeline(tmp_path_factory.mktemp("sdxl")))


def write_prompts(folder):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")
    return folder


def of(folder, **changes):
    """A run's config on a pipeline's folder, on one device."""
    fields = {"eval.prompts": str(folder / "held_out.txt"), "eval.batch_size": 2, "mesh.fsdp": 1}
    return config_for(folder, **fields | changes)


# Of other families nothing but a reward's tokenizer is in the folder.
NO_REWARD = {"reward.pickscore": 0.0, "eval.metrics": (), "eval.prompts": ""}


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "cache"
    cache_text.write(of(folder), str(out))
    return out


# What is kept.


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_sd15, id="sd15", marks=pytest.mark.long),
        pytest.param(write_pixart, id="pixart"),
    ],
)
def test_states_are_those_of_the_encoders(write, tmp_path):
    folder = write_prompts(write(tmp_path / "reference"))
    out = tmp_path / "cache"
    cache_text.write(of(folder, **NO_REWARD, **{"data.batch_size": 24}), str(out))
    found = text_cache.open_cache(str(out))
    text = found.batch(PROMPTS[:3], {})[TEXT]

    loaded = pipeline.load_pipeline(folder)
    params = {name: model.params for name, model in loaded.models.items()}
    ids = token_batch(PROMPTS[:3], loaded.tokenizers)
    live = jax.jit(lambda params, ids: loaded.encode_text(params, ids, 16))(params, ids)
    without = pipeline.load_pipeline(folder, of_empty=found.batch([""], {})[TEXT])
    assert "text_encoder" not in without.models
    kept = without.encode_text({}, {TEXT: text}, 16)
    for ours, expected in zip(kept, live):
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        seen = np.ones(ours.context.shape[:2], bool) if ours.mask is None else ours.mask
        np.testing.assert_array_equal(ours.mask, expected.mask)
        assert not ours.context[~seen].any()
        # To rounding: the encoders run over eight devices here. A run's losses are equal, below.
        np.testing.assert_allclose(ours.context[seen], expected.context[seen], atol=2e-6)


def test_padding_is_not_written(tmp_path):
    texts = {"text.context": np.zeros((1, 120, 4096), "float16"), "text.mask": np.zeros((1, 120))}
    texts["text.context"][0, :2] = 1.0
    [record] = text_cache.to_records(["two tokens"], texts)
    assert len(record["text.context"]) == 2 * 4096 * 2 and record["text.mask"] == b""


def test_every_text_is_kept_once_with_the_rewards_token_ids(cache, folder):
    found = text_cache.open_cache(str(cache))
    assert found.made["texts"] == len(ALL) and not found.lacking(ALL)
    assert found.lacking(["two", "three", "", "four"]) == ["three", "four"]
    config = of(folder, **{"data.cache": str(cache)})
    mesh = train.sharding.make_mesh(8, 1)
    live = assembly.load_parts(of(folder), mesh)
    held = assembly.load_parts(config, mesh, found)
    batch = held.tokenize(["two", "A"])
    np.testing.assert_array_equal(batch["pickscore"], live.tokenize(["two", "A"])["pickscore"])
    assert batch.keys() == {TEXT, "pickscore"}
    encoders = {"text_encoder", "text_encoder_2"}
    assert live.frozen().keys() - held.frozen().keys() == encoders
    assert not encoders & held.pipeline.models.keys()


def test_rewards_that_came_later_read_the_prompts_themselves(cache, folder, tmp_path):
    later = tmp_path / "later"
    shutil.copytree(cache, later)
    layout = later / "00000" / text_cache.ARRAYS
    arrays = json.loads(layout.read_text())
    del arrays["pickscore"]
    layout.write_text(json.dumps(arrays))
    found = text_cache.open_cache(str(later))
    parts = assembly.load_parts(of(folder), train.sharding.make_mesh(8, 1), found)
    ids = parts.tokenize(["two"])
    np.testing.assert_array_equal(ids["pickscore"], parts.rewards["pickscore"].tokenize(["two"]))


# Who may train from it.


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = ("loss", "norm", "reward", "pull")
    return [
        {name: value for name, value in json.loads(line).items() if any(k in name for k in kept)}
        for line in lines
    ]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_pipeline, marks=pytest.mark.long),
        pytest.param(write_sd15, marks=pytest.mark.long),
        pytest.param(write_pixart, marks=pytest.mark.long),
    ],
    ids=["sdxl", "sd15", "pixart"],
)
def test_a_run_from_a_cache_has_the_same_losses_to_the_last_bit(write, tmp_path):
    (tmp_path / "reference").mkdir()
    folder = write_prompts(write(tmp_path / "reference"))
    denoiser = "transformer" if write is write_pixart else "unet"
    fields = NO_REWARD | {
        "weights.generator": str(folder / denoiser),
        "objective.name": "kl",
        "assistant.warmup_steps": 0,
        "mesh.fsdp": 1,
    }
    out = tmp_path / "cache"
    cache_text.write(config_for(folder, **fields), str(out))
    train.run(config_for(folder, **fields), str(tmp_path / "without"))
    train.run(config_for(folder, **fields, **{"data.cache": str(out)}), str(tmp_path / "with"))
    found = losses(tmp_path / "with")
    assert len(found) >= 3 and found == losses(tmp_path / "without")


def refused(config):
    return _error(train.open_text_cache, config, sources(config))


def sources(config):
    return {s: train.load_prompts(config, s, cache_text.files.user_cache()) for s in ("data",)}


def test_a_cache_that_does_not_match_is_refused_in_one_line(cache, folder, tmp_path):
    config = of(folder, **{"data.cache": str(cache)})
    assert train.open_text_cache(config, sources(config)).made["texts"] == len(ALL)
    error = refused(of(folder, **{"data.cache": str(tmp_path)}))
    assert "no text cache in" in error and "di-star cache_text" in error
    error = refused(of(folder, **{"data.cache": str(cache), "compute.dtype": "bfloat16"}))
    assert "dtype 'float32', expected 'bfloat16'" in error

    (tmp_path / "more.txt").write_text("two\nthree\nfour\n")
    more = {"data.cache": str(cache), "data.prompts": str(tmp_path / "more.txt")}
    error = refused(of(folder, **more))
    assert "lacks 2 of the 3 prompts of data.prompts, the first is 'three'" in error

    def other(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy / name)
        return copy

    def swap_two(tokenizer):
        content = json.loads((tokenizer / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        a, red = vocab["a</w>"], vocab["red</w>"]
        vocab |= {"a</w>": red, "red</w>": a}
        (tokenizer / "tokenizer.json").write_text(json.dumps(content))

    def change_last(encoder):
        content = (encoder / "model.safetensors").read_bytes()
        (encoder / "model.safetensors").write_bytes(content[:-4] + b"\1\1\1\1")

    swapped = other("tokenizer", swap_two)
    for reference, told in (
        (other("text_encoder", change_last), "text encoders"),
        (swapped, "tokenizers"),
    ):
        error = refused(of(reference, **{"data.cache": str(cache)}))
        assert f"was made of other text encoders: {told};" in error
    changes = {"data.cache": str(cache), "weights.reward_tokenizer": str(swapped / "tokenizer")}
    assert "token ids of another tokenizer for pickscore" in refused(of(folder, **changes))


@pytest.mark.long
def test_a_plan_with_a_cache_holds_no_text_encoders():
    config = dry(**{"data.cache": "cache/sdxl"})
    planned = plan.make(config, 16, "cpu")
    assert not {"text_encoder", "text_encoder_2"} & planned.parameters.keys()
    assert planned.parameters["vae"] == 83_653_863


def test_a_step_is_compiled_with_a_cache_that_is_not_there(folder):
    config = config_for(folder, **{"data.cache": "cache/none"})
    mesh = cost_compile.sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    work = cost_compile.train_work(config.copy_and_resolve_references(), mesh)
    _, frozen, ids, _ = work.args
    assert ids[0][TEXT].context.shape == (8, 8, 32) and "text_encoder" not in frozen


# How it is written.


def test_a_stopped_command_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_text, "SHARD", 2)
    monkeypatch.setattr(text_cache, "SHARD", 2)
    out = tmp_path / "cache"
    written = cache_text.write_shard

    def write_two(place, number, *others):
        if number == 2:
            raise KeyboardInterrupt
        written(place, number, *others)

    monkeypatch.setattr(cache_text, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        cache_text.write(of(folder), str(out))
    assert "is not finished" in _error(text_cache.open_cache, str(out))
    first = (out / "00000" / text_cache.ARRAYS).stat().st_mtime_ns
    monkeypatch.setattr(cache_text, "write_shard", written)
    cache_text.write(of(folder), str(out))
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["00000", "00001", "00002"]
    assert (out / "00000" / text_cache.ARRAYS).stat().st_mtime_ns == first
    found = text_cache.open_cache(str(out))
    assert not found.lacking(ALL) and len(found.read(ALL)["pickscore"]) == len(ALL)

    error = _error(cache_text.write, of(folder, **{"compute.dtype": "bfloat16"}), str(out))
    assert "holds another cache" in error and "dtype 'float32', expected 'bfloat16'" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    assert "holds other files" in _error(cache_text.write, of(folder), str(tmp_path / "mine"))


def test_a_cache_in_a_bucket(folder, bucket):
    url = f"{bucket.url}/text/cache"
    cache_text.write(of(folder), url)
    bucket.forget()
    cache_text.write(of(folder), url)
    assert not any("arrays.json" in path for method, path, _ in bucket.log if method == "POST")
    config = of(folder, **{"data.cache": url})
    cache = train.open_text_cache(config, sources(config))
    assert cache.read(["two"])["text.context"].any() and buckets.committed(f"{url}/00000")


BOTH = """
import os, pathlib, sys
from di_star_jax import cache_text, hosts, processes
from di_star_jax.pipelines import text_cache
hosts.connect(os.environ)
import jax
cache_text.SHARD = text_cache.SHARD = 2
written = cache_text.write_shard
def noted(place, number, *others):
    written(place, number, *others)
    print(f"process {jax.process_index()} shard {number}", flush=True)
cache_text.write_shard = noted
from test_text_cache import of
with processes.one_for_all():
    cache_text.write(of(pathlib.Path(sys.argv[1])), sys.argv[2])
"""


def test_a_process_that_is_slower_than_the_first_takes_nothing_of_it_for_others_files(
    tmp_path, monkeypatch
):
    place, asked = cache_text.Place(str(tmp_path)), {"texts": 2}

    def gather(name):
        """While this one waits at a barrier the first one does what it does before it comes."""
        tried = tmp_path / ".try"
        if name == "text cache tried":
            tried.rmdir()
        if name == "text cache read":
            place.write_made(asked)

    (tmp_path / ".try").mkdir()
    monkeypatch.setattr(cache_text.processes, "gather", gather)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    cache_text.begin(place, asked)
    assert place.read_made() == asked


@pytest.mark.long
def test_two_processes_write_their_shards_of_one_cache(folder, tmp_path):
    out, port = tmp_path / "cache", free_port()
    both = [start(BOTH, (folder, out), devices=1, port=port, index=i) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    for i, shards in enumerate(([0, 2], [1])):
        lines = [line for line in said[i].splitlines() if line.startswith("process")]
        assert lines == [f"process {i} shard {number}" for number in shards], said[i]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cache, "SHARD", 2)
        found = text_cache.open_cache(str(out))
        assert not found.lacking(ALL) and found.read(ALL)["text.context"].any(axis=(1, 2)).all()
