# SPDX-License-Identifier: Apache-2.0
"""Numbers that papers print, to stand beside ours: of other noise, sizes and versions.

Of arXiv 2410.18881 (DI++) and of the first version of 2410.20898 (DI*) the abstracts alone were at
hand: what their tables have on SD 1.5, on PixArt-alpha, by HPSv2's styles and of few-step models is
not here. Of few-step models there is the table of arXiv 2404.13686 (Hyper-SD).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One generator.

    scores: by metric. model: parameters, and pixels of a side. steps: of sampling, 0 if not said.
    guidance: of a teacher, 0 if not said. seconds: for 10 images, as printed.
    by_style: by metric, in the order of HPSV2_STYLES.
    """

    name: str = ""
    scores: dict[str, float] = {}
    model: str = ""
    steps: int = 0
    guidance: float = 0.0
    seconds: float = math.nan
    by_style: dict[str, tuple[float, ...]] = {}

    @property
    def label(self) -> str:
        """Its name, with what keeps a reader from comparing it with another kind of model."""
        guidance = f"guidance {self.guidance:g}" if self.guidance else ""
        details = ", ".join(filter(None, (self.model, guidance)))
        return f"{self.name} ({details})" if details else self.name


class Table(NamedTuple):
    """What one source prints of a prompt set."""

    source: str
    rows: list[Row]


def tables_of(prompts: str, metrics: Iterable[str]) -> list[Table]:
    """What is published of a prompt set: the tables and rows that have one of the metrics."""
    names = set(metrics)
    tables = [
        table._replace(rows=[row for row in table.rows if names & row.scores.keys()])
        for table in TABLES.get(prompts, ())
    ]
    return [table for table in tables if table.rows]


_SDXL, _SD15, _PIXART = "2.6B, 1024 px", "0.86B, 512 px", "0.6B, pixels not said"
# How arXiv 2410.20898 draws; guidance by its authors' notebook, which leaves the scheduler as the
# folder has it. `sample` and `evaluate` draw a folder of SDXL so by themselves.
_TEACHER = Row(model=_SDXL, steps=50, guidance=7.5, seconds=111.0)
_DRAWN = {
    "SDXL-base": _TEACHER,
    "SDXL-DPO": _TEACHER,
    "SD3.5-large": Row(model="8B, 1024 px", steps=28, seconds=66.23),
    "FLUX-dev": Row(model="12B, 1024 px", steps=50, seconds=118.64),
}
_ONE_STEP = Row(model=_SDXL, steps=1, seconds=2.22)


def _di_star(metrics: tuple[str, ...], values: dict[str, tuple[float, ...]]) -> list[Row]:
    return [
        _DRAWN.get(name, _ONE_STEP)._replace(name=name, scores=dict(zip(metrics, of_row)))
        for name, of_row in values.items()
    ]


def _by_style(
    metric: str,
    default: Row,
    values: dict[str, tuple[float, ...]],
) -> list[Row]:
    """Args: a row that is not in _DRAWN; the scores of HPSV2_STYLES, then their average."""
    return [
        _DRAWN.get(name, default)._replace(
            name=name, scores={metric: of_row[-1]}, by_style={metric: of_row[:-1]}
        )
        for name, of_row in values.items()
    ]


def _hyper_sd(model: str, values: dict[tuple[str, int], tuple[float, ...]]) -> list[Row]:
    """Args: the scores by name and steps."""
    metrics = ("clipscore", "aesthetic", "imagereward", "pickscore")
    return [
        Row(name, dict(zip(metrics, of_row)), model, steps)
        for (name, steps), of_row in values.items()
    ]


HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")  # the benchmark's files
# By prompt set, see prompts/sets.py. Names are the papers', "DI* long" is the run of 1485 kimg.
TABLES = {
    "parti": (
        Table(
            "arXiv 2410.20898, Tables 1 and 2 (named by reward and guidance scale), PartiPrompts; "
            "CLIPScore of a model not named; teachers' guidance by the authors' notebook",
            _di_star(
                ("imagereward", "aesthetic", "pickscore", "clipscore"),
                {
                    "SDXL-base": (0.887, 5.72, 0.2274, 32.72),
                    "SDXL-DPO": (1.102, 5.77, 0.2290, 33.03),
                    "SD3.5-large": (1.133, 5.70, 0.2306, 32.70),
                    "FLUX-dev": (1.132, 5.90, 0.2317, 31.70),
                    "DMD2": (0.930, 5.51, 0.2249, 32.97),
                    "Diff-Instruct": (1.058, 5.60, 0.2253, 33.02),
                    "SIM": (1.049, 5.66, 0.2273, 32.93),
                    "DI++": (1.061, 5.58, 0.2260, 32.94),
                    "DI*": (1.067, 5.74, 0.2304, 32.82),
                    "DI* long": (1.140, 5.83, 0.2331, 32.75),
                    "Table 2, DMD2 to start from": (0.938, 5.51, 0.2249, 32.97),
                    "Table 2, KL (0, 0)": (0.846, 5.50, 0.2243, 32.66),
                    "Table 2, KL (0, 7.5)": (1.058, 5.60, 0.2253, 33.02),
                    "Table 2, KL (100, 7.5)": (1.061, 5.58, 0.2260, 32.94),
                    "Table 2, outside (100, 7.5)": (1.082, 5.63, 0.2263, 33.03),
                    "Table 2, inside (0, 0)": (0.782, 5.74, 0.2256, 32.16),
                    "Table 2, inside (0, 7.5)": (1.049, 5.66, 0.2273, 32.93),
                    "Table 2, inside (1, 7.5)": (1.031, 5.69, 0.2274, 32.87),
                    "Table 2, inside (10, 7.5)": (1.048, 5.66, 0.2278, 32.91),
                    "Table 2, inside (100, 4.5)": (1.020, 5.68, 0.2278, 32.82),
                    "Table 2, inside (100, 7.5)": (1.067, 5.74, 0.2304, 32.82),
                    "Table 2, inside (100, 7.5), long": (1.140, 5.83, 0.2331, 32.75),
                },
            ),
        ),
    ),
    "coco": (
        Table(
            "arXiv 2410.20898, Table 1, COCO 30K (2017-val by the table, 2014 by the text); "
            "CLIPScore of a model not named; teachers' guidance by the authors' notebook",
            _di_star(
                ("imagereward", "aesthetic", "pickscore", "clipscore", "fid"),
                {
                    "SDXL-base": (0.825, 5.55, 0.2281, 31.86, 15.89),
                    "SDXL-DPO": (0.950, 5.69, 0.2295, 32.17, 21.48),
                    "SD3.5-large": (1.048, 5.46, 0.2305, 31.85, 17.69),
                    "FLUX-dev": (1.065, 5.64, 0.2333, 30.88, 24.77),
                    "DMD2": (0.822, 5.42, 0.2251, 31.89, 15.80),
                    "Diff-Instruct": (0.907, 5.48, 0.2264, 31.85, 21.62),
                    "SIM": (0.925, 5.54, 0.2277, 31.90, 18.84),
                    "DI++": (0.908, 5.53, 0.2265, 31.85, 21.42),
                    "DI*": (0.933, 5.57, 0.2305, 31.75, 19.09),
                    "DI* long": (0.983, 5.65, 0.2335, 31.57, 21.15),
                },
            ),
        ),
        Table(
            "arXiv 2410.18881, abstract, COCO's validation prompts",
            [Row("DI++ of PixArt-alpha", {"aesthetic": 6.19, "imagereward": 1.24}, _PIXART, 1)],
        ),
        Table(
            "arXiv 2410.20898v1, abstract, which names no prompts for them",
            [Row("DI* of PixArt-alpha", {"aesthetic": 6.30, "imagereward": 1.31}, _PIXART, 1)],
        ),
        Table(
            "arXiv 2404.13686, Table 2, COCO 5K; CLIPScore of ViT-B/32",
            [
                *_hyper_sd(
                    _SD15,
                    {
                        ("SD 1.5", 25): (31.88, 5.26, 0.18, 0.217),
                        ("LCM", 4): (30.36, 5.66, -0.37, 0.212),
                        ("TCD", 4): (30.62, 5.45, -0.15, 0.214),
                        ("PeRFlow", 4): (30.77, 5.64, -0.35, 0.208),
                        ("Hyper-SD", 1): (30.87, 5.79, 0.29, 0.215),
                    },
                ),
                *_hyper_sd(
                    _SDXL,
                    {
                        ("SDXL-base", 25): (33.16, 5.54, 0.87, 0.229),
                        ("LCM", 4): (32.43, 5.42, 0.48, 0.224),
                        ("TCD", 4): (32.45, 5.42, 0.67, 0.226),
                        ("SDXL-Lightning", 4): (32.40, 5.63, 0.72, 0.229),
                        ("Hyper-SD", 4): (32.56, 5.74, 0.93, 0.232),
                        ("SDXL-Turbo", 1): (32.33, 5.33, 0.78, 0.228),
                        ("SDXL-Lightning", 1): (32.17, 5.34, 0.54, 0.223),
                        ("Hyper-SD", 1): (32.85, 5.85, 1.19, 0.231),
                    },
                ),
            ],
        ),
        Table(
            "arXiv 2410.16794, beside the rows of arXiv 2404.13686; its prompts were not at hand",
            [
                Row(
                    "PixArt-alpha",
                    {"aesthetic": 5.97, "imagereward": 0.82, "pickscore": 0.226},
                    _PIXART,
                    30,
                ),
                Row(
                    "SIM of PixArt-alpha",
                    {"aesthetic": 6.42, "imagereward": 0.67, "pickscore": 0.223},
                    _PIXART,
                    1,
                ),
            ],
        ),
    ),
    "hpsv2": (
        Table(
            "README of the authors of arXiv 2410.20898, HPSv2.1; teachers' guidance by their "
            "notebook",
            _by_style(
                "hpsv21",
                _ONE_STEP,
                {
                    "SDXL-base": (30.85, 29.30, 28.98, 27.05, 29.05),
                    "SDXL-DPO": (32.01, 30.75, 30.70, 28.24, 30.42),
                    "SD3.5-large": (31.89, 30.19, 30.39, 28.01, 30.12),
                    "FLUX-dev": (32.09, 30.44, 31.17, 29.09, 30.70),
                    "DMD2": (29.72, 27.96, 27.64, 26.55, 27.97),
                    "Diff-Instruct": (31.15, 29.71, 29.72, 28.20, 29.70),
                    "SIM": (31.97, 30.46, 30.13, 28.08, 30.16),
                    "DI++": (31.19, 29.88, 29.61, 28.21, 29.72),
                    "DI*": (32.26, 30.57, 30.10, 27.95, 30.22),
                    "DI* long": (33.22, 31.67, 31.25, 28.62, 31.19),
                },
            ),
        ),
        Table(
            "arXiv 2410.18881, abstract, HPSv2.0, which does not name the prompts",
            [Row("DI++ of PixArt-alpha", {"hpsv2": 28.48}, _PIXART, 1)],
        ),
        Table(
            "arXiv 2410.20898v1, abstract, HPSv2, which says neither version nor prompts: 2.0, for "
            "it is called a record, and by 2.1 SDXL-base has 29.05",
            [Row("DI* of PixArt-alpha", {"hpsv2": 28.70}, _PIXART, 1)],
        ),
        Table(
            "README of HPSv2, HPSv2.0; sizes, steps and guidance are not said there",
            _by_style(
                "hpsv2",
                Row(model="size not said"),
                {
                    "Dreamlike Photoreal 2.0": (28.24, 27.60, 27.59, 27.99, 27.86),
                    "SDXL-refiner 0.9": (28.45, 27.66, 27.67, 27.46, 27.80),
                    "SDXL-base 0.9": (28.42, 27.63, 27.60, 27.29, 27.73),
                    "SD 2.0": (27.48, 26.89, 26.86, 27.46, 27.17),
                    "SD 1.4": (27.26, 26.61, 26.66, 27.27, 26.95),
                },
            ),
        ),
    ),
}
