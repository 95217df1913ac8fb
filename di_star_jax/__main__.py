# SPDX-License-Identifier: Apache-2.0
"""The commands by name: `di-star COMMAND`, which is `python -m di_star_jax.MODULE`."""

import runpy
import sys

from di_star_jax import __version__
from di_star_jax.errors import UserError, exit_on_user_error, nearest

COMMANDS = {
    "train": ("main", "Aligns a one-step generator: --config=shapes --workdir=runs/first."),
    "sample": ("sample", "Draws pictures from prompts; alone, a grid by the shipped generator."),
    "evaluate": ("evaluate", "Scores a generator, or a folder of pictures, on many prompts."),
    "collect": ("rewards.collect", "Asks which of two pictures you like better, for a reward."),
    "reward": ("rewards.train", "Trains a reward on preference pairs: docs/rewards.md."),
    "cache_text": ("cache_text", "Encodes prompts once, for runs without text encoders."),
    "convert": ("convert", "Turns checkpoints into folders for diffusers, and back."),
    "benchmark": ("benchmark", "Measures what a step costs; or compiles it for a TPU slice."),
    "pretrain": ("pretrain", "Makes the shapes world's checkpoint from nothing."),
    "ablation": ("studies.ablation", "Trains every method on the shapes world: docs/ablation.md."),
    "optimum": ("studies.optimum", "Trains them where the optimum is known: docs/mixture.md."),
    "mixture": ("studies.mixture", "Trains every objective on points in a plane: docs/mixture.md."),
}


def overview() -> str:
    """What there is, a line each."""
    rows = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: di-star COMMAND --flag=value ...",
            "",
            *rows,
            "",
            "Try `di-star sample`. `di-star COMMAND --help` lists a command's flags,",
            "`di-star train --config=shapes --help` the presets and fields of a config.",
        ]
    )


def _run(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        near = nearest(name, list(COMMANDS), 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}, {hint}")
    sys.argv = [f"di-star {name}", *arguments[1:]]
    runpy.run_module(f"di_star_jax.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)


def main() -> None:
    """The console command."""
    exit_on_user_error(_run)(sys.argv[1:])


if __name__ == "__main__":
    main()
