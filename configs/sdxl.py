# SPDX-License-Identifier: Apache-2.0
"""DI*-SDXL-1step: the paper's run (arXiv 2410.20898), 2.57B parameters at 1024 pixels.

    di-star train --config=sdxl --workdir=/mnt/bucket/di_star
    di-star train --config=sdxl --config.dry_run=True  # no weights

With mesh.fsdp=16 the compiled step takes 8.0 GB of a TPU v5e's 16.9 at one image a chip (128 chips
for the batch of 128; fewer take compute.microbatches). v6e: fsdp=8, 13.2 of 33.6 GB; v5p: fsdp=4,
35.8 of 102.8 GB at 4 images (docs/performance.md). One card of 80 GB takes mesh.fsdp=1,
data.batch_size=4, compute.loop_networks=False and decode.slice=1, 73.1 GB; one H200 these with
compute.remat_denoiser='dots', remat_vae='none' and remat_reward='none', which computes a quarter
less, 134.1 GB, or with data.batch_size=16 and compute.microbatches=4, 85.8 GB; set
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. At 40 % of peak, 256,000 images (the default) would take 0.7 h
on 128 v5e chips or 18.5 h on one H200: computed, not measured. The paper's PickScore on Parti
prompts: 0.2249 before, 0.2304 after. To resume, run the same command again.
"""

import ml_collections

from di_star_jax.errors import UserError, nearest

# One row per method, and per further row of the paper's Table 2, named NAME_REWARD_GUIDANCE; every
# field named here overrides the default below. We read guidance 0 of the paper's tables as omega =
# 1, conditional without guidance; its formula at 0 is the unconditional score, and the rows named
# _null are of that reading. Of the other rows of Table 2, kl_0_7.5 is diff_instruct, kl_100_7.5
# di_pp, outside_100_7.5 di_star_outside, inside_0_7.5 sim, and inside_100_7.5 di_star.
PRESETS = {
    "di_star": {},
    "di_star_l2": {"objective.distance": "l2", "objective.weighting": "x0_normalised"},
    "di_star_outside": {
        "objective.name": "di_star_outside",
        "objective.omega": 1.0,
        "objective.alpha_cfg": 7.5,
    },
    "sim": {"reward.pickscore": 0.0},
    "sid": {
        "objective.name": "sid",
        "objective.weighting": "x0_normalised",
        "reward.pickscore": 0.0,
    },
    "diff_instruct": {"objective.name": "kl", "reward.pickscore": 0.0},
    "di_pp": {"objective.name": "kl"},
    "dmd": {
        "objective.name": "kl",
        "objective.weighting": "x0_normalised",
        "objective.reduction": "mean",
        "reward.pickscore": 0.0,
    },
    "reward_only": {"objective.name": "reward_only"},
    "kl_0_0": {"objective.name": "kl", "reward.pickscore": 0.0, "objective.omega": 1.0},
    "inside_0_0": {"reward.pickscore": 0.0, "objective.omega": 1.0},
    "kl_0_0_null": {"objective.name": "kl", "reward.pickscore": 0.0, "objective.omega": 0.0},
    "inside_0_0_null": {"reward.pickscore": 0.0, "objective.omega": 0.0},
    "inside_1_7.5": {"reward.pickscore": 1.0},
    "inside_10_7.5": {"reward.pickscore": 10.0},
    "inside_100_4.5": {"objective.omega": 4.5},
    "inside_100_7.5_long": {"train.steps": 11600},
}


# One-step pre-training from the teacher alone, DI++'s first stage; its result is what alignment
# begins with: --config.weights.generator=WORKDIR. Of each recipe its rates, batch, length, times,
# guidance, updates and one-step form; b1 and all else are as below. Of SIM nothing of the kind is
# published: it has SiD-LSG's, by its author's family.
FROM_TEACHER = {
    "weights.generator": "",
    "reward.pickscore": 0.0,
    "eval.metrics": (),
    "assistant.warmup_steps": 0,
}
_SID_LSG = FROM_TEACHER | {
    "objective.omega": 4.5,  # SiD-LSG's largest; its assistant is guided as well, ours is not
    "objective.t_max": 979,
    "assistant.t_min": 20,
    "assistant.t_max": 979,
    "assistant.first": True,  # on prompts of its own
    "optim.generator_lr": 1e-6,
    "optim.assistant_lr": 1e-6,
    "optim.weight_decay": 0.0,
    "data.batch_size": 512,
    "train.steps": 10_000,  # 5 M images; its four guidances took 5 to 9 M to their best
}
RECIPES = {
    # DMD2's SDXL without its regression and its GAN
    "dmd": FROM_TEACHER
    | {
        "objective.name": "kl",
        "objective.weighting": "x0_normalised",
        "objective.reduction": "mean",
        "objective.omega": 8.0,
        "assistant.updates": 5,
        "optim.lr_warmup_steps": 500,
        "train.steps": 25_000,
    },
    # Diff-Instruct's code, whose teachers are not text-to-image: the guidance is ours
    "diff_instruct": FROM_TEACHER
    | {
        "objective.name": "kl",
        "assistant.first": True,
        "optim.generator_lr": 1e-5,
        "optim.assistant_lr": 1e-5,
        "optim.weight_decay": 0.0,
        "train.steps": 40_000,
    },
    "sim": _SID_LSG,
    "sid": _SID_LSG | {"objective.name": "sid", "objective.weighting": "x0_normalised"},
}


def distil(recipes: dict, default: str) -> dict:
    """Rows of presets: "distill" by the default loss, "distill_LOSS" by the others."""
    named = {f"distill_{loss}": row for loss, row in recipes.items() if loss != default}
    return {"distill": recipes[default]} | named


PRESETS |= distil(RECIPES, "dmd")


def get_config(preset: str = "di_star") -> ml_collections.ConfigDict:
    """Args: preset, a key of PRESETS, given as --config=configs/sdxl.py:PRESET."""
    config = ml_collections.ConfigDict()
    # of the order of prompts, noise and times
    config.seed = 0
    # steps between scores and pictures of the first eval.batch_size of eval.prompts; 0 is never
    config.eval_every = 200
    # check all that needs no weights, print sizes and memory, stop
    config.dry_run = False

    # Folders in diffusers' layout, or names on the Hub. A dot says that it is a folder: without, it
    # could name a repository. Of the rewards only those that are used need to be there.
    config.weights = ml_collections.ConfigDict()
    # pipeline folder or Hub name: teacher denoiser, VAE, text encoders, schedule
    config.weights.reference = "stabilityai/stable-diffusion-xl-base-1.0"
    # one-step denoiser to start from, a folder with safetensors (DMD2's pickle is converted once,
    # see README), an export of a run, or its workdir, or a LoRA file for the reference
    # (docs/convert.md); empty copies the teacher, as :distill does
    config.weights.generator = "./weights/dmd2-sdxl-1step"
    # first weights of the assistant; empty copies the reference, as all siblings do
    config.weights.assistant = ""
    # CLIPModel folder or Hub name
    config.weights.pickscore = "yuvalkirstain/PickScore_v1"
    # converted HPS_v2_compressed.pt
    config.weights.hpsv2 = "./weights/hpsv2.0"
    # converted HPS_v2.1_compressed.pt
    config.weights.hpsv21 = "./weights/hpsv2.1"
    # CLIPModel folder or Hub name
    config.weights.clipscore = "openai/clip-vit-base-patch32"
    # CLIP ViT-L/14 with the aesthetic head beside it
    config.weights.aesthetic = "./weights/aesthetic"
    # converted ImageReward.pt, med_config.json, vocab.txt
    config.weights.imagereward = "./weights/imagereward"
    # folder or Hub name of an AutoencoderTiny with the reference's latents, of decode.view="tiny":
    # TAESDXL for SDXL, TAESD (madebyollin/taesd) for SD 1.5 and PixArt-alpha
    config.weights.tiny_vae = "madebyollin/taesdxl"
    # tokenizer of all CLIP rewards
    config.weights.reward_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    config.data = ml_collections.ConfigDict()
    # .txt, .tsv, .csv, .json, .jsonl or .parquet, or a published set's name; the paper: 3M of
    # LAION-Aesthetic > 6.25
    config.data.prompts = "prompts.txt"
    # with data.prompts="parti", or another set of --prompts of evaluate: its file's path or URL
    config.data.prompts_file = ""
    # of a table; empty finds prompt, Prompt, caption or text
    config.data.column = ""
    # folder of di-star cache_text, in place of the text encoders: of PixArt 9.5 GB less; empty
    # encodes the prompts of each step
    config.data.cache = ""
    # pixels, a multiple of 64
    config.data.resolution = 1024
    # images a step, over all devices; DMD2's
    config.data.batch_size = 128

    config.mesh = ml_collections.ConfigDict()
    # copies of the parameters; -1 is what fsdp leaves
    config.mesh.data = -1
    # devices that share one copy; the smallest that holds 81 GB of state is best
    config.mesh.fsdp = 16
    # devices that share each image, by rows: for more devices than images
    config.mesh.context = 1

    config.generator = ml_collections.ConfigDict()
    # 2 and 4 train a few-step generator, by DMD2's backward simulation
    config.generator.steps = 1
    # of the steps, falling, 0..999; empty: for one step that of the reference's family (SDXL 399,
    # SD 1.5 625), else evenly from 999 (DMD2's)
    config.generator.timesteps = ()
    # what its one step is given: noise, z (DMD2), or scaled, sigma_t z (SIM, SiD-LSG); empty: that
    # of the reference's family (SDXL noise, SD 1.5 scaled)
    config.generator.input = ""

    config.objective = ml_collections.ConfigDict()
    # a key of objectives.OBJECTIVES
    config.objective.name = "di_star"
    # guidance inside the reference; 1 is none, 0 the unconditional score
    config.objective.omega = 7.5
    # guidance outside, as an implicit reward; of di_star_outside and kl_outside
    config.objective.alpha_cfg = 0.0
    # d(y) of the score divergences: "pseudo_huber" (the paper's), "l2", "huber", or "power"
    config.objective.distance = "pseudo_huber"
    # c / sqrt(d) of (pseudo-)Huber, in units of the weighting; > 0. In bfloat16 a prediction of x0
    # is rounded by 0.005 to 0.015 an element: only compute.scores="float32" sees below that
    config.objective.huber_c = 0.00054
    # of the distance "power", ||y||^power; 2 is l2; >= 1
    config.objective.power = 2.0
    # of sid: 1.0 and 1.2 as in its paper, 0.5 for the unbiased gradient
    config.objective.sid_alpha = 1.0
    # w(t), as the space of the divergence: "x0" (the public code of this family), "eps", "score"
    # (the papers' w = 1), or "x0_normalised", over mean|x0 - x_ref| (SiD, DMD)
    config.objective.weighting = "x0"
    # of the regulariser over a sample, or "mean"; changes its balance with the reward
    config.objective.reduction = "sum"
    # first time of the generator's loss, included, 0..999; DMD2's
    config.objective.t_min = 20
    # last time, included
    config.objective.t_max = 980

    # alpha_rew of each reward, on what its file gives; they add up. 0 is off.
    config.reward = ml_collections.ConfigDict()
    # of PickScore, a cosine; the paper's
    config.reward.pickscore = 100.0
    # of HPSv2.0, a cosine
    config.reward.hpsv2 = 0.0
    # of HPSv2.1, a cosine
    config.reward.hpsv21 = 0.0
    # of CLIPScore, a cosine
    config.reward.clipscore = 0.0
    # of LAION's aesthetic predictor v2, which knows nothing of the prompt: easily hacked
    config.reward.aesthetic = 0.0
    # of ImageReward
    config.reward.imagereward = 0.0
    # a function of your own, FILE:FUNCTION: images [B, H, W, 3] in [-1, 1] -> [B], in JAX
    config.reward.custom = ""
    # of that function
    config.reward.custom_scale = 1.0
    # pull of all rewards at x0 over the regulariser's, measured over the first 20 steps and then
    # fixed; 0 leaves the scales as they are
    config.reward.balance = 0.0

    config.assistant = ml_collections.ConfigDict()
    # first time of the assistant's loss, included, 0..999; DMD2's
    config.assistant.t_min = 0
    # last time, included
    config.assistant.t_max = 999
    # per generator update, further ones on fresh prompts, noise and samples; 5 if training is
    # unstable (DMD2 on SDXL)
    config.assistant.updates = 1
    # all of them before the generator's, which then sees what they learnt, as in the code of
    # Diff-Instruct and SiD-LSG; one forward pass more. Else the first one is on the same samples
    config.assistant.first = False
    # what both losses share: the samples, or ("x_t") times, noise and one forward pass of the
    # assistant too: 8 % less work
    config.assistant.sharing = "x0"
    # of the assistant alone first: at the start it is the reference, not the generator
    config.assistant.warmup_steps = 200

    # Adapters in place of whole networks: see configs/sdxl_lora.py.
    config.lora = ml_collections.ConfigDict()
    # of the adapters beside frozen matrices, which alone learn then; 64 is usual. 0: the whole
    # networks learn
    config.lora.rank = 0
    # alpha / rank scales what adapters add
    config.lora.alpha = 64.0
    # which matrices: "attention", "feed_forward", "projections" (into and out of transformers) and
    # "convolutions"
    config.lora.targets = ("attention", "feed_forward", "projections")
    # whether of the generator only adapters learn, on the frozen weights.generator
    config.lora.generator = True
    # whether of the assistant, on the reference, which both then share
    config.lora.assistant = True
    # the matrices of these two frozen networks in 8 bits, with a scale for each output channel:
    # half of their memory
    config.lora.int8 = False

    config.optim = ml_collections.ConfigDict()
    # AdamW rate of the generator; DMD2's
    config.optim.generator_lr = 5e-7
    # AdamW rate of the assistant
    config.optim.assistant_lr = 5e-7
    # of a linear rise of both
    config.optim.lr_warmup_steps = 0
    # AdamW; SiD's, for the target moves with the assistant
    config.optim.b1 = 0.0
    # AdamW
    config.optim.b2 = 0.999
    # AdamW
    config.optim.eps = 1e-8
    # AdamW
    config.optim.weight_decay = 0.01
    # of the global gradient norm, for losses that are means over a sample's elements; DMD2's
    config.optim.clip_norm = 10.0

    config.ema = ml_collections.ConfigDict()
    # of the average that is exported, in images, and at most 5 % of those seen; SiD-LSG's
    config.ema.half_life_samples = 50_000

    config.compute = ml_collections.ConfigDict()
    # bfloat16 or float32; masters and moments are float32 always
    config.compute.dtype = "bfloat16"
    # in which assistant and reference predict for the generator's loss: bfloat16, float32; auto is
    # float32 where nothing guides, for there bfloat16 rounds the difference away; else dtype
    config.compute.scores = "auto"
    # kernel of long self-attention: "splash" (TPU), "cudnn" (GPU), "xla"; auto by device
    config.compute.attention = "auto"
    # parts that a device's images are taken in, one after the other: less memory
    config.compute.microbatches = 1
    # one traced denoiser serves several passes: compiles in half the time, 6 % more work
    config.compute.loop_networks = True
    # "auto" chooses the three fields below, compute.microbatches and decode.slice: of what fits the
    # device by its compiler with 8 % to spare, the least work; kept in the workdir. Empty: as these
    # fields say
    config.compute.remat = ""
    # what the denoiser recomputes in the backward pass, by block: full, dots (all but
    # products with weights, convolutions and flash attention), none
    config.compute.remat_denoiser = "full"
    # of VAE blocks
    config.compute.remat_vae = "full"
    # of reward blocks
    config.compute.remat_reward = "full"

    config.decode = ml_collections.ConfigDict()
    # what of x0 the reward sees in training: full, or "resized" to decode.resolution, or a random
    # "crop" of it, or ("tiny") all of it by the small decoder of weights.tiny_vae: less work and
    # memory, and another reward
    config.decode.view = "full"
    # pixels, a multiple of 64; of "resized" and "crop"
    config.decode.resolution = 512
    # images that a device decodes at a time for the reward; 0 for all
    config.decode.slice = 0

    config.train = ml_collections.ConfigDict()
    # generator updates: 256k samples, the paper's short run; 11600 for the long one
    config.train.steps = 2000
    # steps between scalars
    config.train.log_every = 10
    # steps between checkpoints, 51 GB each
    config.train.save_every = 200
    # newest checkpoints that stay
    config.train.keep = 3

    config.eval = ml_collections.ConfigDict()
    # held-out prompts for the before/after table, as data.prompts; empty for none
    config.eval.prompts = ""
    # as data.prompts_file
    config.eval.prompts_file = ""
    # of them, at most
    config.eval.num_prompts = 500
    # pictures of each, for the diversity; 2 or more
    config.eval.samples = 8
    # prompts at a time
    config.eval.batch_size = 128
    # rewards that are measured even where their alpha_rew is 0
    config.eval.metrics = ("pickscore",)
    # folder with the teacher's scores and pictures on the same prompts, as pretrain leaves them
    config.eval.teacher = ""
    # "shapes" reads attributes back from the pixels of the shapes world
    config.eval.oracle = ""

    return override(config, preset, PRESETS)


def override(
    config: ml_collections.ConfigDict,
    preset: str,
    presets: dict,
) -> ml_collections.ConfigDict:
    """The config with one row of a table of presets. Raises: UserError for an unknown name."""
    if preset not in presets:
        near = nearest(preset, list(presets))
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"expected one of {', '.join(presets)}"
        )
        raise UserError(f"unknown preset {preset!r}, {hint}")
    config.update_from_flattened_dict(presets[preset])
    return config
