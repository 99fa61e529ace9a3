"""The slots that explain what probes got, one after the other, fitted to stand for all."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.fitted.fitting import FittedTokens
from malloc_bench.compressors.fitted.solving import evened, rows_of
from malloc_bench.registry import register
from malloc_bench.state import Prefill

_RIDGE = 1e-2  # of a column's squared length: in the last direction that is left all columns would gain alike
_SPENT = 2e-3  # of the first gain: below it slots are taken by their weight
_CACHE = 4 << 20  # bytes of columns that a core has at hand over all turns


@register("fit_omp")
@dataclass(frozen=True)
class FitOMP(FittedTokens):
    """Keeps k slots of each head by orthogonal matching pursuit: each next one is the column of A, the weights of
    probes over slots, that leaves least of the target A V (softmax: of the total weight too, on the scale of the
    target) once it stands beside those taken: what they explain of it does not count. Masses and values are solved for
    as in `fit_recent`, where the other parameters are told. across: all heads of a layer keep the same slots, those
    that leave least in all, and where they stand is stored once.
    """

    probes: int = 64
    ridge: float = 1e-3
    horizon: int | tuple[int, ...] = (0,)
    which: str = field(default="drawn", metadata={"unsaid": "drawn"})
    across: bool = field(default=False, kw_only=True, metadata={"unsaid": False})

    family = "fitted"
    paper = (
        "ours; for language models Attention Matching, arXiv 2602.16284; pursuit as in Rebollo-Neira and Lowe, "
        "IEEE SPL 2002"
    )
    formula = (
        "next slot = argmax |b_j' R| / |b_j|, b_j what slots taken leave of a_j, R of [A V, A 1]; masses and values as "
        "in fit_recent"
    )
    version = 6
    growth = grows(compress="p n L d + h p k n L + h p k^2 L")
    stores = "k keys, fitted values and, with softmax, masses a layer and head; positions where the backbone reads them"

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return not self.across

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        size = int(k.max()) if len(k) else 0
        made: dict[str, Tensor] = prefill.remember(
            ("fit_omp", self.ask, self.across, layer), dict
        )  # few slots are the first of many
        if not made or made["order"].shape[-1] < size:
            made["order"] = self._order(prefill, layer, size)
        order = made["order"][..., :size]
        beyond = torch.arange(size, device=k.device) >= k.view(-1, 1, 1)
        last = (prefill.slots(layer).count.long() - 1).clamp(min=0).unsqueeze(-1)
        return order.masked_fill(beyond, prefill.segment(layer).width).sort(-1).values.minimum(last)

    def _order(self, prefill: Prefill, layer: int, size: int) -> Tensor:
        """Slots as they are taken, [B, H or 1, size]; after all of a user's any."""
        probes, segment = prefill.probes(layer, self.ask), prefill.segment(layer)
        heads, even = next(iter(segment.fields.values())).shape[1], evened(probes)
        free = prefill.mask(layer).expand(-1, heads, -1)
        if not size:
            return free[:, : 1 if self.across else heads, :0].long()
        rows = (rows_of(x, heads) for x in (probes.columns(segment), probes.target, probes.share, even))
        asked = [x.flatten(0, 1) for x in (*rows, free)]
        alike = heads if self.across else 1
        at_once = max(1, _CACHE // (8 * alike * asked[0][0].numel())) * alike
        found = [pursued(probes.normalised, size, alike, *each) for each in zip(*(x.split(at_once) for x in asked))]
        return torch.cat(found)[::alike].unflatten(0, (-1, heads // alike))

    def choosing(self, heads: int, rows: int, k: int, wide: int, history: int) -> int:
        """Gains of all slots; for each turn, at most, what is new of a column, along all columns and the target."""
        turns = min(k, rows // heads)
        return 2 * rows * history * (wide + 2 * turns) + 4 * rows * turns * (turns - 1 + wide)


def pursued(
    normalised: bool, size: int, alike: int, columns: Tensor, target: Tensor, share: Tensor, even: Tensor, free: Tensor
) -> Tensor:
    """Slots of N heads as they are taken, [N, size]; columns [N, R, S], target [N, R, D], share and even [N, R, 1];
    free [N, S]: which may be taken. alike: so many heads in a row take the same.

    A head that is spent takes by weight from there on. In float64: gains are kept up by differences, and in float32
    which of two comes first would hang on rounding.
    """
    columns, even = columns.double(), even.double()
    rest = target * even
    if normalised:
        rest = torch.cat([rest, (1 - share) * rest.square().mean((1, 2), keepdim=True).sqrt()], -1)
    else:
        columns = columns * even

    def joint(x: Tensor) -> Tensor:
        """x [N, S] summed over heads that take the same."""
        return x if alike == 1 else x.unflatten(0, (-1, alike)).sum(1).repeat_interleave(alike, 0)

    # of a_j' R no more than its squared length is kept up: all of it would be S x D numbers a turn
    squared, left = (columns.mT @ rest).square().sum(-1), columns.square().sum(1)  # [N, S]
    weight, ridge = joint(left), (_RIDGE * left).clamp(min=1e-30)
    least = _SPENT**2 * joint(squared / left.clamp(min=1e-30)).amax(-1, keepdim=True)
    turns, spent, taken = min(size, *columns.shape[1:]), torch.zeros_like(free[:, :1]), []
    basis = columns.new_empty(len(columns), turns, columns.shape[1])
    for turn in range(turns):
        gain = joint(squared / (left.clamp(min=0) + ridge)).masked_fill(~free, -1.0)
        spent |= gain.amax(-1, keepdim=True) <= least
        if bool(spent.all()):
            break
        best = torch.where(spent, weight.masked_fill(~free, -1.0), gain).argmax(-1, keepdim=True)  # [N, 1]
        taken.append(best)
        free = free.scatter(1, best, False)
        new = columns.gather(2, best.unsqueeze(1).expand(-1, columns.shape[1], -1))  # [N, R, 1]
        before, known = new.norm(dim=1, keepdim=True), basis[:, :turn]
        for _ in range(2):  # once is not enough where little is left
            new = new - known.mT @ (known @ new)
        beyond = new.norm(dim=1, keepdim=True)
        new = torch.where(beyond > 1e-4 * before, new / beyond.clamp(min=1e-30), 0.0)  # nothing new: no direction
        basis[:, turn] = new[..., 0]
        told = new.mT @ rest  # [N, 1, D]
        along, both = (torch.cat([new, rest @ told.mT], -1).mT @ columns).unbind(1)  # [N, S]
        squared = squared - 2 * along * both + along.square() * told.square().sum(-1)
        left = left - along.square()
        rest = rest - new * told
    if len(taken) < size:
        by_weight = weight.masked_fill(~free, -1.0).sort(dim=-1, descending=True, stable=True).indices
        taken.append(by_weight[:, : size - len(taken)])
    return torch.cat(taken, -1)
