"""Time one update against sb3-contrib's, on the same data and the same weights, alternating in one process.

    python benchmarks/update.py humanoid-8192 --output benchmarks/results/update_humanoid-8192.json
    python benchmarks/update.py humanoid-8192 --samples 65536 --device cuda --output update_cuda_humanoid-65536.json
    python benchmarks/update.py --list

Both classes get the same policy, the same rollout and the same settings, with ``target_kl`` and ``cg_damping`` converted to
joint units; sb3-contrib runs at its defaults, ours at its defaults plus the options of the case. What is reported are medians
over alternating repetitions and their ratios: single times mean little on a shared machine. ``actor`` is ``train()`` without
critic epochs, ``train`` all of it.

The quality of a step is measured at equal KL: each class's step is rescaled along its direction until the KL on the batch is
``target_kl``; then the surrogate's improvement is evaluated on the batch itself and on fresh rollouts of the old policy.
"""

import argparse
import copy
import functools
import itertools
import json
import pathlib
import platform
import resource
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks import contrib
from benchmarks.timing import spread
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.update.surrogate import Surrogate


class RandomImages(gym.Env[np.ndarray, int]):
    """An environment of Atari's shapes, 4 x 84 x 84 and 6 actions, with smooth random pictures and rewards for action 0."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(6)

    def _observe(self) -> np.ndarray:
        coarse = self.np_random.integers(0, 256, (4, 12, 12), dtype=np.uint8)
        return coarse.repeat(7, axis=1).repeat(7, axis=2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Reward action 0; end an episode at random."""
        return self._observe(), float(action == 0), bool(self.np_random.random() < 0.01), False, {}


class Case(NamedTuple):
    """One line of the table."""

    env: str | type[gym.Env]
    policy: str
    n_envs: int
    n_steps: int
    net_arch: list[int] | None
    #: Options of ours beyond the defaults.
    options: dict[str, Any]
    normalize: bool = False


CASES = {
    "humanoid-8192": Case("Humanoid-v5", "MlpPolicy", 16, 512, [256, 256], {"sub_sampling_factor": 4}, True),
    "humanoid-8192-all": Case("Humanoid-v5", "MlpPolicy", 16, 512, [256, 256], {}, True),
    "humanoid-2048": Case("Humanoid-v5", "MlpPolicy", 2, 1024, [64, 64], {"sub_sampling_factor": 4}, True),
    "humanoid-65536": Case("Humanoid-v5", "MlpPolicy", 16, 4096, [256, 256], {"sub_sampling_factor": 4}, True),
    "images-8192": Case(RandomImages, "CnnPolicy", 8, 1024, None, {"sub_sampling_factor": 4}),
    "images-1024": Case(RandomImages, "CnnPolicy", 8, 128, None, {"sub_sampling_factor": 4}),
    "cartpole-1024": Case("CartPole-v1", "MlpPolicy", 8, 128, [64, 64], {"cg_tolerance": 0.03}),
}


class Pair(NamedTuple):
    """Both classes with the same weights and the same rollout."""

    ours: TRPO
    theirs: sb3_contrib.TRPO


def make_pair(case: Case, n_critic_updates: int, device: str = "cpu", seed: int = 0) -> Pair:
    """
    Build both models and fill both buffers with one rollout of ours.

    :param case: what to build
    :param n_critic_updates: critic epochs
    :param device: of both models
    :param seed: of environment and policy
    :return: the models
    """
    env = make_vec_env(case.env, case.n_envs, seed=seed)
    if case.normalize:
        env = VecNormalize(env)
    policy_kwargs: dict[str, Any] = {} if case.net_arch is None else {"net_arch": case.net_arch}
    shared: dict[str, Any] = {"n_steps": case.n_steps, "n_critic_updates": n_critic_updates, "seed": seed, "device": device}
    ours = TRPO(
        case.policy,
        env,
        # sb3-contrib's CnnPolicy shares the extractor; the same networks for both
        policy_kwargs={**policy_kwargs, **({"share_features_extractor": True} if case.policy == "CnnPolicy" else {})},
        **{**contrib.settings(env.action_space), **shared, **case.options},
    )
    theirs = sb3_contrib.TRPO(case.policy, env, policy_kwargs=policy_kwargs, **shared)
    _, callback = ours._setup_learn(1, None)
    # A few rollouts, so that the statistics of VecNormalize are no longer those of the first steps
    for _ in range(3 if case.normalize else 1):
        ours.collect_rollouts(env, callback, ours.rollout_buffer, case.n_steps)
    theirs.set_logger(ours.logger)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    copy_rollout(ours, theirs)
    return Pair(ours, theirs)


def copy_rollout(ours: TRPO, theirs: sb3_contrib.TRPO) -> None:
    """
    Give sb3-contrib's buffer the contents of ours.

    :param ours: with a full buffer
    :param theirs: whose buffer is filled
    """
    theirs.rollout_buffer.__dict__.update(copy.deepcopy(ours.rollout_buffer.__dict__))


def restore(model: TRPO | sb3_contrib.TRPO, state: tuple[Any, Any]) -> None:
    """
    Put weights and optimizer back.

    :param model: the model
    :param state: of the policy and of the optimizer
    """
    model.policy.load_state_dict(state[0])
    model.policy.optimizer.load_state_dict(copy.deepcopy(state[1]))


def timed_train(model: TRPO | sb3_contrib.TRPO, n_critic_updates: int, state: tuple[Any, Any]) -> float:
    """
    Time one call of ``train()`` from a given state.

    :param model: the model
    :param n_critic_updates: critic epochs
    :param state: of the policy and of the optimizer
    :return: seconds
    """
    restore(model, state)
    model.n_critic_updates = n_critic_updates
    started = now(model.device)
    with np.errstate(all="ignore"):
        model.train()
    return now(model.device) - started


def now(device: th.device) -> float:
    """
    The time when all that was asked of a device is done.

    :param device: to wait for
    :return: seconds on a clock that only goes forward
    """
    if device.type == "cuda":
        th.cuda.synchronize(device)
    return time.perf_counter()


def compare_times(pair: Pair, n_repetitions: int, n_critic_updates: int) -> dict[str, Any]:
    """
    Time both classes alternately.

    :param pair: the models
    :param n_repetitions: how often, after one warm-up
    :param n_critic_updates: critic epochs of the whole ``train()``
    :return: medians in seconds and the median of the paired ratios, for the actor and for all
    """
    states = [(copy.deepcopy(model.policy.state_dict()), copy.deepcopy(model.policy.optimizer.state_dict())) for model in pair]
    rows: dict[str, list[tuple[float, float]]] = {"actor": [], "train": []}
    for _ in range(n_repetitions + 1):
        for name, epochs in (("actor", 0), ("train", n_critic_updates)):
            rows[name].append((timed_train(pair.ours, epochs, states[0]), timed_train(pair.theirs, epochs, states[1])))
    for model, state in zip(pair, states, strict=True):
        restore(model, state)
    result = {}
    for name, times in rows.items():
        ours, theirs = np.array(times[1:]).T
        result[name] = {
            "ours_s": float(np.median(ours)),
            "theirs_s": float(np.median(theirs)),
            **spread((theirs / ours).tolist()),
        }
    return result


def median_time(function: Any, device: th.device, n_repetitions: int = 7) -> float:
    """
    Median time of a call, after one warm-up.

    :param function: what to call
    :param device: where it works
    :param n_repetitions: how often
    :return: seconds
    """
    function()
    times = []
    for _ in range(n_repetitions):
        started = now(device)
        function()
        times.append(now(device) - started)
    return float(np.median(times))


def gemm_rate(n_samples: int, sizes: list[int], device: th.device) -> float:
    """
    Rate of the matrix products of a Fisher-vector product, done by themselves.

    :param n_samples: number of samples
    :param sizes: widths of the layers, from input to output
    :param device: where to do them
    :return: floating-point operations per second
    """
    products = []
    for index, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        shapes = (n_samples, n_in), (n_out, n_in), (n_samples, n_out)
        hidden, weight, cotangent = (th.randn(shape, device=device) for shape in shapes)
        products += [lambda a=hidden, w=weight: a @ w.t(), lambda c=cotangent, a=hidden: c.t() @ a]
        if index > 0:
            products += [lambda a=hidden, w=weight: a @ w.t(), lambda c=cotangent, w=weight: c @ w]
    seconds = sum(median_time(product, device) for product in products)
    return fvp_flops(n_samples, sizes) / seconds


def fvp_flops(n_samples: int, sizes: list[int]) -> float:
    """
    Floating-point operations of a Gauss-Newton product: two products of matrices at the first layer, four at each other.

    :param n_samples: number of samples
    :param sizes: widths of the layers, from input to output
    :return: operations
    """
    return sum(
        2.0 * n_samples * n_in * n_out * (2 if index == 0 else 4)
        for index, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    )


def phases(model: TRPO, case: Case) -> dict[str, float]:
    """
    Time the parts of our actor update one by one.

    :param model: with a full buffer
    :param case: for the sizes of the network
    :return: seconds, and the Fisher-vector product's share of the GEMM rate
    """
    batch = model._full_batch()
    stride = model._fisher_stride(batch.n_samples)
    timed = functools.partial(median_time, device=model.device)

    def first_pass() -> Surrogate:
        return Surrogate(model.policy, model._parts.actor_params, batch, fisher_stride=stride)

    surrogate = first_pass()
    _, gradient = surrogate.objective_and_gradient()
    fisher = surrogate.fisher()
    result = {
        "batch": timed(model._full_batch),
        "first_pass": timed(first_pass),
        "fisher_setup": timed(surrogate.fisher),
        "fisher_vector_product": timed(lambda: fisher @ gradient),
        "evaluation": timed(lambda: th.no_grad()(surrogate.evaluate)()),
    }
    preconditioner = fisher.preconditioner(model.cg_damping)
    if preconditioner is not None:
        result["preconditioner_setup"] = timed(lambda: fisher.preconditioner(model.cg_damping))
        result["preconditioner_product"] = timed(lambda: preconditioner @ gradient)
        assert case.net_arch is not None
        n_samples = -(-batch.n_samples // stride)
        sizes = [batch.observations.shape[1], *case.net_arch, model.policy.action_net.out_features]
        rate = gemm_rate(n_samples, sizes, model.device)
        result["gemm_gflops"] = rate / 1e9
        result["fvp_share_of_gemm_rate"] = fvp_flops(n_samples, sizes) / result["fisher_vector_product"] / rate
    return result


def step_quality(pair: Pair, n_fresh: int, callback: BaseCallback) -> dict[str, Any]:
    """
    Improvement of each class's step at equal KL, on its own batch and on fresh rollouts of the old policy.

    :param pair: the models
    :param n_fresh: number of fresh rollouts
    :param callback: passed to the rollouts
    :return: for each class, in-sample improvement, and the improvements on the fresh rollouts
    """
    ours, theirs = pair
    params = ours._parts.actor_params
    old = flatten(params)
    batch = ours._full_batch()
    surrogate = Surrogate(ours.policy, params, batch)
    ours.n_critic_updates = theirs.n_critic_updates = 0
    their_names = [name for name, param in ours.policy.named_parameters() if any(param is p for p in params)]
    directions = {}
    ours.train()
    directions["ours"] = flatten(params) - old
    assign_(params, old)
    theirs.train()
    their_params = dict(theirs.policy.named_parameters())
    directions["theirs"] = flatten([their_params[name] for name in their_names]) - old

    @th.no_grad()
    def at(point: Surrogate, direction: th.Tensor, scale: float) -> tuple[float, float]:
        assign_(params, old + scale * direction)
        objective, kl = point.evaluate()
        assign_(params, old)
        return float(objective), float(kl)

    scales = {}
    for name, direction in directions.items():
        low, high = 0.0, 1.0
        while at(surrogate, direction, high)[1] < float(ours.target_kl):
            high *= 2
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if at(surrogate, direction, middle)[1] < float(ours.target_kl) else (low, middle)
        scales[name] = low
    result: dict[str, Any] = {
        name: {"in_sample": at(surrogate, direction, scales[name])[0], "fresh": []} for name, direction in directions.items()
    }
    for _ in range(n_fresh):
        assert ours.env is not None
        ours.collect_rollouts(ours.env, callback, ours.rollout_buffer, ours.n_steps)
        fresh = Surrogate(ours.policy, params, ours._full_batch())
        for name, direction in directions.items():
            result[name]["fresh"].append(at(fresh, direction, scales[name])[0])
    difference = np.array(result["ours"]["fresh"]) - np.array(result["theirs"]["fresh"])
    result["fresh_difference_mean"] = float(difference.mean())
    result["fresh_difference_standard_error"] = float(difference.std(ddof=1) / np.sqrt(n_fresh))
    return result


def peak_memory(arguments: list[str], which: str) -> float:
    """
    Peak memory that one ``train()`` takes on top of what was there before, in a process of its own.

    :param arguments: that name the case
    :param which: "ours" or "theirs"
    :return: MiB
    """
    # One epoch: the memory of the others is the same
    command = [sys.executable, __file__, *arguments, "--measure-memory-of", which, "--critic-epochs", "1"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(pair: Pair, which: str) -> float:
    """
    Growth of the memory during one ``train()``: of this process, sampled every two milliseconds (Linux), or of the GPU.

    :param pair: the models
    :param which: "ours" or "theirs"
    :return: MiB
    """
    if pair.ours.device.type == "cuda":
        before = th.cuda.memory_allocated()
        th.cuda.reset_peak_memory_stats()
        getattr(pair, which).train()
        return (th.cuda.max_memory_allocated() - before) / 2**20
    resident = pathlib.Path("/proc/self/statm")
    page = resource.getpagesize() / 2**20
    is_done = threading.Event()
    seen = [int(resident.read_text().split()[1])]

    def watch() -> None:
        while not is_done.wait(0.002):
            seen.append(int(resident.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    getattr(pair, which).train()
    is_done.set()
    watcher.join()
    return (max(seen) - seen[0]) * page


def write(result: dict[str, Any], output: pathlib.Path | None) -> None:
    """
    Print a result, and keep it.

    :param result: what was measured
    :param output: file, if any
    """
    print(json.dumps(result, indent=1))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--critic-epochs", type=int, default=10, help="sb3-contrib's default is 10")
    parser.add_argument("--fresh", type=int, default=10, help="number of fresh rollouts for the quality of the step")
    parser.add_argument("--samples", type=int, help="another number of samples than the case has, in as many environments")
    parser.add_argument("--device", default="cpu", help="of both classes")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--memory-only", nargs="+", choices=["ours", "theirs"], help="measure peak memory, and no times")
    parser.add_argument("--measure-memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list or args.case is None:
        print("\n".join(f"{name:16} {case}" for name, case in CASES.items()))
        return
    case = CASES[args.case]
    if args.samples is not None:
        case = case._replace(n_steps=args.samples // case.n_envs)
    same_case = [args.case, "--samples", str(case.n_envs * case.n_steps), "--device", args.device]
    if args.memory_only:
        memory = {which: peak_memory(same_case, which) for which in args.memory_only}
        write({"case": args.case, "samples": case.n_envs * case.n_steps, "memory_mib": memory}, args.output)
        return
    pair = make_pair(case, args.critic_epochs, args.device)
    if args.measure_memory_of is not None:
        print(measure_memory(pair, args.measure_memory_of))
        return
    result: dict[str, Any] = {
        "case": args.case,
        "samples": case.n_envs * case.n_steps,
        "critic_epochs": args.critic_epochs,
        "options": case.options,
        "torch": th.__version__,
        "threads": th.get_num_threads(),
        "processor": th.cuda.get_device_name() if pair.ours.device.type == "cuda" else platform.machine(),
        **compare_times(pair, args.repetitions, args.critic_epochs),
        "phases_s": phases(pair.ours, case),
        "memory_mib": {which: peak_memory(same_case, which) for which in ("ours", "theirs")},
    }
    _, callback = pair.ours._setup_learn(1, None, reset_num_timesteps=False)
    result["quality"] = step_quality(pair, args.fresh, callback)
    write(result, args.output)


if __name__ == "__main__":
    main()
