# SPDX-License-Identifier: Apache-2.0
"""ablation.md: the ablation's tables and what is to be known of them."""

import math
import pathlib
from collections.abc import Sequence

from di_star_jax import log
from di_star_jax.storage import files
from di_star_jax.studies import figures, rows
from di_star_jax.studies.page import conclusion_of
from di_star_jax.studies.results import (
    REFERENCES,
    RISING,
    Results,
    Run,
    at_reward,
    ending,
    label_of,
    mean,
    missing,
    results_of,
    spread,
)
from di_star_jax.studies.world import CURVE_CAPTIONS, MEASURES, PER_CAPTION

SPREAD = "Mean ± standard deviation over seeds: how far another seed's run lies away."
_NAMED = 5  # of the missing runs
_INTRODUCTIONS = {
    "paper": """Scales are the paper's: reward 100 is 15 here, guidance 7.5 is 2 and 4.5 is 1.5
(`configs/shapes.py`). At one scale of the reward, objectives are regularised to different degrees:
this table shows the paper's rows, not which divergence is better; for that see the next one.""",
    "balance": """Each method at the same values of `reward.balance`: how hard the reward pulls on \
a sample, over how hard the
regulariser does, measured over a run's first 20 steps and fixed from there
([method.md](method.md)). A divergence keeps more than another where its line lies above it, at
equal attributes or distance, by more than seeds differ: bars are standard deviations over three
seeds, and points without one are of a single seed. The dotted line is the teacher's reward, whose
distance to itself is none.""",
    "hacking": """The reward is a network that learnt a taste, warm light that falls from above, \
from pairs of pictures; `taste` is
that taste itself, which no run sees: a reward that rises while the taste does not is hacked.

What a user watches for, who has no true taste: `attributes`, or any score that the run does not
train on, for where it falls while the reward still rises, the reward is gamed. `saturation`, for
colours that leave their value are drawn for the reward and not for the caption. And `diversity`:
where it falls, what is lost is lost for good, and here it rises, for no two pictures have the same
faults. Then take an earlier checkpoint, and lower the reward's scale, or set `reward.balance`.""",
    "distill": """One-step generators from nothing but the teacher, Diff-Instruct++'s first stage, \
by the presets of these names
(`configs/shapes.py`) stopped after 120 of their 800 steps of 32 pictures; rates are equal. The
dotted line is the generator that the package ships, the one that the other rows start from.""",
    "lora": """The same run twice, once with all numbers of both networks learning and once with \
adapters of rank 16 alone
(`configs/shapes.py:lora`), at the same reward scale, each at its own rates.""",
}
_AT_REWARDS = """At equal reward, linear between the two balances next to it, means over seeds:"""
_FIGURES = {
    "paper": ("ablation.png", "the same captions and noise in every row"),
    "balance": ("ablation_balance.png", "reward against attributes and distance, by method"),
    "hacking": ("ablation_hacking.png", "five signals over the steps, and the last pictures"),
    "distill": ("ablation_distill.png", "scores over the steps by loss, and the last pictures"),
}


def table(results: Results, group: str) -> str:
    """Markdown: mean and standard deviation over seeds, of a group and what it starts from."""
    names = [name for name in results if name in REFERENCES or rows.ROWS[name].group == group]
    header = ["row", "name", "seeds", *MEASURES, "best reward at step", "still rising"]
    return log.markdown_table(header, [_line(name, results[name]) for name in names])


def table_at_rewards(results: Results) -> str:
    """Markdown: every method where it has the same reward, between the balances it was run at."""
    measures = [name for name in MEASURES if name != "reward"]
    lines = []
    for reward in rows.REWARDS:
        for name, method in rows.METHODS.items():
            found = at_reward(results, name, reward)
            cells = ["beyond its balances"] + [""] * (len(measures) - 1)
            if found is not None:
                cells = [f"{found[measure]:.3f}" for measure in measures]
            lines.append([f"{reward:g}", method.label, *cells])
    return log.markdown_table(["reward", "method", *measures], lines)


def _line(name: str, runs: list[Run]) -> list[str]:
    cells = [_cell(mean(runs, measure), spread(runs, measure)) for measure in MEASURES]
    if name in REFERENCES:
        return [label_of(name), "", "", *cells, "", ""]
    best, rising = ending(runs)
    ends = [str(best), "yes" if rising else "no"]
    return [label_of(name), f"`{name}`", str(len(runs)), *cells, *ends]


def _cell(value: float, deviation: float) -> str:
    return f"{value:.3f}" + ("" if math.isnan(deviation) else f" ± {deviation:.3f}")


def text_of(
    results: Results,
    captions: int,
    seeds: Sequence[int],
    conclusion: str,
) -> str:
    """The page. Args: captions, how many; seeds, asked for, () for each row's own."""
    runs = [run for found in results.values() for run in found]
    count = sum(run.seconds > 0 for run in runs)
    hours = sum(run.seconds for run in runs) / 3600
    devices = ", ".join(sorted({run.device for run in runs}))
    sections = "\n".join(_section(results, group) for group in rows.GROUPS)
    return f"""# The paper's Table 2 in miniature

{_incomplete(missing(results, seeds))}Every row trains the shapes world's initial one-step \
generator for {rows.STEPS} steps of {rows.TRAIN_BATCH} pictures, twice as long under
"{rows.GROUPS["hacking"]}", after {rows.WARMUP} of the assistant alone, unless it is \
"{rows.GROUPS["distill"]}"; made by
`python -m di_star_jax.studies.ablation --workdir=runs/ablation --out=docs`, {count} runs in \
{hours:.1f} h on {devices}.

{SPREAD} All are measured on {captions} held-out captions,
{PER_CAPTION} pictures each, on the same noise. `attributes` is the share of what captions state \
that can be read back from the pixels; prompt
score, Frechet distance (to the teacher's pictures) and diversity (1 - cosine between pictures of a
caption) are of a CLIP that no row trains on; the teacher has distance 0 by definition. Where the
reward was best is of the curve, a point every {rows.EVERY} steps on \
{min(CURVE_CAPTIONS, captions)} captions; it is still rising where the
last point is higher than all before it by more than {RISING:g}.

{sections}
{conclusion}"""


def _incomplete(lacking: list[str]) -> str:
    return f"**Not complete: {told(lacking)}.**\n\n" if lacking else ""


def told(lacking: list[str]) -> str:
    """Such as "7 runs are missing: sid (seed 2), dmd (seed 0) and 5 more"."""
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    are = "runs are" if len(lacking) > 1 else "run is"
    return f"{len(lacking)} {are} missing: {', '.join(lacking[:_NAMED])}{more}"


def _section(results: Results, group: str) -> str:
    title = f"## {rows.GROUPS[group]}"
    if not _has(results, group):
        return f"{title}\n\nNot run yet.\n"
    text = f"{title}\n\n{_INTRODUCTIONS[group]}\n\n{table(results, group)}\n"
    if group == "balance":
        text += f"\n{_AT_REWARDS}\n\n{table_at_rewards(results)}\n"
    if group not in _FIGURES:
        return text
    figure, alt = _FIGURES[group]
    return f"{text}\n![{alt}]({figure})\n"


def _has(results: Results, group: str) -> bool:
    return any(row.name in results for row in rows.rows_of([group]))


def write_page(
    workdir: pathlib.Path,
    captions: list[str],
    seeds: Sequence[int],
    out: pathlib.Path,
) -> None:
    """OUT/ablation.md and its pictures from what is done; the conclusion that is there is kept.

    Args: captions, held-out ones; seeds, as of `text_of`.
    """
    results = results_of(workdir)
    figures.draw_grid(workdir, results, captions, out / _FIGURES["paper"][0])
    if _has(results, "balance"):
        figures.draw_balance(results, out / _FIGURES["balance"][0])
    for group in ("hacking", "distill"):
        if _has(results, group):
            figures.draw_curves(workdir, results, captions, group, out / _FIGURES[group][0])
    page = out / "ablation.md"
    files.write_text(page, text_of(results, len(captions), seeds, conclusion_of(page)))
