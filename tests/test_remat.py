# SPDX-License-Identifier: Apache-2.0
"""compute.remat='auto': what is tried, in which order, what is taken, and that it is kept."""

import json
import math
import types

import jax
import pytest
from test_benchmark import folder, tiny
from test_config import dry
from test_train import config_for, write_pipeline

from di_star_jax import benchmark, processes, sharding, train
from di_star_jax.checks import check
from di_star_jax.cost import compile as aot
from di_star_jax.cost import flops, plan, policies, remat, report
from di_star_jax.cost.policies import Choice
from di_star_jax.cost.remat import Found, Tried
from di_star_jax.errors import UserError

__all__ = ["folder"]  # a fixture
NOTHING = Choice("none", "none", "none", 1, 0)
ALL = Choice("full", "full", "full", 1, 0)
AUTO = {"compute.remat": "auto"}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(-1, 2)


@pytest.fixture
def config(folder):
    """Two images on each of eight devices."""
    return tiny(folder, **AUTO, **{"mesh.fsdp": 2, "data.batch_size": 16, "dry_run": True})


def flop_by_formula(*_):
    """As `remat.executed`, without a trace."""
    return {of[:3]: 1e12 * (100 + policies.repeated(of)) for of in policies.choices(1)}


@pytest.fixture
def compiler(monkeypatch):
    """In place of the compiler: bytes by choice, of a step that nothing else is asked of."""
    asked = {}

    def compiled(config, mesh, choice, effort):
        return asked.setdefault(choice, compiled.needs(choice)), None

    compiled.asked = asked
    monkeypatch.setattr(remat, "executed", flop_by_formula)
    monkeypatch.setattr(remat, "_compiled", compiled)
    return compiled


# What there is to choose from.


def test_every_choice_passes_the_checks_and_none_is_left_out():
    found = policies.choices(4)
    parts = {choice[3:] for choice in found}
    assert parts == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (4, 0)}
    assert len(found) == len(set(found)) == 27 * len(parts)
    for choice in found:
        config = dry(**{"data.batch_size": 64}, **choice.fields)
        check(config, 16)
        assert Choice.of(config) == choice
    assert str(ALL) == (
        "remat_denoiser=full, remat_vae=full, remat_reward=full, microbatches=1, slice=0"
    )


def test_an_unknown_value_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="compute.remat='full', expected one of '', 'auto'"):
        check(dry(**{"compute.remat": "full"}), 16)


# The choice by formula.


def sizes(**gb):
    """Choices with their bytes, in GB. Args: by the policies' first letters and the two numbers."""
    names = {"n": "none", "d": "dots", "f": "full"}
    return {
        Choice(*(names[letter] for letter in key[:3]), int(key[3]), int(key[4])): 1e9 * size
        for key, size in gb.items()
    }


def test_the_plan_takes_the_least_work_that_leaves_8_percent_free():
    sized = sizes(nnn10=20, dnn10=9.3, fnn10=9.1, fff10=5, fff20=4)
    assert policies.by_size(sized, 10e9).policies == ("full", "none", "none")
    assert policies.by_size(sized, 10.2e9).policies == ("dots", "none", "none")
    assert policies.by_size(sized, 30e9) == NOTHING
    assert policies.by_size(sized, 1e9) == Choice("full", "full", "full", 2, 0)


def test_of_as_much_work_the_plan_takes_what_is_least_cut():
    sized = sizes(nnn10=9.9, nnn20=6, nnn11=7, nnn12=8)
    assert policies.by_size(sized, 10e9) == Choice("none", "none", "none", 1, 2)


@pytest.mark.slow
def test_a_dry_run_says_in_seconds_what_it_would_take_and_asks_no_compiler(config, monkeypatch):
    monkeypatch.setattr(aot, "compile_work", None)
    made = plan.make(config, 8, "TPU v5 lite")
    line = next(line for line in report.describe(made) if line.startswith("compute.remat=auto"))
    assert line.startswith("compute.remat=auto: remat_denoiser=none, remat_vae=none, ")
    told = " ".join(" ".join(report.describe(made)).split())
    assert "slice=0, by the plan's formula; before its first step a run asks the compiler" in told
    assert made.bytes == made.having(NOTHING.fields).bytes
    assert {choice[3:] for choice in made.choices} == {(1, 0), (1, 1), (2, 0)}
    unknown = plan.make(config, 8, "of any kind")
    told = " ".join(" ".join(report.describe(unknown)).split())
    assert "the fields as they are, for a device whose memory is not known; --topology" in told
    assert Choice.of(unknown.config) == ALL
    plain = plan.make(tiny_without_auto(config), 8, "TPU v5 lite")
    assert "compute.remat" not in " ".join(report.describe(plain))


def tiny_without_auto(config):
    plain = config.copy_and_resolve_references()
    plain.compute.remat = ""
    return plain


def test_a_plan_of_sdxl_on_v5e_fits_with_less_work_than_everything_again():
    made = plan.make(dry(**AUTO, **{"data.batch_size": 16}), 16, "TPU v5 lite")
    chip = plan.memory_of(made)
    assert made.bytes <= 0.92 * chip
    assert policies.repeated(Choice.of(made.config)) < policies.repeated(ALL)
    least_work = min(
        policies.repeated(c) for c, size in made.choices.items() if size <= 0.92 * chip
    )
    assert policies.repeated(Choice.of(made.config)) == least_work


def test_the_plan_of_an_accelerator_keeps_products_but_no_attention_maps():
    def kept(policy, kind):
        changes = {"compute.remat_denoiser": policy, "data.batch_size": 16}
        made = plan.make(dry(**changes), 16, kind)
        return made.phases["gradients and learning"].image / 1e9

    full, dots, none = (kept(policy, "TPU v5 lite") for policy in ("full", "dots", "none"))
    # 10 blocks of 64 x 64 tokens and 60 of 32 x 32, of 16 outputs in bfloat16.
    products = 2 * 16 * (10 * 64**2 * 640 + 60 * 32**2 * 1280) / 1e9
    # Of 5 resnets of 128 x 128, 5 of 64 x 64 and 7 of 32 x 32 two convolutions, and shortcuts.
    products += 2 * (13 * 128**2 * 320 + 14 * 64**2 * 640 + 18 * 32**2 * 1280) / 1e9
    assert dots - full == pytest.approx(products, rel=0.01)
    assert full < dots < none < kept("none", "cpu")


def test_on_a_cpu_the_machines_ram_decides(config, monkeypatch):
    config.dry_run = False
    for ram, expected in ((64e9, NOTHING), (plan.PROGRAM + 1e3, None)):
        monkeypatch.setattr(plan, "ram_here", lambda ram=ram: ram)
        made = plan.make(config, 8, "cpu")
        assert Choice.of(made.config) == (expected or policies.least(made.choices))
        lines = report.describe(made)
        assert any("by the plan's formula" in line for line in lines)
        assert not any("asks the compiler" in line for line in lines)


def test_a_plan_with_other_fields_is_the_plan_of_a_config_with_these(config):
    made = plan.make(tiny_without_auto(config), 8, "TPU v5 lite")
    for choice in (
        NOTHING,
        Choice("full", "dots", "none", 2, 0),
        Choice("dots", "full", "full", 1, 1),
    ):
        changed = remat.with_choice(tiny_without_auto(config), choice)
        assert made.having(choice.fields).bytes == plan.make(changed, 8, "TPU v5 lite").bytes


# The order of compilation.


def order(sized, needs, have):
    """Those compiled, until one fits. Args: needs, GB by choice."""
    flop, tried = flop_by_formula(), []
    while choice := remat.following(sized, flop, tried, have):
        need = 1e9 * needs[choice]
        size = sized[choice]
        tried.append(Tried(choice, flop[choice.policies], size, need, need <= have))
        if tried[-1].fits:
            break
    return tried


def test_the_least_executed_flop_that_may_fit_is_compiled_first():
    sized = sizes(nnn10=12, dnn10=11, fnn10=9, fff10=5)
    needs = {choice: size / 1e9 for choice, size in sized.items()}
    tried = order(sized, needs, 10e9)  # the plan may be 15 % too high
    assert [row.choice.denoiser for row in tried] == ["dots", "full"]
    assert [row.fits for row in tried] == [False, True]
    assert tried[-1].choice.policies == ("full", "none", "none")


def test_what_takes_as_much_by_the_plan_as_what_did_not_fit_is_passed_over():
    sized = sizes(dnn10=9, dnd10=9, dnf10=9.5, fnn10=8)
    tried = order(sized, dict.fromkeys(sized, 9.0) | {next(iter(sized)): 11.0}, 10e9)
    assert [row.choice.policies for row in tried] == [
        ("dots", "none", "none"),
        ("full", "none", "none"),
    ]


def test_the_compilers_word_on_one_corrects_the_plan_of_those_with_the_same_policies():
    sized = sizes(nnn10=9, nnn20=7, nnn40=4, fff40=1)
    needs = dict(zip(sized, (18, 14, 8, 2)))  # twice the plan
    tried = order(sized, needs, 10e9)
    assert [row.choice.microbatches for row in tried] == [1, 4]


def test_compilations_are_bounded_and_the_last_is_what_takes_least():
    sized = {choice: 9e9 - 1e7 * i for i, choice in enumerate(policies.choices(8))}
    tried = order(sized, dict.fromkeys(sized, 11.0), 10e9)
    assert len(tried) == remat.MOST and not any(row.fits for row in tried)
    assert tried[-1].choice == policies.least(sized)
    assert len({row.choice for row in tried}) == remat.MOST


def test_where_the_plan_rules_all_out_the_least_is_compiled_all_the_same():
    sized = sizes(nnn10=40, fff10=30)
    tried = order(sized, dict.fromkeys(sized, 9.0), 10e9)
    assert [row.choice for row in tried] == [ALL]


# The search.


@pytest.fixture
def planned(monkeypatch, config):
    """In place of a plan: a few choices and their bytes."""
    sized = sizes(nnn10=9, nnf10=9, dnn10=8, dnn20=7, fff10=5, fff20=4)
    made = types.SimpleNamespace(choices=sized, device_kind="TPU v5 lite", config=config)
    monkeypatch.setattr(remat, "_planned", lambda config, mesh: made)
    return made


def test_a_search_takes_the_first_that_fits_by_the_compiler_and_says_what_it_tried(
    config, planned, compiler
):
    compiler.needs = lambda choice: {"none": 9.3e9, "dots": 9.1e9}[choice.denoiser]
    found = remat.search(config, None, 10e9, effort=0.0)
    assert found.choice == Choice("dots", "none", "none", 1, 0)
    assert list(compiler.asked) == [NOTHING, found.choice]
    assert remat.told(found, 10e9, "TPU v5 lite").splitlines() == [
        "| remat_denoiser | remat_vae | remat_reward | microbatches | slice | executed TFLOP an "
        "image | plan, GB | compiler, GB | fits |",
        "|---|---|---|---|---|---|---|---|---|",
        "| none | none | none | 1 | 0 | 100 | 9 | 9.3 | no |",
        "| dots | none | none | 1 | 0 | 100.1 | 8 | 9.1 | yes |",
        "compute.remat=auto: remat_denoiser=dots, remat_vae=none, remat_reward=none, "
        "microbatches=1, slice=0: the first that fits 10.0 GB of TPU v5 lite with 8% to spare",
    ]


def test_where_nothing_fits_the_line_has_the_least_that_was_tried(
    config, planned, compiler, capsys
):
    compiler.needs = lambda choice: 50e9 if choice.denoiser == "full" else 90e9
    with pytest.raises(UserError) as error:
        remat.search(config, None, 10e9, effort=0.0)
    assert str(error.value) == (
        "the step needs 50.0 GB a device, TPU v5 lite with 8% to spare has 9.2; in this order "
        "raise compute.microbatches=1, set compute.remat_denoiser='full', remat_vae='full' and "
        "remat_reward='full' to 'full', raise mesh.fsdp=2, lower data.batch_size=16"
    )
    assert list(compiler.asked)[-1] == Choice("full", "full", "full", 2, 0)
    assert capsys.readouterr().out.count(" | no |") == len(compiler.asked)


def test_what_the_compiler_fails_on_is_passed_over_alone(config, planned, compiler, capsys):
    compiler.needs = lambda choice: math.inf if choice.microbatches == 1 else 9.1e9
    found = remat.search(config, None, 10e9, effort=0.0)
    halves = Choice("dots", "none", "none", 2, 0)
    assert list(compiler.asked) == [NOTHING, halves._replace(microbatches=1), halves]
    assert found.choice == halves
    assert "| 9 | failed | no |" in remat.told(found, 10e9, "TPU v5 lite")


def test_a_compiler_that_fails_on_all_ends_in_one_line(config, planned, compiler):
    compiler.needs = lambda choice: math.inf
    with pytest.raises(UserError, match="fails on all 6 choices that were tried"):
        remat.search(config, None, 10e9, effort=0.0)


def test_a_fault_of_the_compiler_is_said_and_is_not_the_end(config, mesh, monkeypatch, capsys):
    monkeypatch.setattr(aot, "train_work", lambda config, mesh: config)

    def compile_work(work, config, *, effort):
        raise jax.errors.JaxRuntimeError("INTERNAL: no tiles\nat step.py:1")

    monkeypatch.setattr(aot, "compile_work", compile_work)
    assert remat._compiled(config, mesh, NOTHING, 0.0) == (math.inf, None)
    assert "the compiler failed: INTERNAL: no tiles\n" in capsys.readouterr().out


def test_processes_take_the_figures_of_the_first_one(config, planned, compiler, monkeypatch):
    first = iter(["10e9", "9.3e9", "9.1e9"])
    monkeypatch.setattr(processes, "gather", lambda name, text: [next(first), text])
    compiler.needs = lambda choice: 1e9  # here all would fit
    found = remat.search(config, None, 99e9, effort=0.0)
    assert [row.need for row in found.tried] == [9.3e9, 9.1e9]
    assert found.choice == Choice("dots", "none", "none", 1, 0)


def test_an_out_of_memory_of_the_compiler_is_a_figure_and_not_the_end(config, mesh, monkeypatch):
    monkeypatch.setattr(aot, "train_work", lambda config, mesh: config)

    def compile_work(work, config, *, effort):
        if config.compute.remat_denoiser == "none":
            raise plan.out_of_memory(20.0, 10.0, "TPU v5 lite", config)
        return aot.Compiled(None, {}, {"arguments": 3, "temporaries": 4, "peak": 5}, {})

    monkeypatch.setattr(aot, "compile_work", compile_work)
    assert remat._compiled(config, mesh, NOTHING, 0.0) == (20e9, None)
    need, compiled = remat._compiled(config, mesh, ALL, 0.0)
    assert need == 7 and compiled.memory["peak"] == 5


def test_without_a_known_memory_the_plan_decides(config, mesh, monkeypatch):
    monkeypatch.setattr(plan, "ram_here", lambda: 64e9)
    found = remat.search(config, mesh, None, effort=0.0)
    assert found == Found(NOTHING, [], None)
    told = remat.told(found, None, "cpu")
    assert told.endswith("as the plan has it, for cpu has no memory of its own that is known")
    assert remat.memory_of(jax.devices()[0]) is None


def test_models_of_unknown_sizes_are_refused_in_one_line(config, mesh):
    config.weights.reference = "some/model"
    with pytest.raises(UserError, match="compute.remat='auto' with weights.reference=some/model"):
        remat.search(config, mesh, 10e9, effort=0.0)


def test_a_benchmark_of_a_part_refuses_what_is_chosen_for_the_whole_step(config):
    with pytest.raises(UserError, match="--what=vae, but it chooses for the whole step; use --wh"):
        benchmark.run(config, benchmark.Request("vae", "tiny"))


# What is kept.


@pytest.fixture
def searches(monkeypatch):
    """Memory of a device that is not there, and what was searched for."""
    made = []

    def search(config, mesh, memory, effort):
        made.append(memory)
        return Found(ALL._replace(vae="none"), [Tried(ALL, 1e12, 1e9, 1e9, True)], None)

    monkeypatch.setattr(remat, "search", search)
    monkeypatch.setattr(remat, "memory_of", lambda device: 10e9)
    return made


def test_a_later_start_takes_what_an_earlier_one_found(config, mesh, searches, tmp_path, capsys):
    first = remat.settled(config, mesh, tmp_path)
    assert Choice.of(first) == ALL._replace(vae="none") and first.compute.remat == "auto"
    assert config.compute.remat_vae == "full"
    assert json.loads((tmp_path / remat.FILE).read_text())["tried"][0]["choice"]["vae"] == "full"
    longer = config.copy_and_resolve_references()
    free = {"train.steps": 7, "seed": 1, "optim.generator_lr": 1e-9, "compute.microbatches": 2}
    longer.update_from_flattened_dict(free)
    capsys.readouterr()
    assert Choice.of(remat.settled(longer, mesh, tmp_path)) == Choice.of(first)
    assert len(searches) == 1
    assert capsys.readouterr().out == (
        f"compute.remat=auto: {Choice.of(first)}, as remat.json of an earlier start has it\n"
    )


@pytest.mark.long
def test_another_config_device_or_version_searches_anew(
    config, mesh, searches, tmp_path, monkeypatch
):
    def starts():
        remat.settled(config, mesh, tmp_path)
        remat.settled(config, mesh, tmp_path)
        return len(searches)

    assert starts() == 1
    config.data.resolution = 128
    assert starts() == 2
    monkeypatch.setattr(remat, "memory_of", lambda device: 11e9)
    assert starts() == 3
    versions = remat.record.versions() | {"jax": "0.0.1"}
    monkeypatch.setattr(remat.record, "versions", lambda: versions)
    assert starts() == 4
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    assert starts() == 5
    for damaged in ("{", "[]", "{}", '{"question": 1}'):
        searches.clear()
        (tmp_path / remat.FILE).write_text(damaged)
        assert starts() == 1


def test_a_process_takes_what_the_first_one_has_whatever_it_sees_itself(
    config, mesh, searches, tmp_path, monkeypatch
):
    first = json.dumps(ALL._replace(reward="none")._asdict())
    monkeypatch.setattr(processes, "gather", lambda name, text: [first, text])
    assert Choice.of(remat.settled(config, mesh, tmp_path)) == ALL._replace(reward="none")
    assert not searches


def test_a_config_that_does_not_ask_is_left_alone(config, mesh, searches, tmp_path):
    plain = tiny_without_auto(config)
    assert remat.settled(plain, mesh, tmp_path) is plain
    assert not searches and not list(tmp_path.iterdir())


# With the compiler.


@pytest.mark.long
def test_executed_flop_are_those_of_the_traced_step(config, mesh):
    planned = plan.make(config, 8, "cpu")
    found = remat.executed(config, mesh, planned, 1e12)
    assert len(found) == 27
    assert found["full", "full", "full"] > found["dots", "full", "full"]
    assert found["dots", "full", "full"] > found["none", "full", "full"]
    assert min(found, key=found.get) == NOTHING.policies
    for choice in (
        NOTHING,
        Choice("dots", "none", "full", 1, 0),
        Choice("none", "dots", "dots", 2, 0),
        Choice("full", "full", "none", 1, 1),
    ):
        work = aot.train_work(remat.with_choice(config, choice), mesh)
        traced = flops.count(work.fn, *work.args) / planned.images
        assert found[choice.policies] == pytest.approx(traced, rel=0.002), choice


@pytest.mark.long
def test_a_smaller_device_gets_more_recomputation(config, mesh, monkeypatch):
    monkeypatch.setattr(remat, "TOLERANCE", 1e6)  # the formula is for larger networks
    free = remat.search(config, mesh, 1e12, effort=0.0)
    assert free.choice == NOTHING and len(free.tried) == 1
    assert free.compiled.memory["temporaries"] > 0
    need = free.tried[0].need
    tight = remat.search(config, mesh, 0.99 * need / (1 - policies.SPARE), effort=0.0)
    first, *_, last = tight.tried
    assert first.choice == NOTHING and not first.fits
    assert last.fits and last.need < 0.99 * need and last.choice == tight.choice != NOTHING
    print(remat.table(tight.tried))


@pytest.mark.long
def test_a_run_chooses_before_it_loads_weights_and_again_takes_what_it_chose(
    tmp_path, monkeypatch, capsys
):
    pipeline = write_pipeline(tmp_path / "pipeline")
    changes = {
        **AUTO,
        "assistant.warmup_steps": 0,
        "train.steps": 1,
        "eval.prompts": "",
        "eval_every": 0,
        "compute.remat_denoiser": "full",
    }
    seen = []
    steps = train.compile_steps
    monkeypatch.setattr(
        train, "compile_steps", lambda config, *more: seen.append(config) or steps(config, *more)
    )
    monkeypatch.setattr(remat, "memory_of", lambda device: 1e12)
    train.run(config_for(pipeline, **changes), str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.index("the first that fits") < said.index("loading weights")
    kept = json.loads((tmp_path / "run" / remat.FILE).read_text())
    assert Choice(**kept["choice"]) == Choice.of(seen[-1]) == NOTHING
    monkeypatch.setattr(remat, "search", None)
    train.run(config_for(pipeline, **(changes | {"train.steps": 2})), str(tmp_path / "run"))
    assert "as remat.json of an earlier start has it" in capsys.readouterr().out
    assert Choice.of(seen[-1]) == NOTHING and len(seen) == 2
