"""A process that decodes with vLLM until its engine core dies, then says how it learnt of that.

    python -m tests.fakes.vllm_process MODEL_DIR

Prints the pid of the engine core once samples decode.
"""

import asyncio
import signal
import sys

import uvloop

from darts_async.config import VllmConfig
from darts_async.errors import EngineError
from darts_async.generator.vllm.engine import VllmEngine, load_vllm_engine
from darts_async.generator.vllm.startup import VllmRequest
from tests.generator.world import generate


def say(*words: object) -> None:
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


async def decode(engine: VllmEngine) -> None:
    while engine.num_unfinished:
        if (await engine.step()).rejected:
            break


async def main(model_dir: str) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, say, "SIGTERM")
    settings = VllmConfig(step_deadline_s=30.0)
    wanted = VllmRequest(model_dir, settings, dtype="float32", num_slots=4, max_context_tokens=900, seed=0)
    engine = await asyncio.to_thread(load_vllm_engine, wanted)
    for i in range(4):
        engine.start(generate(i, max_new_tokens=890, temperature=2.0))
    await engine.step()
    say("core", engine.llm.engine_core.resources.engine_manager.processes[0].pid)
    try:
        while True:
            await decode(engine)
            for i in range(4):
                engine.start(generate(i, max_new_tokens=890, temperature=2.0))
    except EngineError as error:
        say("step:", error)
    for name, call in {
        "call": engine.call_workers("get_supported_tasks", deadline_s=60.0),
        "pause": engine.paused().__aenter__(),
        "step": engine.step(),
    }.items():
        try:
            await call
        except EngineError as error:
            say(f"{name}:", error)
    await engine.close()
    say("closed")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
