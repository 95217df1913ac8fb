# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong is said in one line, before anything is compiled or downloaded."""

import importlib.util
from pathlib import Path

import jax
import pytest

from di_star_jax.checks import check, check_workdir, make_workdir
from di_star_jax.config import fields
from di_star_jax.cost import plan, report
from di_star_jax.cost.plan import planned_devices
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError, suggest
from di_star_jax.pipelines.pixart import PIXART
from di_star_jax.pipelines.sd15 import SD15
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.rewards import scales_of
from di_star_jax.samplers import generator_form
from di_star_jax.studies import fields as studies_fields

ROOT = Path(__file__).parent.parent


CONFIGS = ("sdxl", "sdxl_lora", "shapes", "sd15", "pixart", "shapes_pixart")


def load(name, *preset):
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


def dry(**changes):
    config = load("sdxl")
    config.dry_run = True
    config.update_from_flattened_dict(changes)
    return config


def test_defaults_pass_and_all_configs_have_the_same_fields():
    check(dry(), 16)
    for name in CONFIGS:
        assert fields(load("sdxl")).keys() == fields(load(name)).keys()
    assert load("sdxl", "sim").reward.pickscore == load("shapes", "sim").reward.pickscore == 0.0


def presets(name):
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.PRESETS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_passes_the_checks(name):
    for preset in presets(name):
        config = load(name, preset)
        config.dry_run = True
        check(config, {"sdxl": 16, "sdxl_lora": 1}.get(name, 4))


@pytest.mark.parametrize(
    "preset, objective, omega, alpha_cfg, reward",
    [
        ("kl_0_0", "kl", 1.0, 0.0, 0.0),
        ("diff_instruct", "kl", 7.5, 0.0, 0.0),
        ("di_pp", "kl", 7.5, 0.0, 100.0),
        ("di_star_outside", "di_star_outside", 1.0, 7.5, 100.0),
        ("inside_0_0", "di_star", 1.0, 0.0, 0.0),
        ("sim", "di_star", 7.5, 0.0, 0.0),
        ("inside_1_7.5", "di_star", 7.5, 0.0, 1.0),
        ("inside_10_7.5", "di_star", 7.5, 0.0, 10.0),
        ("inside_100_4.5", "di_star", 4.5, 0.0, 100.0),
        ("di_star", "di_star", 7.5, 0.0, 100.0),
    ],
)
def test_rows_of_table_2_have_its_scales(preset, objective, omega, alpha_cfg, reward):
    row = load("sdxl", preset)
    c = row.objective
    assert (c.name, c.omega, c.alpha_cfg, row.reward.pickscore) == (
        objective,
        omega,
        alpha_cfg,
        reward,
    )


def test_a_few_step_generator_without_times_has_those_of_dmd2():
    forms = [
        generator_form(dry(**{"generator.steps": k}).generator, FewStep((399,))) for k in (1, 2, 4)
    ]
    assert forms == [FewStep((399,)), FewStep((999, 499)), FewStep((999, 749, 499, 249))]


def test_the_one_step_form_is_the_familys_but_for_what_the_config_says():
    def form(**changes):
        fields = {f"generator.{name}": value for name, value in changes.items()}
        return generator_form(dry(**fields).generator, FewStep((625,), "scaled"))

    assert form() == FewStep((625,), "scaled")
    assert form(timesteps=(440,)) == FewStep((440,), "scaled")
    assert form(timesteps=(399,), input="noise") == FewStep((399,), "noise")
    assert form(steps=2) == FewStep((999, 499), "noise")


@pytest.mark.parametrize(
    "preset, objective, omega, alpha_cfg, reward",
    [
        ("di_pp", "kl", 4.5, 0.0, 1.0),
        ("kl_10_4.5", "kl", 4.5, 0.0, 10.0),
        ("diff_instruct", "kl", 4.5, 0.0, 0.0),
        ("di_star", "di_star", 4.5, 0.0, 1.0),
        ("di_star_outside", "di_star_outside", 1.0, 4.5, 1.0),
        ("sim", "di_star", 4.5, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_presets_of_di_pps_models_have_its_guidance_and_imagereward(
    name, preset, objective, omega, alpha_cfg, reward
):
    row = load(name, preset)
    c = row.objective
    assert (c.name, c.omega, c.alpha_cfg) == (objective, omega, alpha_cfg)
    scales = {name: scale for name, scale in scales_of(row.reward).items() if scale}
    assert scales == ({"imagereward": reward} if reward else {})
    assert row.data.resolution == 512
    methods = {"di_star", "di_star_l2", "di_star_outside", "sim", "sid", "diff_instruct", "di_pp"}
    others = {row for row in presets(name) if not row.startswith("distill")} - {"1024"}
    assert others == methods | {"dmd", "reward_only", "kl_10_4.5"}
    assert load(name) == load(name, "di_pp")


@pytest.mark.parametrize(
    "name, preset, objective, form, rates",
    [
        ("sdxl", "distill", "kl", FewStep((399,), "noise"), (5e-7, 5, 8.0)),
        ("sdxl", "distill_sid", "sid", FewStep((399,), "noise"), (1e-6, 1, 4.5)),
        ("sd15", "distill", "sid", FewStep((625,), "scaled"), (1e-6, 1, 4.5)),
        ("sd15", "distill_dmd", "kl", FewStep((999,), "noise"), (1e-5, 10, 1.75)),
        ("pixart", "distill", "di_star", FewStep((440,), "scaled"), (1e-6, 1, 4.5)),
        ("pixart", "distill_dmd", "kl", FewStep((400,), "noise"), (1e-6, 1, 3.0)),
        ("pixart", "distill_diff_instruct", "kl", FewStep((440,), "scaled"), (1e-5, 1, 4.5)),
        ("shapes", "distill_sim", "di_star", FewStep((399,), "noise"), (1e-4, 1, 3.0)),
    ],
)
def test_a_distillation_begins_with_the_teacher_and_has_its_recipes_rates(
    name, preset, objective, form, rates
):
    row = load(name, preset)
    family = {"sdxl": SDXL, "sd15": SD15, "pixart": PIXART, "shapes": SDXL}[name]
    assert row.weights.generator == "" and not any(scales_of(row.reward).values())
    assert row.objective.name == objective
    assert generator_form(row.generator, family.one_step) == form
    assert (row.optim.generator_lr, row.assistant.updates, row.objective.omega) == rates
    losses = {"diff_instruct", "sim", "sid", "dmd"}
    named = {one.removeprefix("distill_") for one in presets(name) if one.startswith("distill_")}
    assert len(named) == 3 and named < losses


@pytest.mark.long
def test_a_dry_run_of_sd15_counts_its_parameters_from_what_is_published():
    config = load("sd15")
    config.dry_run = True
    lines = "\n".join(report.describe(plan.make(config, 1, "cpu")))
    for line in ("859,520,964 denoiser", "83,653,863 vae", "123,060,480 text_encoder\n"):
        assert line in lines
    assert "imagereward" in lines and "unknown" not in lines


@pytest.mark.slow
def test_a_dry_run_of_pixart_counts_its_parameters_from_what_is_published():
    for preset, count in (("di_pp", "610,856,096"), ("1024", "611,349,152")):
        config = load("pixart", preset)
        config.dry_run = True
        lines = "\n".join(report.describe(plan.make(config, 1, "cpu")))
        for line in (f"{count} denoiser", "83,653,863 vae", "4,762,310,656 text_encoder\n"):
            assert line in lines
        assert "imagereward" in lines and "unknown" not in lines
    assert config.data.resolution == 1024


@pytest.mark.parametrize(
    "name, heading, base",
    [("sd15", "## SD 1.5", "sdxl"), ("pixart", "## PixArt-alpha", "sd15")],
)
def test_what_a_config_changes_has_its_source(name, heading, base):
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    section = page.split(heading)[1].split("##")[0]
    ours, base = fields(load(name)), fields(load(base))
    changed = [f"- `{field}={value!r}`: " for field, value in ours.items() if value != base[field]]
    lines = [line for line in section.splitlines() if line.startswith("- ")]
    assert len(lines) == len(changed)
    for start in changed:
        assert any(line.startswith(start) for line in lines), start


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="unknown preset 'nothing', expected one of di_star, di_star_l2"
    ):
        load("sdxl", "nothing")


@pytest.mark.parametrize(
    "changes, devices, message",
    [
        ({"data.batch_size": 6, "mesh.fsdp": 4}, 4, r"data.batch_size=6 .*4 devices.*use 4 or 8"),
        (
            {"data.batch_size": 24, "mesh.fsdp": 8},
            16,
            r"data.batch_size=24 .*16 devices of mesh data=2 x fsdp=8; use 16 or 32",
        ),
        ({"mesh.fsdp": 16}, 12, r"fsdp=16 does not make up the 12 devices"),
        (
            {"mesh.data": 3, "mesh.fsdp": 2},
            8,
            r"data=3 x fsdp=2 does not make up the 8 devices.*fsdp to 1 or 2 or 4 or 8",
        ),
        ({"mesh.fsdp": 0}, 8, r"mesh.fsdp=0, expected 1 or more"),
        ({"mesh.data": -2}, 8, r"mesh.data=-2, expected 1 or more"),
        ({"mesh.fsdp": -1}, 8, r"mesh.data=-1 and mesh.fsdp=-1: expected one of them at most"),
        ({"data.resolution": 1000}, 16, r"1000 is not a multiple of 64; use 1024"),
        ({"mesh.context": -1}, 16, r"mesh.context=-1, expected 1 or more"),
        ({"mesh.context": 3, "mesh.fsdp": 4}, 16, r"x context=3 does not make up the 16 devices"),
        (
            {"mesh.context": 2, "mesh.fsdp": 8, "data.batch_size": 12},
            16,
            r"by the 8 groups of 2 devices.*use 8 or 16",
        ),
        (
            {"compute.microbatches": 3},
            16,
            r"compute.microbatches=3 does not divide the 8 images of a device; use 1 or 2",
        ),
        (
            {"compute.attention": "flash"},
            16,
            r"compute.attention='flash', expected one of 'auto', 'splash'",
        ),
        (
            {"compute.remat_vae": "some"},
            16,
            r"compute.remat_vae='some', expected one of 'none', 'dots', 'full'",
        ),
        (
            {"assistant.sharing": "x_t"},
            16,
            r"compute.loop_networks=True with assistant.sharing='x_t'",
        ),
        ({"decode.slice": 3}, 16, r"decode.slice=3 does not divide the 8 images"),
        (
            {"decode.view": "half"},
            16,
            r"decode.view='half', expected one of 'full', 'resized', 'crop', 'tiny'",
        ),
        (
            {"decode.view": "crop", "decode.resolution": 2048},
            16,
            r"decode.resolution=2048 is more than data.resolution=1024",
        ),
        (
            {"objective.name": "distar"},
            16,
            r"objective.name='distar', expected one of 'di_star', .*did you mean di_star",
        ),
        ({"objective.huber_c": 0.0}, 16, r"objective.huber_c=0.0, expected more than 0"),
        (
            {"reward.pickscore": float("inf")},
            16,
            r"reward.pickscore=inf, expected a number; 100 is the paper's",
        ),
        (
            {"eval.metrics": ("pikscore",)},
            16,
            r"eval.metrics='pikscore', expected one of .*did you mean pickscore\?",
        ),
        ({"eval_every": -1}, 16, r"eval_every=-1, expected 0 or more"),
        (
            {"objective.t_max": 1000},
            16,
            r"objective.t_min=20, objective.t_max=1000, expected 0 <= t_min <= t_max <= 999",
        ),
        ({"assistant.t_min": 500, "assistant.t_max": 400}, 16, r"assistant.t_min=500"),
        (
            {"generator.input": "noisy"},
            16,
            r"generator.input='noisy', expected one of '', 'noise', 'scaled', did you mean noise",
        ),
        (
            {"generator.input": "scaled", "generator.steps": 2},
            16,
            r"generator.input='scaled' with generator.steps=2, .*set generator.input=''",
        ),
        ({"generator.timesteps": ("abc",)}, 16, r"\('abc',\), expected falling numbers in 0..999"),
        (
            {"generator.timesteps": (-1,)},
            16,
            r"generator.timesteps=\(-1,\), expected falling numbers in 0..999",
        ),
        (
            {"generator.steps": 2, "generator.timesteps": (499, 999)},
            16,
            r"\(499, 999\), expected falling numbers",
        ),
        (
            {"generator.steps": 4, "generator.timesteps": (399,)},
            16,
            r"are 1, but generator.steps=4; give as many, or \(\)",
        ),
        ({"generator.steps": 200}, 16, r"generator.steps=200, expected 1 to 100"),
        (
            {"objective.alpha_cfg": 7.5},
            16,
            r"alpha_cfg=7.5 is guidance outside, which objective.name='di_star' does not",
        ),
        ({"objective.alpha_cfg": -1.0}, 16, r"objective.alpha_cfg=-1.0, expected 0 or more"),
        ({"objective.omega": -1.0}, 16, r"objective.omega=-1.0, expected 0 or more"),
        (
            {"objective.weighting": "none"},
            16,
            r"objective.weighting='none', expected one of 'eps', 'score', 'x0'",
        ),
        (
            {"objective.reduction": "max"},
            16,
            r"objective.reduction='max', expected one of 'sum', 'mean'",
        ),
        (
            {"assistant.sharing": "x_t", "assistant.updates": 5, "compute.loop_networks": False},
            16,
            r"assistant.updates=5 with assistant.sharing='x_t'",
        ),
        (
            {"assistant.t_max": 1000},
            16,
            r"assistant.t_max=1000, expected 0 <= t_min <= t_max <= 999",
        ),
        (
            {"compute.dtype": "float16"},
            16,
            r"compute.dtype='float16', in which SDXL's VAE overflows; use 'bfloat16'",
        ),
        (
            {"compute.dtype": "half"},
            16,
            r"compute.dtype='half', expected one of 'bfloat16', 'float32'",
        ),
        ({"optim.b2": 1.0}, 16, r"optim.b2=1.0, expected a number in \[0, 1\)"),
        ({"objective.omega": float("nan")}, 16, r"objective.omega=nan, expected 0 or more"),
        ({"eval.samples": 1}, 16, r"eval.samples=1, expected 2 or more"),
        (
            {"eval.prompts": "some.txt", "eval.batch_size": 20},
            16,
            r"eval.batch_size=20 .*use 16 or 32",
        ),
        ({"train.save_every": 0}, 16, r"train.save_every=0, expected more than 0"),
        (
            {"dry_run": False, "data.prompts": "nowhere.txt"},
            16,
            r"data.prompts=nowhere.txt: no such file",
        ),
        (
            {"dry_run": False, "data.prompts": "parti"},
            16,
            r"data.prompts=parti needs PartiPrompts, .* add data.prompts_file=PATH_OR_URL",
        ),
        (
            {"dry_run": False, "data.prompts": "drawbnch"},
            16,
            r"data.prompts=drawbnch is neither a file nor .*, did you mean drawbench\?",
        ),
        (
            {"dry_run": False, "data.prompts": "parti", "data.prompts_file": "nowhere.tsv"},
            16,
            r"data.prompts_file=nowhere.tsv: no such file",
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(changes, devices, message):
    with pytest.raises(UserError, match=message) as error:
        check(dry(**changes), devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["./nowhere", load("sdxl").weights.generator, "/no/where", "a/b/c"]
)
def test_a_missing_weights_folder_is_refused_before_the_network_is_asked(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    with pytest.raises(UserError, match=f"weights.generator={name}: no such folder"):
        check(
            dry(**{"dry_run": False, "data.prompts": str(prompts), "weights.generator": name}), 16
        )


def test_a_dry_run_is_for_this_machine_only_where_the_mesh_fits_it():
    assert planned_devices(dry(), 1) == 16
    assert planned_devices(dry(), 64) == 64
    assert planned_devices(dry(**{"mesh.data": 2}), 64) == 32
    assert planned_devices(dry(**{"mesh.data": 4, "mesh.fsdp": -1}), 1) == 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "no --workdir"),
        (
            "s3://bucket/run",
            "Orbax writes checkpoints to no bucket but gs://.*give a gs:// address",
        ),
        ("ftp://bucket/run", "begins with ftp://, expected gs://"),
        ("gs://bucket/lr[5e-7]", r"has \[ \] in it, which cannot be read back"),
        ("gs:///run", "names no bucket, expected gs://BUCKET/PATH"),
        ("file", "file is a file, expected a folder"),
        ("file/run", "file is a file, expected a folder"),
    ],
)
def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        check_workdir(name)
    check_workdir("new/folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.case("faults 2")
@pytest.mark.parametrize("name", ["lr[5e-7]", "a*", "what?", "back\\slash"])
def test_a_workdir_that_could_not_be_read_back_is_refused_before_the_run(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read back from; give a folder without"):
        check_workdir(str(tmp_path / name / "run"))


@pytest.mark.case("faults 26")
@pytest.mark.parametrize("name", ["/proc/x", "x" * 300, "/proc/self/x/y"])
def test_a_workdir_that_no_one_can_make_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be written .*; give another folder") as error:
        make_workdir(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert make_workdir("new/folder").is_dir() and list((tmp_path / "new/folder").iterdir()) == []


@pytest.mark.case("faults 21")
def test_64_bit_numbers_are_refused_by_the_variables_name():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(UserError, match="^JAX_ENABLE_X64=1 .*unset JAX_ENABLE_X64$"):
            check(dry(), 16)
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.case("first hour 24")
def test_all_missing_inputs_are_named_at_once():
    changes = {"dry_run": False, "data.prompts": "none.txt", "weights.pickscore": "./none"}
    with pytest.raises(UserError) as error:
        check(dry(**changes), 16)
    line = str(error.value)
    assert "\n" not in line
    for missing in (
        "data.prompts=none.txt: no such file",
        "weights.pickscore=./none: no such folder",
    ):
        assert missing in line
    assert "weights.generator=./weights/dmd2-sdxl-1step: no such folder" in line


@pytest.mark.case("first hour 24")
def test_reward_only_without_a_reward_is_refused():
    with pytest.raises(UserError, match="reward_only' with all scales in reward 0 trains nothing"):
        check(dry(**{"objective.name": "reward_only", "reward.pickscore": 0.0}), 16)


def test_suggestions_search_full_dotted_names():
    known = list(fields(load("sdxl")))
    assert suggest("trian.steps", known) == ", did you mean train.steps?"
    assert suggest("batch_size", known) == ", did you mean data.batch_size?"
    assert suggest("optimizer.b3", known) in (
        ", did you mean optim.b1?",
        ", did you mean optim.b2?",
    )
    assert suggest("asistant.t_min", known) == ", did you mean assistant.t_min?"
    assert suggest("zzz", known) == ""


def test_the_page_of_all_fields_is_that_of_the_config():
    config = ROOT / "configs" / "sdxl.py"
    said = studies_fields.comments(config.read_text())
    assert [name for name in fields(load("sdxl")) if not said.get(name)] == []
    assert (ROOT / "docs" / "fields.md").read_text() == studies_fields.page(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_preset_has_two_names(name):
    rows = [load(name, preset).to_json_best_effort() for preset in presets(name)]
    assert len(set(rows)) == len(rows)


def test_a_config_that_lacks_a_field_is_refused_in_one_line():
    config = dry()
    with config.unlocked():
        del config.eval.samples
    with pytest.raises(UserError, match="the config has no field eval.samples; add it"):
        check(config, 16)


def test_every_default_has_its_source():
    said = {}
    for line in (ROOT / "docs" / "method.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            name, default, source = (cell.strip("`") for cell in cells[:3])
            assert name not in said and source
            said[name] = default
    assert said == {name: repr(value) for name, value in fields(load("sdxl")).items()}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"objective.name": "di_star_outside", "objective.weighting": "x0_normalised"},
            "objective.weighting='x0_normalised' with objective.name='di_star_outside', which has "
            "eps, score, x0; use one of these",
        ),
        (
            {"assistant.first": True, "assistant.sharing": "x_t", "compute.loop_networks": False},
            "assistant.first=True with assistant.sharing='x_t'",
        ),
        (
            {"reward.balance": 1.0, "reward.pickscore": 0.0},
            "reward.balance=1 with all scales in reward 0 has nothing to balance",
        ),
        (
            {"reward.balance": 1.0, "objective.name": "reward_only"},
            "reward.balance=1 with objective.name='reward_only', which has no regulariser",
        ),
        ({"reward.balance": -1.0}, "reward.balance=-1.0, expected 0 or more"),
        ({"optim.b2": 1.0}, r"optim.b2=1.0, expected a number in \[0, 1\)"),
        ({"optim.b2": 0.0}, "optim.b2=0.0, expected more than 0"),
        (
            {"objective.distance": "power", "objective.power": 0.5},
            "objective.power=0.5, expected 1 or more",
        ),
        ({"objective.name": "dmd"}, "objective.name='dmd', expected one of"),
        ({"compute.scores": "float16"}, "compute.scores='float16', expected one of"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(dry(**changes), 16)
