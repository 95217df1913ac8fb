# SPDX-License-Identifier: Apache-2.0
"""DI*-SDXL-1step: the paper's run (arXiv 2410.20898), 2.57B parameters at 1024 pixels.

    python -m di_star_jax.main --config=configs/sdxl.py --workdir=/mnt/bucket/di_star
    python -m di_star_jax.main --config=configs/sdxl.py --config.dry_run=True # checks, sizes,
    memory; no weights

With mesh.fsdp=16 the compiled step takes 7.8 GB of a TPU v5e's 16.9 at one image a chip (128 chips
for the batch of 128; fewer take compute.microbatches). v6e: fsdp=8, 13.2 of 33.6 GB; v5p: fsdp=4,
40.9 of 102.8 GB at 4 images (docs/performance.md). One H200 takes mesh.fsdp=1, data.batch_size=4
and compute.loop_networks=False, by the dry run's estimate. At 40 % of peak, 256,000 images (the
default) would take 0.7 h on 128 v5e chips or 18.5 h on one H200: computed, not measured. The
paper's PickScore on Parti prompts: 0.2249 before, 0.2304 after. To resume, run the same command
again.
"""

import ml_collections

from di_star_jax.errors import UserError

# One row per method and per row of the paper's Table 2, named NAME_REWARD_GUIDANCE; every field
# named here overrides the default below. Guidance 0 in the paper is omega = 1: conditional, without
# guidance.
PRESETS = {
    "di_star": {},
    "di_star_l2": {"objective.name": "di_star_l2"},
    "di_star_outside": {
        "objective.name": "di_star_outside",
        "objective.omega": 1.0,
        "objective.alpha_cfg": 7.5,
    },
    "sim": {"reward.pickscore": 0.0},
    "sid": {"objective.name": "sid", "reward.pickscore": 0.0},
    "diff_instruct": {"objective.name": "kl", "reward.pickscore": 0.0},
    "di_pp": {"objective.name": "kl"},
    "dmd": {"objective.name": "dmd", "reward.pickscore": 0.0},
    "reward_only": {"objective.name": "reward_only"},
    "kl_0_0": {"objective.name": "kl", "reward.pickscore": 0.0, "objective.omega": 1.0},
    "kl_0_7.5": {"objective.name": "kl", "reward.pickscore": 0.0},
    "kl_100_7.5": {"objective.name": "kl"},
    "outside_100_7.5": {
        "objective.name": "di_star_outside",
        "objective.omega": 1.0,
        "objective.alpha_cfg": 7.5,
    },
    "inside_0_0": {"reward.pickscore": 0.0, "objective.omega": 1.0},
    "inside_0_7.5": {"reward.pickscore": 0.0},
    "inside_1_7.5": {"reward.pickscore": 1.0},
    "inside_10_7.5": {"reward.pickscore": 10.0},
    "inside_100_4.5": {"objective.omega": 4.5},
    "inside_100_7.5": {},
    "inside_100_7.5_long": {"train.steps": 11600},
}


def get_config(preset: str = "di_star") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/sdxl.py:PRESET."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of prompts order, noise and times
    # steps between scores and pictures of the first eval.batch_size of eval.prompts; 0: never
    config.eval_every = 200
    config.dry_run = False  # check everything that needs no weights, print sizes and memory, stop

    config.weights = ml_collections.ConfigDict()
    # Folders in diffusers' layout, or names on the Hub. The reference gives teacher UNet, VAE, text
    # encoders, schedule.
    config.weights.reference = "stabilityai/stable-diffusion-xl-base-1.0"
    # The one-step UNet to start from. DMD2 publishes a pickle: convert it to safetensors once, see
    # README. The dot says that it is a folder: without, it could name a repository on the Hub.
    config.weights.generator = "./weights/dmd2-sdxl-1step"
    config.weights.assistant = (
        ""  # the assistant's first weights; "" copies the reference, as all siblings do
    )
    # Of the rewards; only those that are used need to be there. README says which files they are
    # and from where.
    config.weights.pickscore = "yuvalkirstain/PickScore_v1"
    config.weights.hpsv2 = "./weights/hpsv2.0"
    config.weights.hpsv21 = "./weights/hpsv2.1"
    config.weights.clipscore = "openai/clip-vit-base-patch32"
    config.weights.aesthetic = "./weights/aesthetic"
    config.weights.imagereward = "./weights/imagereward"
    config.weights.reward_tokenizer = (
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the same for all CLIPs
    )

    config.data = ml_collections.ConfigDict()
    config.data.prompts = (
        "prompts.txt"  # .txt .tsv .csv .json .jsonl .parquet; the paper: 3M LAION-Aesthetic > 6.25
    )
    # with data.prompts="parti", or another set of --prompts of evaluate: its file's path or URL
    config.data.prompts_file = ""
    config.data.column = ""  # of a table; "" finds prompt, Prompt, caption or text
    config.data.resolution = 1024  # pixels, a multiple of 64
    config.data.batch_size = 128  # images per step over all devices; DMD2's

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # copies of the parameters; -1: the devices that fsdp leaves
    config.mesh.fsdp = (
        16  # devices that share one copy; the smallest that holds 81 GB of state is best
    )
    config.mesh.context = 1  # devices that share each image, by rows: for more devices than images

    config.generator = ml_collections.ConfigDict()
    config.generator.steps = 1  # 2 and 4 train a few-step generator by DMD2's backward simulation
    # of the steps, falling, 0..999; empty: 399 for one step, else evenly from 999 (DMD2's)
    config.generator.timesteps = ()

    config.objective = ml_collections.ConfigDict()
    config.objective.name = "di_star"  # a key of objectives.OBJECTIVES
    config.objective.omega = 7.5  # guidance inside the reference; 1 is none
    config.objective.alpha_cfg = (
        0.0  # guidance outside, as an implicit reward; of di_star_outside only
    )
    config.objective.huber_c = 0.00054  # c / sqrt(d) of the pseudo-Huber distance, eps-space; > 0
    config.objective.sid_alpha = (
        1.0  # of sid only; SiD's paper uses 1.0 and 1.2, 0.5 is the unbiased gradient
    )
    config.objective.weighting = "eps"  # w(t): "eps" 1, "score" 1 / sigma_t, "x0" sigma_t / alpha_t
    config.objective.reduction = (
        "sum"  # of the regulariser over a sample, or "mean"; changes its balance with the reward
    )
    config.objective.t_min = (
        20  # first and last time of the generator's loss, 0..999, both included; DMD2's
    )
    config.objective.t_max = 980

    # alpha_rew of each reward, on what its file gives (a cosine for all CLIPs); they add up. 0 is
    # off.
    config.reward = ml_collections.ConfigDict()
    config.reward.pickscore = 100.0  # the paper's
    config.reward.hpsv2 = 0.0
    config.reward.hpsv21 = 0.0
    config.reward.clipscore = 0.0
    config.reward.aesthetic = 0.0  # knows nothing of the prompt: easily hacked
    config.reward.imagereward = 0.0

    config.assistant = ml_collections.ConfigDict()
    config.assistant.t_min = (
        0  # first and last time of the assistant's loss, 0..999, both included; DMD2's
    )
    config.assistant.t_max = 999
    config.assistant.updates = 1  # per generator update; 5 if training is unstable (DMD2 on SDXL)
    config.assistant.sharing = (
        "x0"  # with the generator's loss; "x_t" shares times, noise and one forward pass: 8 % less
    )
    config.assistant.warmup_steps = (
        200  # assistant alone first: at the start it is the reference, not the generator
    )

    config.optim = ml_collections.ConfigDict()
    config.optim.generator_lr = 5e-7  # DMD2's
    config.optim.assistant_lr = 5e-7
    config.optim.lr_warmup_steps = 0  # of a linear rise
    config.optim.b1 = 0.0  # SiD's; the target moves with the assistant
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 10.0  # of the global gradient norm

    config.ema = ml_collections.ConfigDict()
    config.ema.half_life_samples = 50_000  # SiD's; the average is what is exported

    config.compute = ml_collections.ConfigDict()
    config.compute.dtype = "bfloat16"  # or float32; masters and moments are float32 always
    config.compute.attention = (
        "auto"  # long self-attention: "splash" (TPU), "cudnn" (GPU), "xla"; auto by device
    )
    config.compute.microbatches = (
        1  # parts that a device's images are taken in, one after the other: less memory
    )
    config.compute.loop_networks = (
        True  # one traced UNet serves several passes: compiles in half the time, 6 % more work
    )
    # What a block keeps for the backward pass: "full" recomputation, all but "dots" (matrix
    # products), or "none".
    config.compute.remat_unet = "full"
    config.compute.remat_vae = "full"
    config.compute.remat_reward = "full"

    config.decode = ml_collections.ConfigDict()  # of x0 for the reward in training
    config.decode.view = (
        "full"  # or "resized" to decode.resolution, or a random "crop" of it: less work and memory
    )
    config.decode.resolution = 512  # pixels, a multiple of 64; of "resized" and "crop"
    config.decode.slice = 0  # images that a device decodes at a time, 0 for all

    config.train = ml_collections.ConfigDict()
    config.train.steps = (
        2000  # generator updates; 256k samples, the paper's short run; 11600 for the long one
    )
    config.train.log_every = 10  # steps between lines of scalars
    config.train.save_every = 200  # steps between checkpoints, 72 GB each
    config.train.keep = 3  # newest checkpoints that stay

    config.eval = ml_collections.ConfigDict()
    config.eval.prompts = ""  # file of held-out prompts for the before/after table; "" for none
    config.eval.prompts_file = ""  # as data.prompts_file
    config.eval.num_prompts = 500
    config.eval.num_per_prompt = 8  # pictures of each, for the diversity; at least 2
    config.eval.batch_size = 128  # prompts at a time
    config.eval.metrics = (
        "pickscore",
    )  # rewards that are measured even where their alpha_rew is 0
    config.eval.oracle = ""  # "shapes" reads attributes back from the pixels of the shapes world

    return override(config, preset, PRESETS)


def override(
    config: ml_collections.ConfigDict, preset: str, presets: dict
) -> ml_collections.ConfigDict:
    """The config with one row of a table of presets. Raises: UserError for an unknown name."""
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}, expected one of {', '.join(presets)}")
    config.update_from_flattened_dict(presets[preset])
    return config
