"""What a compressor is: one call from a full state to a smaller one.

A new method is one file in a family's folder: a frozen dataclass with `@register`, whose fields are its parameters.
Scoring methods subclass `Eviction` (selection.py) and write `scores`; methods that write vectors down otherwise
subclass `Encoder`; methods that change the backbone before it is trained `Structural`; everything else `Compressor`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.encoding import map_layers as map_layers
from malloc_bench.compressors.encoding import map_vectors as map_vectors
from malloc_bench.compressors.encoding import shortened as shortened
from malloc_bench.compressors.encoding import together as together
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.registry import clipped, find, place, suggest, told
from malloc_bench.state import Fitted, Prefill, Sample, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

MAX_SIZE = 100_000  # any whole number of a method of ours: slots, ranks, probes, rounds


def _parsing(compress: Callable[..., UserState]) -> Callable[..., UserState]:
    asks = len(inspect.signature(compress).parameters) > 3  # a method that learns nothing need not take `fitted`

    @functools.wraps(compress)
    def parsed(self: Compressor, prefill: Prefill, budget: Any = None, fitted: Fitted | None = None) -> UserState:
        prefill = prefill.given(fitted)
        if prefill.fitted is None and self.fit_parts():
            raise MissingFit(f"{self.name} must be fitted first: compress(prefill, budget, fitted=fit(sample, budget))")
        budget = None if budget is None else Budget.parse(budget)
        made: Any = compress(self, prefill, budget, prefill.fitted) if asks else compress(self, prefill, budget)
        if not isinstance(made, UserState):
            users = f"the {len(prefill.state)} users it was given"
            raise TypeError(f"a method must return a UserState of {users}, not {type(made).__name__}")
        return made

    return parsed


def _sampling(fit: Callable[..., Fitted]) -> Callable[..., Fitted]:
    @functools.wraps(fit)
    def parsed(self: Compressor, sample: Any, budget: Any = None) -> Fitted:
        return fit(self, Sample.of(sample), None if budget is None else Budget.parse(budget))

    return parsed


def grows(memory: str = "b n L d", compress: str = "0", read: str = "b n L d") -> Mapping[str, str]:
    """A method's `growth`: leading terms of numbers stored, of FLOPs of compress, and of a read's beyond no history.

    In n events, L layers, d channels of all h heads, b the share of the bytes that stays and k = b n slots of it, r
    ranks, w newest queries, p probes, c entries of a codebook, m slots of a fixed number, s steps; 0: no matmul.
    """
    return {"memory": memory, "compress": compress, "read": read}


class Source(NamedTuple):
    """What a layer's slots are made of: so many events, and heads of queries, several of which may share a stored one;
    asking: those that multiply keys, all but behind FuXi, whose others weigh slots by where they stand."""

    events: int
    queries: int
    asking: int


Sources = Sequence[Source]


def inner_methods(compressor: Compressor) -> Iterator[Compressor]:
    """The methods that its parameters name: the steps of a chain, an inner method."""
    for value in (getattr(compressor, each.name) for each in fields(compressor)):  # type: ignore[arg-type]
        yield from (x for x in (value if isinstance(value, list | tuple) else (value,)) if isinstance(x, Compressor))


def methods_in(compressor: Compressor) -> Iterator[Compressor]:
    """The method and all that its parameters name, and theirs."""
    yield compressor
    for part in inner_methods(compressor):
        yield from methods_in(part)


def ours(compressor: Compressor) -> bool:
    """Whether it, and all that its parameters name, come with this package."""
    return all(type(part).__module__.startswith("malloc_bench.") for part in methods_in(compressor))


def said(compressor: Compressor) -> str:
    """`fit_keys(probes=128) + mxint`: a method's name, and what its parameters are where they are not the defaults."""
    inner = [each for each in methods_in(compressor) if each is not compressor]
    if inner:
        return " + ".join(map(said, inner))
    given = {each.name: getattr(compressor, each.name) for each in fields(compressor)}  # type: ignore[arg-type]
    plain = {each.name: each.default for each in fields(compressor)}  # type: ignore[arg-type]
    own = ", ".join(f"{name}={value}" for name, value in given.items() if value != plain[name])
    return f"{compressor.name}({own})" if own else compressor.name


class MissingFit(ValueError):
    """A method that learns from training users was to compress before it did."""


class Compressor(ABC):
    """A smaller state from a full one; it knows the state only, never a backbone.

    Class attributes: `family` (its line in tables and figures), `paper`, `formula` and `stores` (in words, for
    `malloc-bench show`), `note` (that it loses to slots by lot, and why), `version` (raise it when results change;
    `version_placed` where they change behind backbones that read positions alone). A method that learns something of
    training users, once for all, also writes `fit`; `fit_fields` are the parameters that a fit depends on (None: all),
    `fit_uses_budget` whether the budget is one. `grid`: parameters worth tuning, each with its values, at most the 8
    settings that `malloc-bench tune` tries. `growth`: see `grows`. `needs_at_best`: does without its `needs` where
    nobody can tell, as behind another method.
    """

    kind: ClassVar[str] = "compressors"
    name: ClassVar[str]
    family: ClassVar[str] = "custom"
    paper: ClassVar[str] = "unpublished"
    formula: ClassVar[str] = "see its source"
    stores: ClassVar[str] = "see its source"
    note: ClassVar[str] = ""
    version: ClassVar[int] = 1
    version_placed: ClassVar[int] = 1
    needs_at_best: ClassVar[bool] = False
    fit_fields: ClassVar[tuple[str, ...] | None] = None
    fit_uses_budget: ClassVar[bool] = False
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}
    growth: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every `compress` takes its budget as a suite writes it: 0.25, {"slots": 8}, {"bytes": 4096} or a Budget."""
        super().__init_subclass__(**kwargs)
        if "compress" in cls.__dict__:
            cls.compress = _parsing(cls.__dict__["compress"])  # type: ignore[method-assign]
        if "fit" in cls.__dict__:
            cls.fit = _sampling(cls.__dict__["fit"])  # type: ignore[method-assign]

    @property
    def needs(self) -> Stats:
        """Attention statistics that `compress` reads."""
        return Stats()

    @property
    def fit_needs(self) -> Stats:
        """What `fit` reads of training users' prefills."""
        return self.needs

    @property
    def files(self) -> Sequence[str | Path]:
        """Files that the method reads, such as a codebook: their content is a part of what a row depends on."""
        return ()

    @property
    def takes_budget(self) -> bool:
        """False where the size follows from the parameters: one cell with a null budget."""
        return True

    @property
    def structural(self) -> Structural | None:
        """What the backbone must be adapted by, and trained with, before `compress`; None for most."""
        return None

    def supports(self, backbone: Backbone) -> str | None:
        """None, or why the pair makes no sense with the backbone as it is: the row is skipped with that reason."""
        return None

    def accepts(self, budget: Budget) -> str | None:
        """None, or why the method cannot be sized by such a budget: the row is skipped with that reason."""
        return None

    def budget_unit(self, budget: Budget) -> str:
        """What such a budget counts here: `bytes` of the state, `slots`, or `events`."""
        return "bytes" if budget.slots is None else "slots"

    def fit(self, sample: Any, budget: Any = None) -> Fitted:
        """What the method learns of training users, named tensors; most learn nothing and do not have this.

        sample: a Prefill of theirs, with `fit_needs`, or several (a `Sample`, which an implementation always gets). The
        same sample comes to the same fit: what is random is seeded. Its bytes are fixed bytes of the method.
        """
        raise TypeError(f"{type(self).__name__} learns nothing")

    def explain(self, fitted: Fitted, budget: Any) -> Sequence[str]:
        """What the method makes of a budget with a fit, in words, a line each; most have nothing to say."""
        return ()

    def fit_parts(self) -> Mapping[str, Compressor]:
        """The parts of the method that are fitted, each by itself, by the name under which it finds its fit."""
        return {} if type(self).fit is Compressor.fit else {"": self}

    @abstractmethod
    def compress(self, prefill: Prefill, budget: Any = None, fitted: Any = None) -> UserState:
        """The smaller state; `prefill` is not changed. budget: None, or as `Budget.parse` takes it.

        fitted: what `fit` came to; None where `prefill` has it or the method learns nothing. An implementation gets a
        Budget, or None, and `prefill.fitted`. Raises ValueError for what is no budget, MissingFit.
        """

    def update(self, prefill: Prefill, budget: Any = None, fitted: Any = None) -> UserState:
        """The state of a user who has gone on, within the budget of the grown history.

        prefill: of the compressed state with new events appended (`joined`), and what can be observed over it; `whole`
        says what the full state of all events would take. As it stands here, that is compressed again.
        """
        return self.compress(prefill, budget, fitted)

    def floor(self, prefill: Prefill) -> Tensor:
        """Bytes [B] of the smallest state the method can make: what a target below it comes to."""
        return torch.zeros(len(prefill.state), dtype=torch.long)

    def flops(self, state: UserState, of: Sources) -> int:
        """Matmul-like work of making `state`, for one user, 2 per multiply-add; of: what each layer is made of.

        Not counted: sorting, element-wise work, and the statistics, which the backbone gathers. As it stands here, what
        the methods that its parameters name cost.
        """
        return sum(each.flops(state, of) for each in inner_methods(self))


class Encoder(Compressor):
    """Writes the vectors of any state down otherwise, slot by slot: composes with every token method.

    measured: the size depends on what the vectors are, so `cost` is an estimate and only the state itself tells;
    by_field: a field is written as it is whatever others there are: behind fitted slots it is given one alone, of few
    slots, without positions or masses; by_vector: so is each vector, whatever is beside it, and what is written comes
    out the same when it is written again.
    """

    measured: ClassVar[bool] = False
    by_vector: ClassVar[bool] = False
    by_field: ClassVar[bool] = True
    growth = grows(read="n L d")

    @property
    def takes_budget(self) -> bool:
        return False

    def encode(self, state: UserState) -> UserState:
        """The same slots, their vectors encoded; an encoder that is fitted writes `write`."""
        raise TypeError(f"{type(self).__name__} must define encode(state) -> UserState, or write(prefill)")

    def write(self, prefill: Prefill) -> UserState:
        """The state, encoded; for encoders that look at `prefill.fitted`."""
        return self.encode(prefill.state)

    @abstractmethod
    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] of an encoded state of n [B] slots."""

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        return self.write(prefill)


@dataclass(frozen=True)
class Structural(Compressor):
    """Changes how a backbone makes its state, before training; the state is the one that the adapted backbone makes.

    Its differences to the full state carry training noise. finetune: epochs that it is trained for, with the suite's
    other settings, from the weights of the un-adapted backbone on; 0: from scratch, for the suite's epochs. As many
    epochs are as many steps. `convert` says what the trained weights become; all others begin fresh.
    """

    finetune: int = field(default=0, kw_only=True, metadata={"unsaid": 0})

    def __post_init__(self) -> None:
        if self.finetune < 0:
            raise ValueError(f"{self.name}: finetune must be at least 0, not {self.finetune}")

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def structural(self) -> Structural:
        return self

    @abstractmethod
    def adapt(self, backbone: Backbone) -> None:
        """Swap modules of a fresh backbone for the method's own; where the state's fields change, so do `fields`."""

    def convert(self, weights: Mapping[str, Tensor], adapted: Backbone) -> Mapping[str, Tensor]:
        """What an adapted backbone begins with where the un-adapted one's trained `weights` are taken over.

        Names are the adapted backbone's; what it does not have, or has in another shape, is left.
        """
        return weights

    def begin(self, adapted: Backbone, weights: Mapping[str, Tensor]) -> None:
        """Load what the trained weights of the un-adapted backbone come to."""
        own = adapted.state_dict()
        taken = {k: v for k, v in self.convert(weights, adapted).items() if k in own and v.shape == own[k].shape}
        adapted.load_state_dict({**own, **taken})

    def adapted(self, backbone: Backbone) -> Backbone:
        """A copy, adapted."""
        made = copy.deepcopy(backbone)
        self.adapt(made)
        return made

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        return prefill.state


def get_compressor(name: str, **params: Any) -> Compressor:
    """A compressor by name; raises UnknownName, or ValueError on an unknown parameter or a value out of range, and of a
    class that cannot be made. No whole number of ours is above `MAX_SIZE`, but for seeds."""
    cls = find("compressors", name)
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"{place(cls)} is no frozen dataclass: write @dataclass(frozen=True) above it")
    valid = {f.name for f in fields(cls)}
    for key in params.keys() - valid:
        what = suggest(key, valid) if valid else " It has none."
        raise ValueError(f"compressor {name} has no parameter '{key}'.{what}")
    for key, value in params.items() if cls.__module__.startswith("malloc_bench.") else ():
        sizes = (x for x in (value if isinstance(value, list | tuple) else (value,)) if isinstance(x, int))
        if key not in ("seed", "which") and max(sizes, default=0) > MAX_SIZE:  # `which` names items
            raise ValueError(f"{name}: {key} must be at most {MAX_SIZE:,}, not {clipped(str(value))}")
    try:
        return cls(**params)  # type: ignore[return-value]
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        how = f"with {params}" if params else "without parameters: give each of them a default"
        raise ValueError(f"{place(cls)} cannot be made {how} ({told(error)})") from error


def as_compressor(step: Any) -> Compressor:
    """A part of another method: a compressor, its name, or {name: {parameter: value}}; raises ValueError."""
    if isinstance(step, Compressor):
        return step
    if isinstance(step, str):
        return get_compressor(step)
    if isinstance(step, dict) and len(step) == 1:
        ((name, params),) = step.items()
        if params is None or isinstance(params, Mapping):
            return get_compressor(name, **(params or {}))
    raise ValueError(f"a step of compose, or an inner method, is NAME or {{NAME: {{parameter: value}}}}, not {step!r}")
