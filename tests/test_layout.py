# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, so that the architecture cannot erode unseen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import di_star_jax
from di_star_jax.pipelines.families import FAMILIES

PACKAGE = Path(di_star_jax.__file__).parent
# A module imports from the lines above its own, and a folder's modules from each other. A name
# ending in / is a folder; models/attention stands above what the rest of models/ needs.
ORDER = """
errors
processes
config diffusion sharding hosts pictures xla_flags storage/
command log
prompts/ models/
objectives samplers stop lock disk pipelines/
rewards/ gradients
schemes checks record
step
assembly
drawing preference/
shapes/ cost/
evaluation/
train
sample
main convert evaluate benchmark pretrain cache_text studies/
__main__
"""
LEVEL = {
    name.rstrip("/"): level for level, line in enumerate(ORDER.split("\n")) for name in line.split()
}
FILES = sorted(PACKAGE.rglob("*.py"))
# A command that is called by what it trains, rewards; like the others it imports from everywhere,
# and nobody imports it.
COMMAND = PACKAGE / "rewards" / "train.py"


def imports(path, text=None):
    """Dotted names of the modules that a file imports, wherever it does. Args: text, in its place.

    What a package itself holds, in its __init__, has the package's name.
    """
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            folder = PACKAGE.parent / module.replace(".", "/")
            for alias in node.names:  # a module of a package, or what a module holds
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{module}.{alias.name}" if is_module else module
        elif isinstance(node, ast.Call) and is_import(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def absolute(node, path):
    """The module's name of a `from` import, whose dots count from the file's own package."""
    if not node.level:
        return node.module
    package = path.relative_to(PACKAGE.parent).parent.parts
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def is_import(function):
    """Whether a call's function is importlib.import_module or __import__."""
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in ("import_module", "__import__")


def ours(path, text=None):
    """The wings and modules of this package that a file imports; not the package itself."""
    names = (name.split(".") for name in imports(path, text))
    return {name[1] for name in names if name[0] == "di_star_jax" and len(name) > 1}


def wing(path):
    return "main" if path == COMMAND else path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_come_from_above(path):
    if path == PACKAGE / "__init__.py":
        assert not ours(path)
        return
    assert wing(path) in LEVEL, f"{wing(path)} is new: give it a place in ORDER"
    for name in ours(path) - {wing(path)}:
        assert name in LEVEL, f"{name} is new: give it a place in ORDER"
        assert LEVEL[name] < LEVEL[wing(path)], (
            f"{wing(path)} imports {name}, which stands below it"
        )


def test_nobody_imports_the_command_that_stands_among_the_rewards():
    assert not [path for path in FILES if "di_star_jax.rewards.train" in imports(path)]


@pytest.mark.parametrize("file", ["rewards/__init__.py", "pipelines/__init__.py", "drawing.py"])
@pytest.mark.parametrize(
    "statement",
    [
        "from di_star_jax.train import run",
        "from di_star_jax import train",
        "import di_star_jax.train as loop",
        "from {dots}train import run",
        "from {dots} import train",
        "def run():\n    from di_star_jax.train import run as it",
        "if typing.TYPE_CHECKING:\n    from di_star_jax import train",
        'run = importlib.import_module("di_star_jax.train").run',
    ],
)
def test_an_import_is_seen_however_it_is_written(file, statement):
    path = PACKAGE / file
    text = path.read_text() + "\n" + statement.format(dots=".." if "/" in file else ".")
    assert ours(path, text) - ours(path) == {"train"} and LEVEL["train"] > LEVEL[wing(path)]


def test_a_place_in_the_order_is_that_of_a_module():
    assert {wing(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("wing", sorted({p.parent for p in FILES if p.parent != PACKAGE}))
def test_a_folders_modules_do_not_import_each_other_in_a_ring(wing):
    package = f"di_star_jax.{wing.name}"
    files = {
        package if p.stem == "__init__" else f"{package}.{p.stem}": p for p in wing.glob("*.py")
    }
    waiting = {name: set(imports(path)) & set(files) for name, path in files.items()}
    while waiting:
        free = [name for name, needed in waiting.items() if not needed & set(waiting)]
        assert free, f"a ring among {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_walking_the_package_pulls_in_neither_torch_nor_tensorflow():
    code = (
        "import importlib, pkgutil, sys, di_star_jax\n"
        "for module in pkgutil.walk_packages(di_star_jax.__path__, 'di_star_jax.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(sorted({'torch', 'tensorflow', 'diffusers', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['jax']", done.stderr


def test_ml_collections_is_imported_by_commands_alone_and_configs_by_nobody():
    users = {
        wing(p) for p in FILES for name in imports(p) if name.split(".")[0] == "ml_collections"
    }
    assert users <= {"main", "config", "benchmark", "cache_text"}
    assert not [p for p in FILES for name in imports(p) if name.split(".")[0] == "configs"]


def test_objectives_know_nothing_of_networks():
    assert ours(PACKAGE / "objectives.py") == {"diffusion"}


def test_configs_import_the_package_for_its_folder_and_its_errors_only():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert ours(path) <= {"errors"}, path


def families():
    """The modules that pipelines/families.py picks from."""
    found = set(imports(PACKAGE / "pipelines" / "families.py"))
    return {
        name
        for name in found - {"di_star_jax.pipelines.family"}
        if name.startswith("di_star_jax.pipelines.")
    }


def strings(path):
    """A file's literals."""
    nodes = ast.walk(ast.parse(path.read_bytes()))
    values = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str)}


def words(path):
    """A file's identifiers, and its strings without blanks: keys, flags, parts of paths."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    fields = ("id", "attr", "arg", "name", "asname")
    found = {getattr(node, field, None) for node in nodes for field in fields}
    return {name for name in found if isinstance(name, str)} | {
        text for text in strings(path) if len(text.split()) == 1
    }


def test_nothing_outside_pipelines_asks_which_family_it_is():
    assert families() >= {"di_star_jax.pipelines.sdxl", "di_star_jax.pipelines.sd15"}
    users = {wing(path) for path in FILES if families() & set(imports(path))}
    assert users == {"pipelines", "shapes"}  # the shapes world is an SDXL, its twin a PixArt
    # models/ has their published sizes, and papers.py the papers' tables.
    names = {*FAMILIES, *(family.name for family in FAMILIES.values())}
    tellers = {wing(p) for p in FILES if names & strings(p) and p.name != "papers.py"}
    assert tellers == {"pipelines", "shapes", "models"}


def test_shared_code_calls_the_network_that_predicts_eps_the_denoiser():
    earlier = {"compute.remat_unet", "unet_config"}  # names that are still read
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if wing(path) in ("models", "pipelines", "shapes") or name == "cost/kinds.py":
            continue
        found = {word for word in words(path) - earlier if "unet" in word.lower()}
        assert not found, (name, found)


def opens_text_by_locale(call):
    """Whether a call reads or writes text in the encoding that the locale names."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    said = {keyword.arg for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        owner = getattr(getattr(call.func, "value", None), "id", "")
        is_ours = isinstance(call.func, ast.Name) or owner in ("files", "buckets")
        return not is_ours and "encoding" not in said
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if (owner, name) == ("os", "open"):  # of bytes
        return False
    if name not in ("open", "fdopen") or owner in (
        "Image",
        "KvStore",
        "tarfile",
        "zipfile",
        "webbrowser",
    ):
        return False
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[0 if isinstance(call.func, ast.Attribute) and owner != "os" else 1 :][:1]
    is_binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
    return not is_binary and "encoding" not in said


@pytest.mark.case("faults 26")
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_files_are_utf_8_in_every_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if opens_text_by_locale(call)]
