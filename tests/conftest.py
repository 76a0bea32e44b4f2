"""Nothing is skipped that was to be run: `DARTS_REQUIRE_VLLM=1` makes a missing vLLM an error.

Nothing fails for being slow: examples have no deadline.
"""

import importlib.util
import os

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Refuse to start where vLLM has to be there and is not."""
    if os.environ.get("DARTS_REQUIRE_VLLM") == "1" and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError(
            "DARTS_REQUIRE_VLLM is 1, but vLLM is not installed, so its tests would be skipped; install it as the "
            "README says, or unset the variable"
        )
