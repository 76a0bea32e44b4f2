"""The shipped files: each is valid, shows its plan, and needs nothing but what it says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.config import RunConfig
from darts_async.generator.vllm.installed import InstalledVllm
from darts_async.prompts.load import load_prompts
from darts_async.topology.roles import LEARNER
from launcher.config_file import load_config
from launcher.plan.placement import place_processes, role_names
from tests import ROOT
from tests.prompts.test_chat import CHATML
from tests.support.byte_tokenizer import write_tokenizer

CONFIGS = {path.name: path for path in sorted((ROOT / "launcher" / "configs").glob("*.yaml"))}
ON_CPUS = {"quickstart.yaml", "quickstart_vllm.yaml", "scripted.yaml", "smollm2.yaml", "smollm2_vllm.yaml"}
WITH_GPUS = sorted(set(CONFIGS) - ON_CPUS)

GSM8K_ROW = {"question": "Natalia sold 48 clips, then half as many. How many?", "answer": "48 / 2 = 24\n#### 72"}
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve: what is 3 + 4? Answer: $Answer"}],
    "reward_model": {"ground_truth": "7", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "a"},
}


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, and what was printed to either stream, each on one line."""
    result = CliRunner().invoke(launcher.commands.cli.app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _away_from_hub_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def lay_out(config: RunConfig) -> None:
    """The model and the data of a file, as small as can be, where the file looks for them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model_dir = write_tokenizer(Path(config.model.path), chat_template=CHATML)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    described = Qwen3Config(vocab_size=512, max_position_embeddings=40_960, **sizes, **heads)
    Qwen3ForCausalLM(described).save_pretrained(model_dir)
    for path in (config.prompts.path, config.prompts.held_out_path):
        assert path is not None
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_rows(Path(path), config.prompts.held_out + 1)


def write_rows(path: Path, num_rows: int) -> None:
    """Rows that differ from file to file."""
    if path.suffix == ".jsonl":
        rows = [{**GSM8K_ROW, "question": f"{path.stem} {n}: {GSM8K_ROW['question']}"} for n in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [[{"role": "user", "content": f"{path.parent.name} {n}"}] for n in range(num_rows)]
    parquet.write_table(pyarrow.Table.from_pylist([{**DAPO_ROW, "prompt": turn} for turn in turns]), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_file_shows_its_plan(name: str) -> None:
    path = str(CONFIGS[name])
    for arguments in (("--dry-run", path), (path, "--dry-run"), ("run", "--dry-run", path)):
        code, output, errors = invoke(*arguments)
        assert code == 0, errors
        assert "darts_async.generator.process" in output
        assert "shaper/0" in output
        assert "tcp://" in output
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.yaml", "scripted.yaml"])
def test_a_file_for_any_machine_can_be_run(name: str) -> None:
    code, output, errors = invoke("validate", str(CONFIGS[name]))
    assert (code, errors) == (0, "")
    assert output == f"✓ {CONFIGS[name]} can be run: {load_prompts(load_config(CONFIGS[name])).counts}"


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_GPUS)
def test_what_the_machine_lacks_is_a_warning_until_the_run_is_to_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.plan.devices.gpus_found", lambda: frozenset[int]())
    path = CONFIGS[name]
    config = load_config(path)
    lacking = ["model.path", "this machine has no GPU 0", "prompts.path", "prompts.held_out_path"]
    for arguments in (("--dry-run", str(path)), ("validate", str(path))):
        code, output, errors = invoke(*arguments)
        assert code == 0, errors
        assert f"{path} is valid, but cannot be run on this machine" in errors
        assert all(words in errors for words in lacking), errors
        assert "can be run" not in output
    code, _, errors = invoke(str(path))
    assert code == 2
    assert all(words in errors for words in ["cannot be run", str(config.prompts.path), *lacking]), errors
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_GPUS)
def test_model_and_data_of_the_named_formats_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIGS[name])
    monkeypatch.setattr("launcher.plan.devices.gpus_found", lambda: frozenset(config.nodes[0].devices))
    vllm = InstalledVllm("vllm", "0.32.0")
    monkeypatch.setattr("darts_async.generator.vllm.installed.find_vllm", lambda: vllm)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lay_out(config)
    code, output, errors = invoke("validate", str(CONFIGS[name]))
    assert code == 0, errors
    if len(config.nodes) == 1:
        assert (output, errors) == (f"✓ {CONFIGS[name]} can be run: {load_prompts(config).counts}", "")
    else:
        assert "is not an address of this machine" in errors
        assert "prompts" not in errors
        assert "model.path" not in errors


@pytest.mark.parametrize("name", WITH_GPUS)
def test_every_gpu_of_a_shipped_file_has_work(name: str) -> None:
    config = load_config(CONFIGS[name])
    places = place_processes(config)
    used = {(place.node, device) for place in places.values() for device in place.devices}
    assert used == {(node.name, device) for node in config.nodes for device in node.devices}
    learners = [places[process] for process in role_names(config, LEARNER)]
    assert len({place.node for place in learners}) == 1


def test_one_gpu_is_shared_and_weights_go_by_gloo() -> None:
    config = load_config(CONFIGS["one_gpu.yaml"])
    places = place_processes(config)
    assert places["learner/0"].devices == places["generator/0"].devices == (0,)
    assert config.weights.backend == "gloo"


def test_the_quickstart_has_the_settings_it_is_described_with() -> None:
    config = load_config(CONFIGS["quickstart.yaml"])
    assert config.learner.learning_rate == 5e-4
    assert config.roles.generator.replicas == 2


def test_the_quickstart_on_vllm_is_the_quickstart() -> None:
    """Only the engine differs, and that one generator with its processes fills two cores."""
    plain, vllm = (load_config(CONFIGS[name]) for name in ("quickstart.yaml", "quickstart_vllm.yaml"))
    differing = {key for key in RunConfig.model_fields if getattr(plain, key) != getattr(vllm, key)}
    assert differing == {"name", "roles", "generator"}


@pytest.mark.slow
def test_smollm2_needs_nothing_but_its_model(tmp_path: Path) -> None:
    """A directory in place of the hub id, as `model.path` of the command line sets it."""
    pytest.importorskip("reasoning_gym")
    config = load_config(CONFIGS["smollm2.yaml"])
    assert config.reward.function == "reasoning_gym"
    local = config.model.model_copy(update={"path": str(write_tokenizer(tmp_path / "model", chat_template=CHATML))})
    roomy = config.prompts.model_copy(update={"max_prompt_tokens": 512})  # a byte is a token here
    sets = load_prompts(config.model_copy(update={"model": local, "prompts": roomy}))
    assert len(sets.held_out) == config.prompts.held_out
    assert len(sets.train) > 300
    code, _, errors = invoke("validate", str(CONFIGS["smollm2.yaml"]))
    assert code == 0
    assert "could not be loaded from the hub" in errors


def test_smollm2_on_vllm_has_the_same_tasks() -> None:
    plain, vllm = (load_config(CONFIGS[name]) for name in ("smollm2.yaml", "smollm2_vllm.yaml"))
    differing = {key for key in RunConfig.model_fields if getattr(plain, key) != getattr(vllm, key)}
    assert differing == {"name", "roles", "model", "shaping", "generator", "learner"}
