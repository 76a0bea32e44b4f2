"""How fast accelerators would be, by arithmetic from their data sheets: what `bench.emulated` has processes wait for.

Of one H100 SXM: 989 TFLOP/s of dense bfloat16, 3.35 TB/s of memory bandwidth (NVIDIA's data sheet). Of Qwen2.5-7B:
7.62e9 parameters, so 15.2 GB in bfloat16; 28 layers with 4 heads of 128 for keys and values, so 57 kB of them a token
(its published config.json).

    a decode step reads the weights:        15.2 GB / (3.35 TB/s x 0.75) + 2 ms of launching kernels         = 8.0 ms
    and for each sample in the batch:       57 kB x 2,000 tokens / 3.35 TB/s + 2 x 7.62 GFLOP / 400 TFLOP/s  = 72 us
    training takes for each token:          6 x 7.62 GFLOP / (GPUs x 989 TFLOP/s x 0.40)
    the optimiser step, its all-reduce and the rest that does not depend on tokens:                            0.5 s
    broadcasting the weights, 15.2 GB:      at 100 GB/s inside a node                                          0.15 s
                                            at 40 GB/s between nodes (400 Gb/s of network, 0.8 of it)          0.4 s
    and copying them where they belong:     twice 15.2 GB / 3.35 TB/s, and 20 ms                               0.03 s

The utilisations (0.75, 0.40) and the overheads are assumptions, the middle of what is published for well-tuned systems.
"""

from dataclasses import dataclass

_TRAINING_FLOP_PER_TOKEN = 6 * 7.62e9
_FLOP_PER_S = 989e12 * 0.40


@dataclass(frozen=True, slots=True)
class Profile:
    """A cluster. Times are of real tokens, in real seconds."""

    num_generators: int
    """Of one accelerator each."""
    num_training: int
    """Accelerators of the learner."""
    groups_per_step: int
    broadcast_s: float
    slowed: float
    """How much slower than its workload allows a run is emulated, so that two cores bear so many processes."""
    num_slots: int = 128
    token_latency_s: float = 8.0e-3
    batch_for_double_latency: float = 111.0
    step_s: float = 0.5
    update_stall_s: float = 0.03

    @property
    def num_accelerators(self) -> int:
        """Together."""
        return self.num_generators + self.num_training

    @property
    def token_s(self) -> float:
        """Training one token."""
        return _TRAINING_FLOP_PER_TOKEN / (self.num_training * _FLOP_PER_S)

    @property
    def decoded_per_s(self) -> float:
        """Tokens per second of all generators, with all slots in use."""
        step_s = self.token_latency_s * (1 + self.num_slots / self.batch_for_double_latency)
        return self.num_generators * self.num_slots / step_s


PROFILES = {
    8: Profile(num_generators=4, num_training=4, groups_per_step=32, broadcast_s=0.15, slowed=1.0),
    16: Profile(num_generators=8, num_training=8, groups_per_step=64, broadcast_s=0.4, slowed=2.0),
    64: Profile(num_generators=32, num_training=32, groups_per_step=256, broadcast_s=0.4, slowed=8.0),
}
"""By the number of accelerators."""
