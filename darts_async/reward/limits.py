"""The limits of a reward worker and its descendants, and the exit codes that report an exceeded limit.

A warden that ends its worker for an exceeded limit exits with the code of that limit, which `breach_of` reads. A worker
may itself end with any code, so the warden replaces a code that has this meaning by another one. This module has few
imports, because a warden imports it.
"""

from dataclasses import asdict, dataclass, fields

GIB, MIB = 1 << 30, 1 << 20
_FIRST_EXIT_CODE = 231


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits; 0 means no limit."""

    memory_bytes: int = 0
    """Memory of the worker and its descendants, without file pages."""
    processes: int = 0
    """Number of processes, including the worker."""
    file_bytes: int = 0
    """Size of one file that is written."""
    output_bytes: int = 0
    """Written to standard output and error during one item."""

    def as_argument(self) -> str:
        """The limits as text; the inverse of `of_argument`."""
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def of_argument(cls, argument: str) -> "Limits":
        """The inverse of `as_argument`."""
        return cls(*map(int, argument.split(",")))

    def breached_by(self, *, memory_bytes: int = 0, processes: int = 0, output_bytes: int = 0) -> str | None:
        """The name of an exceeded limit, if there is one."""
        used = {"memory_bytes": memory_bytes, "processes": processes, "output_bytes": output_bytes}
        return next((name for name, value in used.items() if 0 < getattr(self, name) < value), None)

    def describe(self, name: str) -> str:
        """The message for an exceeded limit."""
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
"""The warden's exit code in place of a worker's code that would mean a limit."""


def exit_code_of(name: str) -> int:
    """The exit code of a warden that has ended its worker for this limit."""
    return _FIRST_EXIT_CODE + _NAMES.index(name)


def passed_on(exit_code: int) -> int:
    """The exit code of a warden whose worker has ended with this one."""
    return _INSTEAD if _FIRST_EXIT_CODE <= exit_code <= _INSTEAD else exit_code


def shown_exit_code(exit_code: int) -> str:
    """The exit code of a worker, given that of its warden."""
    return f"{_FIRST_EXIT_CODE} to {_INSTEAD}" if exit_code == _INSTEAD else str(exit_code)


def breach_of(exit_code: int) -> str | None:
    """The limit that an exit code means; None if it means none."""
    place = exit_code - _FIRST_EXIT_CODE
    return _NAMES[place] if 0 <= place < len(_NAMES) else None
