"""Translates a sample into a request of vLLM.

vLLM draws the tokens of a seeded request from the beginning of a stream of its own. So a sample that is continued after
a prefix gets another stream. With the old one its first token would be drawn by the number that drew the first token of
the prefix.
"""

from typing import Any

import numpy as np

from darts_async.generator.counter_rng import hash_words, seed_word
from darts_async.protocol import Generate


def to_core_request(llm: Any, request: Generate, eos_token_ids: tuple[int, ...], cache_salt: str) -> Any:
    """The `EngineCoreRequest` of a sample. Only requests of the same salt share blocks of a prompt. Raises `ValueError`
    if the sample exceeds a limit of vLLM, such as a temperature of 2."""
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    context = np.concatenate((request.prompt_tokens, request.prefix_tokens)).tolist()
    sampling, num_prefix = request.sampling, len(request.prefix_tokens)
    try:
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens - num_prefix,
            seed=stream_seed(request.seed, num_prefix),
            logprobs=0,  # of the token that was drawn, and of no other
            ignore_eos=True,  # `stop_token_ids` has the tokens that end a response, as for every engine
            stop_token_ids=list(eos_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return llm.input_processor.process_inputs(
            str(request.sample_id),
            tokens_input(context, cache_salt=cache_salt),
            params,
            supported_tasks=("generate",),
            priority=request.priority,
        )
    except VLLMValidationError as error:
        raise ValueError(f"vLLM refuses it: {error}") from error


def stream_seed(seed: int, num_prefix: int) -> int:
    """The seed of tokens after a prefix: 63 bits, as torch and the wire need."""
    word = hash_words(np.array([seed_word(seed)], np.uint64), np.array([num_prefix]))
    return int(word[0] >> np.uint64(1))
