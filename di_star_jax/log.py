# SPDX-License-Identifier: Apache-2.0
"""What a run prints and writes: scalars, pictures, a progress bar. Host 0 only."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
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


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] float -> [0, 255] uint8, same shape, rounded as diffusers does."""
    return np.round((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Args: path, whatever its suffix; array uint8 [H, W, 3]."""
    Image.fromarray(array).save(path, format="PNG")


def image_grid(images: np.ndarray, columns: int, *, padding: int = 2) -> np.ndarray:
    """Pictures in rows of `columns` on white.

    Args: images [N, H, W, 3] in [-1, 1]. Returns: uint8 [rows * (H + padding) - padding, ..., 3].
    """
    n, h, w, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = np.full(
        (rows * (h + padding) - padding, columns * (w + padding) - padding, 3), 255, np.uint8
    )
    for i, image in enumerate(to_uint8(images)):
        y, x = (i // columns) * (h + padding), (i % columns) * (w + padding)
        grid[y : y + h, x : x + w] = image
    return grid


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int) -> str:
    """Breaks `text` at blanks to fit `width` pixels, at most `lines` lines."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if font.getlength(longer) <= width or not broken[-1]:
            broken[-1] = longer
        else:
            broken.append(word)
    if len(broken) > lines:
        broken = [*broken[: lines - 1], broken[lines - 1] + " ..."]
    return "\n".join(broken)


def before_after_grid(
    before: np.ndarray, after: np.ndarray, prompts: list[str], *, columns: int = 4, side: int = 128
) -> np.ndarray:
    """A labelled picture: each cell shows one prompt's image before (left) and after (right), the
    prompt below.

    Args:
      before, after: [N, H, W, 3] in [-1, 1], made from the same noise.
      prompts: N.
      columns: cells in a row. side: pixels each image is shown at.
    Returns:
      uint8 [H', W', 3].
    """
    font, head = ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    gap, margin, text = 4, 20, 48
    cell_w, cell_h = 2 * side + gap, side + text
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    size = (columns * (cell_w + margin) + margin, rows * cell_h + margin + 26)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        x = margin + column * (cell_w + margin)
        for offset, label in ((side / 2, "before"), (side * 1.5 + gap, "after")):
            draw.text((x + offset, 10), label, fill="#333333", font=head, anchor="mt")
    for i, prompt in enumerate(prompts):
        x = margin + (i % columns) * (cell_w + margin)
        y = 34 + (i // columns) * cell_h
        for offset, image in ((0, before[i]), (side + gap, after[i])):
            shown = Image.fromarray(to_uint8(image)).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(shown, (x + offset, y))
        draw.multiline_text(
            (x + cell_w / 2, y + side + 5),
            _wrapped(prompt, cell_w, font, 2),
            fill="#222222",
            font=font,
            anchor="ma",
            align="center",
            spacing=2,
        )
    return np.asarray(canvas)


def before_after_table(rows: list[tuple[str, float, float]]) -> str:
    """A Markdown table. Args: rows of (name, before, after)."""
    lines = ["| | before | after | change |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} |"
        for name, before, after in rows
    ]
    return "\n".join(lines)


def conclusion_of(page: Path) -> str:
    """The part of a written page from '## Conclusion' on, which people write and a new table must
    not lose.
    """
    text = page.read_text() if page.exists() else ""
    return (
        text[text.index("## Conclusion") :]
        if "## Conclusion" in text
        else "## Conclusion\n\nNot drawn yet.\n"
    )
