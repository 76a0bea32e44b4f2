"""How much memory a plan needs, computed by hand from the settings and the headers of the model."""

from typing import Any

from darts_async.config import RunConfig
from darts_async.quickstart import MODEL_PATH
from launcher.plan.placement import place_processes
from launcher.preflight.memory_need import (
    ModelSize,
    ProcessMemory,
    check_memory,
    device_needs,
    gib,
    host_need,
    memory_of,
    model_size,
)

SIZE = ModelSize(num_parameters=1000, matrix_sides=60, kv_values_per_token=8)


def needs(**sections: dict[str, Any]) -> dict[str, ProcessMemory]:
    config = RunConfig.model_validate(sections)
    return {each.name: each for each in memory_of(config, place_processes(config), SIZE)}


def test_the_size_of_the_shipped_model_is_that_of_its_headers() -> None:
    size = model_size(MODEL_PATH)
    assert size is not None
    assert 200_000 < size.num_parameters < 400_000
    assert size.kv_values_per_token == 2 * 3 * 1 * 32


def test_a_directory_without_weights_has_no_size(tmp_path: Any) -> None:
    assert model_size(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert model_size(tmp_path) is None


def test_float32_weights_are_their_own_master_copy() -> None:
    found = needs(generator={"num_slots": 2, "max_context_tokens": 768})
    assert found["learner/0"].parts == {"model weights": 4000, "gradients": 4000, "optimiser": 8000}
    assert found["generator/0"].parts == {"model weights": 4000, "arriving weights": 4000, "KV cache": 2 * 768 * 8 * 4}
    assert "shaper/0" not in found


def test_weights_of_fewer_bits_have_a_copy_and_a_reference_is_one_more() -> None:
    found = needs(model={"dtype": "bfloat16"}, learner={"loss": {"kl_weight": 0.1}})["learner/0"].parts
    wanted = {"model weights": 2000, "float32 copy": 4000, "gradients": 4000, "optimiser": 8000, "reference": 2000}
    assert found == wanted


def test_adapters_leave_the_weights_without_gradients() -> None:
    found = needs(learner={"lora": {"rank": 2}, "loss": {"kl_weight": 0.1}})["learner/0"].parts
    assert found == {"model weights": 4000, "gradients": 480, "optimiser": 960}


def test_ranks_share_what_the_learner_needs() -> None:
    found = needs(model={"dtype": "bfloat16"}, roles={"learner": {"replicas": 2}})
    assert found["learner/0"].parts == found["learner/1"].parts
    assert found["learner/0"].parts == {"model weights": 2000, "gradients": 2000, "optimiser": 4000}


def test_a_machine_with_less_is_a_hint() -> None:
    every = [*needs(generator={"num_slots": 2, "max_context_tokens": 768}).values()]
    need = host_need(every, "local")
    assert need == 16_000 + 8_000 + 49_152
    assert [*check_memory(every, "local", need, {})] == []
    (hint,) = check_memory(every, "local", need - 1, {})
    assert hint.is_hint
    assert "the plan needs 0.1 MiB and more of memory on local" in hint.message


def test_devices_are_compared_one_by_one() -> None:
    roles = {"learner": {"devices": 1}, "generator": {"devices": 1}}
    every = [*needs(nodes=[{"name": "a", "devices": 2}], roles=roles, generator={"engine": "vllm"}).values()]  # type: ignore[arg-type]
    assert host_need(every, "a") == 0
    on = device_needs(every, "a")
    assert on[0] == 16_000 or on[1] == 16_000
    assert [*check_memory(every, "a", 0, on)] == []
    assert len([*check_memory(every, "a", 0, {number: 0 for number in on})]) == 2
    assert [*check_memory(every, "a", 0, {})] == [], "what nvidia-smi does not show is not compared"


def test_sizes_have_a_unit() -> None:
    assert (gib(3 << 29), gib(1 << 19)) == ("1.5 GiB", "0.5 MiB")
