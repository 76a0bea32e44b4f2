"""The screen of `--dry-run`: what a run would start, its key settings, and the bounds that follow from them."""

import shlex
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from darts_async.config import NodeConfig, RewardConfig, RunConfig, ShapingConfig
from darts_async.topology.plan import ProcessSpec, RunPlan
from launcher.display.length_notes import length_note
from launcher.display.view import plain_table
from launcher.preflight.reward_check import isolations


def dry_run_screen(config: RunConfig, plan: RunPlan) -> RenderableType:
    title = Text.assemble((config.name, "bold"), (": the plan; nothing is started", "dim"))
    return Padding(
        Group(
            title,
            "",
            *_process_lines(config, plan),
            _link_table(plan),
            "",
            _pairs("settings", key_settings(config)),
            "",
            _pairs("bounds", bounds(config)),
        ),
        (1, 2),
    )


def key_settings(config: RunConfig) -> dict[str, str]:
    shaping, learner, generator = config.shaping, config.learner, config.generator
    return {
        "model": f"{config.model.path}, {config.model.dtype}",
        "prompts": _prompts_text(config),
        "reward": f"{_reward(config.reward)}, workers in each process: {config.reward.workers}",
        "shaping": _shaping(shaping),
        "length": length_note(shaping, normalises=learner.loss.normalise_advantage),
        "learner": f"{learner.steps} steps of {learner.groups_per_step} groups, rate {learner.learning_rate:g}",
        "generator": f"{generator.engine}, {generator.num_slots} slots of {generator.max_context_tokens} tokens",
        "weights": f"{config.weights.backend}, buckets of {config.weights.bucket_bytes:,} bytes",
        "seed": str(config.seed),
    }


def _prompts_text(config: RunConfig) -> str:
    parts = (config.prompts.mixture or (config.prompts,), config.evaluation.sets)
    drawn, evaluated = ([f"{part.path or part.source}, {part.held_out} held out" for part in some] for some in parts)
    weights = [f"{part.weight:g} x " for part in config.prompts.mixture] or [""]
    also = [f"evaluated on {each}" for each in evaluated]
    return "; ".join([*(f"{weight}{text}" for weight, text in zip(weights, drawn, strict=True)), *also])


def _reward(reward: RewardConfig) -> str:
    if reward.function is not None:
        return reward.function
    programs = "".join(f"; programs run in {walls}" for walls in sorted(set(isolations(reward))))
    return " + ".join(f"{part.weight:g} * {part.label}" for part in reward.functions) + programs


def bounds(config: RunConfig) -> dict[str, str]:
    per_step = config.learner.groups_per_step * config.shaping.keep
    slots = config.roles.generator.replicas * config.generator.num_slots
    staleness = config.staleness.max_staleness
    roles = config.roles
    threads = sum(role.replicas * role.threads for role in (roles.shaper, roles.generator, roles.reward, roles.learner))
    return {
        "staleness of a token": f"at most {staleness}" + (" (synchronous, on-policy)" if staleness == 0 else ""),
        "open groups": f"at most {round(config.shaping.overcommit * config.max_open_groups)}",
        "samples in a step": f"{per_step} of {config.learner.groups_per_step * config.shaping.launch} generated",
        "samples decoded at once": f"at most {slots}",
        "threads": f"{threads} of numerical libraries",
    }


def _shaping(shaping: ShapingConfig) -> str:
    ends = f" ({shaping.shortest} + {shaping.longest})" if shaping.rule in ("dual_end", "survivor") else ""
    switches = {
        "early stop": shaping.early_stop,
        "guard": shaping.guard,
        f"redundancy {shaping.redundancy.total}, {shaping.redundancy.split}": shaping.redundancy.total != "off",
        f"pruning {shaping.pruning.mode}": shaping.pruning.mode != "off",
        f"baseline {shaping.baseline}": shaping.baseline != "group",
    }
    parts = [f"{shaping.rule}: keep {shaping.keep}{ends} of {shaping.launch}", *(k for k, on in switches.items() if on)]
    return ", ".join(parts)


def _process_lines(config: RunConfig, plan: RunPlan) -> Iterator[RenderableType]:
    """The processes of each node, under the node's address and used GPUs."""
    for node in config.nodes:
        yield Text(_node_title(config, node, plan), style="dim")
        for spec in plan.processes:
            if spec.node == node.name:
                devices = f"  GPU {', '.join(map(str, spec.devices))}" if spec.devices else ""
                yield Text.assemble((spec.name, "bold"), devices)
                yield Padding(Text(_command(spec), overflow="fold"), (0, 0, 0, 2))
        yield ""


def _node_title(config: RunConfig, node: NodeConfig, plan: RunPlan) -> str:
    used = {device for spec in plan.processes if spec.node == node.name for device in spec.devices}
    devices = f", {len(used)} of {len(node.devices)} GPUs used" if node.devices else ""
    return f"processes on {node.name}, {config.host_of(node)}{devices}"


def _command(spec: ProcessSpec) -> str:
    """The command as one types it in a shell."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in spec.env.items()), shlex.join(spec.argv)])


def _link_table(plan: RunPlan) -> Table:
    table = plain_table(gap=3)
    for title in ("link", "address", "bound by", "members"):
        table.add_column(title, overflow="fold")
    for link in plan.links:
        table.add_row(link.name, link.address, link.hub, ", ".join(link.members))
    return table


def _pairs(title: str, pairs: dict[str, str]) -> Table:
    table = plain_table(title, gap=3)
    table.add_column("", overflow="fold")
    for key, value in pairs.items():
        table.add_row(key, value)
    return table
