#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gcloud, gcluster or kubectl, by the name that it is called by: refuses what the real one does not
document (documented.json, from their reference pages of autumn 2026), notes each call in $CALLS,
and plays machines: $MACHINES names those of a group, and each is a folder under $HOMES.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

DOCUMENTED = json.loads((pathlib.Path(__file__).resolve().parent / "documented.json").read_text())
HOMES = pathlib.Path(os.environ.get("HOMES", "."))


def command_of(words: list[str]) -> str:
    names = [" ".join(words[:n]) for n in range(len(words), 1, -1)]
    found = next((name for name in names if name in DOCUMENTED), None)
    return found or sys.exit(f"{words[0]}: no command {' '.join(words)}")


def machine(name: str) -> pathlib.Path:
    (HOMES / name).mkdir(parents=True, exist_ok=True)
    return HOMES / name


def play(command: str, names: list[str], options: dict[str, str]) -> int:
    if command.endswith(" ssh"):
        home = machine(names[0])
        env = os.environ | {"HOME": str(home), "MACHINE": names[0]}
        return subprocess.run(["bash", "-c", options["--command"]], cwd=home, env=env).returncode
    if command.endswith(" scp"):
        where, _, target = names[1].partition(":")
        shutil.copy(names[0], machine(where) / target)
    if command.endswith("list-instances"):
        print(os.environ["MACHINES"].replace(" ", "\n"))
    if command.endswith("describe"):
        print("ACTIVE")
    if command == "gcloud config get":
        print("my-project")
    return 0


def main() -> int:
    program, *given = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    words = [word for word in given if not word.startswith("-")]
    command = command_of([program, *words])
    known = DOCUMENTED[command] + DOCUMENTED.get(program, [])
    options = dict(
        word.partition("=")[::2] for word in given if word.startswith("-") and word != "-"
    )
    with open(os.environ["CALLS"], "a") as calls:
        print(json.dumps([program, *given]), file=calls)
    unknown = sorted(set(options) - set(known))
    if unknown:
        print(f"ERROR: ({command}) unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        return 2
    names = words[len(command.split()) - 1 :]
    return play(command, names, options)


if __name__ == "__main__":
    sys.exit(main())
