# SPDX-License-Identifier: Apache-2.0
"""The figures of the ablation's page, in the size that a page on GitHub shows."""

import pathlib
import re
import textwrap

import numpy as np

from di_star_jax.pictures import to_uint8
from di_star_jax.studies import rows
from di_star_jax.studies.results import (
    INIT,
    TEACHER,
    Results,
    Run,
    curve,
    folder_of,
    label_of,
    mean,
    spread,
)

WIDTH = 8.6  # inches; at 96 dpi the 830 pixels of a page, so that 8 points are 8 points there
DPI = 120
COLUMNS = 6  # of pictures, a caption each
# Rows whose pictures stand on the page, those that are done.
SHOWN = (
    INIT,
    TEACHER,
    "diff_instruct",
    "di_pp",
    "di_star_outside",
    "di_star_l2",
    "di_star",
    "dmd",
    "reward_only",
)
# Okabe and Ito's colours, which colour-blind people can tell apart; without the yellow.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "h", "p", "8")
_INK = ("white", "black", "white", "black", "white", "black")  # readable on these colours
# Measures of a group's curves: five, for the legend is the sixth panel.
_CURVES = {
    "hacking": ("reward", "taste", "saturation", "diversity", "attributes"),
    "distill": ("attributes", "prompt score", "Frechet distance", "saturation", "diversity"),
}
_TITLES = {
    "reward": "reward (cosine)",
    "taste": "the true taste",
    "saturation": "saturation",
    "diversity": "diversity",
    "attributes": "attributes right",
    "prompt score": "prompt score (cosine)",
    "Frechet distance": "Frechet distance",
}
# Of the figure of balances: what is measured, as a number that is better when small; its title.
_FAULTS = {
    "attributes": (lambda right: max(1.0 - right, 1e-3), "attributes wrong (better to the right)"),
    "Frechet distance": (lambda d: d, "Frechet distance to the teacher (better to the right)"),
}


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=DPI)


def draw_grid(
    workdir: pathlib.Path,
    results: Results,
    captions: list[str],
    path: pathlib.Path,
) -> None:
    """A row of pictures for each of SHOWN that is done, the same captions and noise in each."""
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if name in results]
    figure = Figure(figsize=(WIDTH, 1.16 * len(names) + 1.0), layout="constrained")
    _draw_pictures(figure, workdir, {name: results[name] for name in names}, captions)
    _save(figure, path)


def _draw_pictures(
    figure,
    workdir: pathlib.Path,
    results: Results,
    captions: list[str],
) -> None:
    """Rows of pictures with names on the left and captions above."""
    axes = figure.subplots(len(results), COLUMNS, squeeze=False)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(textwrap.fill(caption, 19), fontsize=8)
    for row, (name, runs) in zip(axes, results.items()):
        pictures = np.load(folder_of(workdir, name, runs[0].seed) / "pictures.npy")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, image in zip(row, pictures):
            axis.imshow(to_uint8(image), interpolation="lanczos")
        row[0].set_ylabel(_wrapped(name), rotation=0, ha="right", va="center", fontsize=9)


def _wrapped(name: str) -> str:
    """A row's label in lines that keep what stands in brackets together."""
    kept = re.sub(r"\(.*?\)", lambda found: found[0].replace(" ", "\xa0"), label_of(name))
    return textwrap.fill(kept, 17, break_on_hyphens=False)


def draw_balance(results: Results, path: pathlib.Path) -> None:
    """Reward against attributes and against the distance to the teacher, a line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (x, (_, title)) in zip(axes, _FAULTS.items()):
        axis.set_xscale("log")  # one method is ten times as far away as the others
        for i, method in enumerate(rows.METHODS):
            _draw_method(axis, results, x, i, method)
        for name, marker in ((INIT, "X"), (TEACHER, "*")):
            _draw_reference(axis, results, x, name, marker)
        axis.set_xlabel(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=9)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.invert_xaxis()
    axes[0].set_ylabel(_TITLES["reward"], fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        markerscale=0.6,
        title="in a marker: reward.balance",
        title_fontsize=9,
    )
    _save(figure, path)


def _draw_method(
    axis,
    results: Results,
    x: str,
    i: int,
    method: str,
) -> None:
    """A line through the method's balances. Args: x, the measure; i, of the method."""
    points = {b: results.get(rows.balanced_name(method, b)) for b in rows.BALANCES}
    points = {balance: runs for balance, runs in points.items() if runs}
    if not points:
        return
    fault, _ = _FAULTS[x]
    at = {measure: [mean(runs, measure) for runs in points.values()] for measure in (x, "reward")}
    at[x] = [fault(value) for value in at[x]]
    bars = {m: [np.nan_to_num(spread(runs, m)) for runs in points.values()] for m in (x, "reward")}
    axis.errorbar(
        at[x],
        at["reward"],
        xerr=bars[x],
        yerr=bars["reward"],
        color=COLOURS[i],
        marker=MARKERS[i],
        markersize=17,
        markeredgecolor="white",
        linewidth=1.5,
        elinewidth=1.5,
        zorder=3 + i,
        label=rows.METHODS[method].label,
    )
    for balance, *place in zip(points, at[x], at["reward"]):
        axis.annotate(
            f"{balance:g}",
            place,
            ha="center",
            va="center_baseline",
            fontsize=8,
            fontweight="bold",
            color=_INK[i],
            zorder=3.5 + i,
        )


def _draw_reference(
    axis,
    results: Results,
    x: str,
    name: str,
    marker: str,
) -> None:
    """The initial generator or the teacher, which has no distance to itself to be shown."""
    if name not in results:
        return
    fault, _ = _FAULTS[x]
    reward = mean(results[name], "reward")
    if x == "Frechet distance" and name == TEACHER:
        axis.axhline(reward, color="black", linestyle=":", linewidth=1)
        return
    axis.plot(
        fault(mean(results[name], x)),
        reward,
        color="black",
        marker=marker,
        markersize=11,
        linestyle="none",
        label=label_of(name),
    )


def draw_curves(
    workdir: pathlib.Path,
    results: Results,
    captions: list[str],
    group: str,
    path: pathlib.Path,
) -> None:
    """Curves of a group over its steps, the teacher dashed, and the last pictures.

    Args: group, a key of rows.GROUPS that has curves.
    """
    from matplotlib.figure import Figure

    found = {r.name: results[r.name] for r in rows.rows_of([group]) if r.name in results}
    shown = found | {name: results[name] for name in (TEACHER,) if name in results}
    figure = Figure(figsize=(WIDTH, 5.4 + 1.16 * len(shown)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.5, 0.9 + 1.16 * len(shown)])
    *axes, last = above.subplots(2, 3).flat
    for axis, measure in zip(axes, _CURVES[group], strict=True):
        _draw_signal(axis, results, found, measure, group)
    handles, labels = axes[0].get_legend_handles_labels()
    last.axis("off")
    last.legend(handles, labels, loc="center", fontsize=9)
    _draw_pictures(below, workdir, shown, captions)
    _save(figure, path)


def _draw_signal(
    axis,
    results: Results,
    found: Results,
    measure: str,
    group: str,
) -> None:
    """A measure over the steps of the runs that were found, and of what they are compared with."""
    # the teacher is what the one group starts from, and the shipped generator what the other does
    start: list[Run] = [] if group == "distill" else results.get(INIT, [])[:1]
    for i, (name, runs) in enumerate(found.items()):
        steps = [*(0 for _ in start), *curve(runs, "step")]
        values = [*(run.curve[measure][0] for run in start), *curve(runs, measure)]
        axis.plot(
            steps,
            values,
            color=(COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[5])[i],
            marker=MARKERS[i],
            markersize=4,
            label=label_of(name),
        )
    compared = {TEACHER: "--"} | ({INIT: ":"} if group == "distill" else {})
    for reference, style in compared.items():
        for run in results.get(reference, []):
            value = run.curve[measure][0]
            label = label_of(reference)
            axis.axhline(value, color="black", linestyle=style, linewidth=1.2, label=label)
    axis.set_title(_TITLES[measure], fontsize=10)
    axis.set_xlabel("steps", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
