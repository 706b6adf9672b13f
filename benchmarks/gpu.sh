#!/bin/sh
# What only a GPU can tell, in under ten minutes:
#
#     sh benchmarks/gpu.sh FOLDER
#
# Tests of CUDA, the time of an update, and Brax's humanoid in thousands of environments. What is printed goes into FOLDER.
# Before: pip install -e ".[dev,brax]" with builds of PyTorch and JAX (`jax[cuda12]`) for the GPU.
set -u
folder=${1:?usage: sh benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python}
mkdir -p "$folder"
# PyTorch needs memory too
export XLA_PYTHON_CLIENT_PREALLOCATE=false
nvidia-smi >"$folder/nvidia-smi.txt" 2>&1
timeout 120 "$python" -m pytest -q tests/test_cuda.py >"$folder/tests.txt" 2>&1
for case in humanoid-8192 humanoid-65536 images-8192; do
    timeout 60 "$python" benchmarks/update.py "$case" --device cuda --fresh 2 --repetitions 3 \
        --output "$folder/update_$case.json" >"$folder/update_$case.txt" 2>&1
done
for n_envs in 2048 8192; do
    timeout 125 "$python" -m benchmarks.simulators brax humanoid --n-envs "$n_envs" --minutes 1.2 --device cuda \
        >"$folder/humanoid_$n_envs.txt" 2>&1
done
tail -n 3 "$folder"/*.txt
