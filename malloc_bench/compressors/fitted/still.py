"""A small network, trained once, that makes a user's slots in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.fitted.fitting import Asking
from malloc_bench.compressors.fitted.solving import evened
from malloc_bench.compressors.quantization.codebooks import entries
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import Budget, Layout, dense_layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Fitted, Prefill, Sample, Segment, Slots, Stats, UserState, closest

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("still")
@dataclass(frozen=True)
class Still(Asking, TokenMethod):
    """Slots are learned queries that attend to a user's own keys; what they read, scaled channel by channel and moved,
    is the slot. Trained on training users, layer by layer, on what probes should get of the whole history; a user's
    state then needs no probe. Of a budget of k slots the first k answer, and each number is trained for.

    bank: slots that are known; a user gets no more. rounds: steps of Adam, each on some training users, the same ones'
    prefills again and again; rate: of the first, in root mean squares of what moves. probes, which, horizon: those that
    it is trained on, as in `fit_recent`.
    """

    bank: int = 32
    rounds: int = 1000
    rate: float = 0.05
    probes: int = 64
    which: str = "drawn"
    horizon: int | tuple[int, ...] = (0,)

    family = "fitted"
    paper = "Still, arXiv 2606.07878, for language models, end to end; here layer by layer, as small as can be"
    formula = (
        "a_j = softmax_i(u_j.k_i + w_j log age_i), key_j = g_j (a_j K) + c_j, value_j = h_j (a_j V) + d_j, "
        "mass_j = n softmax(m)_j; trained on |A V of the slots - A V|^2 over probes of training users"
    )
    growth = grows(memory="m L d", compress="m n L d", read="m L d")
    stores = "k keys, values and, with softmax, masses a layer and head; mean positions and times where they are read"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank < 1 or self.rounds < 1 or not self.rate > 0:
            raise ValueError(f"still: bank and rounds >= 1 and a rate above 0 are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return Stats()

    @property
    def fit_needs(self) -> Stats:
        return Stats(probes=self.ask)

    def supports(self, backbone: "Backbone") -> str | None:
        two = backbone.has_slots and set(backbone.fields) == {"keys", "values"}
        return None if two else f"still makes keys and values, {backbone.name} has no slots of both"

    def most(self, prefill: Prefill, slots: int | None = None) -> Tensor:
        return super().most(prefill, slots).clamp(max=self.bank)

    def layout(self, prefill: Prefill) -> Layout:
        assert prefill.fitted is not None
        return dense_layout(prefill, "head", mass="weighs" in prefill.fitted)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        assert prefill.fitted is not None
        layers = []
        for layer in prefill.layers:
            own = {name: x.to(k.device) for name, x in prefill.fitted.part(str(layer)).items()}
            layers.append((made(own, prefill, layer, k, "weighs" in prefill.fitted),))
        return UserState(tuple(layers), prefill.state.length)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        prefills = [prefill for prefill in sample if bool((prefill.state.length > 1).any())]
        found: dict[str, Tensor] = {}
        for layer in prefills[0].layers if prefills else ():
            own = _begin(sample.vectors[layer, "keys"], sample.vectors[layer, "values"], self.bank)
            self._descend(own, sample, prefills, layer)
            found |= {f"{layer}/{name}": x.detach() for name, x in own.items()}
            if prefills[0].probes(layer, self.ask).normalised:
                found["weighs"] = torch.ones(1)
        return Fitted(found)

    def _descend(self, own: Mapping[str, Tensor], sample: Sample, prefills: Sequence[Prefill], layer: int) -> None:
        """Each part moves by its own size; what begins at 0 by that of the vectors it is added to."""
        typical = {"key": sample.vectors[layer, "keys"], "value": sample.vectors[layer, "values"], "seek": own["seek"]}
        sizes = {name: float(x.detach().square().mean().sqrt()) for name, x in typical.items()}
        groups = [{"params": [x], "lr": self.rate * max(sizes.get(name, 1.0), 1e-6)} for name, x in own.items()]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.rounds)
        dice, octaves = torch.Generator().manual_seed(layer), float(torch.tensor(self.bank + 0.999).log2())
        for _ in range(self.rounds):
            which, size = torch.rand(2, generator=dice).tolist()
            prefill = prefills[int(which * len(prefills))]
            probes, count = prefill.probes(layer, self.ask), prefill.slots(layer).count.amin(1).long()
            wanted, even = probes.target + probes.share * probes.own_values(), evened(probes)
            with torch.enable_grad():
                k = torch.full_like(count, int(2 ** (size * octaves))).minimum(count)
                slots = made(own, prefill, layer, k, probes.normalised, whole=False)
                weights, share = probes.weigh(slots)
                off = (probes.mix(weights, slots) + share * probes.own_values() - wanted) * even
                power = (wanted * even).square().mean((1, 2, 3)).clamp(min=1e-30)
                loss = (off.square().mean((1, 2, 3)) / power).sqrt().mean()  # not squared: no user is all of it
                slopes = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            for x, slope in zip(own.values(), slopes):
                x.grad = None if slope is None or not bool(slope.isfinite().all()) else slope
            adam.step()
            slower.step()

    def flops(self, state: UserState, of: Sources) -> int:
        """Learned queries times keys; what they read of keys, values, positions and times."""
        total = 0
        for x, (segment, *_) in zip(of, state.layers):
            (_, h, k, d), (*_, wide) = (segment.fields[name].shape for name in ("keys", "values"))
            timed = segment.slots is not None and segment.slots.timestamps is not None
            total += 2 * h * x.events * k * (2 * d + wide + 1 + timed)
        return total


def made(
    own: Mapping[str, Tensor], prefill: Prefill, layer: int, k: Tensor, weighs: bool, whole: bool = True
) -> Segment:
    """k [B] slots of every head, no more than are known, in time order; whole: where k is all there are, these as they
    are."""
    old, keys, values = prefill.slots(layer), prefill.keys(layer), prefill.values(layer)
    b, h, s, _ = keys.shape
    real = prefill.mask(layer).expand(-1, h, -1)
    count = old.count.amin(1).long()
    all_of_it = (k >= count) & whole
    k = k.minimum(count)
    size = int(k.max()) if b else 0
    places = old.places(s, prefill.state.length[:, None]).expand(-1, h, -1)
    age = (prefill.state.length[:, None, None] - places).clamp(min=1).float().log()
    logits = own["seek"][:, :size] @ keys.float().mT + own["age"][:, :size] * age.unsqueeze(2)
    if old.mass is not None:
        logits = logits + old.mass.clamp(min=1e-6).log().unsqueeze(2)
    logits = logits.masked_fill(~real.unsqueeze(2), -1e30)
    share = (logits - logits.amax(-1, keepdim=True)).exp() * real.unsqueeze(2) if s else logits
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)  # [B, H, size, S]
    some = torch.arange(size, device=k.device) < k[:, None]  # [B, size]
    stands = (share.double() @ places.double().unsqueeze(-1))[..., 0]  # [B, H, size]
    order = stands.detach().masked_fill(~some[:, None], torch.inf).argsort(dim=-1, stable=True)
    share = share.gather(2, order.unsqueeze(-1).expand_as(share))

    def row(name: str) -> Tensor:
        """[B, H, size, ...], in the order of the slots."""
        x = own[name][:, :size].expand(b, -1, -1, -1)
        return x.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))

    weights = row("mass")[..., 0].masked_fill(~some[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    events = real.sum(-1) if old.mass is None else (old.mass * real).sum(-1)
    mass = weights * events.unsqueeze(-1)  # [B, H, size]
    new_keys = share @ keys.float() * row("gain") + row("key")
    new_values = share @ values.float() * row("worth") + row("value")
    if not weighs:
        new_values = new_values * mass.unsqueeze(-1)

    def filled(x: Tensor, plain: Tensor) -> Tensor:
        """x [B, H, size, ...], of whole histories what they have."""
        first = plain[:, :, :size].expand(x.shape)
        return torch.where(all_of_it.view(b, *[1] * (x.dim() - 1)), first, x.to(plain.dtype))

    times = old.timestamps
    if times is not None:
        newest = times.amax(-1, keepdim=True) if s else times  # seconds before it: shares do not come to 1 exactly
        mean = newest + (share.double() @ (times - newest).expand(-1, h, -1).double().unsqueeze(-1))[..., 0]
        times = filled(mean.detach().round().long(), times)
    stand = (stands.detach().gather(2, order) + 0.501).floor().to(torch.int32)  # halves are common, and all go up
    slots = Slots(
        k.int()[:, None],
        filled(stand, places.to(torch.int32)) if prefill.uses_positions else None,
        times,
        filled(mass, torch.ones_like(places, dtype=torch.float32) if old.mass is None else old.mass)
        if weighs
        else None,
    )
    fields = {"keys": Dense(filled(new_keys, keys)), "values": Dense(filled(new_values, values))}
    return Segment(fields, slots)


def _begin(keys: Tensor, values: Tensor, bank: int) -> dict[str, Tensor]:
    """Queries that assign keys [H, N, D] softly to the nearest of `bank` means; slots are then those means."""
    means, width = entries(keys, bank), values.shape[2]
    near = means.gather(1, closest(keys, means).unsqueeze(-1).expand_as(keys))
    spread = (keys - near).square().sum(-1).mean(1).clamp(min=1e-6)[:, None, None]
    heads, _, depth = means.shape
    begun = {
        "seek": means / spread,
        "age": means.new_zeros(heads, bank, 1),
        "gain": means.new_ones(heads, bank, depth),
        "key": means.new_zeros(heads, bank, depth),
        "worth": means.new_ones(heads, bank, width),
        "value": means.new_zeros(heads, bank, width),
        "mass": means.new_zeros(heads, bank, 1),
    }
    return {name: x.detach().clone().requires_grad_() for name, x in begun.items()}
