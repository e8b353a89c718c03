#!/usr/bin/env bash
# versions.sh ENVIRONMENT: the tests that meet torch and Triton, on the package as it is installed in an environment whose
# folder is named torch-Python, as 2.11.0-3.12. `make test-versions` makes these.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(realpath "$1")
name=$(basename "$environment")
# By its script: `python -m pytest` would put the clone in front of what is installed.
pytest() { "$environment/bin/pytest" -q -p no:cacheprovider --disable-warnings -m "not slow" "$@"; }

echo "== torch ${name%-*}, Python ${name#*-}"
(
    cd "$environment"
    bin/python -m lmf_kernels
    bin/python - "$name" "$OLDPWD/README.md" <<'CHECK'
import sys
from pathlib import Path
import torch
import lmf_kernels
version, python = sys.argv[1].split("-")
assert torch.__version__.split("+")[0] == version, f"the installation replaced torch {version} by {torch.__version__}"
assert sys.version.startswith(python + "."), sys.version
assert lmf_kernels.__file__.startswith(sys.prefix), lmf_kernels.__file__
example = Path(sys.argv[2]).read_text().split("```python")[1].split("```")[0]
logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
exec(example, {"train_labels": target, "num_classes": 3, "logits": logits, "target": target})
assert logits.grad.abs().sum() > 0
CHECK
)
files() { printf 'tests/test_%s.py ' "$@"; }
# CPU kernels, and what is in front of them.
pytest $(files edges layouts reductions ops pairwise precision backward errors messages modules margins counts state \
    recipes reference oracle properties threads import fuzz linear compile)
# Triton: the compiler, launches down to the driver's call, the emulator, the interpreter, and `make gpu` on stubs.
pytest -m slow $(files triton_compiles)
pytest $(files triton_launch launcher gpu_report)
pytest $(files triton_emulated) -k "reductions_of_many or terms_and_precision or test_float64 or registered_op"
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 pytest $(files edges reductions row_sums) -k triton
