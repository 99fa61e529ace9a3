"""Every promise of a class of anyone's, compressor or backbone."""

from __future__ import annotations

from typing import Any

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.registry import place, told
from malloc_bench.testing.backbones import backbone_checks
from malloc_bench.testing.compressors import compressor_checks
from malloc_bench.testing.worlds import Check, lively


def part_checks(cls: Any) -> list[Check]:
    """Of a registered class (`registry.load_class`): a compressor with its defaults, or a backbone in its default size
    and with large random weights, on data without times and with them. Raises ValueError where it cannot be made."""
    if cls.kind == "compressors":
        return compressor_checks(get_compressor(cls.name))
    worlds = {"without times": False, "with times": True}
    try:
        made = {label: lively(get_backbone(cls.name, 60, times)) for label, times in worlds.items()}
    except (Exception, SystemExit) as error:
        how = f"{cls.__name__}(config, n_items, has_time)"
        raise ValueError(f"{place(cls)} cannot be made as {how} ({told(error)})") from error
    return [check for label, backbone in made.items() for check in backbone_checks(backbone, label=label)]
