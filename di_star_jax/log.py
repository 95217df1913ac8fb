# SPDX-License-Identifier: Apache-2.0
"""What a run prints and writes: scalars, pictures, progress. Host 0 only."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Self

import jax
import numpy as np
from tqdm import tqdm


def say(text: str) -> None:
    """Prints on the first host, at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Writer:
    """TensorBoard events and `metrics.jsonl` in a workdir; a resumed run appends.

    Other hosts write nothing. To be used with `with`, or closed.

    Args: workdir; first_step: lines of `metrics.jsonl` beyond it, from a run that was cut short,
      are dropped, as is a line that was cut itself.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
        self._events = None
        self._lines = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # half a second that other commands need not wait

        purge = first_step + 1 if first_step else None
        self._events = SummaryWriter(str(workdir), purge_step=purge)
        path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Args: step, values by name, such as 'reward/pickscore'."""
        if self._events is None:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()

    def image(
        self,
        step: int,
        tag: str,
        array: np.ndarray,
    ) -> None:
        """Args: step, tag, array uint8 [H, W, 3]."""
        if self._events is not None:
            self._events.add_image(tag, array, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        if self._events is not None:
            self._events.close()
            self._lines.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a JSON Lines file that parse; a kill may have cut the last one."""
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(line)
            whole.append(line)
    return whole


class Progress:
    """What is done and the time left: a bar on a terminal, else a line every ten seconds.

    The lines are our own, for tqdm redraws one line, which a log file keeps as thousands.
    """

    def __init__(
        self,
        total: int,
        start: int,
        unit: str = "step",
    ):
        self._total = total
        self._start = start
        self._unit = unit
        self._said = 0.0
        self._began = time.time()
        self._bar = None
        if jax.process_index() == 0 and sys.stdout.isatty():
            self._bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, done: int, text: str) -> None:
        """Args: done, of the total; text, what else to say."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.time() - self._said > 10 or done >= self._total:
            each = (time.time() - self._began) / max(done - self._start, 1)
            left = each * (self._total - done) / 60
            say(f"{self._unit} {done}/{self._total}, {text}, {left:.1f} min left")
            self._said = time.time()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table as text. Args: header and rows, of equally many cells; a | in one is escaped."""

    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])
