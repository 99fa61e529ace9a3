"""What plain tensors must look like, so that methods can be tried on them: what does not fit is named in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from malloc_bench.state.named import Named
from malloc_bench.state.user_state import Events


def check(keys: Sequence[Tensor], values: Sequence[Tensor], **others: Any) -> None:
    """Hold the arguments of `Prefill.from_tensors` against the shapes that it names; None is left out. Raises
    ValueError that names the argument and what was expected."""
    _layers("keys", keys, keys, "D")
    _layers("values", values, keys, "D'")
    (b, _, s, _) = keys[0].shape
    given = {name: x for name, x in others.items() if x is not None}
    if "lengths" in given:
        _users("lengths", given["lengths"], b, s)
    if "users" in given:
        _users("users", given["users"], b)
    for name, last in (("queries", "D"), ("attention", "S"), ("probes", "D")):
        if name in given and not callable(given[name]):
            _layers(name, given[name], keys, last)
    if "outputs" in given:
        _outputs(given["outputs"], keys, values)
    _events(given.get("events"), given.get("items"), b, s)


def finite(name: str, given: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    """Layers [B, H, S, D], or maps [B, H, S, S], with 0 where padding is no finite number: 0 times NaN is NaN.

    Raises ValueError that names the first of the real numbers that is none."""
    found = []
    for i, x in enumerate(given):
        if bool((bad := ~x.isfinite()).any()):
            slot = torch.arange(x.shape[2], device=x.device) < count[:, None]
            real = slot[:, None, :, None] & (slot[:, None, None, :] if name == "attention" else True)
            for user, head, row, column in (bad & real).nonzero()[:1].tolist():
                number = float(x[user, head, row, column])
                raise ValueError(
                    f"{name}[{i}]: expected finite numbers, not {number} of user {user}, head {head}, slot {row}"
                )
            x = torch.where(real | ~bad, x, 0.0)
        found.append(x)
    return found


def _layers(name: str, given: Sequence[Tensor], like: Sequence[Tensor], last: str) -> None:
    """Raises ValueError in one line where a layer of `given` is no tensor of [B, H, S, last] beside keys `like`.

    last: the name of the last dimension: "D" as the keys', "S" their slots, anything else any number. `queries` and
    `attention` may have a multiple of the keys' heads, and so may `probes`, of any number.
    """
    grouped, some = name in ("queries", "attention", "probes"), name == "probes"
    if not isinstance(given, Sequence | Tensor) or len(given) != len(like) or not len(given):
        found = str(len(given)) if isinstance(given, Sequence | Tensor) else type(given).__name__
        wanted = "one or more" if given is like else len(like)
        raise ValueError(f"{name}: expected a list of one tensor a layer, {wanted}, not {found}")
    if isinstance(given, Tensor) and given.dim() == 4:
        raise ValueError(f"{name}: expected a list of one tensor a layer; of a single layer that is [{name}]")
    for i, (x, key) in enumerate(zip(given, like)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}[{i}]: expected floating point numbers [B, H, S, {last}], not {found}")
        b, h, s, d = (like[0].shape[0], key.shape[1], like[0].shape[2], key.shape[3])
        size = {"D": d, "S": s}.get(last, x.shape[3])
        heads = x.shape[1] % h == 0 and x.shape[1] > 0 if grouped else x.shape[1] == h
        s = max(x.shape[2], 1) if some else like[0].shape[2]
        if not heads or (x.shape[0], x.shape[2], x.shape[3]) != (b, s, size):
            wanted = f"a multiple of {h}" if grouped else h
            raise ValueError(f"{name}[{i}]: expected [{b}, {wanted}, {s}, {size}], not {list(x.shape)}")
        if x.device != like[0].device or (x.dtype != like[0].dtype and not grouped):
            raise ValueError(
                f"{name}[{i}]: expected {like[0].dtype} on {like[0].device}, as keys[0], not {x.dtype} on {x.device}"
            )


def _users(name: str, given: Tensor, users: int, most: int | None = None) -> None:
    """Raises ValueError in one line where `given` is no whole number [B] for each user, of 0 to `most`."""
    if not isinstance(given, Tensor) or given.shape != (users,) or given.is_floating_point() or given.is_complex():
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: expected whole numbers [{users}], one a user, not {found}")
    if most is not None and users and not bool(((given >= 0) & (given <= most)).all()):
        raise ValueError(
            f"{name}: expected 0 to {most}, the slots of keys, not {int(given.min())} to {int(given.max())}"
        )


def _outputs(given: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Raises ValueError in one line where a layer has no map [Hq, D', d] behind each query head."""
    if not isinstance(given, Sequence) or len(given) != len(keys):
        found = str(len(given)) if isinstance(given, Sequence) else type(given).__name__
        raise ValueError(f"outputs: expected a list of one tensor a layer, {len(keys)}, not {found}")
    for i, (x, key, value) in enumerate(zip(given, keys, values)):
        shape = list(x.shape) if isinstance(x, Tensor) else []
        if len(shape) != 3 or not shape[0] or shape[0] % key.shape[1] or shape[1] != value.shape[3]:
            wanted = f"[a multiple of {key.shape[1]}, {value.shape[3]}, d]"
            raise ValueError(f"outputs[{i}]: expected {wanted}, not {shape if shape else type(x).__name__}")


def _events(events: Events | None, items: Named | None, users: int, slots: int) -> None:
    """Raises ValueError in one line where events are not one a slot, or facts not one an item of theirs."""
    for name, given, kind in (("events", events, Events), ("items", items, Named)):
        if given is not None and not isinstance(given, kind):
            raise ValueError(f"{name}: expected {kind.__name__}, not {type(given).__name__}")
    for name, x in {} if events is None else {**events.columns(), "count": events.count}.items():
        wanted = [users] if name == "count" else [users, slots]
        if list(x.shape) != wanted or x.is_floating_point():
            raise ValueError(
                f"events.{name}: expected whole numbers {wanted}, one a slot, not {x.dtype} {list(x.shape)}"
            )
    most = 0 if events is None or not events.items.numel() else int(events.items.max())
    for name in ("categories", "popularity"):
        if items is not None and name in items and (items[name].dim() != 1 or len(items[name]) < most):
            shape = list(items[name].shape)
            raise ValueError(f"items.{name}: expected one for each of {most} items, whose ids begin at 1, not {shape}")
