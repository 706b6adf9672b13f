"""What one of two processes does in the tests of data-parallel training, and the same in one process with the joined batch."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import stable_baselines3.common.policies as sb3_policies
import torch as th

# PyTorch imports it with the first optimizer, which takes longer than all the rest: here, before the processes part
import torch._dynamo
import torch.distributed as dist
from agents import RandomEnv, UpdateLog, collect, copies, make_model, random_vec_env, train
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import cut, make_batch, make_policy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from torch import nn

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.envs import TensorPointMass
from sb3_trpo_ext.envs.blocks import Blocks
from sb3_trpo_ext.optim import (
    AdaptiveKLPenalty,
    Averaged,
    GaussNewtonFisher,
    KLConstraint,
    KroneckerPreconditioner,
    MlpJacobian,
)
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.parallel import reductions
from sb3_trpo_ext.parallel.launch import SharedStatistics, check_identical, start_together
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.update.batch import Batch, rollout_batch
from sb3_trpo_ext.update.critic import CriticFit, CriticStatus, fit_critic
from sb3_trpo_ext.update.normalization import RewardScale, RunningNormalization
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

N_PROCESSES = 2
N_SAMPLES = 24
#: Samples of the first process, and the size of its minibatches.
SPLITS = {"even": (12, 5), "weighted": (8, 6)}
CRITICS: dict[str, tuple[dict[str, Any], CriticFit]] = {
    "by_hand": ({}, CriticFit(3, 0)),
    "by_autograd": ({"activation_fn": nn.ELU}, CriticFit(3, 0, "huber", clip_range=0.5)),
    "clipped": ({}, CriticFit(3, 0, max_grad_norm=0.1)),
}


def use_float64() -> None:
    """New tensors are in double precision, and so is what a policy feeds to its networks."""
    th.set_default_dtype(th.float64)
    policies: Any = sb3_policies
    policies.preprocess_obs = lambda *args, **kwargs: th.as_tensor(preprocess_obs(*args, **kwargs)).double()


def joined_batch(policy: Any) -> Batch:
    th.manual_seed(3)
    batch = make_batch(policy, N_SAMPLES)
    # Away from the start of an update, where all ratios are one
    return batch._replace(old_log_prob=batch.old_log_prob + 0.1 * th.randn(N_SAMPLES))


def policy_facts(part: slice) -> dict[str, th.Tensor]:
    """Each quantity of a policy update on a part of the batch, averaged over the processes."""
    th.manual_seed(1)
    policy = make_policy()
    batch = cut(joined_batch(policy), part)
    shares = Shares.of(batch.n_samples)
    params = split_policy(policy).actor_params
    vector = th.linspace(-1, 1, len(flatten(params)))
    objective_of_batch = Surrogate(policy, params, batch, ent_coef=0.1, shares=shares)
    fisher = objective_of_batch.fisher()
    objective, gradient = objective_of_batch.objective_and_gradient()
    assert isinstance(fisher, GaussNewtonFisher) and isinstance(fisher.jacobian, MlpJacobian)
    score = th.randn(N_SAMPLES, 2, generator=th.Generator().manual_seed(4))[part]
    factors = KroneckerPreconditioner(fisher.jacobian, fisher._output_fisher, score, 0.1, shares)
    # Few steps: rounding grows with each, until not a digit of the residual is left
    update = KLConstraint(5, cg_tolerance=0.0, cg_damping=0.1, precondition=False)
    facts = {
        "objective": shares.mean(objective),
        "gradient": shares.mean(gradient),
        "product": Averaged(fisher, shares) @ vector,
        "factors": th.cat([block.scale.flatten() for block in factors._blocks]),
        "preconditioned": factors @ vector,
        "solution": update._solve(objective_of_batch, shares.mean(gradient)).x,
    }
    result = update.update(objective_of_batch, 0.01)
    assert result.is_accepted, result
    numbers = [result.kl, result.objective_after, result.step_size, *objective_of_batch.summary()]
    return facts | {"params": flatten(params), "numbers": th.tensor(numbers)}


def penalty_facts(part: slice) -> th.Tensor:
    """The parameters after an update of the penalized form, one minibatch per epoch, whose order does not matter then."""
    th.manual_seed(1)
    policy = make_policy()
    batch = cut(joined_batch(policy), part)
    shares = Shares.of(batch.n_samples)
    params = split_policy(policy).actor_params
    update = AdaptiveKLPenalty(params, n_epochs=3, batch_size=N_SAMPLES)
    assert update.update(Surrogate(policy, params, batch, shares=shares), 0.01).is_accepted
    return flatten(params)


def critic_facts(kind: str, part: slice, batch_size: int, order: Callable[[int], th.Tensor]) -> th.Tensor:
    """Loss and parameters after a fit, with a given order in place of a shuffled one."""
    kwargs, fit = CRITICS[kind]
    th.manual_seed(1)
    policy = make_policy(**kwargs)
    batch = cut(joined_batch(policy), part)
    shares = Shares.of(batch.n_samples)
    parts = split_policy(policy)
    policy.optimizer = th.optim.Adam(parts.critic_params, lr=0.01)
    shuffled, th.randperm = th.randperm, order  # type: ignore[assignment]
    try:
        result = fit_critic(
            policy, parts.critic_params, parts.critic_modules, batch, fit._replace(batch_size=batch_size), shares
        )
    finally:
        th.randperm = shuffled
    assert result.status is CriticStatus.FITTED
    return th.cat([flatten(parts.critic_params), th.tensor([result.loss])])


def raw_samples(rank: int) -> list[np.ndarray]:
    """Observations that one process has seen, in batches of different sizes, far from zero."""
    generator = np.random.default_rng(rank)
    return [generator.normal(1e3, 1 + rank, (size, 3)) for size in (4, 2 + rank, 5)]


def merged_statistics(rank: int) -> tuple[Any, ...]:
    """Running statistics after two merges."""
    stats = RunningMeanStd(shape=(3,))
    shared = SharedStatistics({"": stats})
    first, *others = raw_samples(rank)
    stats.update(first)
    shared.merge_()
    for samples in others:
        stats.update(samples)
    shared.merge_()
    # Nothing new
    shared.merge_()
    return stats.mean, stats.var, stats.count


def own_statistics(rank: int) -> tuple[Any, ...]:
    """What an agent knows of the same observations, and of as many rewards, after two rollouts."""
    normalization, scale = RunningNormalization((3,)), RewardScale(gamma=0.0)
    first, *others = raw_samples(rank)
    for samples in (first, np.concatenate(others)):
        normalization.update(th.as_tensor(samples))
        scale.update(samples[:, :1], np.zeros((len(samples), 1), bool))
    return normalization.mean.numpy(), normalization.var.numpy(), int(normalization.n_samples), scale.scale


def advantages_of_rank(rank: int, clip_advantage: float | None = None) -> th.Tensor:
    """Normalized advantages of one process's rollout, out of advantages that differ between the processes."""
    model = collect(make_model(random_vec_env(2), seed=0))
    generator = np.random.default_rng(rank)
    model.rollout_buffer.advantages[:] = generator.normal(rank, 1 + rank, model.rollout_buffer.advantages.shape)
    return rollout_batch(model.rollout_buffer, False, True, clip_advantage).advantages


class StopAt(BaseCallback):
    """Ends the training in the middle of a rollout, and counts how often it is asked."""

    def _on_step(self) -> bool:
        return self.n_calls < 40


def cartpole(rank: int) -> dict[str, Any]:
    """Twenty updates of CartPole, with more environments in the first process."""
    env = VecNormalize(make_vec_env("CartPole-v1", 3 - rank))
    model = make_model(env, n_steps=16, seed=5)
    first_params = flatten(list(model.policy.parameters()))
    log = UpdateLog()
    model.learn(20 * 16 * 5, log)
    stats: Any = env.obs_rms
    return {
        "first_params": first_params,
        "params": copies(model.policy.state_dict().values()),
        "statistics": (stats.mean, stats.var, stats.count, env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "n_logged": len(log.updates),
        "episodes": len(model.ep_info_buffer or ()),
        "actions": model.rollout_buffer.actions.copy(),
    }


def nan_on_one(rank: int, where: str) -> dict[str, Any]:
    """An update with a NaN in the second process alone."""
    model = make_model(random_vec_env(2))
    start_together(model, (0, 1, True))
    collect(model)
    if rank == 1:
        getattr(model.rollout_buffer, where)[3] = np.nan
    before = copies(model.policy.state_dict().values())
    logged = train(model)
    after = copies(model.policy.state_dict().values())
    return {
        "before": before,
        "after": after,
        "status": (logged["train/status_name"], logged["train/value_status_name"]),
        "actor_is_same": all(
            th.equal(*pair) for pair in zip(copies(model._parts.actor_params), _actor_of(model, before), strict=True)
        ),
    }


def _actor_of(model: Any, tensors: list[th.Tensor]) -> list[th.Tensor]:
    names = {id(param): name for name, param in model.policy.named_parameters()}
    values = dict(zip(model.policy.state_dict(), tensors, strict=True))
    return [values[names[id(param)]] for param in model._parts.actor_params]


def error_of(function: Callable[[], Any]) -> str:
    """What a function raises."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def come_apart(rank: int) -> None:
    model = make_model(VecNormalize(random_vec_env(1)))
    start_together(model, (0, 1, True))
    check_identical(model)
    if rank == 1:
        with th.no_grad():
            bias = model.policy.get_parameter("action_net.bias")
            bias[0] = th.nextafter(bias[0], th.tensor(9.0))
    check_identical(model)


def stopped(rank: int) -> tuple[int, int]:
    """A training that a callback in the first process ends."""
    model = make_model(random_vec_env(2))
    callback = StopAt()
    model.learn(10_000, callback)
    return model.num_timesteps, callback.n_calls


def traffic() -> dict[str, Any]:
    """Calls and bytes of the reductions of one update with VecNormalize, what it did, and the shapes of the network."""
    model = make_model(VecNormalize(VecMonitor(DummyVecEnv([RandomEnv] * 2))), n_steps=32, batch_size=16, n_critic_updates=3)
    sent: list[int] = []
    built: list[bool] = []
    log = UpdateLog()
    preconditioner: Any = KroneckerPreconditioner
    build = preconditioner.__init__

    def count_build(*args: Any) -> None:
        built.append(True)
        build(*args)

    module: Any = reductions
    reduce, gather = reductions._reduced_, reductions.all_gathered

    def count_reduce(tensor: th.Tensor, *args: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args)

    def count_gather(tensor: th.Tensor) -> th.Tensor:
        sent.append(tensor.numel() * tensor.element_size())
        return gather(tensor)

    start_together(model, (0, 1, True))
    module._reduced_, module.all_gathered = count_reduce, count_gather
    preconditioner.__init__ = count_build
    try:
        # One exchange more: the callback asks how many environments there are
        model.learn(128, log)
    finally:
        module._reduced_, module.all_gathered = reduce, gather
        preconditioner.__init__ = build
    return {
        "calls": len(sent) - 1,
        "n_bytes": sum(sent) - 8,
        "logged": log.updates,
        "is_preconditioned": bool(built),
        "n_actor": len(flatten(model._parts.actor_params)),
        "n_critic": len(flatten(model._parts.critic_params)),
        "n_tensors": len(model.policy.state_dict()),
    }


def one_process_of_two(rank: int, folder: str) -> None:
    """Write down what this process sees."""
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_PROCESSES)
    save(folder)
    outcome: dict[str, Any] = {
        "cartpole": cartpole(rank),
        "nan_advantage": nan_on_one(rank, "advantages"),
        "nan_returns": nan_on_one(rank, "returns"),
        "apart": error_of(lambda: come_apart(rank)),
        "settings": error_of(lambda: make_model(random_vec_env(1), gamma=0.9 + 0.05 * rank).learn(32)),
        "networks": error_of(lambda: make_model(random_vec_env(1), policy_kwargs={"net_arch": [8 + rank]}).learn(32)),
        "devices": error_of(lambda: on_two_devices(rank)),
        "stopped": stopped(rank),
        "merged": merged_statistics(rank),
        "normalization": own_statistics(rank),
        "advantages": advantages_of_rank(rank),
        "clipped_advantages": advantages_of_rank(rank, 0.5),
        "traffic": traffic(),
        "masks": trained(MaskableTRPO, "MlpPolicy", make_vec_env(Blocks, 1 + rank, seed=rank)),
        "memory": trained(
            *(RecurrentTRPO, "MlpLstmPolicy", make_vec_env(CartPoleEnv, 1 + rank, seed=rank)),
            policy_kwargs={"lstm_hidden_size": 4},
        ),
        "tensors": trained(TRPO, "MlpPolicy", TensorPointMass(1 + rank)),
    }
    use_float64()
    for name, (n_first, batch_size) in SPLITS.items():
        part = slice(n_first) if rank == 0 else slice(n_first, N_SAMPLES)
        outcome[f"policy_{name}"] = policy_facts(part)
        outcome[f"penalty_{name}"] = penalty_facts(part)
        outcome |= {f"{kind}_{name}": critic_facts(kind, part, batch_size, th.arange) for kind in CRITICS}
    dist.barrier()
    if rank == 0:
        outcome["lost"] = error_of(lambda: [Shares().mean(th.ones(1)) for _ in range(3)])
    th.save(outcome, f"{folder}/{rank}.pt")
    # Without a word to the other one
    os._exit(0)


def trained(algorithm: type[TRPO], policy: str, env: VecEnv, **kwargs: Any) -> tuple[int, th.Tensor]:
    """Accepted updates, and parameters and statistics, after a training: the second process has twice the environments."""
    model = algorithm(policy, env, n_steps=32, batch_size=16, seed=0, **kwargs)
    model.learn(3 * 3 * 32)
    tensors = [*model.policy.parameters(), *model.policy.buffers(), *model.reward_scale.buffers()]
    return model._n_accepted, th.cat([tensor.detach().double().flatten() for tensor in tensors])


def on_two_devices(rank: int) -> None:
    """Train with processes whose models say that they are on devices of different kinds."""
    model = make_model(random_vec_env(1))
    model.device = th.device(["cpu", "cuda"][rank])
    model.learn(32)


def save(folder: str) -> None:
    """Both processes save under the same name at the same time; the second one writes nothing."""
    make_model(random_vec_env(1), seed=7).save(f"{folder}/model{dist.get_rank()}")
