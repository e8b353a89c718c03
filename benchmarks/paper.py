"""The paper's tables and figures from its datasets: ``python benchmarks/paper.py --help``, docs/paper.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lmf_kernels, when it is built in place

from training.paper.command import main

if __name__ == "__main__":
    sys.exit(main())
