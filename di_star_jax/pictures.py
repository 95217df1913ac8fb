# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: PNG files and grids."""

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] float -> [0, 255] uint8, same shape, rounded as diffusers does."""
    return np.round((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Args: path, whatever its suffix; array uint8 [H, W, 3]."""
    Image.fromarray(array).save(path, format="PNG")


def image_grid(
    images: np.ndarray,
    columns: int,
    *,
    padding: int = 2,
) -> np.ndarray:
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


def _wrapped(
    text: str,
    width: int,
    font: ImageFont.FreeTypeFont,
    lines: int,
) -> str:
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


def compared_grid(
    images: dict[str, np.ndarray],
    prompts: list[str],
    *,
    width: int = 900,
    side: int = 128,
) -> np.ndarray:
    """A labelled picture: each cell shows one prompt's images beside each other, the prompt below.

    Args:
      images: by label, such as "before"; uint8 [N, H, W, 3] each.
      prompts: N.
      width: pixels that the cells of a row may take, at least one of them.
      side: pixels each image is shown at.
    Returns:
      uint8 [H', W', 3].
    """
    font, head = ImageFont.load_default(size=14), ImageFont.load_default(size=15)
    gap, margin, text = 4, 24, 56
    step = side + gap
    cell_w, cell_h = len(images) * step - gap, side + text
    columns = max(1, min(len(prompts), (width - margin) // (cell_w + margin)))
    rows = -(-len(prompts) // columns)
    size = (columns * (cell_w + margin) + margin, rows * cell_h + margin + 26)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        row, column = divmod(i, columns)
        x, y = margin + column * (cell_w + margin), 34 + row * cell_h
        for k, (label, pictures) in enumerate(images.items()):
            if row == 0:
                place = (x + k * step + side / 2, 10)
                draw.text(place, label, fill="#333333", font=head, anchor="mt")
            shown = Image.fromarray(pictures[i]).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(shown, (x + k * step, y))
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


def captioned_grid(
    images: np.ndarray,
    prompts: list[str],
    *,
    width: int = 1200,
) -> np.ndarray:
    """A row of pictures for each prompt, with the prompt below it; several rows beside each other
    where they fit.

    Small pictures are shown two to four times as large, pixel by pixel.

    Args: images [N, H, W, 3] in [-1, 1], equally many for each of the prompts, in their order;
      width, pixels that the rows may take. Returns: uint8 [H', W', 3].
    """
    _, h, w, _ = images.shape
    num = len(images) // len(prompts)
    scale = max(1, min(4, 256 // max(h, w)))
    font, gap, margin, text = ImageFont.load_default(size=14), 4, 16, 44
    row_w, cell_h = num * (scale * w + gap) - gap, scale * h + text
    columns = max(1, min(len(prompts), (width + margin) // (row_w + margin)))
    rows = -(-len(prompts) // columns)
    size = (columns * (row_w + margin) + margin, rows * (cell_h + margin) + margin)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(to_uint8(images)):
        row, k = divmod(i, num)
        x = margin + (row % columns) * (row_w + margin) + k * (scale * w + gap)
        y = margin + (row // columns) * (cell_h + margin)
        canvas.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (x, y))
        if k == 0:
            caption = _wrapped(prompts[row], row_w, font, 2)
            draw.multiline_text((x, y + scale * h + 5), caption, fill="#222222", font=font)
    return np.asarray(canvas)
