"""How long to wait before something that fails is tried again."""

_MAX_DOUBLINGS = 64
"""More would not fit into a float."""


def backoff_s(num_failures: int, first_s: float, max_s: float) -> float:
    """The wait after so many failures in a row: nothing after none, then twice as long after each.

    >>> [backoff_s(number, first_s=0.5, max_s=3.0) for number in range(5)]
    [0.0, 0.5, 1.0, 2.0, 3.0]
    """
    return min(max_s, first_s * 2.0 ** min(num_failures - 1, _MAX_DOUBLINGS)) if num_failures else 0.0
