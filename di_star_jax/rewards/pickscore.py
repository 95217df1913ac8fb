# SPDX-License-Identifier: Apache-2.0
"""PickScore v1 (arXiv 2305.01569):

CLIP ViT-H/14 trained on people's choices; the reward of Diff-Instruct*.

The cosine itself, 0.22 or so: the published score is this times exp(logit_scale). Source:
  yuvalkirstain/PickScore.
"""

import functools

from di_star_jax.rewards import similarity

NEEDED = {"model.safetensors": "of yuvalkirstain/PickScore_v1 on the Hub"}

read_config, abstract = similarity.read_config, similarity.abstract
load = functools.partial(similarity.load, needed=NEEDED)
