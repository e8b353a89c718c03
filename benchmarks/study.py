"""Which loss for which data? The study behind docs/choosing.md: ``python benchmarks/study.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lmf_kernels, when it is built in place

from training.study.command import main

if __name__ == "__main__":
    sys.exit(main())
