# SPDX-License-Identifier: Apache-2.0
"""Scores a generator, or a folder of images, on a set of prompts.

    di-star evaluate --checkpoint=WORKDIR --prompts=FILE \\
        --metrics=pickscore,saturation --out=evals/after
    di-star evaluate --images=FOLDER --name=FLUX-dev --prompts=FILE \\
        --metrics=pickscore,saturation --baseline=evals/after --out=evals/flux
    di-star evaluate --images=SAMPLES --metrics=pickscore --out=evals/samples

Leaves results.json, scores.parquet, table.md and page.html in --out. Stopped, the same command
continues; with other --metrics it adds them. What `sample` has written needs no --prompts.
"""

from absl import flags

from di_star_jax import rewards, sample
from di_star_jax.command import run as run_command
from di_star_jax.evaluation import metrics, page, results, table
from di_star_jax.evaluation.job import Request
from di_star_jax.evaluation.run import evaluate
from di_star_jax.prompts.sets import PROMPT_SETS
from di_star_jax.rewards.custom import is_custom
from di_star_jax.storage.files import expand


def define_flags() -> None:  # not at import: other commands have flags of the same names
    """All flags; those of `sample` say how images are drawn."""
    sample.define_flags()
    flags.DEFINE_string(
        "images",
        None,
        "Folder of images in the prompts' order, here or in a bucket, or .json of prompt to file, "
        "in place of --checkpoint. Transparency is dropped.",
    )
    flags.DEFINE_string(
        "prompts",
        None,
        f"One of {', '.join(PROMPT_SETS)}, or a file; not needed for --images of `sample`.",
    )
    flags.DEFINE_string("prompts_file", None, "Path or URL of a named set's published file.")
    flags.DEFINE_integer(
        "num_prompts",
        None,
        "How many of the prompts; all if not given.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "samples",
        1,
        "Images of each prompt, each of its own noise: 3 or more also show the spread over noise.",
        lower_bound=1,
    )
    flags.DEFINE_list(
        "metrics",
        ["pickscore", "saturation", "contrast"],
        f"Some of {', '.join(metrics.names())}; or a function of your own, FILE:FUNCTION.",
    )
    flags.DEFINE_multi_string(
        "weights", [], "METRIC=FOLDER, where they are not the run's or the published ones."
    )
    flags.DEFINE_string(
        "tokenizer", None, "Folder or Hub name of CLIP's tokenizer, for the metrics."
    )
    flags.DEFINE_string(
        "features",
        "clipscore",
        "Metric whose CLIP gives the features of diversity and frechet.",
    )
    flags.DEFINE_string(
        "reference",
        None,
        "Folder of real images of frechet and FID; or .npz of statistics (frechet), or "
        "cleanfid:NAME (FID).",
    )
    flags.DEFINE_list(
        "trained_on",
        [],
        "Rewards that the generator was trained on, where its run does not say so.",
    )
    flags.DEFINE_string("name", None, "Name of the generator, in table and page.")
    flags.DEFINE_string("baseline", None, "--out of an earlier evaluation to compare with.")
    flags.DEFINE_string("out", None, "Folder for the results, or an address (gs://, s3://).")
    flags.DEFINE_integer("batch_size", 16, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("max_prompts", 200, "Prompts whose images the page shows.", lower_bound=1)


def _named(metric: str) -> str:
    """The name of a metric that may be a function of the user's own, FILE:FUNCTION."""
    return rewards.add(metric) if is_custom(metric) else metric


def _expanded(path: str | None) -> str | None:
    """~ is the home folder. Names, URLs and other paths stay as they are."""
    return str(expand(path)) if path and path.startswith("~") else path


def _expanded_source(text: str) -> str:
    """As `_expanded`, of METRIC=FOLDER."""
    name, equals, source = text.partition("=")
    return name + equals + _expanded(source)


def request() -> Request:
    """What the flags ask for."""
    args = flags.FLAGS
    return Request(
        checkpoint=_expanded(args.checkpoint),
        reference_pipeline=_expanded(args.reference_pipeline),
        which=args.which,
        sampling=sample.asked(),
        dtype=args.dtype,
        seed=args.seed,
        images=_expanded(args.images),
        prompts=_expanded(args.prompts),
        prompts_file=_expanded(args.prompts_file),
        num_prompts=args.num_prompts,
        samples=args.samples,
        metrics=tuple(dict.fromkeys(map(_named, args.metrics))),
        weights=tuple(map(_expanded_source, args.weights)),
        tokenizer=_expanded(args.tokenizer),
        features=args.features,
        reference=_expanded(args.reference),
        trained_on=tuple(args.trained_on),
        name=args.name,
        baseline=_expanded(args.baseline),
        out=_expanded(args.out),
        batch_size=args.batch_size,
        fsdp=args.fsdp,
        max_prompts=args.max_prompts,
    )


def main() -> None:
    asked = request()
    out = evaluate(asked).folder
    print((out / table.FILE).read_text(encoding="utf-8"))
    print(f"wrote {results.FILE}, {results.SCORES}, {table.FILE} and {page.FILE} in {asked.out}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
