"""The scripted engine: lengths, latency, traces."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from darts_async.config import ScriptConfig
from darts_async.errors import ConfigError
from darts_async.generator.scripted import LoopClock, ScriptedEngine
from darts_async.protocol import sample_id_of
from tests.generator.test_engine_contract import VirtualClock
from tests.generator.world import decode, generate, run


def engine(script: ScriptConfig, clock: VirtualClock | None = None, *, num_slots: int = 64) -> ScriptedEngine:
    return ScriptedEngine(script, num_slots=num_slots, max_context_tokens=4096, seed=1, clock=clock or VirtualClock())


def log_lengths(script: ScriptConfig, num_prompts: int = 200, samples_per_prompt: int = 16) -> np.ndarray:
    """[num_prompts, samples_per_prompt]"""
    scripted = engine(script)
    return np.log(
        [
            [scripted.scripted_length(generate(prompt=(p, 3), seed=p * 100 + s)) for s in range(samples_per_prompt)]
            for p in range(num_prompts)
        ]
    )


def test_lengths_have_the_median_and_the_spread_between_and_within_prompts_that_were_asked_for() -> None:
    logs = log_lengths(ScriptConfig(median_tokens=1000, prompt_sigma=0.5, sample_sigma=0.2))
    assert np.median(logs) == pytest.approx(np.log(1000), abs=0.1)
    assert logs.mean(axis=1).std() == pytest.approx(0.5, rel=0.15)
    assert logs.std(axis=1, ddof=1).mean() == pytest.approx(0.2, rel=0.1)


def test_without_spread_every_response_has_the_median_length() -> None:
    assert set(log_lengths(ScriptConfig(median_tokens=20, prompt_sigma=0, sample_sigma=0)).ravel()) == {np.log(20)}


async def test_responses_have_the_scripted_length_or_the_cap() -> None:
    scripted = engine(ScriptConfig(median_tokens=20, prompt_sigma=0.5, sample_sigma=0.5))
    requests = [generate(i, prompt=(i // 4, 1), max_new_tokens=30) for i in range(100)]
    lengths = [scripted.scripted_length(request) for request in requests]
    record = await decode(scripted, *requests)
    assert [record.ended[i].num_tokens for i in range(100)] == [min(length, 30) for length in lengths]
    assert [record.ended[i].finish_reason for i in range(100)] == ["stop" if n <= 30 else "length" for n in lengths]


async def test_a_sample_whose_tokens_are_all_there_ends_without_another() -> None:
    scripted = engine(ScriptConfig(median_tokens=20, prompt_sigma=0, sample_sigma=0))
    whole, last_missing = (generate(i, prefix=range(20 - i), max_new_tokens=30) for i in range(2))
    record = await decode(scripted, whole, last_missing)
    assert [(record.ended[i].num_tokens, record.ended[i].finish_reason) for i in range(2)] == [(20, "stop")] * 2
    assert scripted.num_tokens_decoded == 1


async def test_a_step_takes_the_modelled_time() -> None:
    clock = VirtualClock()
    script = ScriptConfig(
        median_tokens=10, prompt_sigma=0, sample_sigma=0, token_latency_s=0.01, batch_for_double_latency=4
    )
    await decode(engine(script, clock, num_slots=8), *(generate(i) for i in range(16)))
    assert clock.seconds == pytest.approx(2 * 10 * 0.01 * (1 + 8 / 4))


async def test_oversleeping_is_made_up_for_but_idle_time_is_not() -> None:
    class CoarseClock(VirtualClock):
        async def sleep(self, seconds: float) -> None:
            self.seconds += np.ceil(seconds * 1000) / 1000

    clock = CoarseClock()
    script = ScriptConfig(median_tokens=1000, prompt_sigma=0, sample_sigma=0, token_latency_s=0.0015)
    scripted = engine(script, clock)
    scripted.start(generate(0, max_new_tokens=1000))
    await run(scripted)
    assert clock.seconds == pytest.approx(1000 * 0.0015 * (1 + 1 / 64), rel=0.01)
    clock.seconds = 100.0
    scripted.start(generate(1, max_new_tokens=1))
    await run(scripted)
    assert clock.seconds >= 100.0015


async def test_an_update_stalls_the_engine() -> None:
    clock = VirtualClock()
    await engine(ScriptConfig(update_stall_s=0.25), clock).apply_weights({}, 1)
    assert clock.seconds == 0.25


async def test_real_time_is_the_loops() -> None:
    scripted = ScriptedEngine(
        ScriptConfig(median_tokens=2, token_latency_s=0.0), num_slots=2, max_context_tokens=64, clock=LoopClock()
    )
    assert (await decode(scripted, generate(0))).ended[0].num_tokens >= 1


async def test_a_trace_gives_the_samples_of_a_group_the_lengths_of_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    lengths = np.array([[3, 5, 9], [2, 4, 6]], np.int32)
    np.savez(path, lengths=lengths)
    scripted = engine(ScriptConfig(trace_path=str(path)))
    record = await decode(scripted, *(generate(sample_id_of(7, i), max_new_tokens=8) for i in range(4)))
    ended = [record.ended[sample_id_of(7, i)].num_tokens for i in range(4)]
    assert ended in ([5, 8, 3, 5], [4, 6, 2, 4]), "from the 49th column on, of which the cap cuts one"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"other": np.ones((2, 2), np.int64)}, "array `lengths`"),
        ({"lengths": np.ones(4, np.int64)}, r"int64 \[4\]"),
        ({"lengths": np.ones((2, 2))}, r"float64 \[2, 2\]"),
        ({"lengths": np.ones((0, 2), np.int64)}, r"\[0, 2\]"),
        ({"lengths": np.zeros((2, 2), np.int64)}, "length of 0"),
        ({"lengths": np.array([[None]])}, "array `lengths`"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(ConfigError, match=reason) as caught:
        engine(ScriptConfig(trace_path=str(path)))
    assert str(path) in str(caught.value)


def test_a_trace_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("lengths")
    for name in ("missing.npz", "text.npz"):
        with pytest.raises(ConfigError, match=name):
            engine(ScriptConfig(trace_path=str(tmp_path / name)))


@pytest.mark.slow
def test_the_scripted_engine_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, darts_async.generator.scripted; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
