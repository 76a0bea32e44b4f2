"""Makes what others have written fit to be sent to the page: text without hidden characters, and finite numbers.

The page shows all of it as text, never as markup. Characters that reorder or hide text would still change what a reader
sees, so they are shown as escapes, as on a terminal.
"""

import json
import math
from typing import Any

from launcher.terminal import printable


def plain(value: Any) -> Any:
    """The same value for JSON: text is printable, and a number that is not finite is None.

    >>> plain({"a": ["b\\u202ec", float("nan"), 3]})
    {'a': ['b\\\\u202ec', None, 3]}
    """
    match value:
        case str():
            return printable(value)
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {printable(str(key)): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case _:
            return value


def encoded(value: Any) -> bytes:
    """The value as JSON on one line. Raises `ValueError` if a number is not finite: see `plain`."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
