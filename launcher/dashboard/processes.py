"""What `events.jsonl` tells of each process: its starts, its ends, and how long it was away. Pure."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class ProcessHistory:
    """Of one process, over all starts of the launcher."""

    process: str
    num_starts: int = 0
    num_ends: int = 0
    """While the run was running."""
    last_code: int | None = None
    """Exit code of the last of these ends; of a signal it is negative."""
    num_kills: int = 0
    """Because it hung or was refused."""
    away_s: float = 0.0
    """From its ends until it worked again."""


@dataclass(slots=True)
class Histories:
    """All processes, in the order in which they started."""

    by_process: dict[str, ProcessHistory] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """A line of `events.jsonl`. One that is not about a process changes nothing."""
        name = event.get("process")
        if not isinstance(name, str):
            return
        history = self.by_process.setdefault(name, ProcessHistory(name))
        match event["type"]:
            case "started":
                history.num_starts += 1
            case "ended":
                history.num_ends += 1
                history.last_code = event["code"] if isinstance(event.get("code"), int) else None
            case "serves":
                history.away_s += away_s if isinstance(away_s := event.get("away_s"), int | float) else 0.0
            case "hangs" | "refused":
                history.num_kills += 1

    def rows(self) -> list[dict[str, Any]]:
        """As JSON."""
        return [asdict(history) for history in self.by_process.values()]


def event_row(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the page lists it.

    >>> event_row({"type": "ended", "process": "a/0", "code": 1, "restart_in_s": None, "elapsed_s": 2.5})
    {'elapsed_s': 2.5, 'type': 'ended', 'subject': 'a/0', 'text': 'code 1'}
    """
    rest = {key: value for key, value in event.items() if key not in ("elapsed_s", "type", "process", "node")}
    return {
        "elapsed_s": event.get("elapsed_s"),
        "type": event["type"],
        "subject": str(event.get("process") or event.get("node") or ""),
        "text": "  ".join(f"{key} {_text(value)}" for key, value in rest.items() if value not in (None, [])),
    }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
