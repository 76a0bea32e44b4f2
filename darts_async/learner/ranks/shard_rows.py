"""Computes the rows of a parameter that each rank holds. Pure, so that any number of ranks can read a checkpoint.

FSDP2 cuts the first dimension into chunks of `ceil(num_rows / num_ranks)`, as `torch.chunk` does: the last ranks may
have fewer rows or none. Rows are contiguous in memory, so the rows of all ranks in sequence are the parameter.
"""

from collections.abc import Iterator


def rows_of(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First row of a rank, and the first row after it."""
    chunk = -(-num_rows // num_ranks)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def overlaps(start: int, stop: int, num_rows: int, num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """Where the rows `start` to `stop` lie if `num_ranks` ranks hold them: (rank, first, after the last), counted from
    the rank's own first row."""
    for rank in range(num_ranks):
        begin, end = rows_of(num_rows, rank, num_ranks)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield rank, first - begin, last - begin
