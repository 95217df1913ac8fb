# SPDX-License-Identifier: Apache-2.0
"""What the written pages of docs/ share."""

from pathlib import Path

from di_star_jax.errors import UserError

_HEADING = "## Conclusion"


def check_matplotlib() -> None:
    """Raises: UserError where the figures could not be drawn, hours later."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the figures need matplotlib ({error}); pip install matplotlib, then the same command"
        ) from None


def conclusion_of(page: Path) -> str:
    """What people wrote on a page, from '## Conclusion' on, which a new table must not lose."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, found, conclusion = text.partition(_HEADING)
    return _HEADING + conclusion if found else f"{_HEADING}\n\nNot drawn yet.\n"
