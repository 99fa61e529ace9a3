"""Floating-point operations: a closed form per method and step, and a counter to hold it against.

Counted: matmul-like work, 2 per multiply-add, as the code does it, and eigenvectors by formula (9 d^3 a matrix).
A triangular system of n unknowns counts n^2 for each right-hand side.
Not counted: sorting and top-k, softmax, SiLU and all other element-wise work, norms, gathers and sums over runs,
(un)packing and (de)quantizing, the catalogue scores that follow a read (2 x items x dim a token, for every method), and
states that are made while one is sized, and found too large.
Causal attention by SDPA counts as the full square, though the kernel skips most of its upper half; the blockwise path
counts the blocks that it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from malloc_bench import kernels
from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Compressor
from malloc_bench.compressors.base import Source, methods_in, ours
from malloc_bench.measure.workload import Workload
from malloc_bench.state import Stats, UserState


def count_flops(fn: Callable[[], object]) -> int:
    """FLOPs of the matmul-like operators that fn() runs, attention on CPUs included (torch's counter misses it)."""

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def triangular(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return prod(b) * a[-1]

    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {torch.ops.aten.linalg_solve_triangular: triangular, **({fused: attention} if fused else {})}
    with kernels.eager(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        fn()
    return counter.get_total_flops()


def _has_a_form(compressor: Compressor) -> bool:
    """Whether `flops` knows all that a class does: what ours have knows nothing of what others build on them."""
    said_by = next(each for each in type(compressor).__mro__ if "flops" in vars(each))
    own, form = (each.__module__.startswith("malloc_bench.") for each in (type(compressor), said_by))
    return own or not form


def closed_form(
    backbone: Backbone,
    compressor: Compressor,
    state: UserState,
    workload: Workload,
    full: UserState | None = None,
    again: Callable[[], object] | None = None,
) -> dict[str, int | None]:
    """FLOPs per user of each step of a workload: prefill_flops, compress_flops, append_flops, read_flops.

    state: what the compressor made of the workload's histories; padded widths count, as in the code. full: what it was
    made from, which says how many events each layer has; without it all, as behind all but Climber. Compress includes
    the attention statistics that the method needs: the matmul-like work that they add to a blockwise prefill. A read of
    raw events includes their prefill. None: appending to raw events computes nothing; the backbone has no closed form.
    again: makes the states once more, to be counted for a method of others: where it has no closed form of its own, or
    one that says less.
    """
    n = workload.history
    prefill = backbone.flops("prefill", n)
    needs = compressor.needs if backbone.scoring is None else compressor.needs.in_ranking()
    statistics = backbone.flops("statistics", n, stats=needs) if needs != Stats() else 0
    raw = state.events is not None
    blocks = getattr(backbone, "blocks", ())
    events = [n] * len(blocks) if full is None else [layer[0].width for layer in full.layers]
    of = [Source(x, each.heads, each.heads // getattr(each, "channels", 1)) for x, each in zip(events, blocks)]
    made = compressor.flops(state, of)
    if again and not ours(compressor):
        counted = count_flops(again) // workload.users
        made = max(made, counted) if all(map(_has_a_form, methods_in(compressor))) else counted
    return {
        "prefill_flops": prefill,
        "compress_flops": None if statistics is None else statistics + made,
        "append_flops": None if raw else backbone.flops("append", workload.appended, state),
        "read_flops": backbone.flops("read", workload.candidates, state),
    }
