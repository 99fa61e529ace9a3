"""What a method may ask of a prefill beside keys and values."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from malloc_bench.state.probes import Ask, merged


@dataclass(frozen=True)
class Stats:
    """What a method needs of a prefill beside keys and values; ask for the union of several with `|`.

    column_sum: total |weight| that each slot received from the history's own queries.
    window: weights of the newest `window` queries of the history over all slots, one row each.
    queries: the newest so many queries themselves, and what logits have beside their products with keys.
    inputs: what each layer got in for every event. outputs: each layer's map behind its mixture. projections: each
        layer's map from its input to what it stores, and with them the tables that the lowest layer's input comes from.
    alike: how little each layer changed every event.
    reader: weights of the tokens that will read, which nobody has when a state is made: a ceiling, not deployable.
    events: the raw events, so that a method knows which item and time a slot is of.
    categories, popularity: of each item, the latter in training events; with them come the events.
    probes: what catalogue items ask and get, see `Probes`: so many drawn by popularity, or an `Ask`.
    """

    column_sum: bool = False
    window: int = 0
    queries: int = 0
    inputs: bool = False
    outputs: bool = False
    events: bool = False
    categories: bool = False
    popularity: bool = False
    projections: bool = False
    alike: bool = False
    reader: bool = False
    probes: tuple[Ask, ...] | Ask | int = ()

    def __post_init__(self) -> None:
        asked = self.probes
        if isinstance(asked, int):
            asked = (Ask(asked),) if asked else ()
        object.__setattr__(self, "probes", (asked,) if isinstance(asked, Ask) else asked)

    def __or__(self, other: Stats) -> Stats:
        names = [f.name for f in fields(self) if f.name != "probes"]
        most = {name: max(getattr(self, name), getattr(other, name)) for name in names}
        return Stats(**most, probes=merged(self.asks, other.asks))

    @property
    def asks(self) -> tuple[Ask, ...]:
        """The probes that are asked for."""
        assert isinstance(self.probes, tuple)
        return self.probes

    def in_ranking(self) -> Stats:
        """What is gathered in ranking."""
        return replace(self, probes=tuple(ask.in_ranking() for ask in self.asks))

    @property
    def of_items(self) -> bool:
        """Whether anything about events or items is asked for."""
        return self.events or self.categories or self.popularity or bool(self.probes)


class MissingStatistic(ValueError):
    """A compressor asked a Prefill for what nobody gathered."""
