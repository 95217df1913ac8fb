# SPDX-License-Identifier: Apache-2.0
"""What the ablation trains: a row is a preset of the shapes world with a few fields changed."""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from di_star_jax.config import load_config

STEPS = 120
TRAIN_BATCH = 16  # half of configs/shapes.py's, so that all rows fit in a night
EVERY = 40  # steps, a point of the curve; divides STEPS and WARMUP
WARMUP = 40  # of the assistant alone, before them
# Of `reward.balance`: the reward's pull on a sample over the regulariser's.
BALANCES = (0.1, 0.4, 1.6, 6.4)
# At which the methods are compared, between the balances.
REWARDS = (0.65, 0.7, 0.75)
# Rows that the conclusions rest on: three seeds instead of one.
CONCLUSIVE = ("di_star_x0@0.4", "di_star_x0@1.6", "kl_x0@0.4", "kl_x0@1.6")
GROUPS = {  # the title of its section
    "paper": "Table 2 at the paper's scales",
    "balance": "All methods at equal balance",
    "hacking": "Reward hacking: what to watch for",
    "distill": "From the teacher alone, by loss",
    "lora": "Adapters alone, beside whole matrices",
}


class Row(NamedTuple):
    """One line of a table.

    name: its folder, and what --rows takes. label: what the table and figures call it. group: a
    key of GROUPS. preset: of the config. overrides: values by the full names of its fields. length:
    in STEPS, about, of "distill", which has a batch of its own.
    """

    name: str
    label: str
    group: str
    preset: str
    overrides: Mapping[str, Any] = types.MappingProxyType({})
    length: int = 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that are trained if the user does not say."""
        return (0, 1, 2) if self.name in CONCLUSIVE or self.group == "lora" else (0,)


class Method(NamedTuple):
    """One of the methods that are compared at equal balance: a label, a preset and its fields."""

    label: str
    preset: str
    overrides: Mapping[str, Any] = types.MappingProxyType({})


METHODS = {
    "di_star_x0": Method("DI*, pseudo-Huber in x0", "di_star"),
    "di_star_eps": Method("DI*, pseudo-Huber in eps", "di_star", {"objective.weighting": "eps"}),
    "kl_x0": Method("KL in x0", "di_pp"),
    "kl_eps": Method("KL in eps", "di_pp", {"objective.weighting": "eps"}),
    "l2": Method("L2, normalised", "di_star_l2"),
    "outside": Method("DI*, guidance outside", "di_star_outside"),
}
_PAPER = {  # preset: the row of the paper's Table 2, or what it stands for here
    "kl_0_0": "KL (0, 0)",
    "kl_0_0_null": "KL (0, 0), omega = 0",
    "diff_instruct": "KL (0, 7.5), Diff-Instruct",
    "di_pp": "KL (100, 7.5), Diff-Instruct++",
    "di_star_outside": "DI* outside (100, 7.5)",
    "inside_0_0": "DI* inside (0, 0)",
    "inside_0_0_null": "DI* inside (0, 0), omega = 0",
    "sim": "DI* inside (0, 7.5), SIM",
    "inside_1_7.5": "DI* inside (1, 7.5)",
    "inside_10_7.5": "DI* inside (10, 7.5)",
    "inside_100_4.5": "DI* inside (100, 4.5)",
    "di_star": "DI* inside (100, 7.5)",
    "di_star_l2": "L2 (100, 7.5)",
    "sid": "SiD, alpha 1 (0, 7.5)",
    "dmd": "DMD (0, 7.5)",
    "reward_only": "reward only",
}
_HACKING = (
    Row("good_run", "the good run", "hacking", "di_star", length=2),
    Row(
        "reward_times_10",
        "reward ten times too large",
        "hacking",
        "di_star",
        {"reward.pickscore": 150.0},
        length=2,
    ),
    Row("no_regulariser", "no regulariser", "hacking", "reward_only", length=2),
)

# Of the preset's 800: the losses are told apart long before its end.
_BEGINNING = {"train.steps": 120, "train.save_every": 20}
_DISTILLED = {  # preset: the loss
    "distill": "DMD",
    "distill_diff_instruct": "Diff-Instruct",
    "distill_sim": "SIM",
    "distill_sid": "SiD, alpha 1",
}

_LORA = (
    Row("whole_matrices", "whole matrices learn", "lora", "di_star"),
    Row("lora", "adapters of rank 16 learn", "lora", "lora"),
)


def balanced_name(method: str, balance: float) -> str:
    """The row of a method at a balance. Args: method, a key of METHODS."""
    return f"{method}@{balance:g}"


def _balanced(name: str, balance: float) -> Row:
    method, row = METHODS[name], balanced_name(name, balance)
    return Row(
        row,
        f"{method.label}, balance {balance:g}",
        "balance",
        method.preset,
        {**method.overrides, "reward.balance": balance},
    )


def _rows() -> list[Row]:
    paper = [Row(name, label, "paper", name) for name, label in _PAPER.items()]
    balanced = [_balanced(name, balance) for name in METHODS for balance in BALANCES]
    distilled = [
        Row(name, label, "distill", name, _BEGINNING, length=2)
        for name, label in _DISTILLED.items()
    ]
    return [*paper, *balanced, *_HACKING, *distilled, *_LORA]


ROWS = {row.name: row for row in _rows()}


def rows_of(names: list[str]) -> list[Row]:
    """The rows of names of rows and of groups, in the order given; all of them for none."""
    found = {}
    for name in names or GROUPS:
        group = [row for row in ROWS.values() if row.group == name]
        found |= {row.name: row for row in group or [ROWS[name]]}
    return list(found.values())


def config_of(
    row: Row,
    file: str,
    seed: int,
) -> Any:
    """The config of a run. Args: file, as --config."""
    config = load_config(file, row.preset)
    config.update_from_flattened_dict({"seed": seed, "eval.prompts": ""})
    if row.group != "distill":
        config.update_from_flattened_dict(
            {
                "train.steps": row.length * STEPS,
                "train.save_every": EVERY,
                "assistant.warmup_steps": WARMUP,
                "data.batch_size": TRAIN_BATCH,
            }
        )
    config.update_from_flattened_dict(dict(row.overrides))
    # all of them: a stop leaves one more than the points
    config.train.keep = config.train.steps + config.assistant.warmup_steps
    return config


def points_of(config) -> range:
    """Steps of a run that are measured."""
    every = config.train.save_every
    return range(every, config.train.steps + 1, every)
