"""The length and the reward of each simulated sample of each visit to each prompt.

A draw depends on the seed, the prompt, the visit and the sample's index alone. So arms that launch 8 and 16 samples
share the first 8 (common random numbers: a difference between arms is not a difference of luck), and a run repeats.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from darts_async.errors import ConfigError

Draw = tuple[int, float]
"""Length in tokens, at least 1, and reward."""

_SHEET_PROMPTS: Final = 64
_SHEET_SAMPLES: Final = 16
_CACHED_SHEETS: Final = 256
_NORMAL: Final = NormalDist()


class Workload(Protocol):
    """Lengths and rewards under a policy that does not change."""

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """Sample `sample_index` of the `visit`-th visit (from 0) to a prompt."""


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Parameters of the hierarchical lognormal distribution; the defaults fit a 7B model on competition mathematics.

    With pass rate p_i ~ Beta(a, b), the log length of sample j of prompt i is mu_i + s_i z_ij with
    mu_i ~ N(mean_log - wrong_is_longer (p_i - E p), prompt_sigma^2) and ln s_i normal. The sample is right with
    probability p_i and linked to its length by a Gaussian copula of correlation rho_i ~ N(mean, sd^2): negative where
    wrong answers ramble, positive where right ones need their length. Defaults: lengths p50/p99 of about 800/2350,
    correlation -.35 between pass rate and mean log length, negative within-prompt correlation in .61 of the prompts.
    """

    mean_log: float = 6.667
    prompt_sigma: float = 0.397
    wrong_is_longer: float = 0.37
    mean_log_sigma: float = -1.598
    sd_log_sigma: float = 0.392
    pass_rate_a: float = 0.308
    pass_rate_b: float = 0.303
    reward_correlation_mean: float = -0.075
    reward_correlation_sd: float = 0.27
    contaminated_share: float = 0.005
    contamination_scale: float = 2.0
    """Samples whose z is scaled: the stragglers that a lognormal tail lacks."""


MATH_7B = LengthModel()
LONG_THOUGHT = LengthModel(
    mean_log=7.97,
    prompt_sigma=0.69,
    wrong_is_longer=1.1,
    mean_log_sigma=-0.8,
    sd_log_sigma=0.35,
    reward_correlation_mean=-0.3,
)
"""Long chains of thought: p99 about ten times the median, wrong answers more than twice as long as right ones."""


class LognormalWorkload:
    """Samples of a `LengthModel`, drawn for a sheet of neighbouring prompts at once."""

    def __init__(self, model: LengthModel = MATH_7B, *, seed: int = 0) -> None:
        self._model = model
        self._seed = seed
        self._prompts: Callable[[int], _Prompts] = lru_cache(maxsize=None)(self._draw_prompts)
        self._sheet: Callable[[int, int, int], list[list[Draw]]] = lru_cache(_CACHED_SHEETS)(self._draw_sheet)

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """See `Workload`."""
        sheet, row = divmod(prompt_id, _SHEET_PROMPTS)
        block, place = divmod(sample_index, _SHEET_SAMPLES)
        return self._sheet(sheet, visit, block)[row][place]

    def _draw_sheet(self, sheet: int, visit: int, block: int) -> list[list[Draw]]:
        """[_SHEET_PROMPTS][_SHEET_SAMPLES]"""
        prompts = self._prompts(sheet)
        rng = np.random.default_rng((self._seed, sheet, visit, block))
        z, noise = rng.standard_normal((2, _SHEET_PROMPTS, _SHEET_SAMPLES))
        contaminated = rng.random(z.shape) < self._model.contaminated_share
        scale = np.where(contaminated, self._model.contamination_scale, 1.0)
        lengths = np.maximum(np.exp(prompts.mu + prompts.sigma * z * scale), 1).astype(int)
        right = np.sqrt(1 - prompts.rho**2) * noise - prompts.rho * z < prompts.threshold
        return [
            list(zip(*row, strict=True)) for row in zip(lengths.tolist(), right.astype(float).tolist(), strict=True)
        ]

    def _draw_prompts(self, sheet: int) -> "_Prompts":
        model, shape = self._model, (_SHEET_PROMPTS, 1)
        rng = np.random.default_rng((self._seed, sheet))
        pass_rate = rng.beta(model.pass_rate_a, model.pass_rate_b, shape)
        expected = model.pass_rate_a / (model.pass_rate_a + model.pass_rate_b)
        mu = rng.normal(model.mean_log - model.wrong_is_longer * (pass_rate - expected), model.prompt_sigma)
        sigma = np.exp(rng.normal(model.mean_log_sigma, model.sd_log_sigma, shape))
        rho = np.clip(rng.normal(model.reward_correlation_mean, model.reward_correlation_sd, shape), -0.95, 0.95)
        thresholds = [_NORMAL.inv_cdf(rate) for rate in np.clip(pass_rate, 1e-9, 1 - 1e-9).ravel().tolist()]
        return _Prompts(mu, sigma, rho, np.array(thresholds).reshape(shape))


@dataclass(frozen=True, slots=True, eq=False)
class _Prompts:
    """Parameters of a sheet, all [_SHEET_PROMPTS, 1]."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    rho: NDArray[np.float64]
    threshold: NDArray[np.float64]
    """A sample is right if its normal score is below."""


@dataclass(frozen=True, slots=True)
class FixedWorkload:
    """Every sample has the same length; every `wrong_every`-th one is wrong (0: none)."""

    num_tokens: int
    wrong_every: int = 2

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """See `Workload`."""
        wrong = self.wrong_every > 0 and sample_index % self.wrong_every == self.wrong_every - 1
        return self.num_tokens, 0.0 if wrong else 1.0


class TraceWorkload:
    """Recorded samples: an .npz file with `lengths` and `rewards`, both [num_prompts, samples_per_prompt].

    Prompts beyond the recorded ones start again at the first. Sample j of visit v is column (j + 7 v) mod
    samples_per_prompt: a first visit reads the columns in order, a later one starts elsewhere, and a group of more
    samples than there are columns holds exact copies of its first ones. Copies narrow a group's spread, so read
    results with more launched samples than columns with care.
    """

    def __init__(self, path: str | Path, *, first: int = 0) -> None:
        """Prompt 0 is the recorded prompt `first`.

        Raises:
            ConfigError: the file cannot be read or its arrays are not as described.
        """
        self._first = first
        lengths, rewards = _read_trace(Path(path))
        self._rows: list[list[Draw]] = [
            list(zip(*row, strict=True)) for row in zip(lengths.tolist(), rewards.tolist(), strict=True)
        ]

    @property
    def num_prompts(self) -> int:
        """Recorded prompts."""
        return len(self._rows)

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """See `Workload`."""
        row = self._rows[(self._first + prompt_id) % len(self._rows)]
        return row[(sample_index + 7 * visit) % len(row)]


def _read_trace(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            lengths, rewards = archive["lengths"], archive["rewards"]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ConfigError(f"trace {str(path)!r} is not an .npz file with `lengths` and `rewards`: {error}") from error
    if lengths.ndim != 2 or lengths.size == 0 or not np.issubdtype(lengths.dtype, np.integer):
        raise ConfigError(
            f"trace {str(path)!r}: `lengths` is {lengths.dtype} {list(lengths.shape)}, "
            "expected whole numbers [num_prompts, samples_per_prompt]"
        )
    if rewards.shape != lengths.shape or rewards.dtype.kind not in "biuf":
        raise ConfigError(
            f"trace {str(path)!r}: `rewards` is {rewards.dtype} {list(rewards.shape)}, "
            f"expected numbers {list(lengths.shape)}, the shape of `lengths`"
        )
    if lengths.min() < 1 or not np.isfinite(rewards.astype(np.float64)).all():
        raise ConfigError(f"trace {str(path)!r}: lengths must be at least 1 and rewards finite")
    return lengths.astype(np.int64), rewards.astype(np.float64)
