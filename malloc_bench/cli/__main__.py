"""`python -m malloc_bench.cli`."""

import sys

from malloc_bench.cli.commands import main

sys.exit(main())
