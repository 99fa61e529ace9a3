"""Prices, from a file that the user gives and from nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from malloc_bench.registry import clipped, suggest
from malloc_bench.strict_yaml import YamlError, number_hint, read_yaml

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 16

MOST = 1e12  # of a price
Amount = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]


class Prices(BaseModel):
    """What memory and work cost. A GB is 1e9 bytes, a month 730 hours; power is of the part while it is in use."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    usd_per_gb_month_ram: Amount
    usd_per_gb_month_ssd: Amount
    usd_per_core_hour: Amount
    watts_per_core: Amount | None = None
    watts_per_gb_ram: Amount | None = None
    watts_per_gb_ssd: Amount | None = None


def read_prices(path: str | Path) -> Prices:
    """The prices of a YAML file; raises ValueError: one line with the file, the key and what was expected."""
    try:
        prices = Prices.model_validate(read_yaml(Path(path), MAX_BYTES, "price list"))
    except YamlError as error:
        raise ValueError(f"{path}: {error}") from None
    except ValidationError as error:
        problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            what = f"unknown key.{suggest(name, Prices.model_fields)}"
        elif problem["type"] == "missing":
            what = "missing"
        else:
            given = problem["input"]
            what = f"expected a number from 0 to {MOST:g}, not {clipped(repr(given))}{number_hint(given)}"
        raise ValueError(f"{path}: {clipped(name)}: {what}") from None
    if not any(prices.model_dump(exclude_none=True).values()):
        log.warning("%s: every price is 0, so that all methods cost the same: write down what yours cost", path)
    return prices
