"""A process with the keys of its run that says something which cannot be meant, once, in its first life; in the next it
is what it should be.

python -m tests.fakes.rogue --run-dir DIR --name generator/1 --incarnation 1      (LIE=future_weights)

With LIES_AT_ONCE set it does so in whichever life it is started. A shaper has a list of lies, one for each of its first
lives.
"""

import os
from collections.abc import Callable

import msgspec
import numpy as np

from darts_async.actor import Actor, Runtime, main
from darts_async.generator.engine import Outbox
from darts_async.generator.process import GeneratorActor
from darts_async.prompts.load import load_prompts
from darts_async.protocol import (
    Generate,
    GeneratorToLearner,
    MemberJoined,
    RunFinished,
    SampleScored,
    SamplingParams,
    Score,
    StepCompleted,
    TokensDecoded,
    TrainGroup,
    WeightsApplied,
)
from darts_async.reward.process import RewardActor
from darts_async.shaper.process import ShaperActor, boundary_of, stop_tokens_of

FAR = 1 << 40


class Generator(GeneratorActor):
    """Lies when it has decoded something, or joins."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.lie = os.environ["LIE"] if _lies(runtime) else ""

    def _tell(self, out: Outbox) -> None:
        super()._tell(out)
        if not any(isinstance(message, TokensDecoded) for message in out):
            return
        lie, self.lie = self.lie, ""
        match lie:
            case "future_weights":
                super()._tell([WeightsApplied(FAR, 0.0)])
            case "surplus_frame":
                header = msgspec.msgpack.encode(WeightsApplied(0, 0.0))
                self._runtime.links["generators"]._find("shaper/0").session.push((header, b"surplus"))
            case "end_of_run":
                self._runtime.tell_launcher(RunFinished("finished", {}, {}, {}, 0))
            case _:
                self.lie = lie

    def _send_learner(self, message: GeneratorToLearner) -> None:
        super()._send_learner(message)
        if self.lie == "future_member":
            self.lie = ""
            super()._send_learner(MemberJoined(FAR))


class Reward(RewardActor):
    """Lies when it is greeted."""

    def _announce(self) -> None:
        super()._announce()
        if self._open and self._shaper is not None and _lies(self._runtime):
            self._runtime.send("rewards", self._shaper, SampleScored(0, float("nan")))


class Shaper(ShaperActor):
    """Lies once when its run has come a little further: at that step, or later where several come at once."""

    _has_lied = False

    def _carry_out(self) -> None:
        super()._carry_out()
        lies, life = os.environ["LIE"].split(","), self._runtime.incarnation
        if life <= len(lies) and self._state.num_steps >= 4 * life and not self._has_lied:
            self._has_lied = True
            self._lie(lies[life - 1])

    def _lie(self, lie: str) -> None:
        none, one = np.empty(0, np.int32), np.ones(1, np.int32)
        match lie:
            case "no_sample":
                self._tell_all("generators", Generate(-1, one, none, 0, SamplingParams(1.0, 1.0, 0, 1)))
            case "no_tokens":
                self._tell_all("rewards", Score(0, "", "", "{}", -one, "stop"))
            case "future_step":
                number = np.ones(1, np.float32)
                self._tell_all("learner", TrainGroup(0, FAR, one, one, one, -number, one, number, number))
            case "future_metrics":
                self._runtime.tell_launcher(StepCompleted(FAR, {}))

    def _tell_all(self, link: str, message: Generate | Score | TrainGroup) -> None:
        for peer in self._runtime.links[link].peers:
            self._runtime.send(link, peer, message)


def _shaper(runtime: Runtime) -> Shaper:
    config = runtime.config
    boundary = boundary_of(config, runtime.run_dir)
    return Shaper(runtime, load_prompts(config), stop_tokens_of(config), boundary=boundary)


def _lies(runtime: Runtime) -> bool:
    return runtime.incarnation == 1 or "LIES_AT_ONCE" in os.environ


if __name__ == "__main__":
    roles: dict[str, Callable[[Runtime], Actor]] = {"shaper": _shaper, "reward": Reward, "generator": Generator}
    main(lambda runtime: roles[runtime.name.partition("/")[0]](runtime))
