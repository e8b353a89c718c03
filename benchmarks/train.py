"""Train on imbalanced data with every loss of the LMF paper and compare them; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lmf_kernels, when it is built in place

from training.cli import main

if __name__ == "__main__":
    sys.exit(main())
