"""What a reward worker and all that it has started may use, and how a breach is told.

A warden that ends its worker for a breach leaves with the exit code of that limit, which `breach_of` reads. A worker
may end with any code by itself. So the codes of limits are a warden's alone: it passes on another one in their place.
Light on purpose: a warden imports little.
"""

from dataclasses import asdict, dataclass, fields

GIB, MIB = 1 << 30, 1 << 20
_FIRST_EXIT_CODE = 231


@dataclass(frozen=True, slots=True)
class Limits:
    """A limit of 0 is none."""

    memory_bytes: int = 0
    """Of the worker and everything below it: memory that no file holds."""
    processes: int = 0
    """The worker itself among them."""
    file_bytes: int = 0
    """Of one file that is written."""
    output_bytes: int = 0
    """Written to standard output and error during one item."""

    def as_argument(self) -> str:
        """For `of_argument`."""
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def of_argument(cls, argument: str) -> "Limits":
        """What `as_argument` gave."""
        return cls(*map(int, argument.split(",")))

    def breached_by(self, *, memory_bytes: int = 0, processes: int = 0, output_bytes: int = 0) -> str | None:
        """The name of a limit that is exceeded, if one is."""
        used = {"memory_bytes": memory_bytes, "processes": processes, "output_bytes": output_bytes}
        return next((name for name, value in used.items() if 0 < getattr(self, name) < value), None)

    def describe(self, name: str) -> str:
        """What a breach of a limit is reported as."""
        match name:
            case "memory_bytes":
                return f"used more memory than reward.limits.memory_gib ({self.memory_bytes / GIB:g})"
            case "processes":
                return f"had more processes than reward.limits.processes ({self.processes})"
            case "file_bytes":
                return f"wrote a file larger than reward.limits.file_gib ({self.file_bytes / GIB:g})"
            case _:
                return f"printed more for one item than reward.limits.output_mib ({self.output_bytes / MIB:g})"


_NAMES = [field.name for field in fields(Limits)]
_INSTEAD = _FIRST_EXIT_CODE + len(_NAMES)
"""Passed on for each code of a limit, and for itself."""


def exit_code_of(name: str) -> int:
    """How a warden leaves that has ended its worker for a breach of this limit."""
    return _FIRST_EXIT_CODE + _NAMES.index(name)


def passed_on(exit_code: int) -> int:
    """The code with which a warden leaves whose worker has ended by itself with this one."""
    return _INSTEAD if _FIRST_EXIT_CODE <= exit_code <= _INSTEAD else exit_code


def shown_exit_code(exit_code: int) -> str:
    """Of a worker, from that of its warden."""
    return f"{_FIRST_EXIT_CODE} to {_INSTEAD}" if exit_code == _INSTEAD else str(exit_code)


def breach_of(exit_code: int) -> str | None:
    """The limit of such an exit code; None if it is another one."""
    place = exit_code - _FIRST_EXIT_CODE
    return _NAMES[place] if 0 <= place < len(_NAMES) else None
