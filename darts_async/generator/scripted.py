"""The scripted engine: responses of a known length at a modelled speed, without a model.

It models absent hardware: a decode step of b samples takes `token_latency_s * (1 + b / batch_for_double_latency)`.
Lengths come from a hierarchical lognormal distribution,
`log length = log median + prompt_sigma * z(prompt) + sample_sigma * z(sample)` with z standard normal, or from a
recorded trace. Everything a sample does follows from its prompt, its id and its seed, so runs repeat and responses can
be continued elsewhere.
"""

import asyncio
import zipfile
import zlib
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from darts_async.config import RunConfig, ScriptConfig
from darts_async.config.engines import SCRIPTED
from darts_async.config.paths import expanded
from darts_async.errors import ConfigError
from darts_async.generator.counter_rng import hash_words, seed_word, uniforms
from darts_async.generator.engine import StepEvents
from darts_async.generator.slot_engine import SlotEngine, SlotTable
from darts_async.protocol import SAMPLES_PER_GROUP_LIMIT, Generate

_NORMAL: Final = NormalDist()
_LENGTH_STREAM: Final = np.array([-1])  # counters of draws that belong to no token
_LOGPROB_STREAM: Final = 1 << 32
_COLUMNS_BETWEEN_GROUPS: Final = 7
"""Each group reads a trace from another column on, so that a prompt has other lengths at each visit."""


class Clock(Protocol):
    """Where the engine's time comes from: real, or virtual in a simulation."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    async def sleep(self, seconds: float) -> None:
        """Wait, without blocking others."""


class LoopClock:
    """The time of the running event loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ScriptedEngine(SlotEngine):
    """Scripted lengths, arbitrary tokens, modelled time. Raises `ConfigError` if the trace cannot be used."""

    capabilities = SCRIPTED

    def __init__(
        self,
        script: ScriptConfig,
        *,
        num_slots: int,
        max_context_tokens: int,
        seed: int = 0,
        vocab_size: int = 32,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(SlotTable(num_slots, max_context_tokens))
        self._script = script
        self._trace = None if script.trace_path is None else load_lengths(script.trace_path)
        self._seed = seed
        self._vocab_size = vocab_size
        self._clock = clock or LoopClock()
        self._lengths: dict[int, int] = {}  # sample id -> length of its response without a cap
        self._due_s: float | None = None  # when the step before should have ended; None: there was none
        self._sleeps = False

    def start(self, request: Generate) -> None:
        length = self.scripted_length(request)
        if len(request.prefix_tokens) >= length:  # its generator died before it could report the end
            self._assert_between_steps()
            self._table.end(request, "stop")
            return
        super().start(request)
        self._lengths[request.sample_id] = length

    async def step(self) -> StepEvents:
        self._assert_between_steps()
        self._table.begin_step()
        rows = self._table.active
        if len(rows):
            await self._spend(self._script.token_latency_s * (1 + len(rows) / self._script.batch_for_double_latency))
        lengths = np.array([self._lengths[sample_id] for sample_id in rows["sample_id"].tolist()], np.int64)
        events = self._table.finish_step(*self._tokens(rows), rows["num_tokens"] + 1 >= lengths)
        for sample_id in [end.sample_id for end in events.ended] + [sample_id for sample_id, _ in events.rejected]:
            self._lengths.pop(sample_id, None)
        if self._table.num_unfinished == 0:
            self._due_s = None
        return events

    async def apply_weights(self, tensors: dict[str, object], policy_version: int) -> None:
        """Stall as long as an update would; the tensors are ignored."""
        self._assert_between_steps()
        await self._sleep(self._script.update_stall_s)
        self._due_s = None

    async def close(self) -> None:
        self._is_closed = True

    def scripted_length(self, request: Generate) -> int:
        """Tokens of a complete response, before `max_new_tokens` cuts it."""
        prompt = zlib.crc32(np.ascontiguousarray(request.prompt_tokens, np.int32).tobytes(), self._seed % (1 << 32))
        if self._trace is not None:
            num_prompts, samples_per_prompt = self._trace.shape
            group_id, index = divmod(request.sample_id, SAMPLES_PER_GROUP_LIMIT)
            column = (index + _COLUMNS_BETWEEN_GROUPS * group_id) % samples_per_prompt
            return int(self._trace[prompt % num_prompts, column])
        script = self._script
        spread = script.prompt_sigma * _normal(prompt) + script.sample_sigma * _normal(request.seed)
        return max(1, round(script.median_tokens * float(np.exp(spread))))

    @property
    def _is_stepping(self) -> bool:
        return self._sleeps

    def _tokens(self, rows: NDArray[np.void]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        words = hash_words(rows["seed"], rows["num_tokens"])
        logprobs = np.log(uniforms(rows["seed"], rows["num_tokens"] + _LOGPROB_STREAM))
        return (words % np.uint64(self._vocab_size)).astype(np.int32), logprobs.astype(np.float32)

    async def _spend(self, seconds: float) -> None:
        """Sleep until a step of this length would be over. Timers are coarser than a step (a millisecond on uvloop), so
        each step sleeps less by what the one before overslept, and the rate is right on average."""
        now = self._clock.now()
        start = now if self._due_s is None else min(now, max(self._due_s, now - seconds))
        self._due_s = start + seconds
        await self._sleep(max(0.0, self._due_s - now))

    async def _sleep(self, seconds: float) -> None:
        self._sleeps = True
        try:
            await self._clock.sleep(seconds)
        finally:
            self._sleeps = False


def make_engine(config: RunConfig) -> ScriptedEngine:
    """The engine `scripted`. Raises `ConfigError` if its trace cannot be used."""
    settings = config.generator
    assert settings.script is not None, "the configuration requires it"
    return ScriptedEngine(
        settings.script, num_slots=settings.num_slots, max_context_tokens=settings.max_context_tokens, seed=config.seed
    )


def load_lengths(path: str) -> NDArray[np.int64]:
    """The lengths of a trace, `[num_prompts, samples_per_prompt]`. Raises `ConfigError` if it has none."""
    where = f"generator.script.trace_path {path!r}"
    try:
        with np.load(expanded(path, "generator.script.trace_path"), allow_pickle=False) as archive:
            lengths: NDArray[np.generic] = archive["lengths"]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{where} is not an .npz file with an array `lengths`: {error}") from error
    if lengths.ndim != 2 or lengths.size == 0 or not np.issubdtype(lengths.dtype, np.integer):
        raise ConfigError(
            f"{where}: `lengths` is {lengths.dtype} {list(lengths.shape)}, "
            "but must be whole numbers [num_prompts, samples_per_prompt]"
        )
    if lengths.min() < 1:
        raise ConfigError(f"{where}: `lengths` has a length of {lengths.min()}; a response has at least one token")
    return lengths.astype(np.int64)


def _normal(seed: int) -> float:
    """A standard normal number that depends on the seed alone."""
    return _NORMAL.inv_cdf(float(uniforms(np.array([seed_word(seed)], np.uint64), _LENGTH_STREAM)[0]))
