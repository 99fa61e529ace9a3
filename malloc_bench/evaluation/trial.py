"""One method at one budget on one chunk of users: compress, count bytes, read, and hold it to its promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor
from malloc_bench.evaluation.requests import Asked, some_of
from malloc_bench.state import Events, Fitted, Prefill, UserState

#: told at what a job's method works from now on, and whose, by id ("": nobody's)
Begin = Callable[[str, str], None]
MEASURING = "measuring"  # which takes as long as was asked for

TOLERANCE = 1e-5  # of reads, relative to the largest number read and at least absolute


def nobody(what: str, job: str) -> None:
    """A `Begin` that tells nobody."""


class OverBudget(RuntimeError):
    """A compressor broke its promise: more bytes than the budget, or other bytes than it packs."""


class NotInTheBytes(RuntimeError):
    """What is read from a state is not what is read from its bytes."""


@dataclass(frozen=True)
class Job:
    """One method at one budget; `id` names its results.

    backbone: trained as the structural part of the compressor has adapted it; None: the one that is evaluated.
    fitted: what the method has learned of training users; None for most.
    """

    id: str
    compressor: Compressor
    budget: Budget | None = None
    backbone: Backbone | None = None
    fitted: Fitted | None = None


@dataclass(frozen=True)
class Witnesses:
    """Users whose bytes are packed, unpacked and read again: their rows of the chunk, [P] int64.

    other: one more user, of whom the templates are made that the bytes are unpacked into; None: there is no other.
    """

    rows: Tensor
    other: Prefill | None

    @staticmethod
    def of(prefill: Prefill, rows: Tensor) -> Witnesses:
        """The other user is the one with the longest history among those that are not packed, else the first packed."""
        if not len(rows) or len(prefill.users) < 2:
            return Witnesses(rows, None)
        length = prefill.state.length.clone()
        length[rows.to(length.device)] = -1
        other = int(length.argmax()) if bool((length >= 0).any()) else int(rows[0])
        return Witnesses(rows, prefill.take(torch.tensor([other])))


class Read(NamedTuple):
    """States of B users, and the outputs [B, ...] that were read from them."""

    state: UserState
    out: Tensor


def attempt(
    job: Job, model: Backbone, prefill: Prefill, asked: Asked, reads: Sequence[Read], packed: Witnesses
) -> tuple[Read, dict[str, Tensor]]:
    """What is read from the job's states, and bytes [B] of each user's by part.

    reads: what is known already, and need not be read again: from the full states first, and the like.

    Raises whatever the method raises; TypeError or ValueError for what is no state of these users or reads as no
    number; OverBudget, NotInTheBytes.
    """
    prefill = prefill.given(job.fitted)
    state = of_users(job.compressor.compress(prefill, job.budget, job.fitted), prefill)
    out = next((each.out for each in reads if each.state is state), None)
    out = asked.read(model, state) if out is None else out  # before anything tells who will be packed
    parts = checked_bytes(job, prefill, state)
    size = total(parts)
    blobs = state.packed(packed.rows.tolist()) if len(packed.rows) else []
    for user, blob in zip(packed.rows.tolist(), blobs):
        if len(blob) != int(size[user]):
            raise OverBudget(f"user {user} packs to {len(blob)} bytes, nbytes() says {int(size[user])}")
    if state is prefill.state:
        return Read(state, out), parts
    if out.shape != reads[0].out.shape or not bool(out.isfinite().all()):
        raise ValueError("outputs read from the compressed state are not finite")
    if packed.other is not None:
        template = job.compressor.compress(replace(packed.other, memo={}), job.budget, job.fitted)
        check_read(out[packed.rows.to(out.device)], asked.read(model, template.unpack(blobs), packed.rows))
    return Read(state, out), parts


def check_model(model: Backbone, asked: Asked, prefill: Prefill, full: Tensor, rows: Tensor) -> None:
    """Holds what a backbone reads from the full states of some users, rows [P] of a chunk, against what it reads from
    their bytes, and in retrieval against its causal pass, which is what was trained. Raises ValueError."""
    packed = Witnesses.of(prefill, rows)
    if packed.other is not None:
        again = packed.other.state.unpack(prefill.state.packed(rows.tolist()))
        check_read(full[rows.to(full.device)], asked.read(model, again, rows))
    history, tokens = some_of(asked.history, rows), some_of(asked.tokens, rows)
    if not len(rows) or tokens.items.shape[1] != 1 or history.columns().keys() != tokens.columns().keys():
        return
    at, newest = history.count.long()[:, None], tokens.columns()
    whole = {
        name: torch.cat([x, x.new_zeros(len(x), 1)], 1).scatter(1, at, newest[name])
        for name, x in history.columns().items()
    }
    causal = model(Events(count=history.count + 1, **whole)).gather(1, at[..., None].expand(-1, 1, full.shape[-1]))
    read = model.read(tokens, prefill.state.take(rows))
    error, scale = float((read - causal).abs().max()), max(float(causal.abs().max()), 1.0)
    if not error <= 1e-3 * scale:
        raise ValueError(
            f"{model.name} reads something else from its full state than its forward gives, which was trained: off by "
            f"{error:.2g} (of {scale:.2g}); malloc-bench check FILE.py:CLASS says more"
        )


def of_users(state: object, prefill: Prefill) -> UserState:
    """What `compress` or `update` has returned; raises TypeError where it is no state of the prefill's users."""
    if type(state) is UserState and len(state) == len(prefill.state):
        return state
    what = f"{len(state)} users" if isinstance(state, UserState) else type(state).__name__
    raise TypeError(f"a method must return a UserState of the {len(prefill.state)} users it was given, not {what}")


def check_read(want: Tensor, got: Tensor) -> None:
    """Raises NotInTheBytes unless reads [P, ...] agree to TOLERANCE."""
    error, scale = float((got - want).abs().max()), max(float(want.abs().max()), 1.0)
    if not error <= TOLERANCE * scale:
        raise NotInTheBytes(
            f"read from its own bytes, unpacked beside another user, a state gives outputs that are off by {error:.2g} "
            f"(of {scale:.2g}): something that is read is not in the bytes"
        )


def total(parts: Mapping[str, Tensor]) -> Tensor:
    """Bytes [B] of all parts."""
    return torch.stack([*parts.values()]).sum(0)


def checked_bytes(job: Job, prefill: Prefill, state: UserState) -> dict[str, Tensor]:
    """Bytes [B] of each user's state by part; raises OverBudget beyond the budget and the method's floor."""
    parts = state.nbytes_by_part()
    size = total(parts)
    target = None if job.budget is None else job.budget.target(prefill.full_bytes())
    if target is not None:
        above = bool((size > target).any())
        allowed = target.maximum(job.compressor.floor(prefill).to(target.device)) if above else target
        if above and bool((size > allowed).any()):
            user = int((size - allowed).argmax())
            raise OverBudget(f"user {user} takes {int(size[user])} bytes, the budget allows {int(allowed[user])}")
    return parts
