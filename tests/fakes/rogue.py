"""A process with the keys of its run that says something which cannot be meant, once, in its first life; in the next it
is what it should be.

python -m tests.fakes.rogue --run-dir DIR --name generator/1 --incarnation 1      (LIE=future_weights)

With LIES_AT_ONCE set it does so in whichever life it is started.
"""

import os

import msgspec

from darts_async.actor import Runtime, main
from darts_async.generator.process import GeneratorActor
from darts_async.protocol import (
    GeneratorToLearner,
    GeneratorToShaper,
    MemberJoined,
    RunFinished,
    SampleScored,
    TokensDecoded,
    WeightsApplied,
)
from darts_async.reward.process import RewardActor

FAR = 1 << 40


class Generator(GeneratorActor):
    """Lies when it has decoded something, or joins."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.lie = os.environ["LIE"] if _lies(runtime) else ""

    def _tell_shaper(self, message: GeneratorToShaper) -> None:
        super()._tell_shaper(message)
        if not isinstance(message, TokensDecoded):
            return
        lie, self.lie = self.lie, ""
        match lie:
            case "future_weights":
                super()._tell_shaper(WeightsApplied(FAR, 0.0))
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


def _lies(runtime: Runtime) -> bool:
    return runtime.incarnation == 1 or "LIES_AT_ONCE" in os.environ


if __name__ == "__main__":
    main(lambda runtime: Reward(runtime) if runtime.name.startswith("reward") else Generator(runtime))
