"""Publishes the learner's versions to the generators: parameters, probe, and the report."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict

import structlog
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.actor import Runtime
from darts_async.learner.model import DTYPES
from darts_async.learner.packing.forward import packed_logits, packed_row
from darts_async.learner.packing.tree import Tree
from darts_async.learner.rank_leader import Team
from darts_async.learner.step import Trainer
from darts_async.protocol import GatherWeights, LearnerToGenerator, StepCompleted
from darts_async.weights.probe import Examiner, Reference, reference_of, tolerance_of
from darts_async.weights.sending.events import MemberMessage
from darts_async.weights.sending.publish import Publisher, PublishReport
from darts_async.weights.sending.source import WeightSource

log = structlog.get_logger()


class Publishing:
    """Publishes the parameters of a trainer. All methods are called on one event loop.

    Args:
        team: the other ranks, which have rows of the parameters.
        send: queues a message for a generator.
    """

    def __init__(self, runtime: Runtime, team: Team, send: Callable[[str, LearnerToGenerator], None]) -> None:
        config, generators = runtime.config, runtime.config.roles.generator
        self._runtime = runtime
        self._team = team
        self._dtype = DTYPES[config.model.dtype]
        absence_s = generators.restart.absence_s(generators.start_timeout_s)
        self.publisher = Publisher(config.weights, runtime.host, send, absence_s=absence_s)
        self._examiner = Examiner(send, tolerance_of(config.weights, config.model.dtype))

    def handle(self, said: MemberMessage) -> None:
        self.publisher.handle(said.name, said.incarnation, said.message)
        self._examiner.handle(said.name, said.message)

    async def prepare(self, trainer: Trainer) -> None:
        """Compute the answers to the probe before the parameters are published. With several ranks there is no probe:
        it would be a pass of all ranks."""
        config = self._runtime.config
        if config.weights.probe and config.generator.capabilities.has_model and trainer.rank_info.num_ranks == 1:
            reference = await asyncio.to_thread(packed_reference, trainer.model, trainer.policy_version)
            self._examiner.expect(reference)

    async def publish(self, trainer: Trainer) -> None:
        """Broadcast the parameters; returns when all members use them. Raises as `Publisher.publish`."""
        version, script = trainer.policy_version, self._runtime.config.learner.script
        self._runtime.faults.reach("learner.before_publish")
        with self._runtime.clock.busy("publish", policy_version=version):
            if script is not None:
                await asyncio.sleep(script.broadcast_s)
            report = await self.publisher.publish(version, self._source(trainer))
        self._tell_of(report)

    async def serve_late_joiners(self, trainer: Trainer, lend: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        """See `Publisher.run`."""
        await self.publisher.run(lambda: self._source(trainer), lend)

    def _source(self, trainer: Trainer) -> WeightSource:
        if trainer.rank_info.num_ranks == 1:
            return trainer.source()
        order = GatherWeights(trainer.policy_version, of_checkpoint=False)
        return self._team.gathered(trainer.rows(), trainer.row_shapes(), self._dtype, order)

    def _tell_of(self, report: PublishReport) -> None:
        log.info("published", **asdict(report))
        self._runtime.trace.instant(
            "published",
            policy_version=report.policy_version,
            num_members=len(report.members),
            num_dropped=len(report.dropped),
            forming_s=report.forming_s,
            transfer_s=report.transfer_s,
            apply_s=report.apply_s,
        )
        if report.policy_version:
            metrics = {
                "weights/total_s": report.total_s,
                "weights/transfer_s": report.transfer_s,
                "weights/stall_s": max(report.stalls_s.values(), default=0.0),
                "weights/num_bytes": float(report.num_bytes),
            }
            self._runtime.tell_launcher(StepCompleted(report.policy_version - 1, metrics))


def packed_reference(model: PreTrainedModel, policy_version: int) -> Reference:
    """The answers to a probe of a model with packed attention, whose weights are those of `policy_version`."""

    def last_logits(prompts: Tensor) -> Tensor:
        num_prompts, length = prompts.shape
        trees = (Tree(length),) * num_prompts
        input_ids, positions, _, places = packed_row([prompts.reshape(-1).to(model.device)], trees)
        return packed_logits(model, input_ids, positions, trees, places[length - 1 :: length])

    return reference_of(last_logits, policy_version, vocab_size=model.config.vocab_size)
