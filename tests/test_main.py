# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process, and once as a user runs it."""

import os
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from test_config import ROOT

from di_star_jax import config, errors, hosts, main
from di_star_jax.errors import UserError

SDXL, DRY = "--config=configs/sdxl.py", "--config.dry_run=True"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        argv = ["main", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
        monkeypatch.delitem(
            sys.modules, "config_config", raising=False
        )  # it would load the next file over the last
        monkeypatch.chdir(ROOT)
        code = 0
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                errors.command(main.main)(errors.exit_on_user_error(config.parse_flags)(argv))
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [SDXL, DRY, "--config.trian.steps=3"],
            "unknown config field trian.steps, did you mean train.steps?",
        ),
        (
            [SDXL, DRY, "--config.batch_size=3"],
            "unknown config field batch_size, did you mean data.batch_size?",
        ),
        (
            [SDXL, DRY, "--config.eval.num_per_prompt=8"],
            "unknown config field eval.num_per_prompt, now called eval.samples",
        ),
        (
            [SDXL, DRY, "--config.optim.bb2=3"],
            "unknown config field optim.bb2, did you mean optim.b2?",
        ),
        (
            [SDXL, DRY, "--config.data.batch_size=many"],
            "--config.data.batch_size=many: invalid literal for int()",
        ),
        ([SDXL, DRY, "--config.data=3"], "--config.data=3"),
        (
            [SDXL, DRY, "--config.data.batch_size=6"],
            "data.batch_size=6 is not divisible by the 16 devices of mesh data=1 x fsdp=16; use "
            "16, or give several",
        ),
        ([SDXL, DRY, "surplus"], "got 'surplus', expected flags only"),
        ([SDXL + ":nothing", DRY], "unknown preset 'nothing', expected one of di_star, di_star_l2"),
        ([SDXL, "--config.mesh.fsdp=8"], "no --workdir"),
        ([SDXL, "--workdir=gs://bucket/run"], "mount the bucket"),
        ([SDXL, "--workdri=x"], "unknown flag --workdri, did you mean workdir?"),
        (["--config=configs/nowhere.py"], "no config file configs/nowhere.py"),
        (["--config.seed=3"], "--config.seed without --config"),
        ([], "no --config"),
    ],
)
def test_what_is_typed_wrong_ends_with_one_line_and_exit_code_2(command, arguments, message):
    code, _, stderr = command(*arguments)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(:", "invalid syntax"),
        ("import nothere", "No module named 'nothere'"),
        ("x = 1", "a config file defines get_config()"),
    ],
)
def test_a_broken_config_file_is_named_in_one_line(command, tmp_path, content, message):
    file = tmp_path / "broken.py"
    file.write_text(content)
    code, _, stderr = command(f"--config={file}", DRY)
    assert code == 2
    assert stderr.startswith(f"error: {file}: ") and stderr.count("\n") == 1 and message in stderr


def test_overrides_and_presets_reach_the_dry_run(command, monkeypatch):
    seen = []
    monkeypatch.setattr("di_star_jax.cost.plan.make", lambda c, n, kind: seen.append((c, n)))
    monkeypatch.setattr("di_star_jax.cost.plan.describe", lambda plan: ["the plan"])
    code, stdout, _ = command(SDXL + ":sim", DRY, "--config.data.batch_size=32")
    assert (code, stdout) == (0, "the plan\n")
    ((got, devices),) = seen
    assert (got.data.batch_size, got.reward.pickscore, devices) == (32, 0.0, jax.device_count())


def test_a_run_starts_only_after_the_check(command, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("di_star_jax.train.run", lambda c, workdir, given: started.append(workdir))
    (tmp_path / "weights").mkdir()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = [
        SDXL,
        f"--workdir={tmp_path}",
        "--config.mesh.fsdp=8",
        f"--config.data.prompts={tmp_path}/prompts.txt",
    ]
    assert command(*arguments)[0] == 2 and not started  # weights.generator is not there
    assert command(*arguments, f"--config.weights.generator={tmp_path}/weights")[0] == 0
    assert started == [str(tmp_path)]


@pytest.mark.parametrize(
    "env, variable",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, "SLURM_NTASKS"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_several_hosts_are_recognised_by_their_launcher(env, variable):
    assert hosts.launcher(env) == variable


def test_a_process_that_srun_did_not_start_does_not_train_alone():
    with pytest.raises(
        UserError, match="SLURM_NTASKS=4, but srun did not start this process; use srun"
    ):
        hosts.launcher({"SLURM_NTASKS": "4"})


def test_a_launcher_whose_other_processes_are_missing_is_refused(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: given.update(kw))
    with pytest.raises(
        UserError,
        match="TPU_WORKER_HOSTNAMES=a,b says that there are several processes, but only this",
    ):
        hosts.connect(
            {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        )
    assert (given["num_processes"], given["process_id"]) == (2, 0)


def test_what_is_compiled_is_kept_in_the_workdir_unless_the_user_says_where(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    hosts.keep_compiled(str(tmp_path))
    assert not updates
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    hosts.keep_compiled(str(tmp_path))
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "compiled")


def test_dry_run_as_a_user_types_it_exits_without_error_and_prints_the_plan():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "di_star_jax.main", SDXL, DRY],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2,567,463,684 unet" in done.stdout


def test_an_error_as_a_user_meets_it_is_one_line_without_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "di_star_jax.main", SDXL, DRY, "--config.trian.steps=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown config field trian.steps, did you mean train.steps?\n"
