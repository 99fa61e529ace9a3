"""What all users share: fits, facts about items. Plain classes: whatever takes rows of users leaves them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor


class Named(Mapping[str, Tensor]):
    """Tensors by name, none of which has a row for each user; as safetensors has them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: Mapping[str, Tensor] = MappingProxyType({k: v.detach() for k, v in sorted(tensors.items())})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        return type(self), (dict(self.tensors),)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return (
            self
            if all(x.device == device for x in self.values())
            else type(self)({name: x.to(device) for name, x in self.items()})
        )

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.values())

    @cached_property
    def digest(self) -> str:
        """sha256 of names, shapes and content."""
        found = hashlib.sha256()
        for name, x in self.items():
            found.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            found.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class Fitted(Named):
    """What a method has learned of training users, once for all users: its bytes are fixed, none is anybody's own."""

    @staticmethod
    def joined(parts: Mapping[str, Fitted]) -> Fitted:
        """The fits of the steps of a method as one, from which `part` takes each again."""
        return Fitted({f"{step}/{name}": x for step, fit in parts.items() for name, x in fit.items()})

    def part(self, step: str) -> Fitted:
        """What was joined under a name; everything where the name is empty."""
        start = f"{step}/" if step else ""
        return Fitted({name.removeprefix(start): x for name, x in self.items() if name.startswith(start)})

    def of(self, layer: int, field: str, part: str = "") -> Tensor:
        """What was learned of a layer's field; where that was its only one, of which fitted slots make keys and values,
        of that."""
        start = f"{layer}."
        fields = {name.split(".")[1] for name in self if name.startswith(start)}
        return self[start + (field if field in fields or len(fields) != 1 else fields.pop()) + part]
