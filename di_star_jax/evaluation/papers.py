# SPDX-License-Identifier: Apache-2.0
"""Numbers that papers print, to stand beside ours: of other noise, sizes and versions."""

from typing import NamedTuple


class Row(NamedTuple):
    """One generator.

    scores: by metric. steps: of sampling. seconds: for 10 images, as printed.
    """

    name: str
    scores: dict[str, float]
    steps: int = 0
    seconds: float = float("nan")


class Table(NamedTuple):
    source: str
    rows: list[Row]


_STEPS = {
    "SDXL-base": (50, 111.0),
    "SDXL-DPO": (50, 111.0),
    "SD3.5-large": (28, 66.23),
    "FLUX-dev": (50, 118.64),
}


def _rows(metrics: tuple[str, ...], table: dict[str, tuple[float, ...]]) -> list[Row]:
    return [
        Row(name, dict(zip(metrics, values)), *_STEPS.get(name, (1, 2.22)))
        for name, values in table.items()
    ]


# By prompt set, see prompts/sets.py. Names are the paper's, "DI* long" its run of 1485 kimg.
TABLES = {
    "parti": Table(
        "arXiv 2410.20898, Tables 1 and 2 (named by reward and guidance scale), PartiPrompts; "
        "CLIPScore of a model not named",
        _rows(
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
    "coco": Table(
        "arXiv 2410.20898, Table 1, COCO 30K (2017-val by the table, 2014 by the text); CLIPScore "
        "of a model not named",
        _rows(
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
    "hpsv2": Table(
        "README of the authors of arXiv 2410.20898, HPSv2.1, average of the four styles",
        _rows(
            ("hpsv21",),
            {
                "SDXL-base": (29.05,),
                "SDXL-DPO": (30.42,),
                "SD3.5-large": (30.12,),
                "FLUX-dev": (30.70,),
                "DMD2": (27.97,),
                "Diff-Instruct": (29.70,),
                "SIM": (30.16,),
                "DI++": (29.72,),
                "DI*": (30.22,),
                "DI* long": (31.19,),
            },
        ),
    ),
}
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")  # the benchmark's files
# HPSv2.1 by style; the same source.
HPSV21_BY_STYLE = {
    "SDXL-base": (30.85, 29.30, 28.98, 27.05),
    "SDXL-DPO": (32.01, 30.75, 30.70, 28.24),
    "SD3.5-large": (31.89, 30.19, 30.39, 28.01),
    "FLUX-dev": (32.09, 30.44, 31.17, 29.09),
    "DMD2": (29.72, 27.96, 27.64, 26.55),
    "Diff-Instruct": (31.15, 29.71, 29.72, 28.20),
    "SIM": (31.97, 30.46, 30.13, 28.08),
    "DI++": (31.19, 29.88, 29.61, 28.21),
    "DI*": (32.26, 30.57, 30.10, 27.95),
    "DI* long": (33.22, 31.67, 31.25, 28.62),
}
