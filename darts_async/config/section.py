"""The base class of all sections, and the types of their numbers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from darts_async.extensions import Kind

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def named(kind: Kind) -> AfterValidator:
    """A text that is a short name of the kind, or `module:name`."""
    return AfterValidator(kind.checked)


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True)
