# SPDX-License-Identifier: Apache-2.0
"""What the written pages of docs/ share."""

import re
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


def with_section(
    page: Path,
    title: str,
    heading: str,
    text: str,
) -> str:
    """A page's text with one of its sections made anew, and all others as they are.

    Args: page, which need not be there; title, of a new one; heading and text, of the section.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n"
    parts = re.split(r"^(?=## )", old, flags=re.MULTILINE)
    section = f"## {heading}\n\n{text.strip()}\n"
    places = [i for i, part in enumerate(parts) if part.startswith(f"## {heading}\n")]
    if places:
        parts[places[0]] = section
    else:
        parts.append(section)
    return "\n".join(f"{part.strip()}\n" for part in parts)
