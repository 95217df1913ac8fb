# SPDX-License-Identifier: Apache-2.0
"""docs/fields.md, from the comments of configs/sdxl.py: `python -m di_star_jax.studies.fields`."""

from pathlib import Path

from absl import flags

from di_star_jax.command import run as run_command
from di_star_jax.config import comments, fields, load_config
from di_star_jax.log import markdown_table
from di_star_jax.storage import files

HEAD = """# Fields

Set any of them on the command line: `--config.train.steps=500`. Presets follow a colon:
`--config=configs/sdxl.py:sim`. Made from the comments of configs/sdxl.py by
`python -m di_star_jax.studies.fields`.

"""


def page(config_file: Path) -> str:
    """The page's text."""
    said = comments(config_file.read_text(encoding="utf-8"))
    rows = [
        [f"`{name}`", f"`{value!r}`", said[name]]
        for name, value in sorted(fields(load_config(str(config_file))).items())
    ]
    return HEAD + markdown_table(["field", "default (SDXL)", "what it is"], rows) + "\n"


def main() -> None:
    files.write_text(files.expand(flags.FLAGS.out), page(Path(flags.FLAGS.config)))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("config", "configs/sdxl.py", "Config file whose comments are read.")
    flags.DEFINE_string("out", "docs/fields.md", "File to write.")


if __name__ == "__main__":
    define_flags()
    run_command(main)
