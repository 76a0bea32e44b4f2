"""The screen of `validate` for a file that can be run: what a first look at the data, the reward and the machine has
found."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from darts_async.topology.roles import REWARD
from launcher.preflight.memory_need import ProcessMemory, gib, host_need
from launcher.preflight.preflight import Findings
from launcher.preflight.prompt_figures import PromptFigures
from launcher.preflight.reward_trial import RewardTrial
from launcher.terminal import printable

_MAX_PROMPT_LINES = 12
_MAX_LINE_CHARS = 400


def validate_screen(title: str, findings: Findings, node: str) -> RenderableType:
    """`node`: the name of this machine."""
    parts: list[RenderableType] = [Text.assemble(("✓ ", "green"), title)]
    rows = [*_prompt_rows(findings), *_reward_rows(findings), *_memory_rows(findings, node)]
    if rows:
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in rows:
            grid.add_row(label, value)
        parts += ["", Padding(grid, (0, 0, 1, 2))]
    return Group(*parts)


def _prompt_rows(findings: Findings) -> Iterator[tuple[str, RenderableType]]:
    if findings.prompts is not None:
        yield "prompts", Text(str(findings.prompts))
    if (figures := findings.figures) is not None:
        yield "lengths", Text(lengths_text(figures))
        yield "unknown", Text(f"{figures.unknown_share:.1%} of the tokens are unknown to the tokenizer")
        yield "the first", Group(Text(f"{figures.first_tokens} tokens, as the model sees it:"), *_quoted(figures))


def lengths_text(figures: PromptFigures) -> str:
    """The lengths of the prompts as a sentence."""
    over = f"{figures.over_limit_share:.1%} are over" if figures.over_limit_share else "none is over"
    return (
        f"{figures.shortest} to {figures.longest} tokens, half of them up to {figures.median}; {over} "
        f"prompts.max_prompt_tokens ({figures.limit})"
    )


def _quoted(figures: PromptFigures) -> Iterator[Text]:
    lines = figures.first_text.split("\n")
    for line in lines[:_MAX_PROMPT_LINES]:
        more = "..." if len(line) > _MAX_LINE_CHARS else ""
        yield Text.assemble(("│ ", "cyan"), printable(line[:_MAX_LINE_CHARS]) + more)
    if len(lines) > _MAX_PROMPT_LINES:
        yield Text(f"  and {len(lines) - _MAX_PROMPT_LINES} more lines", style="dim")


def _reward_rows(findings: Findings) -> Iterator[tuple[str, RenderableType]]:
    for number, trial in enumerate(findings.rewards):
        yield "" if number else REWARD.name, Text(printable(_reward_text(trial)))


def _reward_text(trial: RewardTrial) -> str:
    form = " (it may want a certain form)" if trial.is_equal else ""
    return f"{trial.name} gives {trial}{form}"


def _memory_rows(findings: Findings, node: str) -> Iterator[tuple[str, RenderableType]]:
    if not findings.memory:
        return
    need = host_need([*findings.memory], node)
    here = f"{gib(need)} and more on {node}, where {gib(findings.memory_here_bytes)} are available" if need else ""
    yield "memory", Text(here or "on GPUs, without activations")
    for each in findings.memory:
        yield "", Text(_process_text(each), style="dim")


def _process_text(each: ProcessMemory) -> str:
    gpus = f" on GPU {', '.join(map(str, each.place.devices))}" if each.place.devices else ""
    parts = ", ".join(f"{what} {gib(num_bytes)}" for what, num_bytes in each.parts.items())
    return f"{each.name} of {each.place.node}{gpus}: {parts}"
