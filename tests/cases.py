# SPDX-License-Identifier: Apache-2.0
"""Replays the faults that use has shown, by number: `python tests/cases.py`, or `... "faults 5"`.

Each is held by the tests that carry its number, `@pytest.mark.case("faults 5")`. Prints one line a
number; exits with 1 where one fails, or has no test.
"""

import collections
import sys
from pathlib import Path

import pytest

ALL = [f"faults {n}" for n in range(1, 33)] + [f"first hour {n}" for n in range(1, 29)]
# Of these a part at most is mended; the rest belongs to work that is still to come.
LATER = ["faults 19", "faults 31", "first hour 20"]
DUE = [number for number in ALL if number not in LATER]
# Texts of README and docs, which no test can judge; what stands there is.
READ = {
    "first hour 16": "README's DMD2 block: docs/sdxl.md",
    "first hour 23": "README's status box",
}


class Replay:
    """Collects outcomes by case, and runs the marked tests alone. Args: wanted, or all."""

    def __init__(self, wanted: list[str]):
        self._wanted = set(wanted)
        self._cases = {}
        self.outcomes = collections.defaultdict(dict)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        kept = []
        for item in items:
            numbers = [n for mark in item.iter_markers("case") for n in mark.args]
            unknown = set(numbers) - set(ALL)
            if unknown:
                raise pytest.UsageError(f"{item.nodeid} is marked {sorted(unknown)}, no such case")
            numbers = [n for n in numbers if n in self._wanted]
            self._cases[item.nodeid] = numbers
            if numbers:
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        for number in self._cases[report.nodeid]:
            self.outcomes[number][report.nodeid] = report.outcome


def main(argv: list[str]) -> int:
    wanted = argv or DUE
    strange = sorted(set(wanted) - set(ALL))
    if strange:
        print(f"error: no case {strange[0]!r}, expected one such as 'faults 5'", file=sys.stderr)
        return 2
    replay = Replay(wanted)
    options = ["-q", "-m", "case", "-p", "no:xdist", "--no-header"]
    ended = pytest.main([*options, str(Path(__file__).parent)], plugins=[replay])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(ended)  # pytest has said why nothing could be replayed
    bad = 0
    for number in wanted:
        outcomes = replay.outcomes[number]
        failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
        if failed:
            said = f"FAILED {failed[0]}"
        elif outcomes:
            said = f"{len(outcomes)} tests, e.g. {next(iter(outcomes))}"
        else:
            said = READ.get(number, "NO TEST")
        bad += bool(failed) or said == "NO TEST"
        print(f"{number:14} {said}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
