"""Fresh samples of a model in a directory, none of which is stopped by a rule: what a probe looks at."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.quickstart.evaluate import Samples
from darts_async.config import SamplingConfig
from darts_async.generator.embedded.engine import EmbeddedEngine, load_embedded_engine
from darts_async.models.location import load_tokenizer
from darts_async.prompts.source import Prompt
from darts_async.protocol import Generate, SamplingParams
from darts_async.shaper.open_work import sample_seed

Judge = Callable[[str, str, bool], float]
"""The reward of a response, by its text, the answer, and whether the model ended it."""
_NUM_SLOTS = 256


async def sampled(
    model_path: Path, prompts: Sequence[Prompt], num_samples: int, config: SamplingConfig, judge: Judge, seed: int
) -> Samples:
    """A row of samples per prompt, by the embedded engine in this process."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    engine = load_embedded_engine(
        str(model_path), dtype="float32", num_slots=_NUM_SLOTS, max_context_tokens=longest + config.max_new_tokens
    )
    asked = SamplingParams(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    for sample_id, prompt in enumerate(repeated):
        nothing = np.empty(0, np.int32)
        engine.start(Generate(sample_id, prompt.token_ids, nothing, sample_seed(seed, sample_id), sampling=asked))
    tokens, finished = await _decode(engine, len(repeated))
    await engine.close()
    texts = load_tokenizer(model_path).decode_batch(tokens)
    answers = [prompt.answer for prompt in repeated]
    rewards = [judge(*judged) for judged in zip(texts, answers, finished, strict=True)]
    shape = (len(prompts), num_samples)
    return Samples(
        k=np.array([len(prompt.token_ids) for prompt in prompts]),
        lengths=np.array([len(response) for response in tokens]).reshape(shape),
        rewards=np.array(rewards).reshape(shape),
        finished=np.array(finished).reshape(shape),
    )


async def _decode(engine: EmbeddedEngine, num_samples: int) -> tuple[list[list[int]], list[bool]]:
    """The tokens of each sample, and whether the model ended it."""
    tokens: list[list[int]] = [[] for _ in range(num_samples)]
    finished = [False] * num_samples
    while engine.num_unfinished:
        events = await engine.step()
        for sample_id, token_id in zip(events.sample_ids.tolist(), events.token_ids.tolist(), strict=True):
            tokens[sample_id].append(token_id)
        for end in events.ended:
            finished[end.sample_id] = end.finish_reason == "stop"
    return tokens, finished
