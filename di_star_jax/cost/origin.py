# SPDX-License-Identifier: Apache-2.0
"""Where an operation of a compiled program comes from: its source line and its module."""

import re
from collections.abc import Sequence

from di_star_jax.cost.hlo import Frame

NO_NAME = "(no name)"
COLLECTIVES = "gathers and sums"
OTHERS = "others"

_PACKAGE = "di_star_jax/"
# By a frame's file below the package, for all that is called from there; the first that is found.
_WHOLE = {
    "models/vae.py": "VAE",
    "models/tiny_vae.py": "VAE",
    "rewards/": "reward",
    "models/clip.py": "text encoders",
    "models/t5.py": "text encoders",
}
# The decoder's, which a reward's loop over slices calls; no reward has such layers. XLA does not
# know all who called a layer that is computed again.
_DECODER = re.compile(r"(ResnetBlock2D|Upsample2D|GroupNorm|Attention)\.")
# What loops over layers or networks cut out of their stacks, and what makes kernels ready.
_WEIGHTS = re.compile(
    r"(scan|over)_blocks|unstacked|gather_param|whole_kernel|scanned_scores|looped|leaf"
)
# By the function that is nearest.
_NEAREST = {
    re.compile(r"(Layer|Group)Norm|standardised|(group|layer)_norm|_over_groups|_moments"): "norms",
    re.compile(r"[aA]ttention|splash|_by_blocks|of_block"): "attention",
    re.compile(r"FeedForward|GEGLU|TanhGELU|gated"): "feed-forward",
    re.compile(r"ResnetBlock2D|Downsample2D|Upsample2D"): "resnets",
}
_OPTIMIZER = re.compile(r"update|adamw|ema")


def place(name: str, stack: Sequence[Frame]) -> str:
    """The nearest line of this package, or of whatever there is, or else XLA's name.

    Args: name, its op_name; stack, the innermost first.
    """
    nearest = next((frame for frame in stack if _ours(frame)), stack[0] if stack else None)
    if nearest is None:
        return name or NO_NAME
    file = _ours(nearest) or nearest.file.rpartition("/")[2]
    return f"{file}:{nearest.line} {nearest.function.rpartition('<locals>.')[2]}"


def module(stack: Sequence[Frame]) -> str:
    """Of the table by module. Args: stack, the innermost first."""
    ours = [(frame, _ours(frame)) for frame in stack if _ours(frame)]
    for start, group in _WHOLE.items():
        if any(file.startswith(start) for _, file in ours):
            is_decoder = any(_DECODER.match(frame.function) for frame, _ in ours)
            return "VAE" if group == "reward" and is_decoder else group
    if ours and _WEIGHTS.fullmatch(ours[0][0].function.rpartition("<locals>.")[2]):
        return "weights"
    for frame, file in ours:
        for pattern, group in _NEAREST.items():
            if file.startswith("models/") and pattern.search(frame.function):
                return group
    is_update = any(f == "step.py" and _OPTIMIZER.search(frame.function) for frame, f in ours)
    return "optimizer" if is_update or any("optax/" in f.file for f in stack) else OTHERS


def _ours(frame: Frame) -> str:
    """The file below the package; "" for one that is not its."""
    return frame.file.partition(_PACKAGE)[2]
