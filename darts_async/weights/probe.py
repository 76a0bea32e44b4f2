"""Checks after every update that a generator decodes with the right weights.

A checksum covers the transfer to the generator, but not the engine's processing of the weights (fusing, packing,
sharding), which has been wrong in engines. So the learner sends prompts. The generator samples one token after each, as
for any other sample, and reports its log-probability. The learner compares it with its own under that version. Each
version has new random prompts, so that during a run every row of the embedding is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from darts_async.config import WeightsConfig
from darts_async.protocol import (
    GeneratorToLearner,
    LearnerToGenerator,
    ProbeMeasured,
    ProbeWeights,
    UpdateApplied,
    WeightsRefused,
)

NUM_PROMPTS: Final = 4
PROMPT_TOKENS: Final = 12
TOLERANCE_NATS: Final = {"float32": 1e-2, "float16": 0.15, "bfloat16": 0.35}
"""Tolerance of the root mean square over the prompts, by the coarser dtype of both. Engine and learner compute in a
different order and round differently. Wrong weights differ by more, unless the error is smaller than a training step.

SmolLM2-135M in bfloat16, 128 probes: rounding gave at most .15 against bfloat16 and .24 against float32. One token
alone was off by up to .26 and .48. So a bound for each token must be wider, and finds no more: with one layer of 30
wrong (heads shifted, the queries of its neighbour, no attention), .35 refused 75 to 89 % of probes and .5 for each
token as many; with a wrong norm or embedding both refused all."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reference:
    """The answers of the learner's own model, made by `reference_of`."""

    policy_version: int
    prompts: NDArray[np.int32]  # [NUM_PROMPTS, PROMPT_TOKENS]
    logprobs: NDArray[np.float32]  # [NUM_PROMPTS, vocab_size], of the token after each prompt

    def question(self) -> ProbeWeights:
        return ProbeWeights(self.policy_version, self.prompts.reshape(-1), self.prompts.shape[1])


@torch.no_grad()
def reference_of(
    last_logits: Callable[[torch.Tensor], torch.Tensor], policy_version: int, *, vocab_size: int
) -> Reference:
    """Ask a model whose weights are those of `policy_version`.

    Args:
        last_logits: maps prompts, int64 [NUM_PROMPTS, PROMPT_TOKENS], to the logits after each, [NUM_PROMPTS, vocab].
    """
    prompts = np.random.default_rng(policy_version).integers(vocab_size, size=(NUM_PROMPTS, PROMPT_TOKENS))
    logprobs = last_logits(torch.from_numpy(prompts)).float().log_softmax(-1).cpu().numpy()
    return Reference(policy_version, prompts.astype(np.int32), logprobs)


def mismatch(reference: Reference, measured: ProbeMeasured, tolerance_nats: float) -> str | None:
    """Why a generator's weights cannot be those of the version; None if they can. Answers for another version and
    missing answers are ignored."""
    if measured.policy_version != reference.policy_version or not len(measured.token_ids):
        return None
    num_prompts, vocab_size = reference.logprobs.shape
    if len(measured.token_ids) != num_prompts or len(measured.logprobs) != num_prompts:
        return f"it drew {len(measured.token_ids)} tokens after {num_prompts} prompts"
    if measured.token_ids.min() < 0 or measured.token_ids.max() >= vocab_size:
        return f"it drew tokens {measured.token_ids.tolist()} of a vocabulary of {vocab_size}"
    expected = reference.logprobs[np.arange(num_prompts), measured.token_ids]
    error = float(np.sqrt(np.square(expected - measured.logprobs).mean()))
    if error <= tolerance_nats:  # false if it is NaN
        return None
    return (
        f"log-probabilities under version {reference.policy_version} are {error:.3g} nats from the learner's in the "
        f"root mean square, tolerance {tolerance_nats:g} (weights.probe_tolerance_nats)"
    )


class Examiner:
    """Asks every generator that has applied the version of the reference, and refuses generators with wrong answers.
    `send` queues a message for a generator."""

    def __init__(self, send: Callable[[str, LearnerToGenerator], None], tolerance_nats: float) -> None:
        self._send = send
        self._tolerance_nats = tolerance_nats
        self._reference: Reference | None = None

    def expect(self, reference: Reference) -> None:
        self._reference = reference

    def handle(self, peer: str, message: GeneratorToLearner) -> None:
        """Handle a message of a generator; most are ignored."""
        reference = self._reference
        match message:
            case UpdateApplied(policy_version=version) if reference is not None and version == reference.policy_version:
                self._send(peer, reference.question())
            case ProbeMeasured() if reference is not None:
                if (reason := mismatch(reference, message, self._tolerance_nats)) is not None:
                    log.error("weights_refused", generator=peer, reason=reason)
                    self._send(peer, WeightsRefused(message.policy_version, reason))


def tolerance_of(config: WeightsConfig, dtype: str) -> float:
    """The tolerance of the settings, or the default for the dtype of the models."""
    return config.probe_tolerance_nats or TOLERANCE_NATS[dtype]
