# SPDX-License-Identifier: Apache-2.0
"""What the written pages of docs/ share."""

from pathlib import Path


def conclusion_of(page: Path) -> str:
    """The part of a written page from '## Conclusion' on, which people write and a new table must
    not lose.
    """
    text = page.read_text() if page.exists() else ""
    return (
        text[text.index("## Conclusion") :]
        if "## Conclusion" in text
        else "## Conclusion\n\nNot drawn yet.\n"
    )
