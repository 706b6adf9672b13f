"""One thread of PyTorch against two, for rollouts and for updates, on several kinds of vector environment.

    python -m benchmarks.studies.threads --output benchmarks/results/threads.json

Ours alone, alternating in one process, with the settings of ``benchmarks/throughput.py``. Medians.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np
import torch as th

from benchmarks.throughput import CASES, make_models
from sb3_trpo_ext import TRPO


def measure(case_name: str, threads: list[int], n_repetitions: int) -> dict[str, Any]:
    """
    Time rollouts and updates.

    :param case_name: of the benchmark of the whole training
    :param threads: numbers of threads to compare
    :param n_repetitions: how often each, after a warm-up
    :return: for each number of threads, steps per second of the rollout alone and of all, and seconds of the updates
    """
    case = CASES[case_name]
    models = make_models(case, n_critic_updates=10, batch_size=128)
    model = models["ours"]
    assert isinstance(model, TRPO) and models["theirs"].env is not None and model.env is not None
    models["theirs"].env.close()
    _, callback = model._setup_learn(10**9, None)
    n_samples = case.n_envs * case.n_steps
    rows: dict[int, list[tuple[float, float, float]]] = {n: [] for n in threads}
    for repetition in range(n_repetitions + 1):
        for n_threads in threads if repetition % 2 == 0 else threads[::-1]:
            th.set_num_threads(n_threads)
            started = time.perf_counter()
            model.collect_rollouts(model.env, callback, model.rollout_buffer, case.n_steps)
            rollout = time.perf_counter() - started
            model.train()
            logged = model.logger.name_to_value
            rows[n_threads].append((rollout, logged["time/policy_update"], logged["time/critic_update"]))
    model.env.close()
    result = {}
    for n_threads, times in rows.items():
        rollout, policy, critic = np.median(times[1:], axis=0)
        result[str(n_threads)] = {
            "rollout_steps_per_s": round(n_samples / rollout, 1),
            "policy_update_s": round(policy, 4),
            "critic_update_s": round(critic, 4),
            "steps_per_s": round(n_samples / float(np.median(np.sum(times[1:], axis=1))), 1),
        }
    return result


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["humanoid-8", "humanoid-8-subproc", "humanoid-16-envpool"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"torch": th.__version__}
    result["cases"] = {case: measure(case, args.threads, args.repetitions) for case in args.cases}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
