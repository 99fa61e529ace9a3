"""Where contracts are tried: made-up histories, plain tensors, poisoned padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import Budget, Compressor
from malloc_bench.evaluation.guard import undisturbed
from malloc_bench.registry import clipped, told
from malloc_bench.state import (
    Dense,
    Events,
    Fitted,
    Layer,
    Named,
    Prefill,
    Quantized,
    Segment,
    Slots,
    Stats,
    UserState,
    map_tensors,
)

T = TypeVar("T")

STATISTICS = {"column_sum": 2, "window": 3, "inputs": 1, "alike": 1, "reader": 2, "standing": 2}  # the slots' axis
LENGTHS = (0, 1, 2, 3, 23, 40)  # ragged histories
FITTED = (1, 17, 40, 33, 28)  # histories of users that methods are fitted to
POISON = 1e4  # what padding is filled with


@dataclass(frozen=True)
class Check:
    """One promise, tried on one thing; calling it raises AssertionError where the promise is broken."""

    promise: Callable[..., None]
    on: tuple[object, ...]
    label: str

    def __call__(self) -> None:
        try:
            with torch.no_grad(), undisturbed():
                self.promise(*self.on)
        except SystemExit as error:
            raise AssertionError(f"it ends the process: {told(error)}") from error

    def __str__(self) -> str:
        return f"{self.label}-{self.promise.__name__}"


@dataclass(frozen=True, eq=False)
class World:
    """Somewhere a compressor can be tried: behind a backbone, or on plain tensors where backbone is None.

    fitted: what the one that is tried has learned here.
    """

    name: str
    backbone: Backbone | None = None
    fitted: Fitted | None = None
    shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what several promises look at

    def full(self, stats: Stats) -> Prefill:
        """`prefill(stats)`, made once: for promises that leave it as it is."""
        if stats not in self.shared:
            self.shared[stats] = self.prefill(stats)
        return self.shared[stats]

    def made(self, compressor: Compressor, budget: Budget | None) -> UserState:
        """What the compressor makes of `full`, made once a budget."""
        key = id(compressor), budget
        if key not in self.shared:  # with the compressor, so that its id stays its own
            self.shared[key] = compressor, compressor.compress(self.full(compressor.needs), budget)
        return self.shared[key][1]

    def prefill(self, stats: Stats, lengths: Sequence[int] = LENGTHS, constant: bool = False, draw: int = 0) -> Prefill:
        """Full states of users with histories of these lengths; constant: the same event again and again."""
        users, n_items = torch.arange(len(lengths)) + 11, 60 if self.backbone is None else self.backbone.n_items
        items = _facts(n_items) if stats.of_items else None
        known: dict[str, Any] = {"items": items, "fitted": self.fitted}
        if self.backbone is not None:
            history, tokens = histories(self.backbone, lengths, constant, draw)
            return replace(self.backbone.prepare(history, users, stats, 3, items, tokens), **known)
        shape = (len(lengths), 2, max(lengths, default=0), 8)
        q, k, v = ([_noise(shape, 3 * layer + i + 100 * draw) for layer in range(2)] for i in range(3))
        if constant:
            q, k, v = ([torch.ones_like(x) for x in xs] for xs in (q, k, v))
        maps = [_noise((2, 8, 5), 50 + layer) for layer in range(2)]
        probes = [
            _noise((len(lengths), 2, stats.asks[0].number, 8), 60 + layer) for layer in range(2 if stats.asks else 0)
        ]
        more: dict[str, Any] = {"seed": 3, "outputs": maps, "probes": probes or None}
        made = Prefill.from_tensors(k, v, q, lengths=torch.tensor(lengths), users=users, **more)
        count, events = made.state.length, None
        if stats.of_items:  # else methods that rebuild from events would try to
            drawn = torch.randint(1, n_items + 1, shape[:1] + shape[2:3], generator=torch.Generator().manual_seed(5))
            real = torch.arange(shape[2]) < count[:, None]
            events = Events(drawn.int().where(real, 0).clamp(max=1 if constant else n_items), count)
        if stats.reader:
            known["reader"] = [_noise(shape[:3], 60 + layer).abs() for layer in range(2)]
        return replace(made, events=events, **known)

    def sample(self, compressor: Compressor, draw: int = 1) -> Prefill:
        """Training users, other ones for every draw."""
        return self.prefill(compressor.fit_needs, FITTED, draw=draw)

    def fit(self, compressor: Compressor, budget: Budget | None = None) -> World:
        """This place once the compressor has learned what it learns."""
        if not compressor.fit_parts():
            return self
        return replace(self, fitted=fitted(compressor, self.sample(compressor), budget))

    def read(self, state: UserState, users: Sequence[int] | None = None, lengths: Sequence[int] = LENGTHS) -> Tensor:
        """What tokens get out of a state of the given users, [B, ...]."""
        rows = torch.arange(len(lengths)) if users is None else torch.tensor(users)
        if self.backbone is not None:
            _, tokens = histories(self.backbone, lengths)
            return self.backbone.read(map_tensors(lambda x: x.index_select(0, rows), tokens), state)
        queries = _noise((len(lengths), 2, 3, 8), 99).index_select(0, rows)
        return torch.stack([_softmax_read(queries, layer) for layer in state.layers], 1)


def fitted(compressor: Compressor, sample: Any, budget: Budget | None) -> Fitted:
    """What the parts of a method learn, each with the budget only where it says that it uses one, as in a run."""
    fits = {}
    for name, part in compressor.fit_parts().items():
        made: Any = part.fit(sample, budget if part.fit_uses_budget else None)
        if not isinstance(made, Fitted) or not made.nbytes:
            found = "none" if isinstance(made, Fitted) else type(made).__name__
            raise TypeError(f"{part.name}: fit must return a Fitted of named tensors, not {found}")
        fits[name] = made
    return fits[""] if "" in fits else Fitted.joined(fits)


def _facts(n_items: int) -> Named:
    every = torch.arange(n_items)
    known = {"categories": every % 7, "popularity": every**2 % 11, "probes": every.flip(0) + 1, "popular": every + 1}
    known["even"] = every.roll(3) + 1
    return Named({**known, "gaps": every**3 % 5_000 + 1})


def histories(
    backbone: Backbone, lengths: Sequence[int], constant: bool = False, draw: int = 0
) -> tuple[Events, Events]:
    """Made-up histories of these lengths and, behind each, two candidate tokens."""
    b, s = len(lengths), max(lengths, default=0)
    generator = torch.Generator().manual_seed(5 + 100 * draw)
    items = torch.randint(1, backbone.n_items + 1, (b, s + 2), generator=generator, dtype=torch.int32)
    gaps = (torch.rand(b, s + 2, generator=generator) * 12).exp().long() + 1  # seconds to days
    if constant:
        items[:] = 1
        gaps[:] = 60
    times = 1_700_000_000 + gaps.cumsum(1)
    count = torch.tensor(lengths, dtype=torch.int32)
    real = torch.arange(s) < count[:, None]
    kinds = torch.randint(0, 256, (b, s + 2), generator=generator, dtype=torch.uint8)
    now = times.gather(1, count.long()[:, None]).expand(b, 2)
    columns = items[:, :s], times[:, :s], times[:, 1 : s + 1], kinds[:, :s]
    known, *more = (x.where(real, 0) for x in columns)
    return Events(known, count, *more), Events(items[:, s:], torch.full_like(count, 2), now, now, kinds[:, s:])


def worlds(backbones: Iterable[Backbone] | None = None) -> list[World]:
    """Plain tensors and the given backbones; None: small ones of ours with large random weights."""
    if backbones is None:
        ours = (
            ("sasrec", 1, False), ("sasrec", 4, False), ("hstu", 1, True), ("hstu", 4, False), ("gated_delta", 2, False)
        )  # fmt: skip
        backbones = [lively(get_backbone(n, 60, t, heads=h, dim=16, max_length=64)) for n, h, t in ours]
    named = []
    for i, backbone in enumerate(backbones):
        instance(backbone, Backbone)
        named.append(World(f"{backbone.name}{i}", backbone.eval()))
    return [World("tensors"), *named]


def resized(prefill: Prefill, users: Sequence[int], width: int, fill: float = 0.0) -> Prefill:
    """The full states of some users, padded to `width` slots, the padding filled with `fill`; a memory has none."""
    rows = torch.tensor(list(users), dtype=torch.long)
    length = prefill.state.length.index_select(0, rows)

    def fit(x: Tensor, axis: int, count: Tensor, fill: float = fill) -> Tensor:
        real = torch.arange(width) < count[:, None]
        x = x.index_select(0, rows)
        short = list(x.shape)
        short[axis] = max(width - x.shape[axis], 0)
        x = torch.cat([x.narrow(axis, 0, min(width, x.shape[axis])), x.new_zeros(short)], axis)
        shape = [1] * x.dim()
        shape[0], shape[axis] = len(rows), width
        return torch.where(real.view(shape), x, torch.tensor(fill).to(x.dtype))

    counts = [prefill.rows(layer)[rows] for layer in prefill.layers]
    made: dict[int, Slots] = {}  # layers that share their slots go on sharing them
    layers: list[Layer] = []
    for layer, count in zip(prefill.layers, counts):
        old = prefill.segment(layer).slots
        if old is None:
            memory = {k: Dense(v.dense().index_select(0, rows)) for k, v in prefill.segment(layer).fields.items()}
            layers.append((Segment(memory, None),))
            continue
        if id(old) not in made:
            places, times = (None if x is None else fit(x, 2, count) for x in (old.positions, old.timestamps))
            made[id(old)] = Slots(old.count[rows, :1], places, times)
        fields = {k: v.each(lambda x: fit(x, 2, count)) for k, v in prefill.segment(layer).fields.items()}  # noqa: B023
        layers.append((Segment(fields, made[id(old)]),))
    events = prefill.events
    if events is not None:
        items = fit(events.items, 1, length, 0)
        events = replace(events.each(lambda x: fit(x, 1, length), length), items=items)
    seen: dict[str, Any] = {
        name: [fit(x, axis, n, 0) for x, n in zip(known, counts)]
        for name, axis in STATISTICS.items()
        if (known := getattr(prefill, name)) is not None
    }
    if prefill.queries is not None:
        seen["queries"] = [x.index_select(0, rows) for x in prefill.queries]
    if prefill.probed is not None:
        seen["probed"] = map_tensors(lambda x: x.index_select(0, rows), list(prefill.probed))
    return replace(
        prefill,
        state=UserState(tuple(layers), length),
        users=prefill.users.index_select(0, rows),
        events=events,
        memo={},
        **seen,
    )


def poisoned(state: UserState) -> UserState:
    """A copy with garbage in every cell that `pack` does not write, so that whoever reads padding is seen."""
    copy = state.map(torch.clone)
    for slots, vectors, _ in copy._stored():
        if isinstance(vectors, Quantized):  # its scales are stored in one of two precisions: parts() shows copies
            if slots is not None:  # a memory has no row to spare
                _spoil(vectors.codes, slots.count)
                for numbers in (vectors.scale, vectors.zero):
                    if numbers is not None:
                        _spoil(numbers, vectors.groups(slots.count))
        elif vectors is not None:
            for part in vectors.parts(None if slots is None else slots.count):
                _spoil(part.data, part.rows, part.cols)
        elif slots is not None:
            for tensor in (slots.positions, slots.mass, slots.timestamps, slots.score):
                if tensor is not None:
                    _spoil(tensor.unsqueeze(-1), slots.count)
    return copy


def _spoil(data: Tensor, rows: Tensor, cols: Tensor | None = None) -> None:
    """Overwrite data [B, H, R, C] outside the leading rows x cols."""
    real = (torch.arange(data.shape[2]) < rows.unsqueeze(-1)).unsqueeze(-1)
    if cols is not None:
        real = real & (torch.arange(data.shape[3]) < cols.unsqueeze(-1)).unsqueeze(-2)
    small = {torch.uint8: 255, torch.int8: 127}
    data.masked_fill_(~real, small.get(data.dtype, POISON))


def instance(part: Any, kind: type) -> None:
    """Raises TypeError where a part is none of its kind, Compressor or Backbone."""
    if not isinstance(part, kind):
        what = f"the class {part.__name__}" if isinstance(part, type) else clipped(repr(part))
        one = 'get_compressor("knorm")' if kind is Compressor else 'get_backbone("sasrec", n_items=60, has_time=False)'
        raise TypeError(f"expected a {kind.__name__.lower()}, not {what}: make one, such as {one}")


def check_packs(
    state: UserState, read: Callable[[UserState], Tensor] | None = None, template: UserState | None = None
) -> UserState:
    """Bytes, and those of all parts together, are packed lengths, unpacking restores all that was stored, other lengths
    raise ValueError.

    template: a state of other users to unpack into; None: the state itself.
    """
    blobs = packed(state)
    sizes, said = [len(blob) for blob in blobs], state.nbytes().tolist()
    assert sizes == said, f"packed are {sizes} bytes, nbytes says {said}"
    parts = state.nbytes_by_part()
    whole = [sum(own) for own in zip(*(each.tolist() for each in parts.values()))]
    assert whole == sizes, f"parts come to {whole} bytes of {sizes}"
    assert all(parts), "a part has no name"
    back = (template or state).unpack(blobs)
    assert packed(back) == blobs and back.nbytes().tolist() == said, "what was unpacked packs otherwise"
    if read is not None:
        close(read(back), read(state), "read of the unpacked state", 1e-5)
    for wrong in (blobs[-1][:-1], blobs[-1] + b"!"):
        try:
            state.unpack([*blobs[:-1], wrong])
        except ValueError:
            continue
        raise AssertionError(f"a blob of {len(wrong)} bytes was accepted for one of {len(blobs[-1])}")
    return back


def packed(state: UserState) -> list[bytes]:
    return state.packed(range(len(state)))


def close(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    """Equal up to tolerance x the largest number wanted (at least 1)."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    assert bool(got.isfinite().all()), f"{what}: not finite"
    if got.numel():
        got, want = got.detach(), want.detach()
        error, scale = float((got - want).abs().max()), max(float(want.abs().max()), 1.0)
        assert error <= tolerance * scale, f"{what}: off by {error:.2e} of {scale:.2e}"


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(backbone: Backbone) -> Backbone:
    """Weights so large that attention is far from uniform: fresh ones hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return backbone


def _softmax_read(queries: Tensor, layer: Layer) -> Tensor:
    """Softmax attention [B, H, M, D] over a layer and one slot of zeros, so that nothing is no problem."""
    asked = queries / queries.shape[-1] ** 0.5
    logits, mixes = [queries.new_zeros(*queries.shape[:3], 1)], list[Callable[[Tensor], Tensor]]()
    for segment in layer:
        if segment.slots is None:  # as `folded.summed` has it
            known = {name: vectors.dense() for name, vectors in segment.fields.items()}
            answer = known["constant"]
            if "asks" in known:
                answer = answer + asked @ known["asks"].mT @ known["answers"]
            logits.append(
                known["weight"] + (asked @ known["key"].mT if "key" in known else torch.zeros_like(logits[0]))
            )
            mixes.append(answer.mul)
            continue
        x = segment.fields["keys"].dot(asked)
        if segment.slots.mass is not None:
            x = x + segment.slots.mass.clamp(min=1e-6).log().unsqueeze(2)
        logits.append(x.masked_fill(~segment.slots.mask(segment.width).unsqueeze(2), -torch.inf))
        mixes.append(segment.fields["values"].mix)
    _, *weights = torch.cat(logits, -1).softmax(-1).split([x.shape[-1] for x in logits], -1)
    return sum((mix(w) for mix, w in zip(mixes, weights)), torch.zeros_like(queries))
