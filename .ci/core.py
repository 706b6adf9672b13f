"""
Check an installation without extras: TRPO trains, saves and loads, and `sb3-trpo` says which extra it needs.

    make test-core
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from sb3_trpo_ext import TRPO

EXTRAS = ("envpool", "matplotlib", "mujoco", "optuna", "pandas", "rich", "rl_zoo3", "sb3_contrib", "tqdm", "yaml")

installed = [name for name in EXTRAS if importlib.util.find_spec(name)]
assert not installed, f"there are more than the core dependencies: {installed}"

model = TRPO("MlpPolicy", "CartPole-v1", n_steps=256, seed=0, device="cpu").learn(1024)
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder, "model"))
    loaded = TRPO.load(Path(folder, "model"), env=model.get_env(), device="cpu")
observations = model.observation_space.sample()[None].repeat(8, axis=0)
assert np.array_equal(*(each.predict(observations, deterministic=True)[0] for each in (model, loaded)))
loaded.learn(512, reset_num_timesteps=False)
assert loaded.num_timesteps == 1536

command = [Path(sys.executable).with_name("sb3-trpo"), "train", "--env", "CartPole-v1"]
refused = subprocess.run(command, capture_output=True, text=True)
print(refused.stderr, end="")
assert refused.returncode != 0
assert len(refused.stderr.splitlines()) == 1, "one line says what to install"
assert "sb3-trpo-ext[zoo]" in refused.stderr
