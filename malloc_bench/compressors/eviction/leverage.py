"""Keys that span directions of their own stay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState


@register("leverage")
@dataclass(frozen=True)
class Leverage(Eviction):
    """Keeps slots whose centred keys have a high statistical leverage: rows that the others cannot reproduce.

    ridge is a share of the mean eigenvalue. Exact: heads of recommenders are narrow, so no sketch is drawn.
    """

    ridge: float = 1e-2

    grid = {"ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    family = "eviction"
    paper = "the leverage score of Compactor, arXiv 2507.08143, without its sketch"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .715 / .682, slots by lot .785 / .758: it looks at no weight"
    formula = "score = x_i' (X'X + ridge tr(X'X)/d I)^-1 x_i, X the keys less their mean"
    growth = grows(compress="n L d^2")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys",)

    def __post_init__(self) -> None:
        if not self.ridge >= 1e-10:  # below, the last digits of the Gram matrix make its root fail
            raise ValueError(f"leverage: ridge must be at least 1e-10, not {self.ridge}")

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys, real = prefill.keys(layer), prefill.mask(layer).unsqueeze(-1)
        if keys.shape[2] == 0:
            return keys.new_zeros(keys.shape[:3])
        x = keys.to(torch.float64, copy=True).masked_fill_(~real, 0.0)  # ours: all that follows is in place
        mean = x.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        x.sub_(mean).masked_fill_(~real, 0.0)
        most = torch.maximum(x.amax((2, 3), keepdim=True), -x.amin((2, 3), keepdim=True))
        x.div_(most.clamp(min=1e-30))  # squares of huge keys stay finite
        gram = x.mT @ x
        width = gram.shape[-1]
        weight = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[..., None, None] * self.ridge
        root = torch.linalg.cholesky(gram + weight * torch.eye(width, device=x.device, dtype=x.dtype))
        return torch.linalg.solve_triangular(root, x.mT, upper=False).square_().sum(2)

    def flops(self, state: UserState, of: Sources) -> int:
        """The Gram matrix of the keys and one triangular system for each; its root is not counted."""
        shapes = [layer[0].fields["keys"].shape for layer in state.layers]
        return sum(3 * h * x.events * width**2 for x, (_, h, _, width) in zip(of, shapes))
