#!/usr/bin/env bash
# Runs the native tests on the extension that `make sanitize` built with GCC's AddressSanitizer and
# UndefinedBehaviorSanitizer in build/sanitize/lib. The first finding ends the process with a report.
set -euo pipefail
cd "$(dirname "$0")/.."

# Python is not instrumented: the sanitizers come in front of everything, with the library whose exceptions they follow.
preload=""
for library in libasan.so libubsan.so libstdc++.so.6; do preload+="$(g++ -print-file-name=$library) "; done
# Python never frees all of its memory; an allocation that is too large is an error that PyTorch reports.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD/build/sanitize/lib" LMF_TEST_BACKENDS=native

sanitized() { LD_PRELOAD="$preload" "$@"; }
sanitized python -c 'import lmf_kernels._C as c; assert "build/sanitize/lib" in c.__file__, c.__file__'
# --capture=sys: a report goes past Python, and must not end in a file that pytest drops with the process.
# test_cpu_kernels.py runs the kernels of the lower instruction sets, test_fuzz.py the malformed calls.
sanitized python -m pytest -q -p no:cacheprovider --capture=sys -k "not fork and not dataloader" \
    tests/test_{edges,layouts,reductions,ops,pairwise,precision,backward,threads,properties,cpu_kernels,fuzz}.py "$@"
