"""Shows rollouts on a terminal. The texts are of models and data, so nothing here is printed but by a `Screen`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from darts_async.rollouts import Rollout, groups_of
from launcher.terminal import printable

MAX_CHARS = 700
"""Of a response, unless all of it is asked for."""
_PROMPT_CHARS = 200
_COLOURS = {"trained": "green", "cancelled": "yellow", "evaluated": "cyan"}


def rollouts_screen(
    rollouts: Sequence[Rollout], *, pattern: re.Pattern[str] | None = None, is_full: bool = False
) -> RenderableType:
    """Samples under the heading of their group, in the given order. What `pattern` finds is marked."""
    parts: list[RenderableType] = []
    for (step, kind), of_step in groupby(rollouts, key=lambda each: (each.step, each.kind)):
        parts.append(Text(f"step {step}" if kind == "train" else f"evaluation of version {step}", style="bold"))
        for group in groups_of(of_step):
            parts.append(_prompt(group[0], is_full=is_full))
            for rollout in group:
                parts.append(Indented(Facts(rollout), 2))
                parts.append(Indented(_response(rollout, pattern, is_full=is_full), 4))
                parts.append("")
    return Group(*parts)


def one_line(rollout: Rollout) -> Text:
    """One sample in a line, without its text.

    >>> sample = Rollout(kind="train", step=3, sample="7/0", group_id=7, sample_index=0, prompt_id=1, prompt="",
    ...     outcome="trained", reward=0.5, advantage=-1.25, length=9, oldest_version=2, newest_version=3)
    >>> one_line(sample).plain
    '7/0  trained  reward 0.500  advantage -1.250  9 tokens  versions 2 to 3'
    """
    return Text("  ").join(_facts(rollout))


def _facts(rollout: Rollout) -> Iterator[Text]:
    yield Text(rollout.sample, style="bold")
    colour = "red" if rollout.has_failed else _COLOURS.get(rollout.outcome, "dim")
    says_why = rollout.outcome not in ("trained", "evaluated") and rollout.why
    yield Text(f"{rollout.outcome} ({rollout.why})" if says_why else rollout.outcome, style=colour)
    if rollout.reward is not None:
        yield Text(f"reward {rollout.reward:.3f}")
    yield from (Text(f"{name} {value:.3f}", style="dim") for name, value in rollout.reward_parts.items())
    if rollout.advantage is not None:
        yield Text(f"advantage {rollout.advantage:+.3f}")
    yield Text(f"{rollout.length:,} tokens{', cut at the limit' if rollout.finish_reason == 'length' else ''}")
    if (oldest := rollout.oldest_version) is not None:
        newest = rollout.newest_version
        yield Text(f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}", style="dim")


@dataclass(frozen=True, slots=True)
class Facts:
    """The same as `one_line`, in as many lines as it takes, none of which ends inside a fact."""

    rollout: Rollout

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for fact in _facts(self.rollout):
            if line and line.cell_len + 2 + fact.cell_len > options.max_width:
                yield line
                line = Text("  ")
            elif line:
                line.append("  ")
            line.append_text(fact)
        yield line


@dataclass(frozen=True, slots=True)
class Indented:
    """Something moved to the right, without spaces at the ends of its lines."""

    what: RenderableType
    num_columns: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - self.num_columns)
        for line in console.render_lines(self.what, options.update(width=width), pad=False):
            yield Segment(" " * self.num_columns)
            yield from line
            yield Segment.line()


@dataclass(frozen=True, slots=True)
class FirstLines:
    """The beginning of a text, without its line ends, in so many lines on a terminal of any width."""

    text: str
    num_lines: int
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        max_chars = options.max_width * (self.num_lines + 1)  # more than are shown: words move to the next line
        text = Text(printable(" ".join(self.text[:max_chars].split())) or "(no text)", style=self.style)
        lines = text.wrap(console, options.max_width)
        shown = Text("\n").join(lines[: self.num_lines])
        if len(lines) > self.num_lines or len(self.text) > max_chars:
            last = lines[self.num_lines - 1]
            last.truncate(options.max_width - 2)
            shown = Text("\n").join([*lines[: self.num_lines - 1], last.append(" …")])
        yield shown


def excerpt(text: str, max_chars: int, pattern: re.Pattern[str] | None = None) -> str:
    """At most about so many characters of a text: its two ends, or what is around the first place of a pattern.

    >>> excerpt("abcdefghijklmnopqrstuvwxyz", 8)
    'abcdef … 18 characters … yz'
    """
    if len(text) <= max_chars:
        return text
    found = pattern.search(text) if pattern is not None else None
    if found is not None:
        begin = max(0, min(found.start() - max_chars // 4, len(text) - max_chars))
        end = begin + max_chars
        return f"{'… ' if begin else ''}{text[begin:end]}{' …' if end < len(text) else ''}"
    head, tail = max_chars * 3 // 4, max_chars // 4
    return f"{text[:head]} … {len(text) - head - tail:,} characters … {text[-tail:]}"


def _prompt(rollout: Rollout, *, is_full: bool) -> RenderableType:
    prompt = rollout.prompt if is_full else excerpt(rollout.prompt, _PROMPT_CHARS)
    text = Text.assemble((f"group {rollout.group_id}  prompt {rollout.prompt_id}  ", "dim"), prompt)
    if rollout.answer:
        text.append(f"  answer {excerpt(rollout.answer, _PROMPT_CHARS)}", style="dim")
    return text


def _response(rollout: Rollout, pattern: re.Pattern[str] | None, *, is_full: bool) -> Text:
    if not rollout.text.strip():
        return Text("(no text)", style="dim")
    text = Text(rollout.text if is_full else excerpt(rollout.text, MAX_CHARS, pattern))
    if pattern is not None:
        text.highlight_regex(pattern, "reverse")
    return text
