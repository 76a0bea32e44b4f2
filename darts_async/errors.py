"""The exception tree: everything this package raises on purpose.

Errors that a user can cause are `ValueError`s too and name the value, the place and the fix. Errors of our
own making are plain assertions and appear nowhere here.
"""


class DartsError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(DartsError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(DartsError, ValueError):
    """A prompt data set is missing, empty, or a record of it cannot be used."""


class ModelError(DartsError, ValueError):
    """A model or tokenizer cannot be loaded, or does not fit the run."""


class TransportError(DartsError):
    """A link cannot do what was asked: unknown peer, full outbox, closed socket."""


class ProtocolError(TransportError, ValueError):
    """A message is malformed, oversized, or not of the link's union. The message is refused; the link lives."""


class NonsenseError(ProtocolError):
    """A frame comes from the peer that it names, and contradicts what that peer can know. The peer is at fault."""


class OutboxFullError(TransportError):
    """A peer has left too many messages unacknowledged."""


class DeadlineError(DartsError, TimeoutError):
    """A wait passed its deadline. The message names what was waited for and for how long."""


class EngineError(DartsError):
    """The inference engine cannot go on."""


class WeightUpdateError(DartsError):
    """A weight update failed or was aborted. The weights in use are untouched."""


class ExtensionError(DartsError, ValueError):
    """What the run brings itself cannot be loaded, raises, or decides what it may not. (A reward that raises is a
    message, not an exception.)"""


class RewardError(DartsError):
    """Rewards cannot be given: a worker does not start, or too many rewards fail."""


class StalenessError(DartsError):
    """A token older than `max_staleness` was about to enter a gradient."""


class TrainingError(DartsError):
    """Training cannot go on: losses or gradients are not finite, step after step."""


class CheckpointError(DartsError):
    """A checkpoint is missing, torn, or of another model."""


class NoSpaceError(DartsError):
    """A file system is full. The message names it, and how much is free."""


class ProcessDiedError(DartsError):
    """A process of the run ended when it should not have."""


PERMANENT_ERRORS = (ConfigError, DataError, ModelError, ExtensionError, RewardError, TrainingError)
"""Mistakes in what the run was given, and steps that come to nothing: a process that was started again would end by the
same one."""

PERMANENT_EXIT_CODE = 78
"""Exit code of a process that ends by one of them (EX_CONFIG of sysexits.h)."""

NO_SPACE_EXIT_CODE = 75
"""Exit code of a process that a full file system has ended (EX_TEMPFAIL of sysexits.h): it goes on when there is
room."""
