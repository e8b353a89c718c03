#!/bin/sh
# Makes dist/: a source distribution and a wheel, which is installed into a fresh environment and has to pass its check
# there, without the native kernels and, after `python -m lmf_kernels build`, with them.
set -eu
cd "$(dirname "$0")/.."
unset LMF_BUILD_NATIVE LMF_BUILD_CUDA TORCH_CUDA_ARCH_LIST # the wheel has no native kernels; what CI asks for is not meant
rm -rf dist build/dist
uv build --quiet
ls -l dist
uv venv --quiet build/dist/environment
uv pip install --quiet --python build/dist/environment/bin/python dist/*.whl torch==2.15.0 numpy setuptools ninja
cd build/dist
environment/bin/python -m lmf_kernels
LMF_BUILD_CUDA=0 environment/bin/python -m lmf_kernels build
environment/bin/python -m lmf_kernels | tee report
grep -q '^native .*on cpu .*ok' report
