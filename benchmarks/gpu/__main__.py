"""``python -m benchmarks.gpu``: see :mod:`benchmarks.gpu.suite`."""

import sys

from benchmarks.gpu.suite import main

sys.exit(main())
