#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs launch/slurm.sbatch under a real Slurm with five nodes on this machine: tests/slurm/run.sh
# Wants root, Debian or Ubuntu, and on the PATH a `python` with the tests' packages. Ends with 1 at the first expectation
# that fails, after ten minutes otherwise. Daemons, network, host names and files are its own and end with it (unshare).
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
fail() { echo "error: $*" >&2; exit 1; }

if [ "${1-}" != --inside ]; then
  [ "$(id -u)" = 0 ] || fail "tests/slurm/run.sh needs root, for Slurm's daemons and for namespaces of its own"
  if ! { command -v slurmctld && command -v slurmd && command -v munged && command -v ip; } >/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge iproute2 >/dev/null
  fi
  T="$(mktemp -d)"
  trap 'rm -rf "$T"' EXIT
  status=0
  T="$T" unshare --mount --net --pid --fork --kill-child --mount-proc "$0" --inside || status=$?
  exit "$status"
fi

# A Slurm.
start=$SECONDS
say() { printf '%4d s  %s\n' $((SECONDS - start)) "$*"; }
chmod 755 "$T"
ip link set lo up
for i in 0 1 2 3 4; do
  ip addr add "10.0.0.1$i/32" dev lo # with 127.0.0.1 alone glibc takes the machine for one without a network
  echo "10.0.0.1$i n$i" >>"$T/hosts"
done
echo "127.0.0.1 localhost $(hostname)" >>"$T/hosts"
mount --bind "$T/hosts" /etc/hosts
mkdir "$T/munge" "$T/state"
dd if=/dev/urandom of="$T/munge/key" bs=128 count=1 status=none
chmod 400 "$T/munge/key"
chown -R munge "$T/munge"
runuser -u munge -- munged --key-file="$T/munge/key" --socket="$T/munge/socket" --pid-file="$T/munge/pid" \
  --log-file="$T/munge/log" --seed-file="$T/munge/seed"
# cred_expire is also how long a requeued job waits, two minutes by default. A node that says
# nothing for SlurmdTimeout, five minutes by default, is dead.
cat >"$T/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
AuthInfo=socket=$T/munge/socket,cred_expire=5
StateSaveLocation=$T/state
SlurmdSpoolDir=$T/spool.%n
SlurmctldPidFile=$T/slurmctld.pid
SlurmdPidFile=$T/slurmd.%n.pid
SlurmctldLogFile=$T/slurmctld.log
SlurmdLogFile=$T/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=60
GresTypes=gpu
ReturnToService=2
NodeName=n0 NodeHostname=localhost NodeAddr=10.0.0.10 Port=17000 CPUs=2
NodeName=n1 NodeHostname=localhost NodeAddr=10.0.0.11 Port=17001 CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=10.0.0.12 Port=17002 CPUs=2
NodeName=n3 NodeHostname=localhost NodeAddr=10.0.0.13 Port=17003 CPUs=2 Gres=gpu:2
NodeName=n4 NodeHostname=localhost NodeAddr=10.0.0.14 Port=17004 CPUs=2 Gres=gpu:2
PartitionName=cpu Nodes=n[0-2] Default=YES
PartitionName=gpu Nodes=n[3-4]
EOF
touch "$T/gpu0" "$T/gpu1"
echo "NodeName=n[3-4] Name=gpu File=$T/gpu[0-1]" >"$T/gres.conf" # two GPUs, as far as Slurm can tell
export SLURM_CONF="$T/slurm.conf"
slurmctld
for node in n0 n1 n2 n3 n4; do slurmd -N "$node"; done

# What is asked of it.
die() {
  echo "FAILED: $*; the end of the job's log and of slurmctld's:"
  tail -n 40 "$log"
  tail -n 10 "$T/slurmctld.log"
  exit 1
}
within() { # SECONDS WHAT COMMAND...
  local until=$((SECONDS + $1))
  while ! "${@:3}"; do
    [ "$SECONDS" -lt "$until" ] || die "not within $1 seconds: $2"
    sleep 0.5
  done
  say "$2"
}
expect() { "${@:2}" || die "not so: $1"; say "$1"; } # WHAT COMMAND...
field() { scontrol show job "$job" | grep -o "\b$1=[^ ]*" | cut -d= -f2; }
is() { [ "$(field "$1")" = "$2" ]; }
logged() { grep -qE "$1" "$log"; }
# Of the newest start in the job's log: the first step it says it has done.
first() { [ -f "$log" ] && tac "$log" | sed '/^0: mesh:/q' | tac | grep -oE 'step [0-9]+/' | head -n 1 | tr -dc 0-9; }
saved() { find "$run/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' | grep -E '^[0-9]+$' | sort -n | tail -n 1; }
done_steps() { sed -nE 's/.*"step": ([0-9]+).*/\1/p' "$run/metrics.jsonl" 2>/dev/null; }
stepped() { [ "$(first)" ] && [ "$(done_steps | tail -n 1)" -gt $(($(first) + 1)) ]; }
goes_on() { [ -f "$log" ] && [ "$(grep -c '^0: mesh:' "$log")" = "$1" ] && [ "$(first)" = $((at + 1)) ]; } # START, by its number
elsewhere() { ! scontrol show hostnames "$(field NodeList)" | grep -qx "$lost"; }
over() { ! pgrep -f -- "--workdir=$run" >/dev/null; }
nothing_lost() { at="$(saved)" && [ "$at" = "$(done_steps | tail -n 1)" ]; }
every_step_once() { diff -q <(done_steps) <(seq "$at") >/dev/null; }
submit() { # OPTION... -- FIELD...
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  job="$(cd "$T" && sbatch --parsable --nodes=2 "${options[@]}" "$root/launch/slurm.sbatch" "$root/configs/shapes.py" \
    "$run" "${tiny[@]}" "${@:2}")"
  log="$T/di_star_jax-$job.log"
  echo
  say "job $job: sbatch --nodes=2 ${options[*]} launch/slurm.sbatch configs/shapes.py RUN ${*:2}"
}
# Processes of a node, by the name that Slurm puts into their environment.
of_node() { grep -lzx "SLURMD_NODENAME=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3; }
python_of() { for pid in $(of_node "$1"); do grep -qz '^--workdir=' "/proc/$pid/cmdline" && [ "$(cat "/proc/$pid/comm")" = python ] && echo "$pid"; done; }
node_dies() { # NODE: its slurmd, the slurmstepd and its tasks, at once
  local tasks
  tasks="$(of_node "$1")"
  # shellcheck disable=SC2046,SC2086
  kill -9 "$(cat "$T/slurmd.$1.pid")" $tasks $(for pid in $tasks; do ps -o ppid= "$pid"; done | sort -u | grep -vxF "$(printf '%7d\n' 1 $tasks)")
}

# The shapes config on a pipeline that compiles soon.
export JAX_PLATFORMS=cpu PYTHONPATH="$root:$root/tests" PYTHONDONTWRITEBYTECODE=1 TF_CPP_MIN_LOG_LEVEL=3
export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
log="$T/pipeline.log"
python -c "import pathlib, test_train; test_train.write_pipeline(pathlib.Path('$T/pipeline'))" >"$log" 2>&1 || die "a pipeline"
run="$T/run"
code="${CODE:-75}"
tiny=(
  --config.weights.reference="$T/pipeline" --config.weights.generator="$T/pipeline/generator"
  --config.weights.pickscore="$T/pipeline/reward" --config.weights.reward_tokenizer="$T/pipeline/tokenizer"
  --config.data.prompts="$T/pipeline/prompts.txt" --config.eval.prompts="" --config.data.batch_size=2
  --config.mesh.fsdp=2 --config.assistant.warmup_steps=0 --config.train.log_every=1 --config.train.save_every=100000
)
all_idle() { [ "$(sinfo --noheader --Node --format=%T | sort -u)" = idle ]; }
within 30 "$(sbatch --version): five nodes are idle" all_idle

submit --gpus-per-node=0 -- --config.train.steps=100000
within 300 "it makes steps" stepped
scancel "$job"
within 40 "scancel: it ends within KillWait, 30 seconds" over
within 40 "its nodes are idle" all_idle
expect "its state is CANCELLED" is JobState CANCELLED
expect "saved what was done: step $(saved)" nothing_lost
expect "not started again" is Restarts 0

submit --gpus-per-node=0 --time=3 --signal=TERM@90 -- --config.train.steps=100000
within 300 "it goes on at step $((at + 1))" goes_on 1
within 200 "SIGTERM before its time limit: it puts itself back into the queue" is Restarts 1
expect "for exit code $code" logged "^exit code $code: into the queue again, restart 1 of at most 20"
expect "saved what was done: step $(saved)" nothing_lost
scontrol update job="$job" TimeLimit=UNLIMITED
within 300 "it goes on at step $((at + 1)), in the same log" goes_on 2
within 60 "and makes steps" stepped
scontrol requeue "$job"
within 60 "scontrol requeue: it ends within KillWait, 30 seconds" over
expect "and waits for its next start" is Restarts 2
expect "saved what was done: step $(saved)" nothing_lost
within 300 "it goes on at step $((at + 1))" goes_on 3
within 60 "and makes steps" stepped
lost="$([ "$(field BatchHost)" = n1 ] && echo n2 || echo n1)"
node_dies "$lost"
say "node $lost dies, of $(field NodeList)"
# By itself with 76, or with 134 where JAX is quicker to abort it: a restart is due after both.
within 60 "the other process ends by itself" logged 'srun: error: n.: task .: Exited with exit code (76|134)'
within 150 "Slurm takes the node for dead, and the job goes back into the queue" is Restarts 3
within 300 "it goes on at step $((at + 1))" goes_on 4
expect "on other nodes: $(field NodeList)" elsewhere
within 60 "and makes steps" stepped
scancel --signal=INT "$job"
within 60 "scancel --signal=INT, as Ctrl-C: it ends" is JobState FAILED
expect "with exit code 130" is ExitCode 130:0
expect "saved what was done: step $(saved)" nothing_lost
expect "not started again" is Restarts 3

submit --gpus-per-node=0 -- --config.train.steps="$((at + 3))"
within 300 "it runs to the end" is JobState COMPLETED
at=$((at + 3))
expect "metrics.jsonl has each of $at steps once" every_step_once
expect "the generator is exported" test -f "$run/diffusers/model_index.json"

run="$T/other"
submit --partition=gpu --gpus-per-node=2 --export=ALL,RESTARTS=0 -- --config.train.steps=100000
two_run() { [ "$(python_of n3)" ] && [ "$(python_of n4)" ]; }
within 60 "Python runs on two nodes" two_run
victim="$(python_of n3)"
expect "Slurm gives it two GPUs of a node: JAX_LOCAL_DEVICE_IDS=0,1" grep -qzx JAX_LOCAL_DEVICE_IDS=0,1 "/proc/$victim/environ"
kill -9 "$victim"
within 60 "its process dies" is JobState FAILED
expect "by a signal, and the other one is ended" logged 'srun: error: n3: task 0: Exited with exit code 137'
expect "RESTARTS=0: not started again" logged '^error: exit code 1(37|43), after 0 restarts; RESTARTS=0 allows no more'

submit --gpus-per-node=0 -- --config.data.batch_size=3
within 60 "a user's error: it ends" is JobState FAILED
expect "with exit code 2" is ExitCode 2:0
expect "after one line of each process: $(grep -m 1 '^0: error: ' "$log")" logged '^1: error: data.batch_size=3'
expect "not started again" is Restarts 0
echo
say "all as expected"
