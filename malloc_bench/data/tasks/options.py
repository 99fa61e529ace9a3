"""Choices that a suite makes by name, with settings: `name` or `{name: {setting: value}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from malloc_bench.registry import UnknownName, suggest
from malloc_bench.results import label

Whole = Annotated[int, Field(ge=1)]


class Option(BaseModel):
    """One choice. A setting that is None is as good as not there, so a new one changes no cell that lacks it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    kind: ClassVar[str]
    name: ClassVar[str]

    def value(self) -> str | dict[str, Any]:
        """As YAML has it, defaults included: part of a cell's identity."""
        settings = self.model_dump(exclude_none=True)
        return {self.name: settings} if settings else self.name

    @property
    def label(self) -> str:
        """`temporal(long=200)`: the name and the settings that are not the default."""
        return label(self.name, json.dumps(self.model_dump(exclude_defaults=True)))

    def __str__(self) -> str:
        return self.label


O = TypeVar("O", bound=Option)


def pick(value: Any, options: Mapping[str, type[O]]) -> O:
    """The option that a value of YAML names, or the value where it is one already.

    Raises UnknownName, pydantic's ValidationError for a setting that is wrong, ValueError for anything else.
    """
    if isinstance(value, Option):
        return value  # type: ignore[return-value]
    name, settings = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError(f"expected a name or {{name: {{setting: value}}}}, not {value!r}")
    if name not in options:
        kind = next(iter(options.values())).kind
        raise UnknownName(f"no {kind} is named '{name}'.{suggest(name, options)}")
    return options[name](**settings)
