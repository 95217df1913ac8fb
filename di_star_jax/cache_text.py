# SPDX-License-Identifier: Apache-2.0
"""Writes what text encoders make of a config's prompts, once, for data.cache:

    di-star cache_text --config=pixart --out=cache/pixart
    di-star train --config=pixart --config.data.cache=cache/pixart --workdir=runs/pixart

A run then needs no text encoders: of PixArt-alpha that is 9.5 GB less in bfloat16. The cache is of
the prompts of data.prompts, the held-out ones of eval.prompts and the empty one, in compute.dtype,
with the token ids of the config's rewards. With several processes each does its part. Stopped, the
same command goes on.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from di_star_jax import assembly, log, processes, rewards, sharding
from di_star_jax.checks import check_prompts
from di_star_jax.command import run as run_command
from di_star_jax.errors import UserError
from di_star_jax.hosts import connect
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import single, text_cache
from di_star_jax.pipelines.family import TEXT
from di_star_jax.pipelines.folder import check_pipeline, load_model, load_tokenizers
from di_star_jax.pipelines.text_cache import ARRAYS, FILE, INDEX, SHARD, Arrays, named, shard_name
from di_star_jax.prompts import records
from di_star_jax.prompts.tokens import token_batch
from di_star_jax.storage import buckets, files, folders
from di_star_jax.train import check_lengths, eval_prompts, load_prompts, prompt_sections


def main() -> None:
    config, out = flags.FLAGS.config, flags.FLAGS.out
    if config is None:
        raise UserError("no --config; give that of the run, e.g. --config=pixart")
    if not out:
        raise UserError("no --out; give a folder for the cache, e.g. --out=cache/pixart")
    connect(os.environ)
    with processes.one_for_all():
        single.with_folders(config)
        write(config, out)


def write(config, out: str) -> None:
    """Writes the cache of a config's prompts, or what is missing of it.

    Raises: UserError for unusable inputs, and a folder with another cache or anything else.
    """
    check_prompts(config)
    place = Place(out)
    texts = texts_of(config)
    asked = asked_of(config, texts)
    processes.agree("prompts and text encoders", asked)
    begin(place, asked)
    shards = [texts[first : first + SHARD] for first in range(0, len(texts), SHARD)]
    mine = range(jax.process_index(), len(shards), jax.process_count())
    missing = [number for number in mine if not place.has(number)]
    if missing:
        encode = encoder_of(config)
        total, left = (sum(len(shards[number]) for number in part) for part in (mine, missing))
        with log.Progress(total, total - left, "prompt") as progress:
            for number in missing:
                write_shard(place, number, shards[number], encode(shards[number]))
                left -= len(shards[number])
                progress.update(total - left, "")
    processes.gather("text cache")
    if jax.process_index() == 0:
        finish(place, asked, texts)
    log.say(f"{len(texts):,} texts are in {out}; train with --config.data.cache={out}")


def texts_of(config) -> list[str]:
    """The prompts of a run, each once, and the empty one."""
    place = files.user_cache() / "prompts"
    with log.waiting("reading prompts"):
        sources = {s: load_prompts(config, s, place) for s in prompt_sections(config)}
        check_lengths(config, sources)
        texts = [prompt.text for prompt in sources["data"]]
    if "eval" in sources:
        texts += [prompt.text for prompt in eval_prompts(config, sources["eval"])]
    return list(dict.fromkeys(["", *texts]))


def asked_of(config, texts: list[str]) -> dict[str, Any]:
    """What tells one cache from another."""
    reference = folders.resolve(config.weights.reference)
    prompts = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    made_of = text_cache.made_of(reference, config.compute.dtype)
    return made_of | {
        "prompts": prompts,
        "rewards": sorted(assembly.reward_sources(config)),
        "texts": len(texts),
    }


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a cache is written: a folder of this machine, or one in a bucket."""

    out: str

    @property
    def _is_remote(self) -> bool:
        return buckets.is_remote(self.out)

    def _at(self, name: str) -> str:
        return buckets.child(self.out, name) if self._is_remote else str(self._folder / name)

    @property
    def _folder(self) -> Path:
        return files.expand(self.out)

    def prepare(self) -> None:
        """Makes the folder. Raises: UserError where nothing can be written there."""
        if self._is_remote:
            buckets.reach(self.out)
        else:
            files.writable_folder(self.out, "--out")

    def is_empty(self) -> bool:
        """Whether nothing is there, of anybody."""
        return not (buckets.listing(self.out) if self._is_remote else os.listdir(self._folder))

    def has(self, number: int) -> bool:
        """Whether a shard is there, whole."""
        name = self._at(shard_name(number))
        return buckets.committed(name) if self._is_remote else os.path.isdir(name)

    def new(self, number: int) -> AbstractContextManager[Path]:
        """A folder to write a shard in, which gets its place at the end."""
        name = self._at(shard_name(number))
        return buckets.new_folder(name) if self._is_remote else files.whole_folder(Path(name))

    def read_made(self) -> dict[str, Any]:
        """Content of FILE; {} where there is none."""
        if not self._is_remote:
            return files.read_json(self._folder / FILE)
        found = buckets.read_text(self._at(FILE))
        return json.loads(found.text) if found else {}

    def write_made(self, made: dict[str, Any]) -> None:
        """Writes FILE."""
        self.write(FILE, (json.dumps(made, indent=1) + "\n").encode())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, which is there whole or not at all."""
        folder = files.staging("text_cache") if self._is_remote else self._folder
        with files.whole(folder / name) as partial:
            partial.write_bytes(content)
        if self._is_remote:
            buckets.put(folder / name, self._at(name))


def begin(place: Place, asked: dict[str, Any]) -> None:
    """Says in FILE what is to be made, or looks whether it is what is there.

    Raises: UserError for another cache, and for a folder with something else.
    """
    place.prepare()
    # What one tries to write there another one must not take for somebody's file.
    processes.gather("text cache tried")
    kept = place.read_made()
    has_others = not kept and not place.is_empty()
    processes.gather("text cache read")
    if has_others:
        raise UserError(
            f"--out={place.out} holds other files and no {FILE}; give an empty or a new folder"
        )
    other = text_cache.differences(kept, asked) if kept else ""
    if other:
        raise UserError(
            f"--out={place.out} holds another cache, which differs in {other}; give another folder"
        )
    if jax.process_index() == 0 and not kept:
        place.write_made(asked)
    processes.gather("text cache begun")


def encoder_of(config) -> Callable[[list[str]], Arrays]:
    """Texts to arrays [N, ...] by name, on the devices of this process."""
    mesh = sharding.make_mesh(1, jax.local_device_count(), devices=jax.local_devices())
    sources = assembly.reward_sources(config)
    tokenizers = rewards.load_tokenizers(sources, config.weights.reward_tokenizer)
    states = states_of(config, mesh)
    size = batch_size(config)

    def batch(texts: list[str]) -> Arrays:
        """Of `size` texts at most, which are filled up for one shape, one compilation."""
        filled = texts + [""] * (size - len(texts))
        tree = {TEXT: states(filled), **token_batch(filled, tokenizers)}
        return {name: np.asarray(leaf)[: len(texts)] for name, leaf in named(tree).items()}

    def encode(texts: list[str]) -> Arrays:
        found = [batch(texts[first : first + size]) for first in range(0, len(texts), size)]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    return encode


def states_of(config, mesh: Mesh) -> Callable[[list[str]], Condition]:
    """B texts to what the reference's text encoders make of them, in compute.dtype."""
    reference = folders.resolve(config.weights.reference)
    family, _ = check_pipeline(reference)
    options = assembly.model_options(config, mesh)["text"]
    with log.waiting("loading text encoders", "minutes for T5-XXL"):
        encoders = {
            part: load_model(reference / family.parts[part].folder, options)
            for part in family.tokenizers.values()
        }
        tokenizers = load_tokenizers(reference, family)
    params = {name: encoder.params for name, encoder in encoders.items()}
    graphdefs = {name: encoder.graphdef for name, encoder in encoders.items()}
    encode = functools.partial(text_cache.encode, family, graphdefs)
    batch = sharding.batch_spec()
    in_specs = (sharding.params_spec(mesh, params), batch)
    run = jax.jit(sharding.on_each(mesh, encode, in_specs, batch))
    return lambda texts: run(params, token_batch(texts, tokenizers))


def batch_size(config) -> int:
    """Texts that this process encodes at a time: on each device as many as a step does, which then
    rounds the same way.
    """
    on_device = config.data.batch_size // config.compute.microbatches // jax.device_count()
    return max(1, on_device) * jax.local_device_count()


def write_shard(
    place: Place,
    number: int,
    texts: list[str],
    arrays: Arrays,
) -> None:
    """Args: number, of the shard; arrays, of the texts."""
    layout = text_cache.layout(arrays)
    with place.new(number) as folder:
        records.write(folder, text_cache.record_names(layout), text_cache.to_records(texts, arrays))
        files.write_text(folder / ARRAYS, json.dumps(layout, indent=1) + "\n")


def finish(
    place: Place,
    asked: dict[str, Any],
    texts: list[str],
) -> None:
    """Writes what a run reads first. Raises: UserError where a process's shards are not there."""
    shards = range(-(-len(texts) // SHARD))
    missing = [shard_name(number) for number in shards if not place.has(number)]
    if missing:
        raise UserError(
            f"--out={place.out} lacks {len(missing)} of {len(shards)} shards, the first is "
            f"{missing[0]}; give a folder that all processes see"
        )
    content = io.BytesIO()
    np.save(content, text_cache.hashes(texts))
    place.write(INDEX, content.getvalue())
    place.write_made(asked | {"finished": True})


def define_flags() -> None:  # not at import: other commands have flags of the same names
    """The flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "The run's: shapes, sdxl, sd15, pixart, or a file; :PRESET may follow."
    )
    flags.DEFINE_string("out", None, "Folder for the cache, or an address in a bucket.")


if __name__ == "__main__":
    define_flags()
    run_command(main)
