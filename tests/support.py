"""The kinds of spaces of docs/spaces.md, and small trainings with them."""

import math
import os
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from agents import RandomEnv
from gymnasium import spaces
from helpers import BOX_ACTIONS, IMAGE, VECTOR
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tensor_envs import RandomTensorEnv

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO

ARMS = spaces.Discrete(3)
EVERYTHING = spaces.Dict(
    {
        "box": VECTOR,
        "image": IMAGE,
        "discrete": spaces.Discrete(3),
        "several": spaces.MultiDiscrete([2, 3]),
        "binary": spaces.MultiBinary(2),
    }
)
MIXED = spaces.Dict(
    {"box": BOX_ACTIONS, "arm": ARMS, "several": spaces.MultiDiscrete([2, 3]), "binary": spaces.MultiBinary(2)}
)
#: Of each row: observations, actions, arguments.
ACTIONS: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "Box": (VECTOR, BOX_ACTIONS, {}),
    "Box, tanh-squashed": (VECTOR, BOX_ACTIONS, {"squashed": True}),
    "Box, gSDE": (VECTOR, BOX_ACTIONS, {"use_sde": True}),
    "Discrete": (VECTOR, ARMS, {}),
    "MultiDiscrete": (VECTOR, spaces.MultiDiscrete([2, 3]), {}),
    "MultiBinary": (VECTOR, spaces.MultiBinary(2), {}),
    "Tuple or Dict of these": (VECTOR, MIXED, {}),
}
OBSERVATIONS: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "Box": (VECTOR, ARMS, {}),
    "Box, images": (IMAGE, ARMS, {}),
    "Discrete": (spaces.Discrete(3), ARMS, {}),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 3]), ARMS, {}),
    "MultiBinary": (spaces.MultiBinary(2), ARMS, {}),
    "Dict of these": (EVERYTHING, ARMS, {}),
}
CASES = {("Actions", row): case for row, case in ACTIONS.items()} | {
    ("Observations", row): case for row, case in OBSERVATIONS.items()
}
Case = tuple[str, str]


class MaskedEnv(RandomEnv):
    """Any action is valid."""

    def action_masks(self) -> np.ndarray:
        space: Any = self.action_space
        sizes = {spaces.Discrete: lambda: space.n, spaces.MultiDiscrete: lambda: space.nvec.sum()}
        return np.ones(sizes.get(type(space), lambda: 2 * math.prod(space.shape or (1,)))(), dtype=bool)


def policy_of(case: Case, ending: str = "Policy") -> str:
    """The name of the policy for a case."""
    space, _, settings = CASES[case]
    is_image = len(space.shape or ()) == 3
    kind = "MultiInput" if isinstance(space, spaces.Dict) else "Cnn" if is_image else "Mlp"
    return "Squashed" * settings.get("squashed", False) + kind + ending


def model_of(case: Case, algorithm: type[TRPO] = TRPO, env: VecEnv | None = None) -> TRPO:
    """A small model."""
    observations, actions, settings = CASES[case]
    ending, kwargs = "Policy", {name: value for name, value in settings.items() if name != "squashed"}
    if algorithm is RecurrentTRPO:
        ending, kwargs = "LstmPolicy", {**kwargs, "policy_kwargs": {"lstm_hidden_size": 8}}
    if env is None:
        cls = MaskedEnv if algorithm is MaskableTRPO else RandomEnv
        env = DummyVecEnv([lambda: cls(observations, actions)] * 2)
    return algorithm(policy_of(case, ending), env, n_steps=16, batch_size=16, seed=0, device="cpu", **kwargs)


def tensors_of(case: Case) -> VecEnv:
    """An environment of tensors."""
    observations, actions, _ = CASES[case]
    return RandomTensorEnv(observations, actions)


def state_of(model: TRPO) -> th.Tensor:
    """All parameters and statistics of a policy, side by side."""
    return th.cat([tensor.detach().double().flatten() for tensor in model.policy.state_dict().values()])


def one_process_of_two(rank: int, folder: str) -> None:
    """Write down what two processes make of each case together: the state, or the error."""
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    states: dict[Case, th.Tensor | str] = {}
    for case in CASES:
        try:
            states[case] = state_of(model_of(case).learn(128))
        except ValueError as error:
            states[case] = str(error)
    th.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)
