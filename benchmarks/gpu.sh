#!/bin/sh
# What only a GPU can tell, in five minutes:
#
#     sh benchmarks/gpu.sh FOLDER
#
# The tests of CUDA, the times of updates, and Brax's ant and humanoid in thousands of environments. What is printed goes into
# FOLDER. Before: pip install -e ".[dev,brax]" with builds of PyTorch and JAX (`jax[cuda12]`) for the GPU.
set -u
folder=${1:?usage: sh benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python}
mkdir -p "$folder"
# PyTorch needs memory too
export XLA_PYTHON_CLIENT_PREALLOCATE=false
nvidia-smi >"$folder/nvidia-smi.txt" 2>&1
timeout 60 "$python" -m benchmarks.update humanoid-65536 --device cuda --fresh 2 --repetitions 3 \
    --output "$folder/update_cuda_humanoid-65536.json" >"$folder/update.txt" 2>&1
timeout 40 "$python" -m benchmarks.masks_and_memory time --device cuda --pairs 3 \
    --output "$folder/masks_and_memory_cuda.json" >"$folder/masks_and_memory.txt" 2>&1
timeout 40 "$python" -m benchmarks.tensors cartpole --n-envs 4096 16384 --repetitions 2 --device cuda \
    --output "$folder/tensors_cuda_cartpole.json" >"$folder/tensors.txt" 2>&1
timeout 90 "$python" -m benchmarks.simulators brax ant --n-envs 4096 --n-steps 32 --minutes 0.7 --device cuda \
    --output "$folder/simulators.csv" >"$folder/ant_4096.txt" 2>&1
# What takes time from each other is not timed
timeout 120 "$python" -m pytest -q tests/test_cuda.py >"$folder/tests.txt" 2>&1 &
timeout 120 "$python" -m benchmarks.simulators brax humanoid --n-envs 2048 --minutes 1 --device cuda \
    --output "$folder/simulators.csv" >"$folder/humanoid_2048.txt" 2>&1
wait
tail -n 4 "$folder"/*.txt
