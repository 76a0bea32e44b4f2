"""Lifecycles as tables: which states a thing may be in, which state follows which, and on what event.

Example:
    >>> DOOR = Transitions({("shut", "open"): "someone pulls", ("open", "shut"): "someone pushes"})
    >>> DOOR.check("shut", "open", lambda: "the front door")
    >>> print(DOOR.picture())
    shut -> open  someone pulls
    open -> shut  someone pushes
"""

from collections.abc import Callable, Mapping


class IllegalTransition(AssertionError):
    """A bug: a state does not follow the present one. The message has the story of the thing."""


class Transitions:
    """The table of one lifecycle: `{(from, to): the event}`, in the order of a life."""

    def __init__(self, events: Mapping[tuple[str, str], str]) -> None:
        self.events = dict(events)

    def check(self, now: str, then: str, story: Callable[[], str]) -> None:
        """Raises `IllegalTransition` if `then` does not follow `now`."""
        if (now, then) not in self.events:
            allowed = ", ".join(to for at, to in self.events if at == now) or "nothing"
            raise IllegalTransition(f"{story()}: {now} -> {then} is illegal, after {now} comes {allowed}")

    def picture(self) -> str:
        """One line for each transition, as docstrings show it."""
        left = max(len(now) for now, _ in self.events)
        right = max(len(then) for _, then in self.events)
        lines, before = [], ""
        for (now, then), event in self.events.items():
            lines.append(f"{now if now != before else '':{left}} -> {then:{right}}  {event}")
            before = now
        return "\n".join(lines)
