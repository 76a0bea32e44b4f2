"""Finds the tokens that end a response."""

from typing import Any

from darts_async.errors import ModelError


def eos_token_ids(model_path: str, *configs: Any) -> list[int]:
    """The end-of-sequence tokens of the first of a model's configurations that names any.

    Raises `ModelError` if none does.
    """
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    raise ModelError(f"{model_path!r} names no eos_token_id in its generation_config.json or config.json")
