"""What every compressor promises, one function a promise."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, TokenMethod
from malloc_bench.compressors.base import ours
from malloc_bench.compressors.chain.compose import Compose
from malloc_bench.compressors.fitted.fit_keys import FitKeys
from malloc_bench.evaluation.guard import undisturbed
from malloc_bench.registry import told
from malloc_bench.state import MissingStatistic, map_tensors
from malloc_bench.state.prefill import OBSERVED
from malloc_bench.testing.backbones import BACKBONE_PROMISES, read_needs_every_field
from malloc_bench.testing.elsewhere import OTHERS, Case, portable, read_elsewhere
from malloc_bench.testing.encoders import costs_what_it_says, writes_every_slot
from malloc_bench.testing.learning import budgets, learns, learns_soundly
from malloc_bench.testing.places import keeps_places
from malloc_bench.testing.worlds import (
    LENGTHS,
    POISON,
    Check,
    World,
    check_packs,
    close,
    histories,
    instance,
    packed,
    poisoned,
    resized,
    worlds,
)  # fmt: skip

Tried = Callable[[Check], object]


def compressor_checks(compressor: Compressor, *, backbones: Iterable[Backbone] | None = None) -> list[Check]:
    """Every promise on every world that the compressor supports; ValueError where it fails before, TypeError of none.

    A structural one adapts each backbone, which must then keep what backbones promise, but for what takes training.
    """
    instance(compressor, Compressor)
    try:
        hash(compressor)
    except TypeError as error:
        raise ValueError(f"{compressor.name} has no hash ({error}): make its parameters tuples or text") from None
    places = worlds(backbones)
    try:
        with undisturbed():
            return _checks(compressor, places)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{compressor.name} fails before anything can be tried ({told(error)})") from error


def _checks(compressor: Compressor, places: Sequence[World]) -> list[Check]:
    checks, part, elsewhere = [], compressor.structural, None
    for world in places:
        plain = world.backbone
        if plain is not None and compressor.supports(plain):
            continue
        if part is not None:
            if plain is None:
                continue
            world = World(world.name, part.adapted(plain).eval())
            tried = (promise for promise in BACKBONE_PROMISES if promise is not read_needs_every_field)
            checks += [Check(promise, (world.backbone,), world.name) for promise in tried]
        try:  # methods that rebuild from raw events cannot work on plain tensors
            world = world.fit(compressor, budgets(compressor, some=True)[0])
        except MissingStatistic:
            if world.backbone is not None:
                raise
            continue
        except (Exception, SystemExit) as error:
            checks.append(Check(learns, (told(error),), world.name))
            continue
        try:
            compressor.compress(world.prefill(compressor.needs, (2,)), budgets(compressor)[0])
        except MissingStatistic:
            if world.backbone is not None:
                raise
            continue
        except (Exception, SystemExit):  # the promises say what is wrong
            pass
        elsewhere = elsewhere or Case(compressor, plain, budgets(compressor, some=True)[0])
        checks += [Check(promise, (compressor, world), world.name) for promise in COMPRESSOR_PROMISES]
    if elsewhere is not None and portable(compressor):
        checks.append(Check(is_read_from_its_bytes_alone, (elsewhere,), "fresh process"))
    return checks


def broken_promises(
    compressor: Compressor, *, backbones: Iterable[Backbone] | None = None, quick: bool = False, trying: Tried = str
) -> list[str]:
    """A line for each of `compressor_checks` that fails, empty where all is well. trying: told of each before it.

    quick: on plain tensors and behind one backbone only; some seconds.
    """
    if quick and backbones is None:
        backbones = [b for world in worlds() if (b := world.backbone) is not None and world.name == "sasrec1"]
    broken = []
    for check in compressor_checks(compressor, backbones=backbones):
        trying(check)
        try:
            check()
        except Exception as error:  # whatever it is, a promise is broken
            broken.append(f"{check}: {told(error)}")
    return broken


def read_alone(compressor: Compressor) -> None:
    """Nothing for methods of ours, which have been checked; for others, raises AssertionError where a fresh process
    does not read from the bytes of their states what this one does. Some seconds.
    """
    if ours(compressor) or not portable(compressor):
        return
    for world in worlds():
        plain = world.backbone
        if plain is not None and not compressor.supports(plain):
            return is_read_from_its_bytes_alone(Case(compressor, plain, budgets(compressor, some=True)[0]))


def check_compressor(compressor: Compressor, *, backbones: Iterable[Backbone] | None = None) -> None:
    """Run all of `compressor_checks`."""
    for check in compressor_checks(compressor, backbones=backbones):
        check()


def keeps_the_budget(compressor: Compressor, world: World) -> None:
    prefill = world.full(compressor.needs)
    full, floor = prefill.state.nbytes(), compressor.floor(prefill)
    for budget in budgets(compressor):
        state = world.made(compressor, budget)
        grown = len(state) != len(prefill.state) or bool((state.length > prefill.state.length).any())
        assert not grown, f"{budget}: more users or events than it was given"
        if budget is not None and (target := budget.target(full)) is not None:
            over = state.nbytes() - target.maximum(floor)
            assert bool((over <= 0).all()), f"{budget}: bytes of a user above budget and floor: {over.tolist()}"
        if budget is not None and budget.slots is not None:
            kept = [torch.stack([s.slots.count for s in layer if s.slots is not None]).sum(0) for layer in state.layers]
            if isinstance(compressor, TokenMethod) and not compressor.even:  # so many on average
                total = torch.stack([n.sum(1) for n in kept]).sum(0)
                fits = total <= compressor.most(prefill, budget.slots)
                assert bool(fits.all()), f"{budget}: {total.tolist()} slots"
                continue
            for n in kept:
                assert bool((n <= budget.slots).all()), f"{budget}: {n.tolist()} slots"


def uses_the_budget(compressor: Compressor, world: World) -> None:
    """One slot more would not fit."""
    if not isinstance(compressor, TokenMethod):
        return
    prefill = world.full(compressor.needs)
    most = compressor.most(prefill)
    for budget in budgets(compressor):
        target = budget.target(prefill.state.nbytes()) if budget else None
        if budget is None or target is None:
            continue
        k = compressor.slots(prefill, budget)
        if compressor.keep(prefill, k).events is not None:
            continue  # raw events: sized by the reads that they buy
        larger = compressor.keep(prefill, (k + 1).minimum(most)).nbytes()
        fits = (k < most) & (larger <= target)
        assert not bool(fits.any()), f"{budget}: one slot more than {k.tolist()} takes {larger.tolist()} bytes"
        made, kept = world.made(compressor, budget).nbytes(), compressor.keep(prefill, k).nbytes()
        assert bool((made == kept)[kept <= target].all()), f"{budget}: {made.tolist()} bytes where {kept.tolist()} fit"


def returns_full_for_a_whole_budget(compressor: Compressor, world: World) -> None:
    if compressor.takes_budget:
        prefill = world.full(compressor.needs)
        for fraction in (1.0, 1.5):
            assert packed(compressor.compress(prefill, Budget(fraction))) == packed(prefill.state), "not the full one"


def _apart(compressor: Compressor) -> float:
    """How far outputs may lie apart where sums were added in another order: rounding that makes up for rounding turns
    a last digit into another code, and a descent goes on from where it is."""
    if isinstance(compressor, Compose) and compressor.settles:
        return 0.1
    return 2e-3 if isinstance(compressor, FitKeys) else 1e-4


def ignores_the_batch(compressor: Compressor, world: World) -> None:
    """A user alone, without padding, comes to the same bytes and outputs as in a batch."""
    prefill = world.full(compressor.needs)
    single = [resized(prefill, [user], length) for user, length in enumerate(LENGTHS)]
    for budget in budgets(compressor, some=True):
        together = world.made(compressor, budget)
        outputs, sizes = world.read(together), together.nbytes().tolist()
        for user, alone in enumerate(compressor.compress(one, budget) for one in single):
            assert int(alone.nbytes()) == sizes[user], f"user {user} at {budget}"
            close(world.read(alone, [user])[0], outputs[user], f"user {user} at {budget}", _apart(compressor))


def ignores_padding(compressor: Compressor, world: World) -> None:
    """Garbage behind a user's count changes neither what is kept nor what is read."""
    prefill = world.full(compressor.needs)
    wide = resized(prefill, range(len(LENGTHS)), max(LENGTHS) + 3, POISON)
    for budget in budgets(compressor, some=True):
        clean, state = world.made(compressor, budget), compressor.compress(wide, budget)
        assert state.nbytes().tolist() == clean.nbytes().tolist(), f"{budget}: bytes depend on padding"
        outputs = world.read(clean)
        close(world.read(state), outputs, f"poisoned full state at {budget}", _apart(compressor))
        close(world.read(poisoned(clean)), outputs, f"poisoned compressed state at {budget}", 1e-6)


def candidates_are_read_alone(compressor: Compressor, world: World) -> None:
    """Ranking reads many candidates of a compressed state at once: each as if it were the only one."""
    if world.backbone is None:
        return
    _, tokens = histories(world.backbone, LENGTHS)
    for budget in budgets(compressor, some=True):
        state = world.made(compressor, budget)
        together = world.backbone.read(tokens, state)
        for m in range(tokens.items.shape[1]):
            one = map_tensors(lambda x: x[:, m : m + 1] if x.dim() == 2 else torch.ones_like(x), tokens)  # noqa: B023
            close(world.backbone.read(one, state), together[:, m : m + 1], f"candidate {m} at {budget}", 1e-5)


def is_deterministic(compressor: Compressor, world: World) -> None:
    again = world.prefill(compressor.needs)
    _ = torch.rand(7), np.random.rand(7), random.random()  # each promise begins where random numbers stood before
    for budget in budgets(compressor, some=True):
        assert packed(compressor.compress(again, budget)) == packed(world.made(compressor, budget)), "differs"


def leaves_its_input(compressor: Compressor, world: World) -> None:
    prefill = world.prefill(compressor.needs)
    seen = [tuple(getattr(prefill, name) or ()) for name in OBSERVED]
    parts = (prefill.state, prefill.events, seen, prefill.shared())
    before = map_tensors(torch.clone, parts)
    for budget in budgets(compressor, some=True):
        compressor.compress(prefill, budget)
    changed: list[bool] = []
    originals: list[Tensor] = []
    map_tensors(lambda x: originals.append(x) or x, parts)  # type: ignore[func-returns-value]
    copies = iter(originals)
    map_tensors(lambda x: changed.append(not torch.equal(x, next(copies))) or x, before)  # type: ignore[func-returns-value]
    assert len(changed) == len(originals) and not any(changed), "compress wrote into what it was given"


def survives_degenerate_histories(compressor: Compressor, world: World) -> None:
    """Constant vectors, one outlier of 1e6, one event, none at all: finite outputs within the budget."""
    for name, lengths in (("constant", LENGTHS), ("outlier", LENGTHS), ("one", (1, 1)), ("empty", (0, 0))):
        prefill = world.prefill(compressor.needs, lengths, constant=name == "constant")
        if name == "outlier":
            for vectors in prefill.segment(0).fields.values():
                vectors.dense()[:, 0, 0, 0] = 1e6
        for budget in budgets(compressor, some=True):
            state = compressor.compress(prefill, budget)
            assert bool(world.read(state, lengths=lengths).isfinite().all()), f"{name} at {budget}: reads NaN, infinite"
            if budget and (target := budget.target(prefill.state.nbytes())) is not None:
                over = (state.nbytes() - target.maximum(compressor.floor(prefill))).tolist()
                assert max(over) <= 0, f"{name} at {budget}: bytes of a user above budget and floor: {over}"
            sizes, said = [len(blob) for blob in packed(state)], state.nbytes().tolist()
            assert sizes == said, f"{name} at {budget}: packed are {sizes} bytes, said {said}"


def pickles(compressor: Compressor, world: World) -> None:
    copy = pickle.loads(pickle.dumps(compressor))
    budget = budgets(compressor, some=True)[0]
    forgetful = replace(world.full(compressor.needs), memo={})
    assert packed(copy.compress(forgetful, budget)) == packed(world.made(compressor, budget)), (
        "a copy makes other states"
    )


def packs(compressor: Compressor, world: World) -> None:
    """nbytes is the packed length; unpacking, beside other users, restores every user; other lengths are refused."""
    others = world.prefill(compressor.needs, OTHERS)
    for budget in budgets(compressor, some=True):
        check_packs(world.made(compressor, budget), world.read, compressor.compress(others, budget))


def is_read_from_its_bytes_alone(case: Case) -> None:
    """A process that has seen none of the users reads the same from their bytes."""
    written, blobs, want = case.written()
    (got,) = read_elsewhere([(written, blobs)])
    assert not isinstance(got, str), f"a fresh process cannot read the bytes: {got}"
    close(torch.from_numpy(got), want, "read in a fresh process", 1e-5)


def can_be_appended_to(compressor: Compressor, world: World) -> None:
    if world.backbone is None:
        return
    prefill = world.full(compressor.needs)
    _, new = histories(world.backbone, LENGTHS)
    for budget in budgets(compressor, some=True):
        state = world.made(compressor, budget)
        if state.events is not None:
            continue
        before = packed(state)
        grown = world.backbone.append(world.backbone.append(state, new), new)
        assert packed(state) == before, "append changed the state it was given"
        more = (grown.length - state.length).tolist()
        assert more == [4] * len(LENGTHS), f"{more} events more after 4 were appended"
        if world.backbone.has_slots and world.backbone.only_adds:
            assert bool((grown.nbytes() > state.nbytes()).all()), "a state that only adds does not grow"
        elif not world.backbone.has_slots:
            assert grown.nbytes().tolist() == prefill.state.nbytes().tolist(), "a memory does not grow with the history"
        check_packs(grown, world.read)


def stays_in_the_budget_as_users_go_on(compressor: Compressor, world: World) -> None:
    """Two events are appended twice, and `update` brings the state back within the budget of the grown history.

    Not tried: methods that need what nobody can tell of a state that has forgotten events.
    """
    backbone, needs = world.backbone, compressor.needs
    if backbone is None or not backbone.has_slots or not compressor.takes_budget:
        return
    prefill = world.full(needs)
    _, new = histories(backbone, LENGTHS)
    for budget in budgets(compressor, some=True):
        state, full = world.made(compressor, budget), prefill.state
        if state.events is not None:
            continue
        for _ in range(2):
            full = backbone.append(full, new)
            try:
                grown = replace(backbone.go_on(prefill, state, new, needs), whole=full.nbytes())
                state = compressor.update(grown, budget, world.fitted)
            except MissingStatistic:
                return
            assert state.length.tolist() == full.length.tolist(), "update counts other events than there are"
            if (target := budget.target(full.nbytes()) if budget else None) is not None:
                over = state.nbytes() - target.maximum(compressor.floor(grown))
                assert bool((over <= 0).all()), f"{budget}: bytes of a user above budget and floor: {over.tolist()}"
            assert bool(world.read(state).isfinite().all()), f"{budget}: reads NaN, infinite after update"


COMPRESSOR_PROMISES: tuple[Callable[..., None], ...] = (
    keeps_the_budget, uses_the_budget, costs_what_it_says, writes_every_slot, keeps_places,
    returns_full_for_a_whole_budget, ignores_the_batch, ignores_padding, candidates_are_read_alone, is_deterministic,
    leaves_its_input, survives_degenerate_histories, pickles, packs, can_be_appended_to, learns_soundly,
    stays_in_the_budget_as_users_go_on,
)  # fmt: skip
