"""What every backbone promises, one function a promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.state import Batch, Dense, Events, Segment, UserState, map_tensors
from malloc_bench.testing.worlds import LENGTHS, Check, check_packs, close, histories, instance, packed, poisoned

_ALL = torch.tensor(LENGTHS)


def backbone_checks(backbone: Backbone, *, label: str | None = None) -> list[Check]:
    """Every promise, tried in eval mode; raises ValueError of a backbone that keeps fewer than 42 events."""
    instance(backbone, Backbone)
    if backbone.max_length < (most := max(LENGTHS) + 2):
        raise ValueError(
            f"{backbone.name} keeps {backbone.max_length} events: {most} are needed to try it (max_length)"
        )
    return [Check(_evaluating(promise), (backbone,), label or backbone.name) for promise in BACKBONE_PROMISES]


def check_backbone(backbone: Backbone) -> None:
    """Run all of `backbone_checks`."""
    for check in backbone_checks(backbone):
        check()


def _evaluating(promise: Callable[[Backbone], None]) -> Callable[[Backbone], None]:
    def run(backbone: Backbone) -> None:
        was = backbone.training
        backbone.eval()
        try:
            promise(backbone)
        finally:
            backbone.train(was)

    run.__name__ = promise.__name__
    return run


def read_equals_forward(backbone: Backbone) -> None:
    """Each token behind the full state comes out as the plain causal pass has it, which sees nothing of later ones."""
    history, tokens = histories(backbone, LENGTHS)
    outputs = backbone.read(tokens, backbone.prefill(history).state)
    for user, n in enumerate(LENGTHS):
        for m in range(2):
            line = _followed(history, tokens, user, m)
            passed = backbone(line)[0]
            close(outputs[user, m], passed[n], f"user {user}, token {m}", 1e-5)
        for at in {0, n // 2} - {n}:
            early = map_tensors(lambda x: x[:, : at + 1] if x.dim() == 2 else x.clamp(max=at + 1), line)  # noqa: B023
            close(backbone(early)[0, at], passed[at], f"user {user}: event {at} once {n - at} more have come", 1e-4)


def compares_with_every_item(backbone: Backbone) -> None:
    history, tokens = histories(backbone, LENGTHS)
    width = backbone.read(tokens, backbone.prefill(history).state).shape[-1]
    shape, want = list(backbone.catalogue().shape), [backbone.n_items, width]
    assert shape == want, (
        f"catalogue() is {shape}, expected {want}: a row for each item but padding, of what reads give"
    )


def append_equals_prefill(backbone: Backbone) -> None:
    """Token by token and in ragged chunks: the same state, bytes and outputs as in one go."""
    history, tokens = histories(backbone, LENGTHS)
    whole = backbone.prefill(history).state
    for chunk in (torch.ones(len(LENGTHS), dtype=torch.int32), torch.tensor([1, 3, 1, 2, 5, 11])):
        state = backbone.prefill(_part(history, 0 * _ALL, 0 * _ALL)).state
        while bool((state.length < _ALL).any()):
            new = _part(history, state.length, (state.length + chunk).minimum(_ALL))
            state = backbone.append(state, new)
        assert state.length.tolist() == list(LENGTHS)
        assert state.nbytes().tolist() == whole.nbytes().tolist()
        for user in range(len(LENGTHS)):
            for got, want in zip(state.segments(), whole.segments()):
                n = _stored(want, user)
                assert _stored(got, user) == n
                for name in want.fields:
                    a, b = (s.fields[name].dense()[user, :, :n] for s in (got, want))
                    close(a, b, f"{name} of user {user}", 1e-5)
        close(backbone.read(tokens, state), backbone.read(tokens, whole), "read after append", 1e-5)


def read_needs_every_field(backbone: Backbone) -> None:
    """Noise of one standard deviation in any one layer and field moves the output by more than 1 %, on every draw.

    For trained weights: fresh or barely trained ones hardly use their state and fail.
    """
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    clean = backbone.read(tokens, state)
    longer = _ALL >= 3
    for at, layer in enumerate(state.layers):
        for number, segment in enumerate(layer):
            for name, vectors in segment.fields.items():
                x = vectors.dense()
                for draw in range(3):
                    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(draw)) * x[_ALL > 0].std()
                    fields = {**segment.fields, name: Dense(x + noise)}
                    broken = (*layer[:number], Segment(fields, segment.slots), *layer[number + 1 :])
                    layers = (*state.layers[:at], broken, *state.layers[at + 1 :])
                    moved = backbone.read(tokens, replace(state, layers=layers)) - clean
                    share = float(moved[longer].norm() / clean[longer].norm())
                    assert share > 0.01, f"noise in layer {at}'s {name} moves the output by {share:.2%} only"


def tokens_do_not_see_each_other(backbone: Backbone) -> None:
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    together = backbone.read(tokens, state)
    for m in range(2):
        one = map_tensors(lambda x: x[:, m : m + 1] if x.dim() == 2 else torch.ones_like(x), tokens)  # noqa: B023
        close(backbone.read(one, state), together[:, m : m + 1], f"token {m} alone", 1e-5)


def many_states_are_read_as_each(backbone: Backbone) -> None:
    """`reads`: what is worked out once for all states is of none of them, be it of fewer events than was said."""
    history, tokens = histories(backbone, LENGTHS)
    whole, none = (backbone.prefill(_part(history, 0 * _ALL, n)).state for n in (_ALL, 0 * _ALL))
    read = backbone.reads(tokens, whole.length)
    for state in (whole, none, whole, none):
        assert torch.equal(read(state), backbone.read(tokens, state)), f"a read of {state.length.tolist()} events"


def candidates_are_scored_alone(backbone: Backbone) -> None:
    """Ranking: a candidate's logit is the same beside others, in another place, and with any number of padding ones."""
    ranker = _ranker(backbone)
    history, tokens = histories(ranker, LENGTHS)
    state = ranker.prefill(history).state
    logits = ranker.score(ranker.read(tokens, state), tokens)
    assert logits.shape == tokens.items.shape
    four = map_tensors(lambda x: torch.cat([x, x], 1) if x.dim() == 2 else x, tokens)
    four = replace(four, items=torch.cat([tokens.items, tokens.items.flip(0)], 1))
    for order in ([1, 0], [0, 2], [3, 1], [2, 2, 1, 3, 0]):
        some = map_tensors(lambda x: x[:, order] if x.dim() == 2 else torch.full_like(x, len(order)), four)  # noqa: B023
        got = ranker.score(ranker.read(some, state), some)
        for at, m in enumerate(order):
            if m < 2:
                close(got[:, at], logits[:, m], f"candidate {m} in {order}", 1e-5)


def ranking_trains_by_the_same_calls(backbone: Backbone) -> None:
    """The loss has a finite gradient for all parameters, through prefill and read; padding counts for nothing."""
    ranker = _ranker(backbone).requires_grad_(True)
    history, tokens = histories(ranker, LENGTHS)
    labels = torch.arange(2 * len(LENGTHS)).view(-1, 2) % 3 == 0
    with torch.enable_grad():
        loss = ranker.ranking_loss(history, tokens, labels)
        _check_gradients(ranker, loss)
    padded = map_tensors(lambda x: torch.cat([x, x], 1) if x.dim() == 2 else x, tokens)
    close(ranker.ranking_loss(history, padded, torch.cat([labels, ~labels], 1)), loss, "loss with padding", 1e-5)


def retrieval_has_no_scoring_head(backbone: Backbone) -> None:
    """Its weights are those of the backbone alone, and scoring without a head is refused in a word."""
    bare = copy.deepcopy(backbone)
    bare.scoring = None
    names = set(bare.state_dict())
    assert set(_ranker(bare).state_dict()) - names and set(bare.state_dict()) == names
    _, tokens = histories(bare, LENGTHS)
    try:
        bare.score(torch.zeros(len(LENGTHS), 2, 1), tokens)
    except ValueError:
        return
    raise AssertionError("a backbone without a scoring head scored candidates")


def refuses_to_forget_times(backbone: Backbone) -> None:
    """A backbone that reads times does not go on without them as if nothing were missing."""
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    if not backbone.uses_times:
        bare = replace(history, times=None, next_times=None)
        close(backbone(bare), backbone(history), "without times", 0.0)
        return
    for call in (backbone.prefill, backbone, lambda events: backbone.read(events, state)):
        for events in (history, tokens):
            for bare in (replace(events, times=None), replace(events, next_times=None)):
                try:
                    call(bare)
                except ValueError:
                    continue
                raise AssertionError("events without times were taken")


def batch_and_padding_do_not_matter(backbone: Backbone) -> None:
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    outputs = backbone.read(tokens, state)
    close(backbone.read(tokens, poisoned(state)), outputs, "poisoned padding", 1e-6)
    for user, n in enumerate(LENGTHS):
        row = torch.tensor([user])
        alone = map_tensors(lambda x: x.index_select(0, row), history)  # noqa: B023
        alone = map_tensors(lambda x: x[:, :n] if x.dim() == 2 else x, alone)  # noqa: B023
        mine = backbone.prefill(alone).state
        token = map_tensors(lambda x: x.index_select(0, row), tokens)  # noqa: B023
        close(backbone.read(token, mine)[0], outputs[user], "alone", 1e-4)  # of float32, whose kernels CPUs choose
        assert int(mine.nbytes()) == int(state.nbytes()[user])


def refuses_beyond_max_length(backbone: Backbone) -> None:
    n = backbone.max_length
    history, tokens = histories(backbone, (n - 1, 2))
    state = backbone.append(backbone.prefill(history).state, _part(tokens, torch.zeros(2), torch.ones(2)))
    assert state.length.tolist() == [n, 3]
    backbone.read(tokens, state)  # a candidate behind a full history
    for refused in (
        lambda: backbone.append(state, _part(tokens, torch.zeros(2), torch.ones(2))),
        lambda: backbone.prefill(histories(backbone, (n + 1,))[0]),
    ):
        try:
            refused()
        except ValueError:
            continue
        raise AssertionError(f"more than max_length={n} events were taken")


def states_pack(backbone: Backbone) -> None:
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    for segment in state.segments():
        has = segment.slots is not None
        assert has == backbone.has_slots, (
            f"has_slots is {backbone.has_slots}, and its state has {'some' * has or 'none'}"
        )
        stored = tuple(segment.fields)
        assert stored == tuple(backbone.fields), f"fields names {tuple(backbone.fields)}, the state stores {stored}"
    back = check_packs(state, lambda s: backbone.read(tokens, s))
    for got, want in zip(back.segments(), state.segments()):
        for name in want.fields:
            for user in range(len(LENGTHS)):
                n = _stored(want, user)
                assert torch.equal(got.fields[name].dense()[user, :, :n], want.fields[name].dense()[user, :, :n])


def nothing_is_not_a_problem(backbone: Backbone) -> None:
    """Users without events, alone or together."""
    for lengths in ((0, 0), (0,), (0, 1)):
        history, tokens = histories(backbone, lengths)
        state: UserState = backbone.prefill(history).state
        assert bool(backbone.read(tokens, state).isfinite().all()), (
            f"histories of {lengths} events: reads NaN, infinite"
        )
        assert len(packed(state)) == len(lengths), f"histories of {lengths} events: {len(packed(state))} states"


def loss_reaches_every_parameter(backbone: Backbone) -> None:
    """Finite, and with a gradient for all parameters."""
    history, _ = histories(backbone, LENGTHS)
    targets = torch.where(history.mask(), history.items.roll(-1, 1).clamp(min=1), 0)
    bare = copy.deepcopy(backbone)
    bare.scoring = None
    with torch.enable_grad():
        _check_gradients(bare, bare.loss(Batch(history, targets)))


def _check_gradients(backbone: Backbone, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True)
    assert bool(loss.isfinite()), f"the loss is {float(loss)}"
    for (name, _), gradient in zip(backbone.named_parameters(), gradients):
        assert gradient is not None and bool(gradient.isfinite().all()), f"{name}: its gradient is not finite, or none"
        assert bool((gradient != 0).any()), f"{name} has no gradient"


def _ranker(backbone: Backbone) -> Backbone:
    """A copy with a scoring head, its own or a fresh one that tells items apart."""
    copied = copy.deepcopy(backbone)
    if copied.scoring is None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            copied.for_ranking()
            assert copied.scoring is not None
            copied.scoring.bias.normal_()
    return copied


def _stored(segment: Segment, user: int) -> int:
    """Slots of a user in a full state's segment, or rows of a memory."""
    return segment.width if segment.slots is None else int(segment.slots.count[user, 0])


def _part(events: Events, start: Tensor, stop: Tensor) -> Events:
    """Each user's events [start, stop), left-aligned."""
    count = (stop - start).to(torch.int32)
    index = start.long()[:, None] + torch.arange(int(count.max()))
    return events.take(index.clamp(max=max(events.items.shape[1] - 1, 0)), count)


def _followed(history: Events, tokens: Events, user: int, m: int) -> Events:
    """One user's history with a token behind it, as a plain batch of one."""
    n, token = int(history.count[user]), tokens.columns()
    line = {name: torch.cat([x[user, :n], token[name][user, m : m + 1]])[None] for name, x in history.columns().items()}
    return Events(count=torch.tensor([n + 1], dtype=torch.int32), **line)


BACKBONE_PROMISES: tuple[Callable[[Backbone], None], ...] = (
    read_equals_forward, compares_with_every_item, append_equals_prefill, read_needs_every_field,
    tokens_do_not_see_each_other, many_states_are_read_as_each, batch_and_padding_do_not_matter,
    refuses_beyond_max_length, refuses_to_forget_times, states_pack, nothing_is_not_a_problem,
    loss_reaches_every_parameter, candidates_are_scored_alone, ranking_trains_by_the_same_calls,
    retrieval_has_no_scoring_head,
)  # fmt: skip
