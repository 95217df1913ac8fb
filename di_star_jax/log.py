# SPDX-License-Identifier: Apache-2.0
"""What a run prints and writes: scalars, pictures, progress. Host 0 only."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import jax
import numpy as np
from tqdm import tqdm

from di_star_jax.storage.files import whole

HEARTBEAT = 5.0  # seconds until a wait is said to go on
RECENT = 10  # steps that the time left is estimated by


def say(text: str) -> None:
    """Prints on the first host, at once, above the bar where there is one."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Writer:
    """TensorBoard events and `metrics.jsonl` in a workdir; a resumed run appends.

    Other hosts write nothing. To be used with `with`, or closed.

    Args: workdir; first_step: lines of `metrics.jsonl` and events beyond it, from a run that was
      cut short, are dropped, and so are damaged ones, which a line says; written: called when
      something was.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        first_step: int = 0,
        written: Callable[[], None] = lambda: None,
    ):
        self._events = None
        self._lines = None
        self._written = written
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # half a second that other commands need not wait

        for file in sorted(Path(workdir).glob("events.out.tfevents.*")):
            _drop_events(file, first_step)
        self._events = SummaryWriter(str(workdir), flush_secs=10)
        path = Path(workdir) / "metrics.jsonl"
        kept, damaged = _usable_lines(path)
        if damaged:
            say(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} dropped")
        with whole(path) as partial:
            partial.write_text(
                "".join(line + "\n" for step, line in kept if step <= first_step), encoding="utf-8"
            )
        self._lines = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Args: step, values by name, such as 'reward/pickscore'."""
        if self._events is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        # Not by add_scalar, which puts underscores into names such as "pickscore, std".
        named = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.file_writer.add_summary(Summary(value=named), step)
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        self._written()

    def image(
        self,
        step: int,
        tag: str,
        array: np.ndarray,
    ) -> None:
        """Args: step, tag, array uint8 [H, W, 3]."""
        if self._events is not None:
            self._events.add_image(tag, array, step, dataformats="HWC")

    def text(
        self,
        step: int,
        tag: str,
        text: str,
    ) -> None:
        """Args: step, tag, text as Markdown."""
        if self._events is not None:
            self._events.add_text(tag, text, step)

    def flush(self) -> None:
        """Writes what is left, for a process that may be ended."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """As `flush`, and nothing after it."""
        if self._events is not None:
            self._events.close()
            self._lines.close()


def _usable_lines(path: Path) -> tuple[list[tuple[int, str]], int]:
    """The lines of metrics.jsonl with their steps, and how many are damaged.

    A kill may have cut the last one, a crash of the machine filled some with NUL bytes.
    """
    if not path.exists():
        return [], 0
    usable = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            usable.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            damaged += bool(line.strip())
    return usable, damaged


def _drop_events(path: Path, last_step: int) -> None:
    """Removes a file's events beyond a step, and what a kill has cut; the file, if none is left."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    kept = []
    at = 0
    while at + 16 < len(content):  # length, its checksum, event, its checksum
        end = at + 16 + int.from_bytes(content[at : at + 8], "little")
        try:
            event = Event.FromString(content[at + 12 : end - 4])
        except DecodeError:
            break
        if end <= len(content) and (event.file_version or event.step <= last_step):
            kept.append((event, content[at:end]))
        at = end
    if all(event.file_version for event, _ in kept):
        path.unlink()
    elif sum(len(record) for _, record in kept) < len(content):
        with whole(path) as partial:
            partial.write_bytes(b"".join(record for _, record in kept))


class Phase(NamedTuple):
    """Steps of one kind. Args: until, the last one's number; cost, relative to other phases."""

    until: int
    cost: float = 1.0


class Progress:
    """What is done and the time left: a bar on a terminal, else a line every ten seconds.

    The lines are our own, for tqdm redraws one line, which a log file keeps as thousands.

    The time left is that of the steps, by the last ten of their phase, or of another phase by their
    costs, and of the pauses to come. The first step of a phase, which may wait for a compiler, and
    what is spent in `paused` are no part of a step's time.

    Args:
      total, start: steps in all, and those done before.
      unit: what is counted.
      phases: in order; None where all steps are alike.
      pauses: name -> (steps done -> how often that pause is still to come).
      clock: seconds.
    """

    def __init__(
        self,
        total: int,
        start: int,
        unit: str = "step",
        *,
        phases: Sequence[Phase] | None = None,
        pauses: Mapping[str, Callable[[int], int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._start = start
        self._unit = unit
        self._phases = phases or [Phase(total)]
        self._pauses = pauses or {}
        self._clock = clock
        self._done = start
        self._at = None  # when `_done` was reached
        self._said = -math.inf
        self._timed = [deque(maxlen=RECENT) for _ in self._phases]
        self._expected: dict[str, float] = {}  # seconds by pause
        self._bar = None
        if jax.process_index() == 0 and sys.stdout.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {elapsed}{postfix}"
            self._bar = tqdm(
                total=total,
                initial=start,
                unit=unit,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=layout,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def expect(self, pause: str, seconds: float) -> None:
        """Says how long a pause takes that has not been seen yet."""
        self._expected[pause] = seconds

    @contextlib.contextmanager
    def paused(self, pause: str) -> Iterator[None]:
        """What is done in it is no step; a later one is expected to take as long."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._expected[pause] = seconds
        if self._at is not None:
            self._at += seconds

    def step_seconds(self) -> float | None:
        """Of a step of the present phase, by the last ten; None before two were timed."""
        timed = self._timed[self._phase(self._done)]
        return sum(timed) / len(timed) if len(timed) >= 2 else None

    def seconds_left(self) -> float | None:
        """Of the steps and pauses to come; None before two steps were timed."""
        left = 0.0
        after = self._done
        for i, phase in enumerate(self._phases):
            count = max(phase.until - after, 0)
            after = max(after, phase.until)
            if count:
                each = self._estimate(i)
                if each is None:
                    return None
                left += count * each
        for name, seconds in self._expected.items():
            left += seconds * self._pauses.get(name, lambda done: 0)(self._done)
        return left

    def update(self, done: int, text: str) -> None:
        """Args: done, of the total; text, what else to say."""
        now = self._clock()
        self._time(done, now)
        self._done = done
        self._at = now
        text = ", ".join(part for part in (text, self._left()) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._said > 10 or done >= self._total:
            say(", ".join(part for part in (f"{self._unit} {done}/{self._total}", text) if part))
            self._said = now

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _time(self, done: int, now: float) -> None:
        """Notes what a step took, unless the first one of a phase is among them."""
        phase = self._phase(done)
        if self._at is not None and done > self._done and phase == self._phase(self._done):
            self._timed[phase].append((now - self._at) / (done - self._done))

    def _phase(self, done: int) -> int:
        """Index of the phase whose step was the last one done."""
        inside = [i for i, phase in enumerate(self._phases) if done <= phase.until]
        return inside[0] if inside else len(self._phases) - 1

    def _estimate(self, i: int) -> float | None:
        """Seconds of a step of one phase, or None."""
        known = [j for j, timed in enumerate(self._timed) if len(timed) >= 2]
        if not known:
            return None
        j = i if i in known else known[-1]
        timed = self._timed[j]
        return sum(timed) / len(timed) * self._phases[i].cost / self._phases[j].cost

    def _left(self) -> str:
        seconds = self.seconds_left()
        if seconds is None:
            return "no estimate of the time yet"
        if seconds == 0.0:
            return ""
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def waiting(what: str, estimate: str = "") -> Iterator[None]:
    """Says what is being done, that it still is, and how long it took.

    Args: what, such as "compiling the step"; estimate, of its time.
    """
    say(f"{what}, {estimate}" if estimate else what)
    began = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        pause = HEARTBEAT
        while not over.wait(pause):
            elapsed = time.monotonic() - began
            say(f"still {what}, {duration(elapsed)}")
            pause = min(max(HEARTBEAT, elapsed / 4), 60.0)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
    elapsed = time.monotonic() - began
    if elapsed >= 1:
        say(f"{what} took {duration(elapsed)}")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table as text. Args: header and rows, of equally many cells; a | in one is escaped."""

    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])
