"""Methods that cheat, spoil what others are given, or bring the process down: their row fails, the others are right.

Each flawed method runs between sound ones, whose values must be those that they have without it.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.compressors.selection import Eviction
from malloc_bench.data import load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.splits import Split, leave_one_out
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.evaluation.drift import drift
from malloc_bench.evaluation.evaluate import REFERENCE, Evaluation, Job, evaluate
from malloc_bench.evaluation.guard import ProcessChanged, fingerprint, undisturbed
from malloc_bench.state import Ask, Dense, Prefill, Segment, Slots, Stats, UserState, Vectors, map_tensors
from malloc_bench.state.vectors import Ragged, Read


@pytest.fixture(scope="module")
def split() -> Split:
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 40, "items": 40, "median": 12, "longest": 30, "shortest": 3})
    return leave_one_out(group(card, generate(small), "test"))


@pytest.fixture(scope="module")
def backbone(split: Split) -> Backbone:
    torch.manual_seed(0)
    return get_backbone("sasrec", split.dataset.n_items, True, dim=16, max_length=30)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_USERS", 16)  # 3 chunks


def job(name: str, budget: Any = None, **params: Any) -> Job:
    return Job(f"{name}@{budget}", get_compressor(name, **params), budget and Budget.parse(budget))


SOUND = [job("none"), job("snapkv", 0.3), job("svd", 0.5), job("kivi"), job("truncate", {"slots": 3})]


@pytest.fixture(scope="module")
def want(split: Split, backbone: Backbone) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_USERS", 16)
        return evaluate(backbone, split, SOUND)


class Kept:
    """A store that forgets all but the names of what it was to keep."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def load(self, chunk: int) -> dict[str, Any]:
        return {}

    def save(self, chunk: int, done: Any) -> None:
        self.names.extend(done)


def failure(flawed: Compressor, split: Split, backbone: Backbone, want: Evaluation, budget: Any = 0.5) -> str:
    """The reason that the flawed method's row gives, run between sound ones, which are all right."""
    bad = Job("bad", flawed, budget and Budget.parse(budget))
    kept = Kept()
    result = evaluate(backbone, split, [*SOUND[:3], bad, *SOUND[3:]], store=kept)
    bad_chunks, *sound = (kept.names.count(each) for each in ("bad", REFERENCE, SOUND[-1].id))
    assert bad_chunks < sound[0] == sound[1] == 3
    np.testing.assert_equal(result.values, want.values)
    assert result.failed.keys() == {"bad"}
    return result.failed["bad"].reason


# --- what is given is changed ---------------------------------------------------------------------------------------


def by_torch(prefill: Prefill) -> None:
    prefill.keys(0).mul_(0.5)


def by_data(prefill: Prefill) -> None:
    prefill.values(1).data[0, 0, 0, 0] += 1e-3


def by_numpy(prefill: Prefill) -> None:
    prefill.keys(1).detach().numpy()[:] = prefill.keys(1).flip(2).numpy()


def by_statistics(prefill: Prefill) -> None:
    prefill.newest_attention(0, 16).zero_()


def by_events(prefill: Prefill) -> None:
    assert prefill.events is not None
    prefill.events.items.data.fill_(1)


def by_fields(prefill: Prefill) -> None:
    prefill.segment(0).fields["keys"] = prefill.segment(1).fields["keys"]  # type: ignore[index]


def by_force(prefill: Prefill) -> None:
    object.__setattr__(prefill.state, "layers", prefill.state.layers[::-1])


def by_sorting(prefill: Prefill) -> None:
    x = prefill.keys(0).data
    x[:, :, [0, 1]] = x[:, :, [1, 0]]


def by_users(prefill: Prefill) -> None:
    prefill.users.add_(1)


def by_outputs(prefill: Prefill) -> None:
    prefill.output_map(0).mul_(0.5)  # a view of the weights


def by_tables(prefill: Prefill) -> None:
    assert prefill.tables is not None
    prefill.tables["positions"].add_(1)


def by_projection(prefill: Prefill) -> None:
    next(iter(prefill.projection(1).values())).zero_()


def by_block(prefill: Prefill) -> None:
    block: Any = prefill.probes(0)
    block.block.qkv.weight.data.mul_(0.9)


@dataclass(frozen=True)
class Writes(Compressor):
    """As recent, after it has changed what it was given."""

    how: Any = by_torch
    late: bool = False
    seen: list[int] = field(default_factory=list, repr=False, compare=False)

    @property
    def needs(self) -> Stats:
        return Stats(window=16, outputs=True, projections=True, probes=Ask(4))

    def floor(self, prefill: Prefill) -> Tensor:
        return get_compressor("recent").floor(prefill)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if len(prefill.users) > 1:
            self.seen.append(1)
        if not self.late or len(self.seen) > 1:
            self.how(prefill)
        return get_compressor("recent").compress(replace(prefill, memo={}), budget)


MUTATORS = [
    by_torch, by_data, by_numpy, by_statistics, by_events, by_fields, by_force, by_sorting, by_users, by_outputs,
    by_tables, by_projection, by_block,
]  # fmt: skip


@pytest.mark.parametrize("how", MUTATORS, ids=lambda how: how.__name__)
def test_a_method_that_changes_what_it_is_given(how: Any, split: Split, backbone: Backbone, want: Evaluation) -> None:
    weights = {name: x.clone() for name, x in backbone.state_dict().items()}
    assert "InputChanged: a method changed the " in failure(Writes(how), split, backbone, want)
    assert all(torch.equal(x, weights[name]) for name, x in backbone.state_dict().items())


def test_one_that_does_so_in_a_later_chunk_only(split: Split, backbone: Backbone, want: Evaluation) -> None:
    assert "InputChanged" in failure(Writes(by_data, late=True), split, backbone, want)


def test_two_of_them_at_once(split: Split, backbone: Backbone, want: Evaluation) -> None:
    jobs = [Job("a", Writes(by_torch), Budget(0.5)), *SOUND, Job("b", Writes(by_data), Budget(0.5))]
    result = evaluate(backbone, split, jobs)
    np.testing.assert_equal(result.values, want.values)
    assert result.failed.keys() == {"a", "b"} and all("InputChanged" in each.reason for each in result.failed.values())


@dataclass(frozen=True)
class Poisons(Compressor):
    """Spoils what other methods may have remembered: writes into it, and remembers nonsense in their names."""

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        map_tensors(torch.Tensor.zero_, tuple(prefill.memo.values()))
        backwards = torch.arange(prefill.keys(0).shape[2]).expand(len(prefill.users), 1, -1)
        for sound in SOUND:
            for layer in prefill.layers:
                prefill.memo["order", sound.compressor, layer] = backwards
        prefill.memo["full bytes"] = torch.ones(len(prefill.users), dtype=torch.long)
        return prefill.state


def test_what_one_method_remembers_no_other_reads(split: Split, backbone: Backbone, want: Evaluation) -> None:
    inside = get_compressor("compose", steps=(Recalls(), "int8")), get_compressor("chunkkv", inner=Recalls())
    for chain in (Poisons(), *inside):
        bad = Job("bad", chain, None if isinstance(chain, Poisons) else Budget(0.5))
        result = evaluate(backbone, split, [bad, *SOUND])
        assert not result.failed
        for each in SOUND:
            np.testing.assert_equal(result.values[each.id], want.values[each.id])


@dataclass(frozen=True)
class Recalls(Eviction):
    """A link of a chain, or an inner method, that spoils how many slots others keep."""

    name = "recalls"
    steps: int = 3  # not those of a chain

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        map_tensors(lambda x: x.clamp_(max=1) if x.dtype == torch.long else x, tuple(prefill.memo.values()))
        return prefill.keys(layer).norm(dim=-1)


def test_a_fingerprint_sees_any_change_and_nothing_else() -> None:
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool):
        x = (torch.randn(3, 2, 700, 5) * 9).to(dtype)
        before = fingerprint(x)
        assert fingerprint(x.clone()) == before == fingerprint(torch.cat([x, x])[3:])
        for at in (0, 1, 4095, 20999):
            y = x.clone()
            y.view(-1)[at] = 1 if float(y.view(-1)[at]) == 0 else 0
            assert fingerprint(y) != before
        y = x.clone()
        y[0, 0, :2] = x[0, 0, :2].flip(0)
        assert torch.equal(x, y) or fingerprint(y) != before
    assert fingerprint(torch.zeros(4)) != fingerprint(torch.zeros(2, 2)) != fingerprint(torch.zeros(0))


# --- what is read is not in the bytes -------------------------------------------------------------------------------

VAULT: dict[Any, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Hollow(Vectors):
    """One number a user is stored, and the vectors come from somewhere else."""

    tag: Tensor  # [B, 1, 1, 1]
    where: str
    full: Any
    size: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.tag), *self.size)

    def dense(self) -> Tensor:
        found = {
            "field": lambda: self.full,
            "global": lambda: VAULT[self.full],
            "closure": lambda: self.full(),
            "attribute": lambda: self.__dict__.get("secret", torch.zeros(self.shape)),
        }[self.where]()
        return found[: len(self.tag)] if len(found) >= len(self.tag) else found.expand(self.shape)

    def parts(self, count: Tensor | None):
        yield Ragged(self.tag, torch.ones(1, 1, dtype=torch.long))

    def load(self, read: Read, count: Tensor | None) -> Vectors:
        return replace(self, tag=read(self.tag, torch.ones(1, 1, dtype=torch.long)))


@dataclass(frozen=True)
class Hides(Compressor):
    """Full vectors for a few bytes."""

    where: str = "field"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer in prefill.layers:
            fields = {}
            for name, vectors in prefill.segment(layer).fields.items():
                x = vectors.dense()
                key = (layer, name, len(VAULT))
                VAULT[key] = x
                full = {"field": x, "global": key, "closure": lambda x=x: x, "attribute": None}[self.where]
                fields[name] = Hollow(prefill.users.float().view(-1, 1, 1, 1), self.where, full, tuple(x.shape[1:]))
                object.__setattr__(fields[name], "secret", x)
            layers.append((Segment(fields, prefill.slots(layer)),))
        return UserState(tuple(layers), prefill.state.length)


@pytest.mark.parametrize("where", ["field", "global", "closure", "attribute"])
def test_a_state_that_is_kept_elsewhere(where: str, split: Split, backbone: Backbone, want: Evaluation) -> None:
    assert "NotInTheBytes" in failure(Hides(where), split, backbone, want)


class Codebook:
    """Vectors that all users share: an object of its own, so that no row of it is taken for a user."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Coded(Vectors):
    """The nearest of a few vectors, by number."""

    codes: Tensor  # [B, H, S, 1] uint8
    book: Codebook

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.codes.shape[:3], self.book.rows.shape[-1])  # type: ignore[return-value]

    def dense(self) -> Tensor:
        return self.book.rows[self.codes[..., 0].long()]

    def parts(self, count: Tensor | None):
        assert count is not None
        yield Ragged(self.codes, count)

    def load(self, read: Read, count: Tensor | None) -> Vectors:
        assert count is not None
        return replace(self, codes=read(self.codes, count))


@dataclass(frozen=True)
class Codes(Compressor):
    """A codebook, of random vectors that do not look at users, or (a fault) of these users' own vectors."""

    own: bool = False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer in prefill.layers:
            fields: dict[str, Vectors] = {}
            for name, vectors in prefill.segment(layer).fields.items():
                x = vectors.dense()
                own = x[:8, 0].flatten(0, 1)
                rows = torch.randn(256, x.shape[-1], generator=torch.Generator().manual_seed(layer))
                rows[: min(256, len(own))] = own[:256] if self.own else rows[: len(own)]
                codes = torch.cdist(x, rows.expand(*x.shape[:2], -1, -1)).argmin(-1, keepdim=True)
                fields[name] = Coded(codes.byte(), Codebook(rows))
            layers.append((Segment(fields, prefill.slots(layer)),))
        return UserState(tuple(layers), prefill.state.length)


def test_what_all_users_share_comes_from_the_template(split: Split, backbone: Backbone, want: Evaluation) -> None:
    result = evaluate(backbone, split, [Job("coded", Codes())])
    assert not result.failed and result.values["coded"]["bytes"].max() < result.bytes_full.max() / 4
    assert "NotInTheBytes" in failure(Codes(own=True), split, backbone, want, None)


def test_bytes_are_counted_in_one_place() -> None:
    with pytest.raises(TypeError, match="UserState is final, its bytes are counted in one place"):
        type("Lying", (UserState,), {"nbytes": lambda self: 10})
    with pytest.raises(TypeError, match="Segment is final"):
        type("Lying", (Segment,), {})
    with pytest.raises(TypeError, match="parts of Slots are final"):
        type("Lying", (Slots,), {"parts": lambda self, length: iter(())})
    state = get_compressor("full").compress(Prefill.from_tensors([torch.zeros(1, 1, 2, 2)], [torch.ones(1, 1, 2, 2)]))
    for thing in (state, state.layers[0][0]):
        for name in ("nbytes", "pack", "packed", "secret"):
            with pytest.raises((AttributeError, TypeError)):
                object.__setattr__(thing, name, lambda: 10)

    class Small(Ragged):
        def nbytes(self) -> Tensor:
            return torch.zeros(1, dtype=torch.long)

    class Lying(Dense):
        def parts(self, count: Tensor | None):
            yield from (Small(*part) for part in super().parts(count))

    liar = UserState(((Segment({"keys": Lying(torch.zeros(1, 1, 2, 2))}, state.layers[0][0].slots),),), state.length)
    assert liar.nbytes().tolist() == [len(liar.pack(0))]


@dataclass(frozen=True)
class Returns(Compressor):
    what: str = "nothing"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> Any:
        state = prefill.state
        return {"nothing": None, "a tuple": state.layers, "fewer": state.take(torch.arange(len(state) - 1))}[self.what]


@pytest.mark.parametrize("what", ["nothing", "a tuple", "fewer"])
def test_what_is_no_state_of_these_users(what: str, split: Split, backbone: Backbone, want: Evaluation) -> None:
    assert "TypeError: a method must return a UserState of the 16 users" in failure(
        Returns(what), split, backbone, want, None
    )


@dataclass(frozen=True)
class Scores(Eviction):
    """Scores of which one is no number."""

    value: float = float("nan")
    padding: bool = False
    name = "scores"

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        scores = prefill.keys(layer).norm(dim=-1)
        return torch.where(prefill.mask(layer) == self.padding, scores, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers(value: float, split: Split, backbone: Backbone, want: Evaluation) -> None:
    assert "ValueError: scores of real slots are NaN or infinite" in failure(Scores(value), split, backbone, want)
    sound = evaluate(backbone, split, [Job("padding", Scores(value, padding=True), Budget(0.5))])
    assert not sound.failed


# --- the process is brought down or changed -------------------------------------------------------------------------


class Alien(BaseException):
    pass


def change_rng() -> None:
    torch.manual_seed(99), np.random.seed(99), random.seed(99)


HARM = {
    "exit": (lambda: sys.exit(0), "SystemExit: 0"),
    "alien": (lambda: (_ for _ in ()).throw(Alien("from afar")), "Alien: from afar"),
    "generator": (lambda: (_ for _ in ()).throw(GeneratorExit()), "GeneratorExit"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "torch's default dtype from torch.float32 to"),
    "threads": (lambda: torch.set_num_threads(3), "torch's number of threads from"),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), "torch's matmul precision from highest"),
    "folder": (lambda: os.chdir("/"), "the working folder from"),
    "environment": (lambda: os.environ.update(MALLOC_BENCH_HOME="/nowhere"), "the environment, for the whole process"),
}


@dataclass(frozen=True)
class Harms(Compressor):
    how: str = "exit"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        HARM[self.how][0]()
        return prefill.state


@pytest.mark.parametrize("how", HARM)
def test_a_method_that_harms_the_process(how: str, split: Split, backbone: Backbone, want: Evaluation) -> None:
    assert HARM[how][1] in failure(Harms(how), split, backbone, want, None)
    assert torch.get_default_dtype() is torch.float32


def test_an_interrupt_stays_one(split: Split, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(HARM, "exit", (interrupt, ""))
    with pytest.raises(KeyboardInterrupt):
        evaluate(backbone, split, [*SOUND, Job("bad", Harms())])


def test_random_numbers_and_the_gradient_mode_go_on_as_if_nothing_had_been() -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    change_rng()
    want = drawn()
    change_rng()
    with undisturbed():
        random.random(), torch.rand(3), np.random.rand(3)
        torch.set_grad_enabled(not torch.is_grad_enabled())
    assert drawn() == want and torch.is_grad_enabled()


def test_what_torchs_compiler_writes_into_the_environment_is_no_methods_doing(monkeypatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with undisturbed():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/somewhere"
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == "/somewhere"
    monkeypatch.setenv("KEPT", "1")
    with pytest.raises(ProcessChanged, match="the environment"), undisturbed():
        os.environ.update(KEPT="2", NEW="3")
    assert os.environ["KEPT"] == "1" and "NEW" not in os.environ


@dataclass(frozen=True)
class Descends(Compressor):
    """Half of the slots, their values moved by gradient steps towards the mean that all of them have."""

    def floor(self, prefill: Prefill) -> Tensor:
        return get_compressor("recent").floor(prefill)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        state = get_compressor("recent").compress(prefill, budget)
        layers = []
        for layer, (segment,) in enumerate(state.layers):
            with torch.enable_grad():
                x = segment.fields["values"].dense().clone().requires_grad_(True)
                target = prefill.values(layer).mean(2, keepdim=True)
                for _ in range(2):
                    (step,) = torch.autograd.grad((x.mean(2, keepdim=True) - target).square().sum(), x)
                    x = (x - 0.1 * step).detach().requires_grad_(True)
            layers.append((Segment({**segment.fields, "values": Dense(x)}, segment.slots),))
        return UserState(tuple(layers), state.length)


def test_a_method_that_fits_by_gradient_steps(split: Split, backbone: Backbone) -> None:
    result = evaluate(backbone, split, [Job("descends", Descends(), Budget(0.5)), job("recent", 0.5)])
    assert not result.failed
    np.testing.assert_array_equal(result.values["descends"]["bytes"], result.values["recent@0.5"]["bytes"])


# --- a backbone that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["prefill", "read"])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_adapted_backbone_that_fails(
    call: str, error: type, split: Split, backbone: Backbone, want: Evaluation
) -> None:
    """It takes its own jobs with it, and no others."""
    part = get_compressor("mqa")
    adapted = part.adapted(get_backbone("sasrec", split.dataset.n_items, True, dim=16, heads=2, max_length=30))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error("a fault")

    setattr(adapted, call, fails)
    result = evaluate(backbone, split, [*SOUND, Job("bad", part, None, adapted)])
    np.testing.assert_equal(result.values, want.values)
    assert f"{error.__name__}: a fault" in result.failed["bad"].reason


def test_a_backbone_whose_outputs_are_no_numbers(split: Split) -> None:
    torch.manual_seed(0)
    broken = get_backbone("sasrec", split.dataset.n_items, True, dim=16, max_length=30)
    torch.nn.init.constant_(broken.items.weight, float("nan"))
    with pytest.raises(ValueError, match="read from the full state are not finite"):
        evaluate(broken, split, SOUND[:1])


def test_the_reference_is_there(want: Evaluation) -> None:
    assert want.values.keys() == {REFERENCE, *(each.id for each in SOUND)} and not want.failed


def test_a_method_whose_needs_cannot_be_met(split: Split, backbone: Backbone, want: Evaluation) -> None:
    """It alone: all others share the prefill that it asks for."""
    assert "cannot give" in failure(replace(get_compressor("snapkv"), window=2**62), split, backbone, want)


# --- drift: what goes on is held to the same ------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates(Compressor):
    """As recent, but for what it does when the user has gone on."""

    how: str

    def floor(self, prefill: Prefill) -> Tensor:
        return get_compressor("recent").floor(prefill)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        return get_compressor("recent").compress(prefill, budget)

    def update(self, prefill: Prefill, budget: Any = None, fitted: Any = None) -> UserState:
        state = self.compress(prefill, budget)
        if self.how == "exits":
            sys.exit(3)
        if self.how == "threads":
            torch.set_num_threads(torch.get_num_threads() + 1)
        if self.how == "returns":
            return state.take(torch.tensor([0]))
        if self.how == "writes":
            assert prefill.whole is not None
            prefill.whole.mul_(2)  # what all others' budgets are shares of
        if self.how == "no numbers":
            return state.map(lambda x: x * torch.nan if x.is_floating_point() else x)
        if self.how == "hides":
            return Hides("global").compress(prefill)
        return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exits", "SystemExit: 3"), ("threads", "ProcessChanged"), ("returns", "TypeError: a method must return"),
        ("writes", "InputChanged"), ("no numbers", "not finite"), ("hides", "NotInTheBytes"),
    ],
)  # fmt: skip
def test_a_method_whose_update_is_flawed(how: str, said: str, split: Split, backbone: Backbone) -> None:
    sound = [job("full"), job("recent", 0.3), job("h2o", 0.3)]
    want, failed = drift(backbone, split, sound, (3,))
    assert not failed and want["recent@0.3"]["drift_users@3"] > 1
    found, failed = drift(backbone, split, [sound[0], Job("bad", Updates(how), Budget(0.5)), *sound[1:]], (3,))
    assert {each: found[each] for each in want} == want
    assert failed.keys() == {"bad"} and said in failed["bad"].reason and "drift@3" not in found["bad"]
