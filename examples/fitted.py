"""A history that only items of a catalogue will ever ask, kept in few fitted slots, on plain tensors.

    python examples/fitted.py

Keys, values and queries are maps of item vectors in 20 loose groups. 128 items of the catalogue are the probes that
slots are fitted to; the other 872 then ask, and what they get is compared with what the whole history gives them.
"""

import torch

from malloc_bench.compressors.base import as_compressor
from malloc_bench.state import Prefill, UserState

USERS, HEADS, EVENTS, WIDTH, ITEMS, PROBES = 32, 2, 200, 32, 1000, 128
FITTED = {"fit_omp": {"probes": PROBES}}
METHODS = {
    "recent": "recent",
    "merge_adjacent": "merge_adjacent",
    "fit_constant": {"fit_constant": {"probes": PROBES}},
    "fit_omp": FITTED,
    "merge_adjacent + mxint": {"compose": {"steps": ["merge_adjacent", "mxint"]}},
    "fit_omp + mxint": {"compose": {"steps": [FITTED, "mxint"]}},
}


def answers(state: UserState, queries: torch.Tensor) -> torch.Tensor:
    """What queries [B, H, Q, D] get of the only layer of a state: softmax attention, a slot's mass times its weight."""
    (segment,) = state.layers[0]
    fields = {name: vectors.dense() for name, vectors in segment.fields.items()}
    if segment.slots is None:  # a constant
        return fields["constant"].expand(-1, -1, queries.shape[2], -1)
    logits = queries @ fields["keys"].mT / WIDTH**0.5
    logits = logits.masked_fill(~segment.slots.mask(segment.width).unsqueeze(2), -torch.inf)
    if segment.slots.mass is not None:
        logits = logits + segment.slots.mass.unsqueeze(2).log()
    return logits.softmax(-1) @ fields["values"]


def main() -> None:
    torch.manual_seed(0)
    items = torch.randn(20, WIDTH)[torch.randint(20, (ITEMS,))] + 0.5 * torch.randn(ITEMS, WIDTH)
    to_key, to_value, to_query = (torch.randn(HEADS, WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3))
    history = items[torch.randint(ITEMS, (USERS, EVENTS))].unsqueeze(1)
    keys, values, queries = history @ to_key, history @ to_value, (items @ to_query).expand(USERS, -1, -1, -1)
    prefill = Prefill.from_tensors([keys], [values], probes=[queries[:, :, :PROBES]])
    asked = queries[:, :, PROBES:]
    wanted = answers(prefill.state, asked)
    print(f"{'method':24} {'budget':>7} {'bytes':>6} {'wrong by':>9}")
    for name, method in METHODS.items():
        for budget in (1 / 8, 1 / 32):
            made = as_compressor(method)
            state = made.compress(prefill, budget if made.takes_budget else None)
            share = float(state.nbytes().sum() / prefill.full_bytes().sum())
            wrong = float((answers(state, asked) - wanted).norm() / wanted.norm())
            print(f"{name:24} {budget:7.1%} {share:6.1%} {wrong:9.1%}")


if __name__ == "__main__":
    main()
