# SPDX-License-Identifier: Apache-2.0
"""Real processes over loopback: what they must share, and that they end together, each in time."""

import signal
import threading
import time

import pytest
from test_hosts import free_port, start

from di_star_jax import processes

# What each case runs in: connected, listening, with an error ending all.
FRAME = """
import os, signal, sys, time
from di_star_jax import errors, hosts, lock, processes
from di_star_jax.errors import UserError
from di_star_jax.stop import Stop
hosts.SILENCE = 10
hosts.connect(os.environ)
import jax
me = jax.process_index()
def case(stop):
    processes.gather("met")
    print("met", flush=True)
{case}
with processes.one_for_all(), Stop() as stop:
    case(stop)
    processes.gather("the end")
print("whole", flush=True)
"""


class Pair:
    """Two processes that run a case; `end` has their exit codes, outputs and seconds."""

    def __init__(self, case, *arguments, count=2):
        body = "\n".join(f"    {line}" for line in case.strip().splitlines())
        port = free_port() if count > 1 else None
        self.each = [
            start(FRAME.format(case=body), arguments, devices=1, port=port, index=i)
            for i in range(count)
        ]

        self.lines = [[] for _ in self.each]
        self._readers = [
            threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, i):
        for line in self.each[i].stdout:
            self.lines[i].append(line.rstrip("\n"))

    def until(self, text):
        """Waits until each process has said it."""
        deadline = time.time() + 60
        while not all(text in lines for lines in self.lines):
            assert time.time() < deadline, self.lines
            time.sleep(0.02)
        self.since = time.time()
        return self

    def met(self):
        return self.until("met")

    def end(self):
        deadline = time.time() + 60
        try:
            codes = [p.wait(timeout=max(0, deadline - time.time())) for p in self.each]
        finally:
            for process in self.each:
                process.kill()
        seconds = time.time() - self.since
        for reader in self._readers:
            reader.join()
        lines = [[x for x in one if not x.startswith("[Gloo]")] for one in self.lines]
        return codes, [one[one.index("met") + 1 :] for one in lines], seconds


def test_what_one_process_has_otherwise_is_said_by_all_and_they_end_with_2():
    codes, lines, seconds = (
        Pair('processes.agree("start", {"seed": 1, "jax": "9"[me:]})').met().end()
    )
    assert codes == [2, 2] and seconds < 10
    assert lines[0] == lines[1], lines
    [line] = lines[0]
    assert line.startswith(
        "error: the processes do not have the same start: jax is  in process 1 ("
    )


@pytest.mark.parametrize(
    "raised, codes", [("UserError('no such file')", [2, 2]), ("ValueError('a bug')", [76, 1])]
)
def test_an_error_of_one_process_ends_the_other_at_once(raised, codes):
    waits = f"if me == 1:\n    raise {raised}\ntime.sleep(50)"
    ended, lines, seconds = Pair(waits).met().end()
    assert ended == codes and seconds < 10
    if codes == [2, 2]:
        assert lines == [["error: process 1: no such file"], ["error: no such file"]]
    else:
        assert lines[0] == ["error: process 1 has ended: ValueError, see its log"]
        assert lines[1][-1] == "ValueError: a bug"


@pytest.mark.parametrize(
    "victim", [0, pytest.param(1, marks=pytest.mark.long)], ids=["the first", "another"]
)
@pytest.mark.parametrize(
    "work", ["time.sleep(50)", pytest.param("processes.gather('x')", marks=pytest.mark.long)]
)
def test_a_killed_process_ends_the_other_within_a_minute_with_76(victim, work):
    pair = Pair(f"if me != {victim}:\n    {work}\ntime.sleep(50)").met()
    pair.each[victim].kill()
    codes, lines, seconds = pair.end()
    assert codes[victim] == -9 and codes[1 - victim] == 76, lines
    assert seconds < 30  # hosts.SILENCE is 10 here, 30 in a run
    said = "\n".join(lines[1 - victim])  # JAX's own lines may come into the middle of it
    assert said.count("error: process ") == 1
    assert f"error: process {victim} of 2 has died or cannot be reached" in said
    assert "Traceback" not in "".join(lines[1 - victim])


@pytest.mark.slow
def test_a_collective_whose_other_end_has_died_is_no_bug_of_this_process():
    work = "from jax.experimental import multihost_utils as m\nm.sync_global_devices('a')\n"
    pair = Pair(work + "if me == 1:\n    os.kill(os.getpid(), 9)\nm.sync_global_devices('b')").met()
    codes, lines, _ = pair.end()
    assert codes == [76, -9] and "Traceback" not in "".join(lines[0]), lines


def test_a_process_that_does_not_come_is_named_in_time():
    late = "processes.gather('the party', patience=2.0) if me == 0 else time.sleep(50)"
    codes, lines, seconds = Pair(late).met().end()
    assert codes == [76, 76] and seconds < 10
    assert lines[0] == ["error: process 1 did not come to 'the party' within 2 s; see what it does"]


@pytest.mark.case("faults 27")
def test_a_signal_to_one_process_ends_both_where_there_is_nothing_to_lose():
    pair = Pair("with stop.free():\n    print('free', flush=True)\n    time.sleep(50)").met()
    pair.until("free")
    pair.each[1].send_signal(signal.SIGTERM)
    codes, lines, seconds = pair.end()
    assert codes == [75, 75] and seconds < 10, lines
    assert "Traceback" not in str(lines)


@pytest.mark.case("faults 27")
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
)
def test_a_signal_to_one_process_after_the_last_vote_is_the_others_too(number, code):
    # The second process gets it where neither is free, and asks nobody before it leaves.
    work = "print('at work', flush=True)\ntime.sleep(2 + me)\nstop.leave_if_asked()\ntime.sleep(50)"
    pair = Pair(work).met()
    pair.until("at work")
    pair.each[1].send_signal(number)
    codes, lines, seconds = pair.end()
    assert codes == [code, code] and 1 < seconds < 12, lines


@pytest.mark.slow
def test_a_second_sigterm_waits_and_a_second_ctrl_c_does_not():
    for second, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        pair = Pair("print('at work', flush=True)\ntime.sleep(4)\nstop.leave_if_asked()", count=1)
        pair.met()
        pair.until("at work")
        pair.each[0].send_signal(signal.SIGTERM)
        time.sleep(1)
        pair.each[0].send_signal(second)
        codes, _, seconds = pair.end()
        assert codes == [code] and (seconds > 3) == (second == signal.SIGTERM)


@pytest.mark.slow
def test_processes_with_workdirs_of_their_own_are_refused(tmp_path):
    work = "lock._SIGHT = 2\nwith lock.held(sys.argv[1] + f'/{me}'):\n    time.sleep(50)"
    codes, lines, _ = Pair(work, tmp_path).met().end()
    assert codes == [2, 2]
    assert "process 1 of 2 does not see what process 0 writes in the workdir" in lines[0][-1]


@pytest.mark.long
def test_a_count_of_processes_that_does_not_divide_the_batch_is_a_line_of_each(tmp_path):
    code = "import runpy; runpy.run_module('di_star_jax.main', run_name='__main__', alter_sys=True)"
    given = ["--config=shapes", "--config.data.batch_size=5", f"--workdir={tmp_path}"]
    port = free_port()
    each = [start(code, given, devices=1, port=port, index=i) for i in range(2)]
    for process in each:
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "data.batch_size=5 is not divisible by the 2 devices" in said
    assert not list(tmp_path.iterdir())


def test_differences_name_the_odd_ones():
    each = [{"seed": "1"}, {"seed": "1"}, {"seed": "2"}]
    line = processes._differences("start", each, ["a", "b", "c"])
    assert "seed is 2 in process 2 (on c), 1 in the others" in line and "\n" not in line
