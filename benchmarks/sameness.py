"""
Hash what seven short trainings compute, to show that a change of structure changes no number.

Each training makes 20 updates with a fixed seed on one thread. The hashes depend on the machine and on PyTorch's build, so
compare two trees on one machine:

    PYTHONPATH=/path/to/old/tree python -m benchmarks.sameness > old.json
    PYTHONPATH=/path/to/new/tree python -m benchmarks.sameness > new.json
    diff old.json new.json

For every training there is a hash of the parameters and one of each logged value that is not a time. The norms of the
parameters tell how large a difference is.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from benchmarks import contrib
from sb3_trpo_ext import TRPO

N_UPDATES = 20


class Images(gym.Env):
    """A dot moves on a picture; the action that follows it is rewarded."""

    observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = spaces.Discrete(3)

    def _picture(self) -> np.ndarray:
        self.place = int(self.np_random.integers(3))
        picture = np.zeros((1, 36, 36), np.uint8)
        picture[:, :, 12 * self.place : 12 * self.place + 12] = 255
        return picture

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._picture(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(action == self.place)
        self.n_steps += 1
        return self._picture(), reward, False, self.n_steps == 20, {}


class Rooms(gym.Env):
    """A position and a door; two choices at once."""

    observation_space = spaces.Dict({"position": spaces.Box(-1.0, 1.0, (3,)), "door": spaces.Discrete(2)})
    action_space = spaces.MultiDiscrete([2, 3])

    def _observe(self) -> dict[str, Any]:
        self.position = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.door = int(self.np_random.integers(2))
        return {"position": self.position, "door": self.door}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        reward = float(action[0] == self.door) + float(action[1] == int(self.position[0] > 0))
        self.n_steps += 1
        return self._observe(), reward, False, self.n_steps == 20, {}


class RoomsExtractor(BaseFeaturesExtractor):
    """A features extractor as a user writes it."""

    def __init__(self, observation_space: spaces.Dict):
        super().__init__(observation_space, features_dim=16)
        self.position = nn.Sequential(nn.Linear(3, 12), nn.ReLU())
        self.door = nn.Linear(2, 4)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return th.cat([self.position(observations["position"]), self.door(observations["door"].flatten(1))], dim=1)


class Values(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.records.append(dict(key_values))


def environments(env: str | Callable[[], gym.Env]) -> VecEnv:
    return make_vec_env(env, n_envs=2, seed=0)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def train(policy: str, env: VecEnv, n_steps: int = 128, **kwargs: Any) -> dict[str, Any]:
    # Explicit, so that a change of the defaults changes nothing here
    kwargs["policy_kwargs"] = {"log_std_init": 0.0, **kwargs.get("policy_kwargs", {})}
    model = TRPO(policy, env, seed=0, device="cpu", **{**contrib.DEFAULTS, "n_steps": n_steps, **kwargs})
    values = Values()
    model.set_logger(Logger(None, [values]))
    model.learn(N_UPDATES * n_steps * env.num_envs, log_interval=1)
    state = model.policy.state_dict()
    keys = sorted({key for record in values.records for key in record})
    return {
        "parameters": digest(*(state[name].numpy().tobytes() for name in sorted(state))),
        "values": {
            key: "" if key.startswith("time/") else digest(*(repr(record.get(key)).encode() for record in values.records))
            for key in keys
        },
        "norms": [float(state[name].norm()) for name in sorted(state)],
    }


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "box": lambda: train("MlpPolicy", VecNormalize(environments("Pendulum-v1"))),
    "squashed": lambda: train("SquashedMlpPolicy", environments("Pendulum-v1")),
    "gsde": lambda: train("MlpPolicy", environments("Pendulum-v1"), use_sde=True, sde_sample_freq=4),
    "discrete": lambda: train("MlpPolicy", environments("CartPole-v1"), ent_coef=0.01),
    "images": lambda: train("CnnPolicy", environments(Images), n_steps=32, batch_size=32, n_critic_updates=2),
    "dict": lambda: train(
        "MultiInputPolicy", environments(Rooms), policy_kwargs={"features_extractor_class": RoomsExtractor, "net_arch": [16]}
    ),
    "penalty": lambda: train("MlpPolicy", environments("Pendulum-v1"), trust_region="penalty"),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    names = sys.argv[1:] or list(TRAININGS)
    print(json.dumps({name: TRAININGS[name]() for name in names}, indent=1))
