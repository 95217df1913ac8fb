# SPDX-License-Identifier: Apache-2.0
"""Image files to the pixels that a network sees, by Pillow, on the host.

Nothing here touches a device: worker processes import it.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

# Far more than any picture of a generator; Pillow's own limit only warns.
LARGEST = 8192 * 8192


def _half(excess: int) -> int:
    """What transformers' centre crop cuts off first."""
    return excess // 2


def _half_even(excess: int) -> int:
    """What torchvision's cuts off first: a half goes to the even neighbour."""
    return round(excess / 2)


CROPS: dict[str, Callable[[int], int]] = {"clip": _half, "torchvision": _half_even}


def pixels(
    content: bytes,
    size: int,
    crop: str,
) -> np.ndarray:
    """What an image processor makes of an image before it normalises: uint8 [size, size, 3].

    The shortest side is resized to `size`, and the centre stays.

    Args: content, of a JPEG, PNG or WebP file; crop, a key of CROPS.
    Source: transformers `CLIPImageProcessor`; with "torchvision", ImageReward's transform.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = file.convert("RGB")
    shortest = min(image.size)
    wide, high = (int(size * side / shortest) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (CROPS[crop](side - size) for side in (wide, high))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def why_broken(content: bytes) -> str:
    """What is wrong with an image file; "" where it can be decoded to its end."""
    if not content:
        return "it is empty"
    try:
        with Image.open(io.BytesIO(content)) as file:
            if file.width * file.height > LARGEST:
                return f"{file.width} x {file.height} pixels"
            # A JPEG at an eighth of its size: all of it is read, and little computed.
            file.draft("RGB", (1, 1))
            file.load()
    except Exception as error:  # of a dozen decoders, with no class in common
        return " ".join(str(error).split()) or type(error).__name__
    return ""
