# SPDX-License-Identifier: Apache-2.0
"""The networks of the shapes world, as the config.json of each folder of its checkpoint says it."""

from typing import Any

from di_star_jax.pipelines.scheduler import GUIDANCE_SCALE

RESOLUTION = 64  # pixels of an image
LATENT_SHAPE = (16, 16, 4)
OMEGA = 3.0  # guidance of the teacher, in its pictures and in what is distilled from it
TOKENS = 20  # two specials and the longest caption

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    GUIDANCE_SCALE: OMEGA,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 24, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "force_upcast": False,
    "scaling_factor": 1.0,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
}
TEXT_ENCODER_2 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 96, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 3, 4],
    "cross_attention_dim": 160,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 64,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

REWARD = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 64,
    "logit_scale_init_value": 2.6592,
    "text_config": {
        "model_type": "clip_text_model",
        "hidden_act": "gelu",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": TOKENS,
        "projection_dim": 64,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "projection_dim": 64,
    },
}


def text_configs(vocab_size: int) -> dict[str, dict[str, Any]]:
    """config.json of both text encoders. Args: vocab_size, of a tokenizer of tokenizer.py."""
    special = _special(vocab_size)
    return {"text_encoder": TEXT_ENCODER | special, "text_encoder_2": TEXT_ENCODER_2 | special}


def reward_config(vocab_size: int) -> dict[str, Any]:
    """config.json of the reward. Args: as of `text_configs`."""
    return REWARD | {"text_config": REWARD["text_config"] | _special(vocab_size)}


def _special(vocab_size: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
