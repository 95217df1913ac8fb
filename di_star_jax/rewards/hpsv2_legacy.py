# SPDX-License-Identifier: Apache-2.0
"""HPSv2 on the scale of its README: evaluated without antialiasing, as torchvision once resized
tensors.
"""

import functools

from di_star_jax.rewards import hpsv2
from di_star_jax.rewards.pixels import tensor_pixels_aliased

NEEDED, read_config = hpsv2.NEEDED, hpsv2.read_config
abstract = functools.partial(hpsv2.abstract, evaluation=tensor_pixels_aliased)
load = functools.partial(hpsv2.load, evaluation=tensor_pixels_aliased)
