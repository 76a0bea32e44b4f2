"""Limits that the system puts on a process, raised at its start as far as it may raise them itself.

The usual soft limit of open files is 1,024, so that old programs which use `select` are not surprised; the hard one is
hundreds of times higher. A process of a run uses `epoll` and needs some descriptors for every peer.
"""

import resource

MAX_OPEN_FILES = 1 << 20
"""Higher than this no soft limit is raised: some libraries do work for every descriptor that is allowed."""


def raise_open_files() -> None:
    """Allow as many open files as the hard limit does; what this process starts inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
