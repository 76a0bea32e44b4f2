"""What the Hugging Face hub has, as a directory of this machine: fetched into its cache, or found there."""

from collections.abc import Sequence
from pathlib import Path


class FetchError(Exception):
    """The hub does not give it, and its cache does not have it: why, in one line."""


def fetched(hub_id: str, patterns: Sequence[str], *, revision: str | None = None, is_dataset: bool = False) -> Path:
    """The files of a model or a data set that match a pattern, in a directory whose name is their commit.

    Args:
        hub_id: its id, `OWNER/NAME`.
        patterns: as `fnmatch` has them, each for a complete path.
        revision: branch, tag or commit; None: the newest.
        is_dataset: whether it is a data set, and not a model.

    Raises:
        FetchError: there is no such thing, or the hub cannot be reached.

    Example:
        >>> fetched("openai/gsm8k", ["README.md"], is_dataset=True).name  # doctest: +SKIP
        'e53f048856ff4f594e959d75785d2c2d37b678ee'
    """
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed
    from huggingface_hub.errors import HFValidationError

    kind = "dataset" if is_dataset else "model"
    try:
        return Path(snapshot_download(hub_id, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise FetchError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
