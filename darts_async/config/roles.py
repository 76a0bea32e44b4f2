"""Settings of the roles: how many processes each has, and what each process may use."""

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, create_model, model_validator

from darts_async.config.restart import RestartConfig
from darts_async.config.section import NonNegative, Positive, Seconds, Section
from darts_async.topology.roles import ROLES, Role


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


_FIELDS: Any = {role.name: (RoleConfig, RoleConfig()) for role in ROLES}
_Roles: Any = create_model("_Roles", __base__=Section, **_FIELDS)
"""One section for each entry of the table of roles."""


class RolesConfig(_Roles):
    """The processes of a run. There is one shaper. The replicas of the learner are the ranks of the one learner."""

    if TYPE_CHECKING:

        def __getattr__(self, role: str) -> RoleConfig: ...

    def of(self, role: Role) -> RoleConfig:
        """The settings of a role."""
        settings: RoleConfig = getattr(self, role.name)
        return settings

    @model_validator(mode="after")
    def _as_many_as_the_table_says(self) -> Self:
        for role in ROLES:
            settings, place = self.of(role), f"roles.{role}"
            if role.is_single and settings.replicas != 1:
                raise ValueError(f"{place}.replicas is {settings.replicas}, but there is exactly one {role}")
            if role.has_ranks and settings.devices > 1:
                raise ValueError(
                    f"{place}.devices is {settings.devices}, but a rank drives one device; for more devices raise "
                    f"{place}.replicas"
                )
        return self
