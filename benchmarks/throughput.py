"""Time the whole training loop against sb3-contrib's, alternating in one process.

    python benchmarks/throughput.py humanoid-8 --output benchmarks/results/throughput_humanoid-8.json
    python benchmarks/throughput.py --list

What is timed is ``learn()``: rollouts, policy updates and critic updates. Both classes get the same kind of vector
environment, the same networks and the same weights at the start of each repetition, the same number of critic epochs and
minibatches, and ``target_kl`` and ``cg_damping`` converted to joint units; all else is at the defaults of each, but for the
options of the case. What is reported are medians over alternating repetitions, and the ratios within each: single times mean
little on a shared machine.

The shares come from repetitions of their own, with timers around the parts; ``other`` is what is in none of them. The limit is
what the environment alone does with the actions of the last rollout.
"""

import argparse
import copy
import json
import pathlib
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from benchmarks import contrib
from benchmarks.timing import spread
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.rollout import actors, lean

Model = TRPO | sb3_contrib.TRPO


def of_class(vec_env_cls: type[VecEnv]) -> Callable[[str, int, int], VecEnv]:
    """
    Make environments of Gymnasium's, side by side.

    :param vec_env_cls: how
    :return: from id, number and seed to the environments
    """
    return lambda env, n_envs, seed: make_vec_env(env, n_envs, seed=seed, vec_env_cls=vec_env_cls)


class Case(NamedTuple):
    """One line of the table."""

    env: str
    n_envs: int
    n_steps: int
    net_arch: list[int]
    #: From id, number and seed to the environments; one for each class, where they are to have different ones.
    make_ours: Callable[[str, int, int], VecEnv] = of_class(DummyVecEnv)
    make_theirs: Callable[[str, int, int], VecEnv] = of_class(DummyVecEnv)
    #: Rollouts per repetition.
    n_rollouts: int = 1
    #: Options of ours beyond the defaults.
    options: tuple[tuple[str, Any], ...] = ()


SUBPROC = of_class(SubprocVecEnv)


def envpool(env: str, n_envs: int, seed: int) -> VecEnv:
    """
    Make environments of EnvPool's.

    :param env: id
    :param n_envs: number of environments
    :param seed: of the first
    :return: the environments
    """
    return EnvPoolVecEnv(env, n_envs, seed=seed)


THINNED = (("sub_sampling_factor", 4),)
CASES = {
    "humanoid-8": Case("Humanoid-v5", 8, 1024, [256, 256], options=THINNED),
    "humanoid-8-subproc": Case("Humanoid-v5", 8, 1024, [256, 256], SUBPROC, SUBPROC, options=THINNED),
    "humanoid-16-envpool": Case("Humanoid-v5", 16, 512, [256, 256], envpool, options=THINNED),
    "humanoid-16-envpool-both": Case("Humanoid-v5", 16, 512, [256, 256], envpool, envpool, options=THINNED),
    "cartpole-8": Case("CartPole-v1", 8, 128, [64, 64], n_rollouts=8),
}


def make_models(case: Case, n_critic_updates: int, batch_size: int, seed: int = 0) -> dict[str, Model]:
    """
    Build both models, each with environments of its own.

    :param case: what to build
    :param n_critic_updates: critic epochs
    :param batch_size: of the critic's minibatches
    :param seed: of environments and policies
    :return: the models
    """
    shared: dict[str, Any] = {"n_steps": case.n_steps, "n_critic_updates": n_critic_updates, "batch_size": batch_size}
    shared |= {"seed": seed, "device": "cpu", "policy_kwargs": {"net_arch": case.net_arch}}
    env = case.make_ours(case.env, case.n_envs, seed)
    ours = TRPO("MlpPolicy", env, **{**contrib.settings(env.action_space), **shared, **dict(case.options)})
    theirs = sb3_contrib.TRPO("MlpPolicy", case.make_theirs(case.env, case.n_envs, seed), **shared)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    return {"ours": ours, "theirs": theirs}


class Contestant:
    """
    A model that starts each repetition from the same weights.

    :param model: the model
    :param case: how long a repetition is
    """

    def __init__(self, model: Model, case: Case):
        self.model = model
        self.n_steps = case.n_envs * case.n_steps * case.n_rollouts
        self._state = copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))

    def learn(self) -> float:
        """
        Train for one repetition.

        :return: seconds
        """
        self.model.policy.load_state_dict(self._state[0])
        self.model.policy.optimizer.load_state_dict(copy.deepcopy(self._state[1]))
        started = time.perf_counter()
        self.model.learn(self.n_steps)
        return time.perf_counter() - started

    def step_only(self) -> float:
        """
        Run the environments alone, with the actions of the last rollout.

        :return: steps per second
        """
        env, buffer = self.model.env, self.model.rollout_buffer
        assert env is not None
        actions = buffer.actions.reshape(env.num_envs, buffer.buffer_size, -1).swapaxes(0, 1)
        if isinstance(env.action_space, spaces.Box):
            actions = np.clip(actions, env.action_space.low, env.action_space.high)
        actions = actions.reshape(-1, env.num_envs, *env.action_space.shape)
        env.reset()
        started = time.perf_counter()
        for step in actions:
            env.step(step)
        return actions.shape[0] * env.num_envs / (time.perf_counter() - started)


class _Timers:
    """Seconds spent in functions, by name; what is called within another timed function counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_inside = False

    @contextmanager
    def around(self, targets: list[tuple[Any, str, str]]) -> Iterator[None]:
        """
        Time functions inside the block.

        :param targets: owner, name of the function, and under which name to count
        """
        with ExitStack() as stack:
            for owner, name, label in targets:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), label)))
            yield

    def _timed(self, function: Any, label: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside = True
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - started
                self._is_inside = False

        return timed


def shares(contestant: Contestant) -> dict[str, float]:
    """
    How the time of one repetition is spent.

    :param contestant: of either class
    :return: shares of the whole, by part
    """
    model = contestant.model
    env, buffer = model.env, model.rollout_buffer
    targets = [(env, "step", "env_step"), (buffer, "compute_returns_and_advantage", "values_and_gae")]
    targets += [(BaseCallback, name, "callbacks") for name in ("update_locals", "on_step")]
    targets += [(buffer, "add", "buffer")]
    if isinstance(model, TRPO):
        targets += [(actors.Actor, "act", "actor_step"), (lean.LeanRollout, "_evaluate", "values_and_gae")]
        targets += [(model, "_full_batch", "policy_update")]
        module = sys.modules[TRPO.__module__]
        targets += [(module, "Surrogate", "policy_update"), (model, "_update_policy", "policy_update")]
        targets += [(module, "fit_critic", "critic_update")]
    else:
        targets += [(model.policy, "forward", "actor_step")]
        # Of truncated episodes and at the end; the critic's fit calls it too, inside of `train`
        targets += [(model.policy, "predict_values", "values_and_gae"), (model, "train", "policy_and_critic_update")]
    timers = _Timers()
    with timers.around(targets):
        total = contestant.learn()
    result = {name: seconds / total for name, seconds in sorted(timers.seconds.items(), key=lambda item: -item[1])}
    return {**result, "other": 1 - sum(result.values())}


def compare(case: Case, n_repetitions: int, n_timed: int, n_critic_updates: int, batch_size: int) -> dict[str, Any]:
    """
    Time both classes alternately.

    :param case: what to time
    :param n_repetitions: how often, after one warm-up
    :param n_timed: how often with timers around the parts
    :param n_critic_updates: critic epochs
    :param batch_size: of the critic's minibatches
    :return: medians, ratios and shares
    """
    models = make_models(case, n_critic_updates, batch_size)
    contestants = {name: Contestant(model, case) for name, model in models.items()}
    for contestant in contestants.values():
        contestant.learn()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    limits: dict[str, list[float]] = {name: [] for name in contestants}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for repetition in range(n_repetitions):
        names = list(contestants) if repetition % 2 == 0 else list(contestants)[::-1]
        for name in names:
            rates[name].append(contestants[name].n_steps / contestants[name].learn())
        for name in names:
            limits[name].append(contestants[name].step_only())
    for _ in range(n_timed):
        for name, contestant in contestants.items():
            parts[name].append(shares(contestant))
    for model in models.values():
        assert model.env is not None
        model.env.close()
    ratios = np.array(rates["ours"]) / np.array(rates["theirs"])
    return {
        "ours_steps_per_s": float(np.median(rates["ours"])),
        "theirs_steps_per_s": float(np.median(rates["theirs"])),
        **spread(ratios.tolist()),
        "env_only_steps_per_s": {name: float(np.median(values)) for name, values in limits.items()},
        "all_ours_steps_per_s": [round(rate, 1) for rate in rates["ours"]],
        "all_theirs_steps_per_s": [round(rate, 1) for rate in rates["theirs"]],
        "shares": {
            name: {key: round(float(np.median([row.get(key, 0.0) for row in rows])), 4) for key in rows[0]}
            for name, rows in parts.items()
        },
    }


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--timed", type=int, default=3, help="repetitions with timers around the parts")
    parser.add_argument("--critic-epochs", type=int, default=10, help="sb3-contrib's default is 10")
    parser.add_argument("--batch-size", type=int, default=128, help="of the critic; sb3-contrib's default is 128")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.list or args.case is None:
        print("\n".join(f"{name:20} {case}" for name, case in CASES.items()))
        return
    case = CASES[args.case]
    result: dict[str, Any] = {
        "case": args.case,
        **{name: getattr(case, name) for name in ("env", "n_envs", "n_steps", "net_arch")},
        "options": dict(case.options),
        "critic_epochs": args.critic_epochs,
        "batch_size": args.batch_size,
        "torch": th.__version__,
        "threads": th.get_num_threads(),
        "processor": platform.machine(),
        **compare(case, args.repetitions, args.timed, args.critic_epochs, args.batch_size),
    }
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
