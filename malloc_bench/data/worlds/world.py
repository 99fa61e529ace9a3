"""The parameters of a generated world: what a synthetic card's `parameters` may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

MOST = 100_000_000  # events and items: they are made in memory
Share = Annotated[float, Field(ge=0, le=1)]


class SyntheticWorld(BaseModel):
    """Shares say where the next event comes from; what they leave of 1 is drawn by popularity alone.

    The items of a cluster stand in a round: a follower is one place on, a call-back's item `jump` places on.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    users: PositiveInt
    items: PositiveInt
    seed: Annotated[int, Field(ge=0)]
    clusters: PositiveInt  # groups of as many items each
    zipf: Annotated[float, Field(ge=0)]  # exponent of item popularity
    shortest: PositiveInt  # events of a history
    median: PositiveInt
    longest: PositiveInt
    call_back: Share = 0.0  # the item called by the event L steps back
    lags: dict[PositiveInt, Share] = {}  # L -> its share of the call-backs
    jump: PositiveInt = 7
    follow: Share = 0.0  # the follower of the last event
    repeat: Share = 0.0  # the item of any earlier event
    interest: Share = 0.0  # a popular item of the cluster of an earlier event
    drift: Annotated[float, Field(gt=0, le=1)] = 0.01  # chance, at each event, that an interest is forgotten
    session: Share = 0.0  # a popular item of the cluster that opened the session
    session_length: Annotated[float, Field(ge=1)] = 8.0  # mean, in events

    @model_validator(mode="after")
    def _possible(self) -> SyntheticWorld:
        if not self.shortest <= self.median <= self.longest:
            raise ValueError("needs shortest <= median <= longest")
        if self.users * self.longest > MOST or self.items > MOST:
            raise ValueError(f"users x longest, and items, may be {MOST:,} at most")
        if self.items % self.clusters:
            raise ValueError(f"{self.items} items are no multiple of {self.clusters} clusters")
        if sum(self.shares) > 1 + 1e-9:
            raise ValueError("call_back, follow, repeat, interest and session come to more than 1")
        if self.call_back and abs(sum(self.lags.values()) - 1) > 1e-9:
            raise ValueError(f"the shares of lags come to {sum(self.lags.values()):g}, not to 1")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Of call-backs, followers, repeats, interests and sessions."""
        return self.call_back, self.follow, self.repeat, self.interest, self.session
