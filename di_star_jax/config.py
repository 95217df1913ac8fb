# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong, checked before any compile or download."""


class UserError(Exception):
    """A mistake the user can mend: one line that says what was given, what is expected and how to fix it."""
