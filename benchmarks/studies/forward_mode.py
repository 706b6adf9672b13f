"""Products of the Jacobian of an LSTM policy with a vector: by two reverse passes, and in forward mode.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.forward_mode --output benchmarks/results/forward_mode.json

The package makes ``J v`` by a reverse pass through the graph of ``J^T u``, which is built once for an update
(:class:`~sb3_trpo_ext.optim.AutogradJacobian`). Forward mode (``torch.autograd.forward_ad``) goes through the network with
tangents, and needs no such graph. (``torch.func.jvp`` does not take sequences of different lengths in PyTorch 2.13.) Both are
timed in turn, on rollouts of 2,048 samples of CartPole-v1 without velocities, with their largest relative difference. So are
the building of the graph, and ``J^T u``, which every product with the Fisher matrix needs as well.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch as th
import torch.autograd.forward_ad as forward_ad
from rl_zoo3.wrappers import MaskVelocityWrapper
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.timing import spread, timing_parser
from sb3_trpo_ext import RecurrentTRPO
from sb3_trpo_ext.optim import AutogradJacobian
from sb3_trpo_ext.optim.vectors import unflatten
from sb3_trpo_ext.update.distributions import family_of
from sb3_trpo_ext.update.settings import no_argument_checks
from sb3_trpo_ext.update.surrogate import _Outputs


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(n_envs: int, hidden_size: int, n_repetitions: int) -> dict[str, Any]:
    """
    Time both on one rollout.

    :param n_envs: number of environments: the fewer, the longer the sequences can be
    :param hidden_size: of the LSTM
    :param n_repetitions: how often
    :return: a row
    """
    env = make_vec_env("CartPole-v1", n_envs, wrapper_class=MaskVelocityWrapper, seed=0)
    kwargs = {"lstm_hidden_size": hidden_size}
    model = RecurrentTRPO("MlpLstmPolicy", env, n_steps=2048 // n_envs, policy_kwargs=kwargs, seed=0, device="cpu")
    model.learn(2048 * 3)
    model.policy.set_training_mode(False)
    batch, calls = model._full_batch(), model.calls_class.on(model.policy, model.rollout_buffer)
    params = model._parts.actor_params
    with no_argument_checks:
        family_outputs = _Outputs(calls, batch, family_of(model.policy.action_dist))
        everything = slice(0, batch.n_samples)
        by_name = {name: param for name, param in family_outputs.named_parameters() if any(param is each for each in params)}
        vector = th.randn(sum(param.numel() for param in params))
        tangents = dict(zip(by_name, unflatten(vector, list(by_name.values())), strict=True))

        def forwards() -> list[th.Tensor]:
            with th.no_grad(), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(param.detach(), tangents[name]) for name, param in by_name.items()}
                outputs = th.func.functional_call(family_outputs, duals, (everything,))
                return [forward_ad.unpack_dual(output).tangent for output in outputs]

        def graph() -> AutogradJacobian:
            return AutogradJacobian(family_outputs(everything), list(by_name.values()))

        jacobian = graph()
        reverse = jacobian.jvp(vector)
        difference = max(
            float((one - other).abs().max() / one.abs().max()) for one, other in zip(reverse, forwards(), strict=True)
        )
        cotangents = tuple(th.ones_like(part) for part in reverse)
        times = [
            {
                "forward mode": seconds(forwards),
                "reverse": seconds(lambda: jacobian.jvp(vector)),
                "graph": seconds(graph),
                "transposed": seconds(lambda: jacobian.vjp(cotangents)),
            }
            for _ in range(n_repetitions)
        ]
    return {
        "n_envs": n_envs,
        "hidden_size": hidden_size,
        "n_sequences": len(calls.sequences.starts),
        "longest": int(calls.sequences.lengths.max()),
        "difference": difference,
        **{name: statistics.median(each[name] for each in times) for name in times[0]},
        **spread([each["reverse"] / each["forward mode"] for each in times]),
    }


def main() -> None:
    """Measure and print."""
    args = timing_parser(__doc__, repetitions=9).parse_args()
    th.set_num_threads(1)
    rows = []
    for n_envs, hidden_size in ((16, 64), (1, 64), (16, 256)):
        rows.append(compare(n_envs, hidden_size, args.repetitions))
        print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"torch": th.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
