"""Lengths and rewards of simulated samples."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import ConfigError
from darts_async.simulation.demand import LONG_THOUGHT, LognormalWorkload, TraceWorkload, Workload


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def drawn(workload: Workload, num_prompts: int = 600, num_samples: int = 16) -> tuple[np.ndarray, np.ndarray]:
    draws = np.array([[workload.draw(p, i, 0) for i in range(num_samples)] for p in range(num_prompts)])
    return draws[..., 0], draws[..., 1]


@given(prompt_id=st.integers(0, 10**6), index=st.integers(0, 100), visit=st.integers(0, 50), seed=st.integers(0, 2**32))
def test_a_draw_depends_on_prompt_sample_visit_and_seed_alone(
    prompt_id: int, index: int, visit: int, seed: int
) -> None:
    busy, fresh = LognormalWorkload(seed=seed), LognormalWorkload(seed=seed)
    busy.draw(prompt_id + 1, index, visit)
    busy.draw(prompt_id, 0, visit)
    length, reward = busy.draw(prompt_id, index, visit)
    assert (length, reward) == fresh.draw(prompt_id, index, visit)
    assert length >= 1
    assert reward in (0.0, 1.0)


def test_visits_and_samples_differ() -> None:
    workload = LognormalWorkload()
    assert len({workload.draw(3, index, visit)[0] for index in range(20) for visit in range(3)}) > 30


def test_the_default_model_has_the_published_shape() -> None:
    lengths, rewards = drawn(LognormalWorkload())
    p50, p99 = np.percentile(lengths, (50, 99))
    assert 720 < p50 < 880
    assert 2000 < p99 < 2900
    log = np.log(lengths)
    within = log.var(axis=1, ddof=1).mean()
    assert 0.70 < 1 - within / log.var() < 0.83  # share of variance between prompts: .76
    pass_rate = rewards.mean(axis=1)
    assert 0.16 < (pass_rate == 1).mean() < 0.28
    assert 0.16 < (pass_rate == 0).mean() < 0.28
    mixed = (pass_rate > 0) & (pass_rate < 1)
    covariance = ((log - log.mean(1, keepdims=True)) * rewards).mean(axis=1)
    assert 0.51 < (covariance[mixed] < 0).mean() < 0.67  # pattern I: .59
    assert lengths[rewards == 0].mean() > lengths[rewards == 1].mean()


def test_long_thought_has_a_tail_of_ten_medians_and_long_wrong_answers() -> None:
    lengths, rewards = drawn(LognormalWorkload(LONG_THOUGHT))
    p50, p99 = np.percentile(lengths, (50, 99))
    assert 7 < p99 / p50 < 13
    assert 1.8 < lengths[rewards == 0].mean() / lengths[rewards == 1].mean() < 3


def test_a_trace_is_read_row_by_row_and_columns_are_used_again(tmp_path: Path) -> None:
    lengths = np.arange(1, 33, dtype=np.int32).reshape(2, 16)
    trace = TraceWorkload(saved(tmp_path / "t.npz", lengths=lengths, rewards=(lengths % 2).astype(np.int8)))
    assert trace.num_prompts == 2
    assert [trace.draw(0, i, 0) for i in range(3)] == [(1, 1.0), (2, 0.0), (3, 1.0)]
    assert trace.draw(3, 0, 0) == (17, 1.0)
    assert trace.draw(0, 16, 0) == trace.draw(0, 0, 0)
    assert sorted(trace.draw(0, i, 5)[0] for i in range(16)) == lengths[0].tolist()
    assert trace.draw(0, 0, 1) != trace.draw(0, 0, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lengths": np.ones(16, np.int32), "rewards": np.ones(16)}, r"`lengths` is int32 \[16\], expected"),
        ({"lengths": np.ones((4, 16)), "rewards": np.ones((4, 16))}, r"float64 \[4, 16\], expected whole numbers"),
        ({"lengths": np.ones((4, 16), int), "rewards": np.ones((4, 8))}, r"float64 \[4, 8\], expected .* \[4, 16\]"),
        ({"lengths": np.ones((0, 16), int), "rewards": np.ones((0, 16))}, r"\[0, 16\]"),
        ({"lengths": np.zeros((4, 16), int), "rewards": np.ones((4, 16))}, "at least 1"),
        ({"lengths": np.ones((4, 16), int), "rewards": np.full((4, 16), np.nan)}, "finite"),
        ({"lengths": np.ones((4, 16), int)}, "rewards"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused_with_path_and_shapes(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = saved(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        TraceWorkload(path)
    assert str(path) in str(caught.value)


def test_a_missing_trace_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.npz"):
        TraceWorkload(tmp_path / "none.npz")
