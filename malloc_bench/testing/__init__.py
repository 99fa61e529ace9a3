"""Contract tests for anyone's compressor or backbone.

`check_compressor(MyMethod())` and `check_backbone(my_backbone)` run everything and raise AssertionError at the
first broken promise. `compressor_checks` and `backbone_checks` give the single checks, one test each in pytest:

    @pytest.mark.parametrize("check", compressor_checks(MyMethod()), ids=str)
    def test_contract(check):
        check()
"""

from malloc_bench.testing.backbones import backbone_checks, check_backbone
from malloc_bench.testing.compressors import broken_promises, check_compressor, compressor_checks, read_alone
from malloc_bench.testing.elsewhere import portable
from malloc_bench.testing.parts import part_checks
from malloc_bench.testing.worlds import POISON, Check, World, check_packs, histories, poisoned, resized, worlds

__all__ = [
    "POISON", "Check", "World", "backbone_checks", "broken_promises", "check_backbone", "check_compressor",
    "check_packs", "compressor_checks", "histories", "part_checks", "poisoned", "portable", "read_alone", "resized",
    "worlds",
]  # fmt: skip
