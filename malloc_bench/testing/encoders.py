"""What encoders promise beside what every compressor does."""

from __future__ import annotations

import torch

from malloc_bench.compressors import Compressor, Encoder, get_compressor
from malloc_bench.compressors.chain.compose import Compose
from malloc_bench.compressors.selection import gather
from malloc_bench.registry import told
from malloc_bench.state import Fitted, Segment, Slots, UserState
from malloc_bench.testing.worlds import World, close


def costs_what_it_says(compressor: Compressor, world: World) -> None:
    """An encoder's `cost`, by which chains know how many slots fit, is within a factor of what is packed, of all slots,
    half of them and one; what codes to entropy need not know it better."""
    if not isinstance(compressor, Encoder) or compressor.takes_budget:
        return
    try:
        chain = Compose((get_compressor("recent"), compressor))
    except ValueError:  # nobody knows what it asks for behind other methods
        return
    if world.backbone is None or chain.supports(world.backbone) is None:
        prefill = world.full(chain.needs)
        prefill = prefill.given(None if world.fitted is None else Fitted.joined({"1": world.fitted}))
        sizes, most = chain.sizes(prefill), chain.most(prefill)
        for k in (most,) if compressor.measured else (most, most // 2, most.clamp(max=1)):
            said, size = sizes(k), chain.keep(prefill, k).nbytes()
            off = float(size.sum() / said.sum().clamp(min=1))
            what = f"{off:.2g} times the bytes that `cost` says of {k.tolist()} slots"
            assert 0.6 < off < 2.5, f"{what}: {size.tolist()} for {said.tolist()}"


def writes_every_slot(compressor: Compressor, world: World) -> None:
    """An encoder leaves no slot out and makes none; with `by_field` a field alone comes out as it does beside others,
    with `by_vector` a vector too, and what is written stays as it is when it is written again."""
    if not isinstance(compressor, Encoder) or compressor.takes_budget:
        return
    prefill = world.full(compressor.needs)
    if any(segment.slots is None for segment in prefill.state.segments()):
        return

    def write(state: UserState) -> UserState:
        return compressor.write(prefill.over(state))

    whole = compressor.write(prefill)
    for number, (layer, was) in enumerate(zip(whole.layers, prefill.state.layers)):
        got = torch.stack([s.slots.count.amin(1) for s in layer if s.slots is not None]).sum(0)
        want = torch.stack([s.slots.count.amin(1) for s in was if s.slots is not None]).sum(0)
        assert torch.equal(got, want), f"layer {number} has {got.tolist()} slots of {want.tolist()}"
    for name in prefill.segment(0).fields if compressor.by_field else ():
        try:
            alone = write(_parts(prefill.state, name))
        except Exception as error:
            raise AssertionError(f"{name} alone cannot be written ({told(error)}): say by_field = False") from error
        _alike(alone, _parts(whole, name), f"{name} alone comes out otherwise than beside the rest: by_field is False")
    if compressor.by_vector:
        few = write(_some(prefill.state))
        _alike(few, _some(whole), "some vectors alone come out otherwise than among all: by_vector is False")
        _alike(write(whole), whole, "what is written comes out otherwise when it is written again")


def _parts(state: UserState, name: str) -> UserState:
    """One field of each segment, beside which only the number of slots is known."""
    bare = {id(s.slots): s.slots and Slots(s.slots.count) for s in state.segments()}  # shared ones stay shared
    layers = (tuple(Segment({name: s.fields[name]}, bare[id(s.slots)]) for s in layer) for layer in state.layers)
    return UserState(tuple(layers), state.length)


def _some(state: UserState) -> UserState:
    """Every other slot, of one segment a layer."""
    layers = []
    for (segment,) in state.layers:
        assert segment.slots is not None
        at = torch.arange(0, segment.width, 2).expand(len(state), 1, -1)
        layers.append((gather(segment, at, Slots((segment.slots.count + 1) // 2)),))
    return UserState(tuple(layers), state.length)


def _alike(got: UserState, want: UserState, what: str) -> None:
    for one, other in zip(got.segments(), want.segments()):
        for name, vectors in one.fields.items():
            x, y = vectors.dense(), other.fields[name].dense()
            if x.shape == y.shape and other.slots is not None:
                real = other.slots.mask(x.shape[2]).unsqueeze(-1)
                x, y = x.where(real, 0), y.where(real, 0)
            close(x, y, what, 1e-6)
