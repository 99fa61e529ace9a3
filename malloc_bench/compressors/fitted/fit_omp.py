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


@register("fit_omp")
@dataclass(frozen=True)
class FitOMP(FittedTokens):
    """Keeps k slots of each head by orthogonal matching pursuit: each next one is the column of A, the weights of
    probes over slots, that leaves least of the target A V (softmax: of the total weight too, on the scale of the
    target) once it stands beside those taken: what they explain of it does not count. Masses and values are solved for
    as in `fit_recent`, where the parameters are told.
    """

    probes: int = 64
    ridge: float = 1e-3
    horizon: int | tuple[int, ...] = (0,)
    which: str = field(default="drawn", metadata={"unsaid": "drawn"})

    family = "fitted"
    paper = (
        "ours; for language models Attention Matching, arXiv 2602.16284; pursuit as in Rebollo-Neira and Lowe, "
        "IEEE SPL 2002"
    )
    formula = (
        "next slot = argmax |b_j' R| / |b_j|, b_j what slots taken leave of a_j, R of [A V, A 1]; masses and values as "
        "in fit_recent"
    )
    version = 5
    growth = grows(compress="p n L d + h p k n L + h p k^2 L")
    stores = "k keys, fitted values and, with softmax, masses a layer and head; positions where the backbone reads them"

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        size = int(k.max()) if len(k) else 0
        made: dict[str, Tensor] = prefill.remember(
            ("fit_omp", self.ask, layer), dict
        )  # few slots are the first of many
        if not made or made["order"].shape[-1] < size:
            made["order"] = self._order(prefill, layer, size)
        order = made["order"][..., :size]
        beyond = torch.arange(size, device=k.device) >= k.view(-1, 1, 1)
        last = (prefill.slots(layer).count.long() - 1).clamp(min=0).unsqueeze(-1)
        return order.masked_fill(beyond, prefill.segment(layer).width).sort(-1).values.minimum(last)

    def _order(self, prefill: Prefill, layer: int, size: int) -> Tensor:
        """Slots as they are taken, [B, H, size]; after all of a user's any.

        In float64: gains are kept up by differences, and in float32 which of two comes first would hang on rounding.
        """
        probes, segment = prefill.probes(layer, self.ask), prefill.segment(layer)
        heads, even = next(iter(segment.fields.values())).shape[1], evened(probes).double()
        columns = rows_of(probes.columns(segment).double(), heads)  # [B, H, R, S]
        rest = rows_of(probes.target * even, heads)  # what is left of the target
        if probes.normalised:
            scale = rest.square().mean((2, 3), keepdim=True).sqrt()
            rest = torch.cat([rest, (1 - rows_of(probes.share, heads)) * scale], -1)
        else:
            columns = columns * rows_of(even, heads)
        free = prefill.mask(layer).expand(-1, heads, -1)
        taken: list[Tensor] = []
        if not size:
            return free[..., :0].long()
        length = columns.norm(dim=2)  # [B, H, S]
        # of a_j' R no more than its squared length is kept up: all of it would be S x D numbers a turn
        squared, left = (columns.mT @ rest).norm(dim=-1).square(), length.square()
        ridge = (_RIDGE * left).clamp(min=1e-30)
        first = (squared / left.clamp(min=1e-30)).amax(-1, keepdim=True)
        spent = _SPENT**2 * first  # below it what is left is rounding
        turns = min(size, columns.shape[2])  # then all directions are taken
        basis = columns.new_zeros(*columns.shape[:2], turns, columns.shape[2])
        for turn in range(turns):
            gain = (squared / (left.clamp(min=0) + ridge)).masked_fill(~free, -1.0)
            gain = torch.where(gain.amax(-1, keepdim=True) <= spent, length.masked_fill(~free, -1.0), gain)
            best = gain.argmax(-1, keepdim=True)
            taken.append(best)
            free = free.scatter(2, best, False)
            new = columns.gather(3, best.unsqueeze(2).expand(-1, -1, columns.shape[2], -1))  # [B, H, R, 1]
            before = new.norm(dim=2, keepdim=True)
            known = basis[..., :turn, :]
            for _ in range(2):  # once is not enough where little is left
                new = new - known.mT @ (known @ new)
            beyond = new.norm(dim=2, keepdim=True)
            new = torch.where(beyond > 1e-4 * before, new / beyond.clamp(min=1e-30), 0.0)  # nothing new: no direction
            basis[..., turn, :] = new[..., 0]
            told = new.mT @ rest  # [B, H, 1, D]
            along, both = (torch.cat([new, rest @ told.mT], -1).mT @ columns).unbind(2)  # [B, H, S]
            squared = squared - 2 * along * both + along.square() * told.square().sum(-1)
            left = left - along.square()
            rest = rest - new * told
        if size > turns:
            by_weight = length.masked_fill(~free, -1.0).sort(dim=-1, descending=True, stable=True).indices
            taken.append(by_weight[..., : size - turns])
        return torch.cat(taken, -1)

    def choosing(self, heads: int, rows: int, k: int, width: int, wide: int, history: int) -> int:
        """Gains of all slots; then for each turn what is new of a column, along all columns and the target."""
        turns = min(k, rows // heads)
        return 2 * rows * history * (wide + 2 * turns) + 4 * rows * turns * (turns - 1 + wide)
