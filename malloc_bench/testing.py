"""Contract tests for anyone's compressor or backbone.

`check_compressor(MyMethod())` and `check_backbone(my_backbone)` run everything and raise AssertionError at the first broken
promise. `compressor_checks` and `backbone_checks` give the single checks, so that pytest shows one test for each:

    @pytest.mark.parametrize("check", compressor_checks(MyMethod()), ids=str)
    def test_contract(check):
        check()
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import Budget, Compressor, TokenMethod
from malloc_bench.state import (
    Batch, Dense, Events, MissingStatistic, Prefill, Quantized, Segment, Slots, Stats, UserState, map_tensors,
)  # fmt: skip

LENGTHS = (0, 1, 2, 3, 23, 40)  # ragged histories
BUDGETS = tuple(map(Budget.parse, (0.9, 0.5, 0.25, 0.1, 0.02, {"slots": 1}, {"slots": 6}, {"bytes": 1}, {"bytes": 2500})))
POISON = 1e4  # what padding is filled with


@dataclass(frozen=True)
class Check:
    """One promise, tried on one thing; calling it raises AssertionError where the promise is broken."""

    promise: Callable[..., None]
    on: tuple[object, ...]
    label: str

    def __call__(self) -> None:
        with torch.no_grad():
            self.promise(*self.on)

    def __str__(self) -> str:
        return f"{self.label}-{self.promise.__name__}"


@dataclass(frozen=True, eq=False)
class World:
    """Somewhere a compressor can be tried: behind a backbone, or on plain tensors where backbone is None."""

    name: str
    backbone: Backbone | None = None

    def prefill(self, stats: Stats, lengths: Sequence[int] = LENGTHS, constant: bool = False) -> Prefill:
        """Full states of users with histories of these lengths; constant: the same event again and again."""
        if self.backbone is not None:
            history, _ = histories(self.backbone, lengths, constant)
            return self.backbone.prefill(history, torch.arange(len(lengths)) + 11, stats, seed=3)
        shape = (len(lengths), 2, max(lengths, default=0), 8)
        q, k, v = ([_noise(shape, 3 * layer + i) for layer in range(2)] for i in range(3))
        if constant:
            q, k, v = ([torch.ones_like(x) for x in xs] for xs in (q, k, v))
        return Prefill.from_tensors(k, v, q, lengths=torch.tensor(lengths), users=torch.arange(len(lengths)) + 11, seed=3)

    def read(self, state: UserState, users: Sequence[int] | None = None, lengths: Sequence[int] = LENGTHS) -> Tensor:
        """What tokens get out of a state of the given users, [B, ...]."""
        rows = torch.arange(len(lengths)) if users is None else torch.tensor(users)
        if self.backbone is not None:
            _, tokens = histories(self.backbone, lengths)
            return self.backbone.read(map_tensors(lambda x: x.index_select(0, rows), tokens), state)
        queries = _noise((len(lengths), 2, 3, 8), 99).index_select(0, rows)
        return torch.stack([_softmax_read(queries, layer) for layer in state.layers], 1)


def histories(backbone: Backbone, lengths: Sequence[int], constant: bool = False) -> tuple[Events, Events]:
    """Made-up histories of these lengths and, behind each, two candidate tokens."""
    b, s = len(lengths), max(lengths, default=0)
    generator = torch.Generator().manual_seed(5)
    items = torch.randint(1, backbone.n_items + 1, (b, s + 2), generator=generator, dtype=torch.int32)
    gaps = (torch.rand(b, s + 2, generator=generator) * 12).exp().long() + 1  # seconds to days
    if constant:
        items[:] = 1
        gaps[:] = 60
    times = 1_700_000_000 + gaps.cumsum(1)
    count = torch.tensor(lengths, dtype=torch.int32)
    real = torch.arange(s) < count[:, None]
    now = times.gather(1, count.long()[:, None]).expand(b, 2)
    history = Events(items[:, :s].where(real, 0), count, times[:, :s].where(real, 0), times[:, 1 : s + 1].where(real, 0))
    return history, Events(items[:, s:], torch.full_like(count, 2), now, now)


def worlds(backbones: Iterable[Backbone] | None = None) -> list[World]:
    """Plain tensors and the given backbones; None: small ones of ours with large random weights."""
    if backbones is None:
        ours = (("sasrec", 1, False), ("sasrec", 2, False), ("hstu", 1, True), ("hstu", 2, False))
        backbones = [_lively(get_backbone(n, 60, t, heads=h, dim=16, max_length=64)) for n, h, t in ours]
    named = [World(f"{b.name}{i}", b.eval()) for i, b in enumerate(backbones)]
    return [World("tensors"), *named]


def compressor_checks(compressor: Compressor, *, backbones: Iterable[Backbone] | None = None) -> list[Check]:
    """Every promise of the design on every world that the compressor supports."""
    checks = []
    for world in worlds(backbones):
        if world.backbone is not None and compressor.supports(world.backbone):
            continue
        try:  # methods that rebuild from raw events cannot work on plain tensors
            compressor.compress(world.prefill(compressor.needs, (2,)), _budgets(compressor)[0])
        except MissingStatistic:
            if world.backbone is not None:
                raise
            continue
        checks += [Check(promise, (compressor, world), world.name) for promise in COMPRESSOR_PROMISES]
    return checks


def check_compressor(compressor: Compressor, *, backbones: Iterable[Backbone] | None = None) -> None:
    """Run all of `compressor_checks`."""
    for check in compressor_checks(compressor, backbones=backbones):
        check()


def keeps_the_budget(compressor: Compressor, world: World) -> None:
    prefill = world.prefill(compressor.needs)
    full, floor = prefill.state.nbytes(), compressor.floor(prefill)
    for budget in _budgets(compressor):
        state = compressor.compress(prefill, budget)
        assert bool((state.length <= prefill.state.length).all()) and len(state) == len(prefill.state)
        if budget is not None and (target := budget.target(full)) is not None:
            over = state.nbytes() - target.maximum(floor)
            assert bool((over <= 0).all()), f"{budget}: {over.tolist()} bytes over max(target, floor)"
        if budget is not None and budget.slots is not None:
            for layer in state.layers:
                kept = torch.stack([s.slots.count.amax(1) for s in layer if s.slots is not None]).sum(0)
                assert bool((kept <= budget.slots).all()), f"{budget}: {kept.tolist()} slots"


def uses_the_budget(compressor: Compressor, world: World) -> None:
    """One slot more would not fit."""
    if not isinstance(compressor, TokenMethod):
        return
    prefill = world.prefill(compressor.needs)
    length = prefill.state.length.long()
    for budget in _budgets(compressor):
        target = budget.target(prefill.state.nbytes()) if budget else None
        if budget is None or target is None:
            continue
        k = compressor.slots(prefill, budget)
        if compressor.keep(prefill, k).events is not None:
            continue  # raw events: sized by the reads that they buy
        larger = compressor.keep(prefill, (k + 1).minimum(length)).nbytes()
        fits = (k < length) & (larger <= target)
        assert not bool(fits.any()), f"{budget}: one slot more than {k.tolist()} takes {larger.tolist()} bytes"
        made = compressor.compress(prefill, budget).nbytes()
        assert bool((made == compressor.keep(prefill, k).nbytes())[made <= target].any())


def returns_full_for_a_whole_budget(compressor: Compressor, world: World) -> None:
    if compressor.takes_budget:
        prefill = world.prefill(compressor.needs)
        for fraction in (1.0, 1.5):
            assert _packed(compressor.compress(prefill, Budget(fraction))) == _packed(prefill.state)


def ignores_the_batch(compressor: Compressor, world: World) -> None:
    """A user alone, without padding, comes to the same bytes and outputs as in a batch."""
    prefill = world.prefill(compressor.needs)
    for budget in _budgets(compressor)[1:5]:
        together = compressor.compress(prefill, budget)
        outputs = world.read(together)
        for user, length in enumerate(LENGTHS):
            alone = compressor.compress(resized(prefill, [user], length), budget)
            assert int(alone.nbytes()) == int(together.nbytes()[user]), f"user {user} at {budget}"
            _close(world.read(alone, [user])[0], outputs[user], f"user {user} at {budget}", 1e-4)


def ignores_padding(compressor: Compressor, world: World) -> None:
    """Garbage behind a user's count changes neither what is kept nor what is read."""
    prefill = world.prefill(compressor.needs)
    wide = resized(prefill, range(len(LENGTHS)), max(LENGTHS) + 3, POISON)
    for budget in _budgets(compressor)[1:5]:
        clean, state = compressor.compress(prefill, budget), compressor.compress(wide, budget)
        assert state.nbytes().tolist() == clean.nbytes().tolist()
        _close(world.read(state), world.read(clean), f"poisoned full state at {budget}", 1e-4)
        _close(world.read(poisoned(clean)), world.read(clean), f"poisoned compressed state at {budget}", 1e-6)


def is_deterministic(compressor: Compressor, world: World) -> None:
    for budget in _budgets(compressor):
        first, second = (compressor.compress(world.prefill(compressor.needs), budget) for _ in range(2))
        assert _packed(first) == _packed(second)


def leaves_its_input(compressor: Compressor, world: World) -> None:
    prefill = world.prefill(compressor.needs)
    parts = (prefill.state, prefill.events, tuple(prefill.column_sum or ()), tuple(prefill.window or ()))
    before = map_tensors(torch.clone, parts)
    for budget in _budgets(compressor):
        compressor.compress(prefill, budget)
    changed: list[bool] = []
    originals: list[Tensor] = []
    map_tensors(lambda x: originals.append(x) or x, parts)  # type: ignore[func-returns-value]
    copies = iter(originals)
    map_tensors(lambda x: changed.append(not torch.equal(x, next(copies))) or x, before)  # type: ignore[func-returns-value]
    assert len(changed) == len(originals) and not any(changed)


def survives_degenerate_histories(compressor: Compressor, world: World) -> None:
    """Constant vectors, one outlier of 1e6, one event, none at all: finite outputs within the budget."""
    for name, lengths in (("constant", LENGTHS), ("outlier", LENGTHS), ("one", (1, 1)), ("empty", (0, 0))):
        prefill = world.prefill(compressor.needs, lengths, constant=name == "constant")
        if name == "outlier":
            prefill.keys(0)[:, 0, 0, 0] = 1e6
            prefill.values(0)[:, 0, 0, 0] = 1e6
        for budget in _budgets(compressor):
            state = compressor.compress(prefill, budget)
            assert bool(world.read(state, lengths=lengths).isfinite().all()), f"{name} at {budget}"
            target = budget.target(prefill.state.nbytes()) if budget else None
            if target is not None:
                assert bool((state.nbytes() <= target.maximum(compressor.floor(prefill))).all()), f"{name} at {budget}"
            assert [len(blob) for blob in _packed(state)] == state.nbytes().tolist()


def pickles(compressor: Compressor, world: World) -> None:
    copy = pickle.loads(pickle.dumps(compressor))
    budget = _budgets(compressor)[1 % len(_budgets(compressor))]
    prefill = world.prefill(compressor.needs)
    assert _packed(copy.compress(resized(prefill, range(len(LENGTHS)), 40), budget)) == _packed(
        compressor.compress(prefill, budget)
    )


def packs(compressor: Compressor, world: World) -> None:
    """nbytes is the packed length; unpacking restores every user; other lengths are refused."""
    prefill = world.prefill(compressor.needs)
    for budget in _budgets(compressor):
        check_packs(compressor.compress(prefill, budget), world.read)


def can_be_appended_to(compressor: Compressor, world: World) -> None:
    if world.backbone is None:
        return
    prefill = world.prefill(compressor.needs)
    _, new = histories(world.backbone, LENGTHS)
    for budget in _budgets(compressor)[1:4]:
        state = compressor.compress(prefill, budget)
        if state.events is not None:
            continue
        before = _packed(state)
        grown = world.backbone.append(world.backbone.append(state, new), new)
        assert _packed(state) == before, "append changed the state it was given"
        assert (grown.length - state.length).tolist() == [4] * len(LENGTHS)
        assert bool((grown.nbytes() > state.nbytes()).all())
        check_packs(grown, world.read)


COMPRESSOR_PROMISES: tuple[Callable[..., None], ...] = (
    keeps_the_budget, uses_the_budget, returns_full_for_a_whole_budget, ignores_the_batch, ignores_padding,
    is_deterministic, leaves_its_input, survives_degenerate_histories, pickles, packs, can_be_appended_to,
)  # fmt: skip
