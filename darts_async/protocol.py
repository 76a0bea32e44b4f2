"""Every message between processes: one union per direction of a link.

    Shaper -> Generator   Greet, Generate, Cancel
    Generator -> Shaper   GeneratorReady, TokensDecoded, SampleFinished, SampleCancelled, SampleRejected,
                          WeightsApplied
    Shaper -> Reward      Greet, Score
    Reward -> Shaper      RewardReady, SampleScored, ScoreFailed
    Shaper -> Learner     Greet, CatchUp, TrainGroup, ShaperSnapshot
    Learner -> Shaper     LearnerReady, GroupsCommitted, VersionPublished, VersionSaved
    Learner -> Generator  Greet, EpochFormed, StoreValue, UpdateOffered, UpdateCommitted, UpdateAborted, ProbeWeights,
                          WeightsRefused
    Generator -> Learner  MemberJoined, StoreValue, UpdateReady, UpdateStaged, UpdateApplied, UpdateFailed,
                          ProbeMeasured
    Generator -> Worker   EpochFormed, StoreValue, UpdateOffered, UpdateCommitted, UpdateAborted
    Worker -> Generator   WorkerConnected, StoreValue, UpdateReady, UpdateStaged, UpdateFailed
    Leader -> Rank        StoreValue, Prepare, AddGroups, TrainGroup, FinishStep, SaveCheckpoint, GatherWeights,
                          Dismiss
    Rank -> Leader        StoreValue, RankReady, StepTallied, PartSaved
    Process -> Launcher   PeerRefused, ProcessStatus, StepCompleted, EvaluationCompleted, ScoreFailed, RunFinished,
                          TakeUpAgain
    Launcher -> Process   Shutdown, ProcessEnded

Messages of the launcher to its own parts, and those inside one role, have modules of their own:

    launcher.control.requests            another terminal and the launcher, over the socket of the run directory
    launcher.nodes.node_messages         the launcher, the agent of a node and its keeper
    darts_async.machine.fork_server      a keeper and the process that forks others for it
    darts_async.reward.worker_messages   a reward process and its workers
    darts_async.prompts.task_maker       a process that loads prompts, and the process that makes tasks

Commands are verbs, events are past tense. Arrays travel as raw buffer frames beside the MessagePack header (see
`transport`), at no cost per element. Types of elements are checked on decoding; `__post_init__` checks the rest.

A *group* is one visit to one prompt; `group_id` counts visits from 0 and is never reused. A *sample* is one response of
a group. Identifiers do not change in a restart, so duplicates are dropped by them.
"""

from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

SAMPLES_PER_GROUP_LIMIT = 4096
"""A group has fewer samples than this: `sample_id = group_id * SAMPLES_PER_GROUP_LIMIT + index`."""

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its response. `length`: it was cut at the token limit."""


def sample_id_of(group_id: int, index: int) -> int:
    """The identifier of sample `index` of a group."""
    assert 0 <= index < SAMPLES_PER_GROUP_LIMIT
    return group_id * SAMPLES_PER_GROUP_LIMIT + index


def group_id_of(sample_id: int) -> int:
    """The group that a sample belongs to."""
    return sample_id // SAMPLES_PER_GROUP_LIMIT


class Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages: immutable, tagged by class name, unknown fields refused."""


class SamplingParams(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are drawn. `top_p=1` and `top_k=0` switch truncation off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


class Greet(Message, frozen=True):
    """A hub's first message to a peer that is up, or up again, whose earlier state it does not rely on. From the
    shaper: a generator drops every sample, and every peer answers with its `...Ready`. A generator repeats the
    `number`, because only its answer to the newest greeting counts. From the learner: ask again to be a member of
    weight updates."""

    number: int


# --- shaper -> generator -------------------------------------------------------------------------------------
class Generate(Message, frozen=True):
    """Decode one sample. A generator that is lost has decoded `prefix_tokens`: decoding continues after them. They
    count towards `max_new_tokens`, and are not reported again."""

    sample_id: int
    prompt_tokens: NDArray[np.int32]  # [prompt_length]
    prefix_tokens: NDArray[np.int32]  # [prefix_length], usually empty
    seed: int
    sampling: SamplingParams
    priority: int = 0  # lower first; resumed samples go before new ones


class Cancel(Message, frozen=True):
    """Stop decoding a sample. Answered by `SampleCancelled`, or by a `SampleFinished` that was already sent. Ids of
    samples that have ended get no answer."""

    sample_id: int


ShaperToGenerator = Greet | Generate | Cancel


# --- generator -> shaper -------------------------------------------------------------------------------------
class GeneratorReady(Message, frozen=True):
    """A generator holds no sample and can hold these. `WeightsApplied` follows as soon as it has weights."""

    greeting: int  # the number of the `Greet` that this answers
    num_slots: int
    max_context_tokens: int


class TokensDecoded(Message, frozen=True):
    """Tokens of one or more engine steps, all decoded under one policy version. Those of sample `sample_ids[i]` are the
    next `num_tokens[i]` entries. `logprobs` are of the distribution sampled from, after temperature and truncation."""

    policy_version: int
    sample_ids: NDArray[np.int64]  # [num_samples]
    num_tokens: NDArray[np.int32]  # [num_samples]
    token_ids: NDArray[np.int32]  # [sum(num_tokens)]
    logprobs: NDArray[np.float32]  # [sum(num_tokens)]

    def __post_init__(self) -> None:
        if len(self.sample_ids) != len(self.num_tokens):
            raise ValueError(f"{len(self.sample_ids)} sample ids but {len(self.num_tokens)} token counts")
        counts = self.num_tokens.tolist()  # few of them: faster than reductions of an array
        if min(counts, default=1) < 1:
            raise ValueError("a token count below 1")
        total = sum(counts)
        if not total == len(self.token_ids) == len(self.logprobs):
            raise ValueError(f"counts sum to {total}, {len(self.token_ids)} tokens, {len(self.logprobs)} logprobs")


class SampleFinished(Message, frozen=True):
    """The sample ended by itself; `num_tokens` (prefix included) were decoded, all of them already sent."""

    sample_id: int
    finish_reason: FinishReason
    num_tokens: int


class SampleCancelled(Message, frozen=True):
    """Acknowledges `Cancel`: the slot is free, and all `num_tokens` tokens (prefix included) were sent."""

    sample_id: int
    num_tokens: int


class SampleRejected(Message, frozen=True):
    """The engine cannot decode this sample (for example, its prompt does not fit)."""

    sample_id: int
    error: str


class WeightsApplied(Message, frozen=True):
    """Tokens sent after this message were decoded under `policy_version` or a later one."""

    policy_version: int
    stall_s: float  # time in which no token was decoded because of the update


GeneratorToShaper = GeneratorReady | TokensDecoded | SampleFinished | SampleCancelled | SampleRejected | WeightsApplied


# --- shaper <-> reward ---------------------------------------------------------------------------------------
class Score(Message, frozen=True):
    """Score one finished response."""

    sample_id: int
    prompt: str
    answer: str
    metadata_json: str  # the other fields of the record: a JSON object
    token_ids: NDArray[np.int32]  # [response_length], the end-of-sequence token included if there was one
    finish_reason: FinishReason
    function: str = ""  # a reward function of these prompts alone; empty: that of the settings


class RewardReady(Message, frozen=True):
    """A reward process accepts items, and works on this many at once."""

    num_workers: int


class SampleScored(Message, frozen=True):
    """The reward of a sample: a finite number."""

    sample_id: int
    reward: float
    parts: tuple[float, ...] = ()  # of each of several reward functions, before it is weighted; none of a single one


FailureKind = Literal["raised", "timeout", "wrong_type", "not_finite", "limit", "worker_died", "unavailable"]
"""Why there is no reward: the function raised, took too long, or returned no number or one that is not finite; a limit
of the settings was exceeded; the worker process ended; a judge or a sandbox does not work at the moment."""


class ScoreFailed(Message, frozen=True):
    """This sample has no reward, which is not a reward of zero. To the launcher: the first failure of its kind in the
    run. Further ones are counted, and reported at the end."""

    sample_id: int
    kind: FailureKind
    error: str


ShaperToReward = Greet | Score
RewardToShaper = RewardReady | SampleScored | ScoreFailed


# --- shaper <-> learner --------------------------------------------------------------------------------------
class TrainGroup(Message, frozen=True):
    """The selected samples of one group, for optimiser step `step` (which turns version `step` into `step + 1`)."""

    group_id: int
    step: int
    prompt_tokens: NDArray[np.int32]  # [prompt_length]
    num_tokens: NDArray[np.int32]  # [num_samples], response lengths
    token_ids: NDArray[np.int32]  # [sum(num_tokens)]
    logprobs: NDArray[np.float32]  # [sum(num_tokens)], behaviour policy
    versions: NDArray[np.int32]  # [sum(num_tokens)], policy version that decoded each token
    rewards: NDArray[np.float32]  # [num_samples]
    weights: NDArray[np.float32]  # [num_samples], inverse inclusion probabilities to a power; 1 where unbiased
    baseline: float | None = None  # pass rate of the prompt before this group; None: a baseline made of the group

    def __post_init__(self) -> None:
        total = int(self.num_tokens.sum())
        if not total == len(self.token_ids) == len(self.logprobs) == len(self.versions):
            raise ValueError(f"group {self.group_id}: response arrays disagree with {total} tokens")
        if not len(self.num_tokens) == len(self.rewards) == len(self.weights):
            raise ValueError(f"group {self.group_id}: sample arrays disagree on the number of samples")


class LearnerReady(Message, frozen=True):
    """The learner has its model at `policy_version`, and expects groups for that step next. Answered by `CatchUp` and
    by every group from that step on: a restarted learner repeats steps. The rest is of its checkpoint, for a shaper
    that does not know how the learner got there."""

    policy_version: int
    shaper_state: bytes = b""  # see `ShaperSnapshot`; empty if the checkpoint has none
    next_group_id: int = 0  # no group from this one on is in the checkpoint


class CatchUp(Message, frozen=True):
    """A generator may use `policy_version` already: publish nothing older. None uses a version after `newest_version`,
    because no learner has had the groups for it."""

    policy_version: int
    newest_version: int


class GroupsCommitted(Message, frozen=True):
    """These groups are in the gradient of `step`, and the step is complete."""

    step: int
    group_ids: NDArray[np.int64]  # [groups_per_step]


class VersionPublished(Message, frozen=True):
    """Every member of the current epoch has applied `policy_version` (late members were dropped)."""

    policy_version: int


class VersionSaved(Message, frozen=True):
    """A checkpoint of `policy_version` is on the disk; for the last version, the final model too. A learner may restart
    at `oldest_kept` or later, so groups of earlier steps are no longer needed. It is 0, which is the first model, until
    there are enough checkpoints."""

    policy_version: int
    oldest_kept: int


class ShaperSnapshot(Message, frozen=True):
    """What another shaper needs to continue after the step that makes `policy_version`. The learner stores it unread in
    the checkpoint, and returns it when it restarts at that version."""

    policy_version: int
    state: bytes


ShaperToLearner = Greet | CatchUp | TrainGroup | ShaperSnapshot
LearnerToShaper = LearnerReady | GroupsCommitted | VersionPublished | VersionSaved


# --- learner <-> generator: weights --------------------------------------------------------------------------
class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the model on the wire."""

    name: str
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    shape: tuple[int, ...]


class WeightManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors in order. Both sides derive the same layout of buckets from it."""

    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int


class EpochFormed(Message, frozen=True):
    """The receiver's ranks in a broadcast group of `world_size` begin with `first_rank` (the learner is rank 0)."""

    epoch: int
    first_rank: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    interface: str  # address that the collective's own sockets bind to
    deadline_s: float


class StoreValue(Message, frozen=True):
    """An entry of the rendezvous store of `epoch`, which the learner passes on to the other members: addresses of
    gloo's sockets or NCCL's unique id. So these never leave the authenticated link."""

    epoch: int
    key: str
    value: bytes


class UpdateOffered(Message, frozen=True):
    """Phase one: `policy_version` is about to be broadcast to the members of `epoch`."""

    epoch: int
    policy_version: int
    manifest: WeightManifest
    deadline_s: float


class UpdateCommitted(Message, frozen=True):
    """Phase two: the checksums agree; swap the staged weights in at the next step boundary."""

    epoch: int
    policy_version: int


class UpdateAborted(Message, frozen=True):
    """Drop what was staged and leave the group of `epoch`; a new epoch will form."""

    epoch: int
    policy_version: int
    reason: str


class ProbeWeights(Message, frozen=True):
    """Sample a token after each prompt under `policy_version`, if that is in use. Answered by `ProbeMeasured`."""

    policy_version: int
    prompt_tokens: NDArray[np.int32]  # [num_prompts * prompt_length]
    prompt_length: int

    def __post_init__(self) -> None:
        if self.prompt_length < 1 or len(self.prompt_tokens) % self.prompt_length:
            raise ValueError(f"{len(self.prompt_tokens)} tokens cannot be prompts of {self.prompt_length}")


class WeightsRefused(Message, frozen=True):
    """This generator must end: its weights are not those of `policy_version`, or it failed too often to receive
    them."""

    policy_version: int
    reason: str


LearnerToGenerator = (
    Greet | EpochFormed | StoreValue | UpdateOffered | UpdateCommitted | UpdateAborted | ProbeWeights | WeightsRefused
)


class MemberJoined(Message, frozen=True):
    """A generator asks to be a member of the next epoch. It holds `policy_version`, -1 for nothing. Each of its workers
    that receives weights is a rank of the group."""

    policy_version: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"a member of {self.num_ranks} ranks")


class UpdateReady(Message, frozen=True):
    """Phase one accepted: the group is joined, buffers are ready, the receive has been posted."""

    epoch: int
    policy_version: int


class UpdateStaged(Message, frozen=True):
    """All buckets have arrived in side buffers; decoding never paused. One checksum per tensor."""

    epoch: int
    policy_version: int
    checksums: NDArray[np.int64]  # [num_tensors]


class UpdateApplied(Message, frozen=True):
    """The staged weights are in use."""

    epoch: int
    policy_version: int
    stall_s: float


class UpdateFailed(Message, frozen=True):
    """This member could not receive; its weights in use are untouched."""

    epoch: int
    policy_version: int
    error: str


class ProbeMeasured(Message, frozen=True):
    """The tokens sampled after the prompts of `ProbeWeights`, with their log-probabilities at temperature 1. Empty if
    the generator uses another version by now, or cannot decode such prompts."""

    policy_version: int
    token_ids: NDArray[np.int32]  # [num_prompts]
    logprobs: NDArray[np.float32]  # [num_prompts]


GeneratorToLearner = (
    MemberJoined | StoreValue | UpdateReady | UpdateStaged | UpdateApplied | UpdateFailed | ProbeMeasured
)


# --- generator <-> the workers of its engine -----------------------------------------------------------------
class WorkerConnected(Message, frozen=True):
    """A worker's first message: which of the generator's ranks it is. Then it hears what the learner says of its group,
    and answers."""

    rank: int  # from 0


GeneratorToWorker = EpochFormed | StoreValue | UpdateOffered | UpdateCommitted | UpdateAborted
WorkerToGenerator = WorkerConnected | StoreValue | UpdateReady | UpdateStaged | UpdateFailed


# --- learner's rank 0 <-> its other ranks --------------------------------------------------------------------
class Prepare(Message, frozen=True):
    """Load the model, join the process group, and continue from a checkpoint of the run if one is named."""

    epoch: int  # of the rendezvous
    checkpoint: str  # name of its directory, empty for none


class AddGroups(Message, frozen=True):
    """Train the next `num_groups` messages `TrainGroup` together."""

    num_groups: int


class FinishStep(Message, frozen=True):
    """The groups so far make `step`. Answered by `StepTallied`."""

    step: int


class SaveCheckpoint(Message, frozen=True):
    """Write this rank's part of the checkpoint of `policy_version` into the directory that rank 0 has made."""

    policy_version: int


class GatherWeights(Message, frozen=True):
    """Send rank 0 this rank's rows of every parameter of `policy_version`: those in use, or those being saved."""

    policy_version: int
    of_checkpoint: bool


class Dismiss(Message, frozen=True):
    """The run needs the rank no longer."""


LeaderToRank = StoreValue | Prepare | AddGroups | TrainGroup | FinishStep | SaveCheckpoint | GatherWeights | Dismiss


class RankReady(Message, frozen=True):
    """The rank is at `policy_version`."""

    policy_version: int


NUM_BINS = 2001
"""Of histograms of logarithms, odd so that 0 is the middle of a bin: a ratio of 1 is reported as 1."""


class StepTallied(Message, frozen=True):
    """The rank has trained on its samples of every group of `step`: the content of its `Tally`."""

    step: int
    sums: dict[str, float]
    counts: dict[str, float]
    maxima: dict[str, float]
    histograms: dict[str, bytes]  # [NUM_BINS] little-endian float64


class PartSaved(Message, frozen=True):
    """The rank's part of a checkpoint is on the disk."""

    policy_version: int
    num_bytes: int
    crc32: int


RankToLeader = StoreValue | RankReady | StepTallied | PartSaved


# --- every process <-> launcher ------------------------------------------------------------------------------
class ProcessStatus(Message, frozen=True):
    """A heartbeat for the live view; one more is sent at the end. `busy_s` integrates busy intervals by stage since the
    start; `num_tokens` were decoded by a generator, or trained on by a learner."""

    state: str
    policy_version: int
    num_tokens: int
    num_in_flight: int
    uptime_s: float
    busy_s: dict[str, float]
    loop_lag_s: float  # the longest the event loop was held since the last status
    hindrance: str = ""  # what it waits for that only the user can give, such as room on a full disk


class StepCompleted(Message, frozen=True):
    """Metrics of one optimiser step, as the sender knows them; the launcher merges by `step`."""

    step: int
    metrics: dict[str, float]


class EvaluationCompleted(Message, frozen=True):
    """Complete samples of the held-out prompts, ordered by prompt, except those without a reward. No token is older
    than `policy_version`. During training tokens may be newer, because weights are updated in flight."""

    policy_version: int
    prompt_ids: NDArray[np.int64]  # [num_samples], the same in every evaluation
    rewards: NDArray[np.float32]  # [num_samples]
    num_tokens: NDArray[np.int32]  # [num_samples]
    newest_version: int  # of all their tokens
    num_skipped: int = 0  # evaluations that became due during this one, and were skipped
    pass_above: float = 0.5  # a sample passes with a reward above this
    prompts_by_set: dict[str, list[int]] = {}  # ids of the prompts of each set; empty if there is only one
    part_metrics: dict[str, float] = {}  # of each of several reward functions


class RunFinished(Message, frozen=True):
    """The shaper has finished. Its tokens by outcome must sum to the counts in the last `ProcessStatus` of the
    generators. A killed generator has no last count: `tokens_by_generator`, {name: {incarnation: tokens}}, has what was
    received."""

    reason: str
    tokens_by_outcome: dict[str, int]
    samples_by_outcome: dict[str, int]
    tokens_by_staleness: dict[int, int]
    num_steps: int
    tokens_by_generator: dict[str, dict[int, int]] = {}
    num_rewards: int = 0  # scored responses, including those without a reward
    failed_rewards: dict[str, int] = {}  # by the kind of the failure
    first_failures: dict[str, str] = {}  # the message of the first one of each kind


class Shutdown(Message, frozen=True):
    """Finish current work, write results, and leave. `finished`: the run is complete. `num_steps`: the steps that the
    shaper has accounted for, if known; a learner at that version writes a checkpoint."""

    reason: str
    finished: bool
    num_steps: int | None = None


class ProcessEnded(Message, frozen=True):
    """A process of the run has ended, so its peers need not wait until its silence shows."""

    name: str
    incarnation: int


class PeerRefused(Message, frozen=True):
    """A process has sent an invalid message. The sender of this refuses all messages of that incarnation, which must
    restart."""

    name: str
    incarnation: int
    reason: str


class TakeUpAgain(Message, frozen=True):
    """The learner is back at a checkpoint older than any group that the shaper has kept, so versions that generators
    use are undone. The launcher ends all processes and begins another life of the run."""

    reason: str


ProcessToLauncher = (
    PeerRefused | ProcessStatus | StepCompleted | EvaluationCompleted | ScoreFailed | RunFinished | TakeUpAgain
)
LauncherToProcess = Shutdown | ProcessEnded
