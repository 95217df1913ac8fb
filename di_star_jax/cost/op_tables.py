# SPDX-License-Identifier: Apache-2.0
"""The operations of a compiled program as a sum, and as tables by source line and by module."""

from collections.abc import Callable
from typing import Any

from di_star_jax.cost import hlo, ops, origin
from di_star_jax.cost.chips import Chip
from di_star_jax.cost.ops import Op

LARGEST = 20  # source lines that are shown
_BOUNDS = ("compute", "bytes", "network")


def of_text(text: str, chip: Chip | None) -> dict[str, Any]:
    """What a call costs, by operation; sizes of one device.

    Args: text, of the compiled program; chip, None where its limits are not known: then there are
      no seconds.
    Returns: flop, padded_flop, bytes, received_bytes; runs, of instructions; endless_loops, that
      are counted as one turn; seconds, and seconds_by by what bounds; unnamed, seconds' share;
      modules and largest, the tables, largest first.
    """
    found, endless = ops.of_program(hlo.parse(text))
    total = _row(found, chip)
    unnamed = _row([op for op in found if op.place in (origin.NO_NAME, ops.ARGUMENT)], chip)
    total["unnamed"] = _ratio(unnamed, total)
    total["endless_loops"] = endless
    modules = _table(found, chip, lambda op: {"module": op.module})
    lines = _table(found, chip, lambda op: {"place": op.place, "module": op.module})
    return total | {"modules": modules, "largest": lines[:LARGEST]}


def _table(
    found: list[Op],
    chip: Chip | None,
    key: Callable[[Op], dict[str, str]],
) -> list[dict[str, Any]]:
    """A row for all that have a key in common, the costliest first."""
    groups: dict[tuple[str, ...], list[Op]] = {}
    for op in found:
        groups.setdefault(tuple(key(op).values()), []).append(op)
    rows = sorted(groups.values(), key=lambda group: -_cost(_row(group, chip), group))
    return [key(group[0]) | _row(group, chip) for group in rows]


def _cost(row: dict[str, Any], group: list[Op]) -> float:
    return row["seconds"] if "seconds" in row else ops.weight(group)


def _row(group: list[Op], chip: Chip | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "runs": sum(op.times for op in group),
        "flop": sum(op.times * op.flop for op in group),
        "padded_flop": sum(op.times * op.padded for op in group),
        "bytes": sum(op.times * op.bytes for op in group),
        "received_bytes": sum(op.times * op.received for op in group),
    }
    if chip is None:
        return row
    by_bound = dict.fromkeys(_BOUNDS, 0.0)
    for op in group:
        bound, seconds = max(op.seconds(chip).items(), key=lambda each: each[1])
        by_bound[bound] += seconds
    return row | {"seconds": sum(by_bound.values()), "seconds_by": by_bound}


def _ratio(part: dict[str, Any], whole: dict[str, Any]) -> float | None:
    """Of seconds; None where there are none."""
    return part["seconds"] / whole["seconds"] if whole.get("seconds") else None


def rows(found: dict[str, Any], compute_s: float | None) -> list[tuple[str, str]]:
    """The sum, a name and a text each. Args: found, of `of_text`; compute_s, of the roofline."""
    padding = found["padded_flop"] / found["flop"] - 1 if found["flop"] else 0.0
    runs = [
        f"{found['flop'] / 1e12:.4g} TF in products",
        f"{found['bytes'] / 1e9:.4g} GB of memory",
        f"{found['received_bytes'] / 1e9:.4g} GB of network",
        f"{found['runs']:,.0f} operations",
    ]
    text = ", ".join(runs)
    if found["endless_loops"]:
        text += f"; {found['endless_loops']} loops of unknown length are counted as one turn"
    if "seconds" not in found:
        unknown = "no seconds: the bandwidth of this device's memory is not known"
        return [("operation by operation", f"{text}; {unknown}")]
    total = f"{found['seconds']:.4g} s a step, one after the other"
    if compute_s:
        total += f", {found['seconds'] / compute_s:.2f} times the roofline of compute"
    by = [f"{seconds:.3g} s of it by {bound}" for bound, seconds in found["seconds_by"].items()]
    return [
        ("operation by operation", total),
        ("bound", ", ".join(by)),
        ("in all", f"{text}; tiles add {100 * padding:.1f} % to products"),
        ("without a source line", f"{100 * found['unnamed']:.1f} % of the time"),
    ]


def tables(found: dict[str, Any]) -> list[str]:
    """By module and by source line, as lines."""
    whole = found.get("seconds")
    return [
        *_lines("by module", found["modules"], ["module"], whole),
        *_lines(f"the {LARGEST} largest lines", found["largest"], ["place", "module"], whole),
    ]


def _lines(
    title: str,
    table: list[dict[str, Any]],
    keys: list[str],
    whole: float | None,
) -> list[str]:
    cells = [[title, *[""] * (len(keys) - 1), *_heads(whole)]]
    cells += [[row[key] for key in keys] + _cells(row, whole) for row in table]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    left = len(keys)
    return ["", *(_line(line, widths, left) for line in cells)]


def _heads(whole: float | None) -> list[str]:
    times = ["ms", "%", "bound"] if whole else []
    return [*times, "TF", "GB", "net GB", "runs"]


def _cells(row: dict[str, Any], whole: float | None) -> list[str]:
    times = []
    if whole:
        bound = max(row["seconds_by"], key=row["seconds_by"].get)
        times = [f"{1e3 * row['seconds']:.4g}", f"{100 * row['seconds'] / whole:.1f}", bound]
    return [
        *times,
        f"{row['flop'] / 1e12:.3g}",
        f"{row['bytes'] / 1e9:.3g}",
        f"{row['received_bytes'] / 1e9:.3g}",
        f"{row['runs']:,.0f}",
    ]


def _line(
    cells: list[str],
    widths: list[int],
    left: int,
) -> str:
    """Args: left, of the first columns, which are words."""
    words = [cell.ljust(width) for cell, width in zip(cells[:left], widths)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[left:], widths[left:])]
    return "  " + "  ".join([*words, *numbers])
