"""Bad input: each mistake ends with exit code 2, on one screen, naming the place, the value and the fix."""

import contextlib
import socket
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.config import RunConfig
from launcher.config_file import all_places, parse_config
from launcher.field_names import FIELD_NAMES, OURS
from launcher.preflight.preflight import check_network, check_run, link_ports
from launcher.problems import InputError

BAD_FILES = {
    "unknown key": ("learner:\n  step: 3\n", ["learner.step", "3", "line 2", "did you mean learner.steps?"]),
    "unknown section": ("lerner:\n  steps: 3\n", ["lerner", "line 1", "did you mean learner?"]),
    "key of another section": ("generator:\n  top_k: 3\n", ["generator.top_k", "did you mean sampling.top_k?"]),
    "nested unknown key": (
        "generator:\n  engine: scripted\n  script:\n    median: 3\n",
        ["generator.script.median", "line 4", "did you mean generator.script.median_tokens?"],
    ),
    "name in TRL": ("learner:\n  beta: 0.04\n", ["learner.beta", "line 2", "here it is learner.loss.kl_weight"]),
    "sections of verl": (
        "actor_rollout_ref:\n  rollout: {n: 8}\n  actor: {optim: {lr: 1e-6}}\n",
        [
            "actor_rollout_ref",
            "line 1",
            "leave this section out; of its keys, n is shaping.keep and shaping.launch, lr is learner.learning_rate",
        ],
    ),
    "misspelt section with names in TRL": (
        "lerner:\n  lr: 1e-6\n",
        ["lerner", "line 1", "did you mean learner?; of its keys, lr is learner.learning_rate"],
    ),
    "group size in verl": ("shaping:\n  n: 8\n", ["shaping.n: 8", "here it is shaping.keep and shaping.launch"]),
    "factor in prime-rl": (
        "shaping:\n  oversampling_factor: 1.5\n",
        ["shaping.oversampling_factor: 1.5", "here it is shaping.overcommit"],
    ),
    "nothing like it": ("staleness:\n  xyzzy: 1\n", ["staleness.xyzzy", "the settings here are max_staleness"]),
    "text for a number": ("learner:\n  steps: '5'\n", ["learner.steps", "'5'", "whole number", "without quotes"]),
    "fraction for a count": ("learner:\n  steps: 2.5\n", ["learner.steps", "2.5", "a whole number"]),
    "number for a text": ("name: 2024\n", ["name", "2024", "expected a text", "put it in quotes: '2024'"]),
    "out of range": ("sampling:\n  top_p: 1.5\n", ["sampling.top_p", "1.5", "less than or equal to 1"]),
    "wrong choice": ("shaping:\n  rule: dual_ends\n", ["shaping.rule", "'dual_ends'", "did you mean 'dual_end'?"]),
    "section is a value": ("learner: 3\n", ["learner", "3", "expected a section"]),
    "counts disagree": ("shaping:\n  keep: 9\n", ["shaping", "shaping.shortest (7)", "shaping.keep is 9"]),
    "context too small": ("generator:\n  max_context_tokens: 99\n", ["is 768", "generator.max_context_tokens is 99"]),
    "direct without vLLM": (
        "weights:\n  receive: direct\n",
        ["weights.receive is direct", "generator.engine embedded", "or choose vllm"],
    ),
    "too hot for vLLM": (
        "generator:\n  engine: vllm\nsampling:\n  temperature: 2.5\n",
        ["sampling.temperature is 2.5", "samples only at 0.01 to 2"],
    ),
    "too cold for vLLM": (
        "generator:\n  engine: vllm\nsampling:\n  temperature: 0.005\n",
        ["sampling.temperature is 0.005", "samples only at 0.01 to 2"],
    ),
    "pattern of answers": ("prompts:\n  answer_pattern: '(x'\n", ["prompts.answer_pattern", "line 2", "'(x'"]),
    "node of another name": ("roles:\n  reward:\n    nodes: [b]\n", ["roles.reward.nodes names 'b'", "are local"]),
    "too few devices": (
        "nodes:\n  - name: a\nroles:\n  learner:\n    devices: 1\n",
        ["roles.learner.devices", "no node can take learner/0 of 1: it needs 1 of one node, but a has 0 of 0 free"],
    ),
    "two shapers": ("roles:\n  shaper:\n    replicas: 2\n", ["roles.shaper.replicas is 2", "exactly one shaper"]),
    "repeated key": ("seed: 1\nname: a\nseed: 2\n", ["seed", "line 3", "is repeated", "line 1", "remove one"]),
    "not a mapping": ("- a\n- b\n", ["is not a mapping", "['a', 'b']"]),
    "empty": ("# nothing\n", ["the file is empty"]),
    "syntax": ("learner:\n  steps: [1\nseed: 3\n", ["is not YAML", "column", "line"]),
    "bad indentation": ("learner:\n  steps: 1\n seed: 3\n", ["is not YAML", "line 3"]),
    "control character": ("name: \x07\n", ["is not YAML"]),
    "recursive": ("name: &a [*a]\n", ["is nested too deeply", "write values out"]),
    "aliases of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join([f'*{b}'] * 10)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)),
        [
            "line 5",
            "the file",
            "holds more than 100,000 values once its aliases are expanded",
            "write fewer aliases",
        ],
    ),
    "a list of aliases of aliases": (
        "- &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"- &{n} [{','.join([f'*{b}'] * 10)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)),
        ["holds more than 100,000 values"],
    ),
    "merges of merges": (
        "a: &a {x: 1}\n"
        + "".join(f"{n}: &{n} {{<<: [{','.join([f'*{b}'] * 20)}]}}\n" for b, n in zip("abcdef", "bcdefg", strict=True)),
        ["holds more than 100,000 values"],
    ),
    "null character": ('reward:\n  function: "a\\0b:c"\n', ["a text with a null character", "line 2"]),
    "long name": (f"reward:\n  function: {'x' * 2_000}\n", ["reward.function", "at most 1000 characters", "line 2"]),
    "too long": ("# " + "x" * (1 << 18), ["is longer than 262,144 bytes", "give the YAML file of a run"]),
    "no date": ("name: 2024-13-45\n", ["holds a value that cannot be read", "month must be in 1..12"]),
    "thousands of digits": (f"seed: {'1' * 5000}\n", ["line 1", "a whole number of more than 64 bits"]),
    "thousands of digits to the base 16": (f"seed: 0x{'f' * 5000}\n", ["a whole number of more than 64 bits"]),
    "thousands of digits to the base 60": (f"seed: 1{':1' * 5000}\n", ["a whole number of more than 64 bits"]),
    "65 bits": (f"seed: {1 << 64}\n", ["a whole number of more than 64 bits"]),
    "a date": ("name: 2024-01-01\n", ["name", "expected a text", "put it in quotes: '2024-01-01'"]),
    "a hundred million processes": (
        "roles: {generator: {replicas: 100000000}}\n",
        ["roles.generator.replicas", "less than or equal to 10000"],
    ),
    "no such model": ("model:\n  path: ./nowhere\n", ["model.path", "'./nowhere'", "no directory"]),
    "no such reward": (
        "reward:\n  function: maths\n",
        ["line 2", "reward.function", "'maths'", "did you mean 'math'?"],
    ),
    "a reward of an earlier version": (
        "reward:\n  function: chain\n",
        ["line 2", "reward.function: 'chain'", "is now called 'darts_async.quickstart.task:reward'", "→ write that"],
    ),
    "a source of an earlier version": (
        "prompts:\n  source: chain\n",
        ["line 2", "prompts.source: 'chain'", "is now called 'darts_async.quickstart.task:prompts'"],
    ),
    "a model of an earlier version": (
        "model:\n  path: quickstart\n",
        ["line 2", "model.path: 'quickstart'", "is now called 'darts_async.quickstart:model'"],
    ),
    "no such model in a package": (
        "model:\n  path: darts_async.quickstart:modle\n",
        ["model.path", "there is no directory", "correct the name"],
    ),
    "no such rule": (
        "shaping:\n  rule: my_rule\n",
        ["line 2", "shaping.rule: 'my_rule'", "there is no such choice", "→ use one of", "or module:name"],
    ),
    "no such engine": (
        "generator:\n  engine: vlm\n",
        ["generator.engine: 'vlm'", "line 2", "there is no such choice", "→ use one of", "did you mean 'vllm'?"],
    ),
    "no such loss": (
        "learner:\n  loss:\n    kind: grppo\n",
        ["learner.loss.kind: 'grppo'", "line 3", "there is no such choice", "→ use one of", "did you mean 'grpo'?"],
    ),
    "no such sink": (
        "telemetry:\n  sinks: [wandbb]\n",
        ["line 2", "telemetry.sinks is 'wandbb'", "or module:name", "did you mean 'wandb'?"],
    ),
    "a sink twice": ("telemetry:\n  sinks: [wandb, wandb]\n", ["line 2", "names 'wandb' 2 times"]),
    "no such setting of a sink": (
        "telemetry:\n  wandb: {projct: mine}\n",
        ["line 2", "telemetry.wandb.projct", "did you mean telemetry.wandb.project?"],
    ),
    "the name of sinks elsewhere": ("telemetry:\n  report_to: wandb\n", ["line 2", "here it is telemetry.sinks"]),
    "no such module": (
        "shaping:\n  rule: my_rule:Rule\n",
        ["shaping.rule", "there is no module 'my_rule'", "looked in the current directory"],
    ),
    "no such data": (
        "prompts:\n  source: jsonl\n  path: nowhere.jsonl\n",
        ["prompts.path", "nowhere.jsonl", "there is no file"],
    ),
    "prompt too long": (
        "prompts:\n  num_train: 16\n  held_out: 4\n  max_prompt_tokens: 4\n",
        ["prompts", "max_prompt_tokens is 4", "on_too_long: skip"],
    ),
    "host of another machine": ("network:\n  host: 192.0.2.7\n", ["network.host", "'192.0.2.7'", "127.0.0.1"]),
    "every interface": ("network:\n  host: 0.0.0.0\n", ["network.host", "every interface", "name one address"]),
    "host is a name": ("network:\n  host: example\n", ["network.host", "'example'", "numeric address"]),
    "runs_dir is a file": ("runs_dir: taken\n", ["runs_dir", "'taken'", "is a file", "name a directory"]),
    "no trace": (
        "generator:\n  engine: scripted\n  script:\n    trace_path: gone.npz\n",
        ["generator.script.trace_path", "'gone.npz'"],
    ),
}


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed, on one line."""
    result = CliRunner().invoke(launcher.commands.cli.app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_input_ends_with_2_and_names_place_value_and_fix(case: str) -> None:
    text, expected = BAD_FILES[case]
    Path("bad.yaml").write_text(text)
    code, output = invoke("bad.yaml")
    assert code == 2, output
    assert "bad.yaml cannot be run" in output
    for part in expected:
        assert part in output, f"{part!r} is not in: {output}"
    assert not Path("runs").exists()


def test_all_mistakes_of_a_file_are_shown_at_once() -> None:
    text = "seed: -1\nseed: -2\nlearner:\n  step: 3\nsampling:\n  top_p: high\n"
    with pytest.raises(InputError) as caught:
        parse_config(text, Path("bad.yaml"))
    places = [problem.place for problem in caught.value.problems]
    assert places == ["seed", "seed", "learner.step", "sampling.top_p"]
    assert [problem.line for problem in caught.value.problems] == [2, 2, 4, 6]


def test_names_of_other_systems_lead_to_settings_that_exist_and_are_none_of_ours() -> None:
    places = [".".join(place) for place in all_places(RunConfig, ())]
    assert set(FIELD_NAMES) <= set(places)
    several = {theirs for theirs, ours in OURS.items() if " and " in ours}
    assert {OURS[theirs] for theirs in several} == {"shaping.keep and shaping.launch"}, "others lead to one setting"
    assert not {place.rpartition(".")[2] for place in places} & set(OURS)


def test_a_missing_file_suggests_one_that_is_there() -> None:
    Path("cluster.yaml").touch()
    code, output = invoke("clutser.yaml")
    assert code == 2
    assert "there is no such file" in output
    assert "did you mean cluster.yaml?" in output


def test_a_mistyped_verb_is_not_taken_for_a_file() -> None:
    Path("cluster.yaml").touch()
    code, output = invoke("statsu")
    assert code == 2
    assert "No such command 'statsu'" in output
    assert "cluster.yaml" not in output


@pytest.mark.parametrize("files", [["0.yml"], ["0.yml", "1.yml"]])
def test_files_of_little_resemblance_are_listed_and_none_is_suggested(files: list[str]) -> None:
    for file in files:
        Path(file).touch()
    output = invoke("cluster.yaml")[1]
    assert "did you mean" not in output
    assert f"the YAML files there are {', '.join(files)}" in output


def test_names_are_not_similar_for_their_endings() -> None:
    Path("a.yaml").touch()
    assert "did you mean" not in invoke("b.yaml")[1]


def test_a_reward_module_that_leaves_python_is_a_mistake_with_a_name() -> None:
    Path("leaves_python.py").write_text("import sys\nsys.exit(0)\n")
    Path("run.yaml").write_text("reward:\n  function: leaves_python:f\n")
    code, output = invoke("validate", "run.yaml")
    assert code == 2
    assert "reward.function is 'leaves_python:f', but importing 'leaves_python' raised SystemExit: 0" in output


def test_what_a_reward_module_prints_while_it_is_imported_does_not_reach_the_terminal() -> None:
    Path("talks.py").write_text("import sys\nprint('\x1b[2J')\nsys.stderr.write('\x1b]0;title\x07')\n")
    Path("run.yaml").write_text("reward:\n  function: talks:f\n")
    code, output = invoke("validate", "run.yaml")
    assert code == 2
    assert "has no 'f'" in output
    assert "\x1b" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os\nos._exit(0)", "ended the process (exit code 0)"),
        ("import os\nos.kill(os.getpid(), 9)", "ended the process (SIGKILL)"),
        ("raise KeyboardInterrupt", "ended the process (SIGINT)"),
        ("import time\ntime.sleep(600)", "took longer than reward.start_deadline_s (3 s)"),
    ],
    ids=["leaves", "killed", "interrupted", "hangs"],
)
def test_whatever_a_reward_module_does_to_its_process_the_launcher_says(body: str, said: str) -> None:
    Path("strange.py").write_text(body + "\n")
    deadline_s = 3 if "sleep" in body else 60
    Path("run.yaml").write_text(f"reward:\n  function: strange:f\n  start_deadline_s: {deadline_s}\n")
    code, output = invoke("validate", "run.yaml")
    assert code == 2
    assert "importing 'strange' " + said in output


@pytest.mark.slow
def test_what_a_reward_module_starts_while_it_is_looked_at_does_not_live_on() -> None:
    Path("starts.py").write_text(
        "import subprocess\nopen('pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "def f(**_): return 1.0\n"
    )
    Path("run.yaml").write_text("reward:\n  function: starts:f\n")
    assert invoke("validate", "run.yaml")[0] == 0
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(Path("pid").read_text())).wait(10)


def test_a_few_aliases_and_merges_are_followed() -> None:
    text = "x: &role {replicas: 2}\nroles:\n  generator: *role\n  reward: {<<: *role, threads: 2}\n"
    with pytest.raises(InputError) as caught:
        parse_config(text, Path("a.yaml"))
    assert [problem.place for problem in caught.value.problems] == ["x"], "which is no setting"
    config = parse_config(
        text.replace("x: &role", "roles:\n  generator: &role").replace("\nroles:\n  generator: *role", ""),
        Path("a.yaml"),
    )
    assert config.roles.reward.replicas == 2


def test_a_directory_is_not_a_file() -> None:
    code, output = invoke("validate", ".")
    assert code == 2
    assert "cannot be read" in output


def test_a_port_in_use_is_named_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = RunConfig.model_validate({"network": {"base_port": port - 1}})
        problems = [problem for problem in check_network(config) if str(port) in problem.message]
    assert [(problem.place, problem.message) for problem in problems] == [
        ("network.base_port", f"port {port} is in use")
    ]


def test_free_ports_are_a_block_below_the_range_of_outgoing_connections() -> None:
    ports = link_ports(RunConfig())
    assert list(ports) == list(range(ports[0], ports[0] + 6))
    assert ports[-1] < 32_768


@pytest.mark.slow
def test_preflight_finds_nothing_wrong_with_the_defaults() -> None:
    assert check_run(RunConfig()).problems == ()


@pytest.mark.parametrize(("text", "rate"), [("5e-4", 5e-4), ("1E+2", 100.0), ("0.25", 0.25), ("1e-5", 1e-5), ("3", 3)])
def test_numbers_may_be_written_with_an_exponent_and_no_point(text: str, rate: float) -> None:
    config = parse_config(f"learner:\n  learning_rate: {text}\n", Path("a.yaml"))
    assert config.learner.learning_rate == rate


@given(st.text(max_size=40))
def test_any_text_is_a_configuration_or_an_input_error(text: str) -> None:
    try:
        assert isinstance(parse_config(text, Path("a.yaml")), RunConfig)
    except InputError as error:
        assert error.problems  # noqa: PT017 - either way is right


def test_no_arguments_and_help_show_the_verbs() -> None:
    code, output = invoke("--help")
    assert code == 0
    assert "validate" in output
    assert "FILE.yaml [NAME=VALUE]" in " ".join(output.split())


def test_an_unknown_option_is_bad_input() -> None:
    code, output = invoke("--dry-rum", "a.yaml")
    assert code == 2
    assert "--dry-r" in output
