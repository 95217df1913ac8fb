# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, so that the architecture cannot erode unseen."""

import ast
from pathlib import Path

import pytest

import di_star_jax

PACKAGE = Path(di_star_jax.__file__).parent
# A module may import from its own line and from those above.
LEVELS = [
    {"config", "storage", "cost", "evaluation", "pipelines", "studies"},
    {"diffusion", "models.attention", "cost.flops", "sharding", "xla_flags"},
    {
        "objectives",
        "models",
        "models.layers",
        "models.unet",
        "models.vae",
        "models.clip",
        "models.blip",
        "models.published",
        "shapes.scenes",
        "shapes.oracle",
        "shapes.taste",
    },
    {
        "samplers",
        "storage.weights",
        "storage.checkpoint",
        "prompts",
        "prompts.files",
        "log",
        "evaluation.measures",
    },
    {"pipelines.folder", "prompts.sets"},
    {
        "rewards",
        "rewards.reward",
        "rewards.pixels",
        "rewards.views",
        "storage.open_clip",
        "rewards.similarity",
        "rewards.pickscore",
        "rewards.hpsv2",
        "rewards.hpsv2_legacy",
        "rewards.clipscore",
        "rewards.aesthetic",
        "rewards.imagereward",
    },
    {"gradients", "cost.plan", "evaluation.before_after"},
    {"step"},
    {"train"},
    {"cost.compile", "cost.peer"},
    {"evaluation.scores", "evaluation.papers", "evaluation.page"},
    {"evaluation.results"},
    {
        "main",
        "convert",
        "sample",
        "evaluation.drawn",
        "evaluation.frechet",
        "evaluate",
        "benchmark",
        "shapes",
        "studies.mixture",
        "shapes.pretrain",
        "studies.ablation",
        "shapes.tokenizer",
    },
]
LEVEL = {module: i for i, level in enumerate(LEVELS) for module in level}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = PACKAGE.parent / (node.module or "").replace(".", "/")
            for alias in node.names:  # a module of a package, or what a module holds
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_from_its_own_level_and_above(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports(path):
        if module not in (
            "cost.peer",
            "benchmark",
            "evaluation.frechet",
        ):  # what --vs=torch and --metrics=fid alone run
            assert name.split(".")[0] not in ("torch", "tensorflow", "diffusers"), (
                f"{module} imports {name}"
            )
        if name.startswith("di_star_jax."):
            used = name.removeprefix("di_star_jax.")
            assert module in LEVEL and used in LEVEL, (
                f"{module} or {used} is new: give it a line in LEVELS"
            )
            assert LEVEL[used] <= LEVEL[module], f"{module} imports {used}, which is to its right"


def test_ml_collections_is_imported_by_main_alone_and_configs_by_nobody():
    users = {p.stem for p in FILES for name in imports(p) if name.split(".")[0] == "ml_collections"}
    assert users <= {"main", "config", "benchmark"}
    assert not [p for p in FILES for name in imports(p) if name.split(".")[0] == "configs"]


def test_objectives_know_nothing_of_networks():
    ours = {name for name in imports(PACKAGE / "objectives.py") if name.startswith("di_star_jax")}
    assert {name.split(".")[1] for name in ours} == {"diffusion"}


def test_configs_import_the_package_for_its_folder_and_its_errors_only():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("di_star_jax")}
        assert ours <= {"di_star_jax", "di_star_jax.config.UserError"} | {"di_star_jax.config"}, (
            path
        )
