"""Raises the limit of open files of a process at its start.

The usual soft limit is 1,024, for old programs that use `select`; the hard limit is hundreds of times higher. A process
of a run uses `epoll` and needs several descriptors for every peer.
"""

import resource

MAX_OPEN_FILES = 1 << 20
"""The soft limit is not raised above this, because some libraries do work for every possible descriptor."""


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard limit. Child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
