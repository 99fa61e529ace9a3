"""Mutated bytes of every kind of state: refused with a ValueError, or read as what they say; quickly, in little memory.

By itself it prints counts:  python tests/faults/test_unpack.py --blobs 5000 --seed 0
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import peak_memory
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState, low_rank, quantize
from malloc_bench.testing import World, histories

LENGTHS, OTHERS = (0, 1, 3, 12), (7, 2)
SECONDS, BYTES = 1.0, 100e6
METHODS = {
    "full": ("full", {}), "none": ("none", {}), "recent": ("recent", {}), "per head": ("knorm", {}),
    "merged": ("merge_adjacent", {}), "int8": ("int8", {}), "kivi": ("kivi", {"bits": 2, "group": 4}),
    "tail": ("kivi", {"bits": 4, "group": 4, "tail": 2}), "svd": ("svd", {}),
    "svd codes": ("svd", {"dtype": "int4"}), "turned": ("turboquant", {"bits": 3}), "raw": ("recompute", {}),
    "truncated": ("truncate", {}), "chain": ("compose", {"steps": ("merge_adjacent", {"kivi": {"bits": 4}})}),
    "zipped": ("zstd", {}), "zipped codes": ("zstd", {"inner": {"kivi": {"bits": 2, "group": 4}}}),
    "thin chain": ("compose", {"steps": ("h2o", {"svd": {"rank": 2}})}),
}  # fmt: skip
SPECIAL = (0, 1, -1, 2, 3, 127, 255, 2**15, 2**16, 2**24, 2**31 - 1, -(2**31), 2**30, -7)


@cache
def kinds() -> dict[str, tuple[list[bytes], UserState]]:
    """By name: packed users of LENGTHS and, as the template, a state of OTHERS: other users, and another number."""
    torch.manual_seed(0)
    made: dict[str, tuple[UserState, UserState]] = {}
    worlds = [World("tensors")]
    for name in ("sasrec", "hstu", "gated_delta", "marm", "climber"):
        backbone = get_backbone(name, 60, True, heads=2, dim=16, max_length=20).eval()
        worlds.append(World(name, backbone))
    with torch.no_grad():
        for world in worlds:
            for label, (method, params) in METHODS.items():
                compressor = get_compressor(method, **params)
                if world.backbone is None and label in ("raw", "truncated"):
                    continue
                if world.backbone is not None and compressor.supports(world.backbone):
                    continue
                if world.name in ("marm", "climber") and label not in ("full", "recent", "kivi"):
                    continue  # as behind the others
                budget = (
                    Budget.parse({"slots": 3} if label == "truncated" else 0.4) if compressor.takes_budget else None
                )
                states = [compressor.compress(world.prefill(compressor.needs, n), budget) for n in (LENGTHS, OTHERS)]
                made[f"{world.name}, {label}"] = states[0], states[1]
                if world.backbone is not None and states[0].events is None and label in ("recent", "kivi", "full"):
                    grown = [
                        world.backbone.append(s, histories(world.backbone, n)[1])
                        for s, n in zip(states, (LENGTHS, OTHERS))
                    ]
                    made[f"{world.name}, {label}, appended"] = grown[0], grown[1]
        made |= {f"memory, {name}": (_memory(name, 4), _memory(name, 2)) for name in ("dense", "quantized", "low rank")}
    for one, other in made.values():  # what torch loads at first use is not counted
        peak_memory(lambda: other.unpack([one.pack(0)]))  # noqa: B023
    return {name: ([one.pack(u) for u in range(len(one))], other) for name, (one, other) in made.items()}


def _memory(kind: str, users: int) -> UserState:
    """A matrix a user, without slots."""
    x, mask = torch.randn(users, 2, 6, 5), torch.ones(users, 1, 6, dtype=torch.bool)
    vectors = {
        "dense": lambda: Dense(x),
        "quantized": lambda: quantize(x, mask, 4, 4, "slots"),
        "low rank": lambda: low_rank(x, mask, torch.full((users, 1), 2)),
    }[kind]()
    return UserState(((Segment({"memory": vectors}, None),),), torch.full((users,), 9, dtype=torch.int32))


def mutated(blob: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The blob with one to three things done to it."""
    out = bytearray(blob)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, max(len(out), 1)))
        match rng.integers(0, 9):
            case 0 if out:
                out[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if out:
                out[at] = int(rng.integers(0, 256))
            case 2:
                out = out[:at]
            case 3:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 4 | 5 | 6:  # a number where numbers lie
                word = min(at, 40) // 4 * 4
                out[word : word + 4] = int(rng.choice(SPECIAL)).to_bytes(4, "little", signed=True)
            case 7:
                out[at : at + 8] = other[at : at + 8]
            case _:
                out = bytearray(rng.bytes(int(rng.integers(0, 80))))
    return bytes(out)


def attempt(name: str, rng: np.random.Generator) -> str:
    """What became of one mutated blob among sound ones: refused, read, or a fault in words."""
    blobs, template = kinds()[name]
    blobs, user = list(blobs), int(rng.integers(0, len(blobs)))
    blobs[user] = mutated(blobs[user], blobs[-1], rng)

    def unpack() -> UserState | Exception:
        try:
            return template.unpack(blobs)
        except Exception as error:
            return error

    began = time.process_time()  # other work on the machine is not ours
    found, peak = peak_memory(unpack)
    seconds = time.process_time() - began
    if seconds > SECONDS or peak > BYTES:
        return f"fault: {name}: {seconds:.1f} s, {peak / 1e6:.0f} MB"
    if isinstance(found, ValueError):
        return "refused" if "\n" not in str(found) and "packed state of user" in str(found) else f"fault: {found}"
    if isinstance(found, Exception):
        return f"fault: {name}: {type(found).__name__}: {found}"
    lengths = [len(blob) for blob in blobs]
    sound = found.nbytes().tolist() == lengths == [len(found.pack(u)) for u in range(len(blobs))]
    return "read" if sound else f"fault: {name}: read, but of another length"


def fuzz(blobs: int, seed: int = 0) -> Counter[str]:
    """So many mutated blobs over all kinds in turn."""
    rng, names = np.random.default_rng(seed), list(kinds())
    return Counter(attempt(names[i % len(names)], rng) for i in range(blobs))


@pytest.mark.slow
def test_templates_of_other_users_serve_all_kinds() -> None:
    for name, (blobs, template) in kinds().items():
        for some in (blobs, blobs[2:3], []):
            back = template.unpack(some)
            assert [back.pack(u) for u in range(len(some))] == some, name
        nobody = template.take(torch.zeros(0, dtype=torch.long))
        assert [nobody.unpack(blobs).pack(u) for u in range(len(blobs))] == blobs, name


def test_mutated_blobs_are_refused_or_read() -> None:
    counts = fuzz(300)
    assert counts.keys() == {"refused", "read"}, counts
    assert min(counts.values()) > 30


@pytest.mark.slow
def test_5000_mutated_blobs() -> None:
    assert fuzz(5000, seed=1).keys() == {"refused", "read"}


def words(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(4, "little", signed=True) for n in numbers)


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (words(HUGE, HUGE), "more slots than bytes"),
        (words(-1, 0), "negative length"),
        (words(5, -1), "less than 0 or more slots than events"),
        (words(1, 2, 0, 0, 0), "less than 0 or more slots than events"),
        (words(5, 1, 5), "position outside its history"),
        (words(5, 1, -1), "position outside its history"),
        (words(5, 1, 0, HUGE) + bytes(16), "rank below 0 or above 4"),
        (words(5, 1, 0, 1), "shorter than its own counts say"),
        (words(5), "shorter than its own counts say"),
        (words(5, 0, 0, 0, 0), "longer than its own counts say"),
    ],
)
def test_what_is_refused_says_why(blob: bytes, message: str) -> None:
    """Length, count, positions where events were left out, rank, scale, two factors."""
    x, mask = torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3, dtype=torch.bool)
    slots = Slots(torch.full((1, 1), 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32).view(1, 1, 3))
    segment = Segment({"keys": low_rank(x, mask, torch.full((1, 1), 2))}, slots)
    template = UserState(((segment,),), torch.tensor([9], dtype=torch.int32))
    found, peak = peak_memory(lambda: _refusal(template, blob))
    assert message in found and peak < 1e6


def _refusal(template: UserState, blob: bytes) -> str:
    with pytest.raises(ValueError, match="packed state of user 0") as caught:
        template.unpack([blob])
    return str(caught.value)


def test_counts_whose_product_wraps_int64_are_refused() -> None:
    """Two heads of 2^31 - 1 rows, each of 2^31 - 1 columns of 8 bytes: 0 bytes in 64 bits."""
    from malloc_bench.state.packing import Reader

    huge = torch.full((1, 2), 2**31 - 1)
    with pytest.raises(ValueError, match="shorter"):
        Reader([b"12345678"])(torch.zeros(1, 2, 0, 0, dtype=torch.int64), huge, huge)


def test_events_without_an_item_are_refused() -> None:
    events = get_compressor("recompute")
    world = World("sasrec", get_backbone("sasrec", 9, max_length=20).eval())
    with torch.no_grad():
        state = events.compress(world.prefill(events.needs, (2,)))
    blob = state.pack(0)
    with pytest.raises(ValueError, match="without an item"):
        state.unpack([blob[:4] + words(0) + blob[8:]])


def test_rows_of_a_prefill() -> None:
    prefill = Prefill.from_tensors([torch.randn(4, 1, 6, 2)], [torch.randn(4, 1, 6, 2)], [torch.randn(4, 1, 6, 2)])
    prefill.memo["k"] = 1
    some = prefill.take(torch.tensor([3, 1]))
    assert some.users.tolist() == [3, 1] and not some.memo and len(some.state) == 2
    assert torch.equal(some.keys(0), prefill.keys(0)[[3, 1]])
    assert torch.equal(some.attention_received(0), prefill.attention_received(0)[[3, 1]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blobs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    for what, count in fuzz(options.blobs, options.seed).most_common():
        print(f"{count:6d}  {what}")
    print(f"{options.blobs} blobs of {len(kinds())} kinds of state in {time.perf_counter() - started:.0f} s")


def test_a_tall_array_beside_a_wide_one_is_refused() -> None:
    """What each user's bytes fill is small, what both would share is 10 GB."""
    from malloc_bench.state.packing import Reader

    rows, cols = torch.tensor([[50_000], [1]]), torch.tensor([[1], [50_000]])
    like = torch.zeros(1, 1, 0, 0, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"user 0 \(200000 bytes\) of arrays of up to 50000 rows and 50000 columns"):
        Reader([bytes(200_000)] * 2)(like, rows, cols)
