"""Keys, masses and values all by gradient: the most that k slots can do."""

from dataclasses import dataclass, field
from typing import ClassVar

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.fitted.fit_keys import FitKeys
from malloc_bench.registry import register


@register("cartridge")
@dataclass(frozen=True)
class Cartridge(FitKeys):
    """As `fit_keys`, but keys, masses and values move together and for 100 steps: a ceiling of what k slots do, far too
    slow to be made for every user, and to more probes, for few could be learned by heart. The paper trains end to end,
    on a text's own questions; here layer by layer, on what probes should get of each.
    """

    probes: int = 256
    rounds: int = field(default=100, kw_only=True)

    growth = grows(compress="s p k L d + h p k n L")
    family = "fitted"
    paper = "Cartridges, arXiv 2506.06266, there end to end"
    formula = "keys, log masses and values by Adam on |A V of the slots - A V|^2 over probes, from fit_omp on"
    version = 4
    whole: ClassVar[bool] = True
