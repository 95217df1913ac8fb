# SPDX-License-Identifier: Apache-2.0
"""What a run prints and writes: scalars, pictures, a progress bar. Host 0 only."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm


def say(text: str) -> None:
    """Prints on the first host, at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Writer:
    """TensorBoard events and `metrics.jsonl` in a workdir; a resumed run appends.

    Other hosts write nothing.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
        """Args: workdir; first_step: lines of `metrics.jsonl` beyond it, from a run that was cut
        short, are dropped.
        """
        self._events = self._lines = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(workdir), purge_step=first_step + 1 if first_step else None
            )
            path = Path(workdir) / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            path.write_text("".join(line + "\n" for line in kept))
            self._lines = path.open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Args: step, values by name, such as 'reward/pickscore'."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()

    def image(self, step: int, tag: str, array: np.ndarray) -> None:
        """Args: step, tag, array uint8 [H, W, 3]."""
        if self._events is not None:
            self._events.add_image(tag, array, step, dataformats="HWC")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._lines.close()


class Progress:
    """One line with what is done and the time left: a bar on a terminal, else a line every ten
    seconds.
    """

    def __init__(self, total: int, start: int, unit: str = "step"):
        self._bar = None
        self._total, self._start, self._unit, self._said, self._began = (
            total,
            start,
            unit,
            0.0,
            time.time(),
        )
        if jax.process_index() == 0 and sys.stdout.isatty():
            self._bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)

    def update(self, done: int, text: str) -> None:
        """Args: done, of the total; text, what else to say."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif jax.process_index() == 0 and (time.time() - self._said > 10 or done >= self._total):
            left = (time.time() - self._began) / max(done - self._start, 1) * (self._total - done)
            print(
                f"{self._unit} {done}/{self._total}, {text}, {left / 60:.1f} min left", flush=True
            )
            self._said = time.time()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def before_after_table(rows: list[tuple[str, float, float]]) -> str:
    """A Markdown table. Args: rows of (name, before, after)."""
    lines = ["| | before | after | change |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} |"
        for name, before, after in rows
    ]
    return "\n".join(lines)
