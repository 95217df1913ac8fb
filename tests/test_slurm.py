# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch against stand-ins for srun, squeue and scontrol: which exit code starts a job
again. tests/slurm/run.sh runs it under a real Slurm.
"""

import sys

import pytest
from test_launch import LAUNCH, RUN, fake  # noqa: F401

# srun as a real one: all tasks at once, those that are left ended when one fails, by SIGTERM and
# then by SIGKILL, and the highest exit code of all.
SRUN = f"""exec {sys.executable} - "$@" <<'EOF'
import os, subprocess, sys, time
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + sys.argv[1:].index("bash") :]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i)}}, start_new_session=True)
    for i in range(2)
]
while any(task.poll() is None for task in tasks):
    time.sleep(0.05)
    if any(task.poll() for task in tasks) and "--kill-on-bad-exit=1" in options:
        for number in (15, 9):
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, number)
            time.sleep(0.1)
codes = [128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks]
sys.exit(max(codes))
EOF"""


@pytest.fixture
def job(fake, tmp_path):  # noqa: F811
    """job(code of task 0, of task 1, variables) -> (exit code, output, whether it was requeued)."""

    def run(*codes, state="RUNNING", **variables):
        fake("srun", SRUN)
        fake("python", f'codes=({" ".join(codes)}); eval "${{codes[$SLURM_PROCID]}}"')
        fake("sleep", 'exec /bin/sleep "0.$1"')  # ten seconds are one tenth of one
        fake("squeue", f"echo {state}")
        fake("scontrol", f"echo $* >>{tmp_path}/asked")
        done = fake.run("bash", LAUNCH / "slurm.sbatch", *RUN, SLURM_JOB_ID="7", **variables)
        asked = tmp_path / "asked"
        said = asked.read_text() if asked.exists() else ""
        assert said in ("", "requeue 7\n")
        return done.returncode, done.stdout + done.stderr, bool(said)

    return run


@pytest.mark.parametrize("code", ["75", "76", "137", "139"])
def test_a_job_that_was_told_to_end_or_lost_a_process_starts_again(job, code):
    _, said, again = job(f"'exit {code}'", f"'exit {code}'")
    assert again and f"exit code {code}: into the queue again, restart 1 of at most 20" in said


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_mistake_a_bug_and_ctrl_c_never_start_again(job, code):
    assert job(f"'exit {code}'", f"'exit {code}'") == (code, "", False)


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_mistake_is_not_hidden_by_the_processes_that_srun_ends_for_it(job, code):
    ended, _, again = job("'exec /bin/sleep 60'", f"'exit {code}'")
    assert (ended, again) == (code, False)


def test_a_process_that_dies_ends_the_others_and_the_job_starts_again(job):
    _, said, again = job("'exec /bin/sleep 60'", "'kill -9 $$'")
    assert again and "into the queue again" in said


def test_a_finished_job_ends_when_its_last_process_does(job):
    assert job("'/bin/sleep 0.5'", "true") == (0, "", False)


def test_restarts_have_a_limit(job):
    code, said, again = job("'exit 75'", "'exit 75'", SLURM_RESTART_COUNT="20")
    assert (code, again) == (75, False) and "after 20 restarts; RESTARTS=20" in said
    assert job("'exit 75'", "'exit 75'", SLURM_RESTART_COUNT="20", RESTARTS="21")[2]


def test_a_cancelled_job_does_not_start_again(job):
    assert job("'exit 75'", "'exit 75'", state="COMPLETING") == (75, "", False)


def test_a_limit_that_is_no_number_is_refused_before_anything_runs(job):
    code, said, again = job("true", "true", RESTARTS="many")
    assert (code, again) == (2, False)
    assert said == "error: got RESTARTS=many, expected a number from 0\n"


def test_a_task_waits_for_its_process_which_saves_when_told_to_end(job, tmp_path):
    save = tmp_path / "save.sh"
    save.write_text("trap 'sleep 2; echo saved; exit 75' TERM\nkill -TERM 0\nwait\n")
    code, said, again = job(f"'. {save}'", f"'. {save}'")
    assert said.count("saved") == 2 and again


def test_a_node_without_gpus_gets_no_flags_of_gpus(fake):  # noqa: F811
    fake("srun", 'printf "%s\\n" "${JAX_LOCAL_DEVICE_IDS-none}" "${XLA_FLAGS-none}"')
    for gpus in ({}, {"SLURM_GPUS_ON_NODE": "0"}):
        done = fake.run("bash", LAUNCH / "slurm.sbatch", *RUN, **gpus)
        assert (done.returncode, done.stdout) == (0, "none\nnone\n"), done.stderr
