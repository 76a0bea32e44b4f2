"""A shaper that has died goes on: from its journal, with its ledger made whole."""

from collections.abc import Callable
from pathlib import Path

from darts_async.shaper.journal import read_journal
from darts_async.shaper.ledger import LedgerWriter
from darts_async.shaper.standing import Standing
from darts_async.shaper.state import ShaperState, Snapshot
from darts_async.shaper.workload import Forget, Send


def take_up(path: Path, ledger: LedgerWriter, make_state: Callable[[Snapshot], ShaperState]) -> tuple[Standing, int]:
    """Where the process before stood when it died, and the bytes of the journal behind which to go on.

    What was decided is decided again, and what of it is missing in the ledger is written there. Nothing is sent.

    Raises:
        OSError: a file cannot be read.
        DataError: journal or ledger is not what this run has written.
    """
    head, inputs, num_bytes = read_journal(path)
    standing = Standing.of(head, make_state)
    outputs = [output for given in inputs for output in standing.take(given)]
    ledger.catch_up(head.ledger_bytes, [output for output in outputs if not isinstance(output, Send | Forget)])
    return standing, num_bytes
