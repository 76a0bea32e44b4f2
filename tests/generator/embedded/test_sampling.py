"""Draws follow the distribution that they report."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import EngineError
from darts_async.generator.counter_rng import hash_words, seed_word, uniforms
from darts_async.generator.embedded.sampling import draw


def draw_all(
    logits: torch.Tensor, u: float = 0.5, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[list[int], list[float]]:
    n = len(logits)
    tokens, logprobs = draw(
        logits,
        np.full(n, u),
        temperature=np.full(n, temperature, np.float32),
        top_p=np.full(n, top_p, np.float32),
        top_k=np.full(n, top_k, np.int64),
    )
    return tokens.tolist(), logprobs.tolist()


def test_the_token_is_the_inverse_of_the_distribution_at_the_uniform_number() -> None:
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    drawn = [draw_all(logits, u) for u in (0.1, 0.199, 0.201, 0.69, 0.71, 1 - 2.0**-48)]
    assert [tokens for tokens, _ in drawn] == [[0], [0], [2], [2], [3], [3]]
    assert [logprobs[0] for _, logprobs in drawn] == pytest.approx(np.log([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))


def assert_drawn(drawn: tuple[list[int], list[float]], token: int, logprob: float) -> None:
    assert drawn[0] == [token]
    assert drawn[1][0] == pytest.approx(logprob, abs=1e-6)


def test_truncation_renormalises_over_what_is_left() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert_drawn(draw_all(logits, 0.999, top_k=2), 2, np.log(3 / 7))
    assert_drawn(draw_all(logits, 0.999, top_p=0.39), 1, 0.0)
    assert_drawn(draw_all(logits, 0.999, top_p=0.5), 2, np.log(3 / 7))
    assert draw_all(logits, 0.01, top_p=0.95, top_k=3)[0] == [1]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [({"top_k": 3}, {0, 1, 2}), ({"top_p": 0.85}, {0, 1, 2, 3}), ({"top_p": 0.92}, {0, 1, 2, 3, 5})],
)
def test_of_tokens_that_tie_at_the_edge_as_many_are_drawn_as_it_takes(
    truncation: dict[str, Any], kept: set[int]
) -> None:
    """The first in the vocabulary, and their probabilities add up to 1."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 0.0, -1.0, 0.0]])  # probabilities .202, .074, .548, .074, .027, .074
    drawn = dict(
        (tokens[0], logprobs[0])
        for tokens, logprobs in (draw_all(logits, u, **truncation) for u in np.linspace(0.01, 0.99, 200))
    )
    assert set(drawn) == kept
    assert sum(map(np.exp, drawn.values())) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@given(
    st.lists(st.lists(st.floats(-8, 8), min_size=5, max_size=5), min_size=1, max_size=4),
    st.floats(0.001, 0.999),
    st.floats(0.1, 3.0),
)
def test_a_row_draws_the_same_whatever_truncation_its_neighbours_have(
    rows: list[list[float]], u: float, temperature: float
) -> None:
    alone_tokens, alone_logprobs = draw_all(torch.tensor(rows), u, temperature=temperature)
    n = len(rows)
    tokens, logprobs = draw(
        torch.tensor([*rows, rows[0]]),
        np.full(n + 1, u),
        temperature=np.full(n + 1, temperature, np.float32),
        top_p=np.array([1.0] * n + [0.5], np.float32),
        top_k=np.zeros(n + 1, np.int64),
    )
    assert tokens[:n].tolist() == alone_tokens
    assert logprobs[:n].tolist() == alone_logprobs
    assert logprobs[n] >= alone_logprobs[0] or tokens[n] != alone_tokens[0]


def test_a_large_vocabulary_is_drawn_in_parts_and_a_row_as_if_it_were_alone() -> None:
    """Neither the tokens nor the log-probabilities of a row depend on where a part ends."""
    num_rows, vocab_size = 7, 100_003
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    u = uniforms(np.full(num_rows, 5, np.uint64), np.arange(num_rows))
    temperature = np.linspace(0.5, 1.1, num_rows, dtype=np.float32)
    top_p = np.array([1, 1, 1, 0.9, 1, 1, 0.5], np.float32)
    top_k = np.array([0, 4, 0, 0, 0, 0, 0], np.int64)
    tokens, logprobs = draw(logits, u, temperature=temperature, top_p=top_p, top_k=top_k)
    for i in range(num_rows):
        one = slice(i, i + 1)
        alone = draw(logits[one], u[one], temperature=temperature[one], top_p=top_p[one], top_k=top_k[one])
        assert (tokens[i], logprobs[i]) == (alone[0][0], alone[1][0])
    cumulative = (logits.double() / torch.from_numpy(temperature)[:, None].double()).softmax(-1).cumsum(-1)
    whole = np.flatnonzero((top_p == 1) & (top_k == 0))
    for i in whole.tolist():
        below, above = cumulative[i, tokens[i] - 1].item(), cumulative[i, tokens[i]].item()
        assert below - 1e-6 < u[i] < above + 1e-6


def test_frequencies_follow_the_distribution() -> None:
    num_draws = 20_000
    logits = torch.tensor([0.05, 0.15, 0.3, 0.5]).log().expand(num_draws, 4)
    ones = np.ones(num_draws, np.float32)
    u = uniforms(np.full(num_draws, 7, np.uint64), np.arange(num_draws))
    tokens, _ = draw(logits, u, temperature=ones, top_p=ones, top_k=np.zeros(num_draws, np.int64))
    shares = np.bincount(tokens, minlength=4) / num_draws
    np.testing.assert_allclose(shares, [0.05, 0.15, 0.3, 0.5], atol=0.015)


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(EngineError, match="not finite"):
        draw_all(torch.tensor([[0.0, torch.nan]]))


def test_hashes_of_neighbouring_seeds_and_places_look_independent() -> None:
    seeds, places = np.meshgrid(np.arange(120, dtype=np.uint64), np.arange(120))
    u = uniforms(seeds, places)
    assert len(np.unique(hash_words(seeds, places))) == u.size
    assert abs(u.mean() - 0.5) < 0.01
    for shifted in (u[1:, :], u[:, 1:]):
        base = u[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(base.ravel(), shifted.ravel())[0, 1]) < 0.03


@given(st.integers(), st.integers(0, 1 << 40))
def test_uniform_numbers_stay_strictly_inside_the_unit_interval(seed: int, place: int) -> None:
    u = uniforms(np.array([seed_word(seed)], np.uint64), np.array([place]))
    assert 0 < u[0] < 1
