"""Multi-head latent attention: keys and values of all heads are linear maps of one short vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.block import Block
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import Shared, SharedHeads, converted, layers, narrow, outputs, refusal, swap
from malloc_bench.registry import register
from malloc_bench.state import Segment

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class LatentHeads(SharedHeads):
    """No key or value is ever made: q.(U_k c) = (U_k' q).c, and sum w (U_v c) = U_v (sum w c)."""

    up_keys: nn.Linear
    up_values: nn.Linear

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        q, own, gate = super().project(x)  # type: ignore[safe-super]
        return torch.einsum("bhmd,hdr->bhmr", q, self._by_head(self.up_keys)), own, gate

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        mixed = torch.einsum("bhmr,hdr->bhmd", mixed, self._by_head(self.up_values))
        return super().combine(x, mixed, gate)  # type: ignore[safe-super]

    def outputs(self) -> Tensor | None:
        """Of a unit of a mixed latent."""
        maps = super().outputs()
        return None if maps is None else self._by_head(self.up_values).mT @ maps

    def seen(self, segment: Segment) -> Segment:
        if "latent" not in segment.fields:  # a plain pass that has them spread out already, or two latents were stored
            return segment if segment.fields["keys"].shape[1] == self.heads else super().seen(segment)
        latent = Shared(segment.fields["latent"], self.heads)
        return Segment({"keys": latent, "values": latent}, segment.slots)

    def _by_head(self, up: nn.Linear) -> Tensor:
        return up.weight.unflatten(0, (self.heads, -1))  # [H, D, r]


@register("mla")
@dataclass(frozen=True)
class MLA(Structural):
    """One latent vector an event and layer, from which every head's keys and values are mapped up (DeepSeek-V2, 2024).

    From the paper: the joint latent of keys and values, and maps absorbed into the query and behind the mixture, so
    that a read touches the latent only. No decoupled rotary keys: positions are absolute and in x already, or a bias
    (HSTU). Ours: queries are not compressed; behind HSTU the latent is SiLU(W x) as all its maps are, and what is
    mapped up from it stays linear, else nothing could be absorbed; maps up have no bias; the plain pass is absorbed
    too.
    """

    latent: int = 16

    family = "heads"
    paper = "DeepSeek-V2 (multi-head latent attention), 2024, arXiv 2405.04434"
    formula = "c = W x; keys = U_k c, values = U_v c: logits (U_k' q).c, output U_v (sum w c)"
    growth = grows(memory="r n L", read="h r n L")
    stores = "one vector of width `latent` of every event in each layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 1:
            raise ValueError(f"mla: latent must be at least 1, not {self.latent}")

    def supports(self, backbone: "Backbone") -> str | None:
        if why := refusal(self.name, backbone):
            return why
        stored = min(block.parts["keys"] + block.parts["values"] for block in layers(backbone))
        return None if self.latent < stored else f"a latent of {self.latent} is no less than keys and values, {stored}"

    def adapt(self, backbone: "Backbone") -> None:
        for block in layers(backbone):
            rows, device = outputs(block), next(block.parameters()).device
            stored = torch.cat([rows.pop("keys"), rows.pop("values")])
            for up in ("keys", "values"):
                block.add_module(f"up_{up}", nn.Linear(self.latent, block.parts[up], bias=False, device=device))
            narrow(block, rows | {"latent": stored[: self.latent]})
            block.stored_heads = 1
            swap(block, LatentHeads)
        backbone.fields = ("latent",)  # type: ignore[misc]

    def convert(self, weights: Mapping[str, Tensor], adapted: "Backbone") -> dict[str, Tensor]:
        """The best thin factors of the maps to keys and values together: W = (U sqrt S) (sqrt S V')."""

        def factored(block: Block, parts: dict[str, Tensor]) -> dict[str, Tensor]:
            keys, values = parts.pop("keys"), parts.pop("values")
            u, s, v = torch.linalg.svd(torch.cat([keys, values]).double(), full_matrices=False)
            short = self.latent - len(s)
            u, s, v = F.pad(u, (0, short)), F.pad(s, (0, short)).sqrt(), F.pad(v, (0, 0, 0, short))
            up_keys, up_values = (u * s).to(keys.dtype).split([len(keys), len(values)])
            down = (s[:, None] * v).to(keys.dtype)
            return parts | {"latent": down, "up_keys.weight": up_keys, "up_values.weight": up_values}

        return converted(weights, adapted, factored)
