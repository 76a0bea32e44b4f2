"""How many processes of each role there are, and what each may use."""

from typing import Self

from pydantic import model_validator

from darts_async.config.section import Positive, Seconds, Section


class RoleConfig(Section):
    """How many processes of a role, and what each may use."""

    replicas: Positive = 1
    """Processes of this role."""
    threads: Positive = 1
    """Threads of numerical libraries in each."""
    start_timeout_s: Seconds = 120.0
    """A process that has not reported by then has failed to start."""


class RolesConfig(Section):
    """The processes of a run. There is one shaper and one learner; the others scale out."""

    shaper: RoleConfig = RoleConfig()
    generator: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    learner: RoleConfig = RoleConfig()

    @model_validator(mode="after")
    def _single_roles(self) -> Self:
        for role in ("shaper", "learner"):
            replicas = getattr(self, role).replicas
            if replicas != 1:
                raise ValueError(f"roles.{role}.replicas is {replicas}, but there is exactly one {role}")
        return self
