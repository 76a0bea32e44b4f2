"""The exceptions of this package.

Errors that a user can cause are also `ValueError`s, and name the value, the place and the fix. Our own mistakes are
plain assertions.
"""


class DartsError(Exception):
    """The base class of all errors of this package."""


class ConfigError(DartsError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(DartsError, ValueError):
    """A prompt data set is missing, empty, or a record of it cannot be used."""


class ModelError(DartsError, ValueError):
    """A model or tokenizer cannot be loaded, or does not fit the run."""


class TransportError(DartsError):
    """A link cannot do what was asked: unknown peer, full outbox, closed socket."""


class ProtocolError(TransportError, ValueError):
    """A message is malformed, oversized, or not of the link's union. It is refused; the link stays open."""


class NonsenseError(ProtocolError):
    """A frame from the peer that it names contradicts what that peer can know. The peer is at fault."""


class OutboxFullError(TransportError):
    """A peer has left too many messages unacknowledged."""


class DeadlineError(DartsError, TimeoutError):
    """A wait passed its deadline. The message names what was waited for and for how long."""


class EngineError(DartsError):
    """The inference engine cannot continue."""


class WeightUpdateError(DartsError):
    """A weight update failed or was aborted. The weights in use are untouched."""


class ExtensionError(DartsError, ValueError):
    """What the run brings itself cannot be loaded, raises, or decides what it may not. (A reward that raises is a
    message, not an exception.)"""


class RewardError(DartsError):
    """Rewards cannot be given: a worker does not start, or too many rewards fail."""


class RewardUnavailableError(DartsError):
    """What gives a reward cannot be asked at the moment. The response has no reward, and the run continues, however
    often it happens. A reward function may raise it."""


class SandboxError(RewardUnavailableError):
    """A sandbox cannot be set up, or a program in it does not end. (A program that fails is an outcome.)"""


class JudgeError(RewardUnavailableError):
    """A judge does not answer."""


class StalenessError(DartsError):
    """A token older than `max_staleness` was about to enter a gradient."""


class TrainingError(DartsError):
    """Training cannot continue: losses or gradients are not finite in several steps in a row."""


class CheckpointError(DartsError):
    """A checkpoint is missing, torn, or of another model."""


class NoSpaceError(DartsError):
    """A file system is full. The message names it, and how much is free."""


class ProcessDiedError(DartsError):
    """A process of the run ended when it should not have."""


PERMANENT_ERRORS = (ConfigError, DataError, ModelError, ExtensionError, RewardError, TrainingError)
"""Errors in the input of the run, or in step after step: a restarted process would end by the same error."""

PERMANENT_EXIT_CODE = 78
"""Exit code of a process that ends by one of them (EX_CONFIG of sysexits.h)."""

NO_SPACE_EXIT_CODE = 75
"""Exit code of a process that ended because of a full file system (EX_TEMPFAIL of sysexits.h), and may restart."""
