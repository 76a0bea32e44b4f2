"""All benchmarks by one name: `python -m bench throughput FILE` is `python -m bench.throughput FILE`."""

import difflib
import runpy
import sys
from typing import Final

QUESTIONS: Final = {
    "throughput": "how fast is a run, and where does the time go?",
    "emulated": "how much sooner is a step on 8, 16 or 64 accelerators?",
    "learning": "does shaping make a model good sooner, and is it as good then?",
    "peers": "how long until the model is as good, beside TRL's trainer?",
    "shaping": "which shaping makes a step sooner, simulated, at which price?",
    "scale": "from 8 to 1,024 accelerators, simulated: what gives way first?",
    "arms": "which shaping helps on the quickstart's task?",
    "engines": "how fast do engines decode, and how soon is a cancelled sample gone?",
    "learner": "how fast is a training step, on a CPU or a GPU?",
    "shaper": "how many samples a minute does the shaper bear?",
    "rollouts": "what does it cost to keep rollouts?",
    "transport": "how many messages does a link move, how fast?",
    "weights": "what does an update of the weights cost over a bare broadcast?",
    "weights_vllm": "and with vLLM as the receiver?",
    "faults": "is anything lost when processes are killed?",
    "restart": "how long is a process gone that is restarted?",
    "away": "how long is a process away that was killed, forked or not?",
    "chaos": "and in simulated runs, thousands of them?",
    "gpu": "does the weight transfer work under NCCL?",
}


def main() -> None:
    """Run the benchmark that is named, or show which there are."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("python -m bench NAME [ARGUMENTS], and --help behind a name says which:\n")
        print("\n".join(f"  {each:14}{question}" for each, question in QUESTIONS.items()))
        return
    if name not in QUESTIONS:
        near = difflib.get_close_matches(name, QUESTIONS, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        sys.exit(f"error: there is no benchmark {name!r}; {meant}`python -m bench` shows all")
    sys.argv = [f"bench.{name}", *sys.argv[2:]]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
