"""Settings of the roles: how many processes each has, and what each process may use."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.restart import RestartConfig
from darts_async.config.section import NonNegative, Positive, Seconds, Section


class RoleConfig(Section):
    """The processes of one role, and what each may use."""

    replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Processes of this role."""
    threads: Positive = 1
    """Threads of numerical libraries in each process."""
    start_timeout_s: Seconds = 120.0
    """A process that has not reported after this long has failed to start."""
    devices: NonNegative = 0
    """GPUs of each process, all on one node. The process sees no others."""
    share_devices: bool = False
    """Whether another role that sets this too may use the same devices."""
    nodes: tuple[str, ...] = Field((), strict=False)
    """Names of the nodes that the role may run on. Empty: all nodes."""
    restart: RestartConfig = RestartConfig()
    """What happens to a process of the role that dies or hangs."""

    @model_validator(mode="after")
    def _can_be_healthy(self) -> Self:
        if self.restart.min_healthy > self.replicas:
            raise ValueError(f"restart.min_healthy is {self.restart.min_healthy}, but replicas is {self.replicas}")
        return self


class RolesConfig(Section):
    """The processes of a run. There is one shaper. The replicas of the learner are the ranks of the one learner."""

    shaper: RoleConfig = RoleConfig()
    generator: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    learner: RoleConfig = RoleConfig()

    @model_validator(mode="after")
    def _one_shaper(self) -> Self:
        if self.shaper.replicas != 1:
            raise ValueError(f"roles.shaper.replicas is {self.shaper.replicas}, but there is exactly one shaper")
        return self

    @model_validator(mode="after")
    def _a_rank_drives_one_device(self) -> Self:
        if self.learner.devices > 1:
            raise ValueError(
                f"roles.learner.devices is {self.learner.devices}, but a rank drives one device; for more devices "
                "raise roles.learner.replicas"
            )
        return self
