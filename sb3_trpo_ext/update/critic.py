"""The fit of the value function, by steps of the policy's optimizer that move nothing but the critic's parameters."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.optim import MlpRegression, Status
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.transaction import Transaction
from sb3_trpo_ext.optim.vectors import flat_gradient_
from sb3_trpo_ext.parallel.reductions import Shares, all_true, average_
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.settings import threads_for
from sb3_trpo_ext.update.structure import MlpStructure, critic_structure

#: Losses by name; each maps values and targets to a scalar, or to one number per sample with ``reduction="none"``.
VALUE_LOSSES: dict[str, Callable[..., th.Tensor]] = {"mse": F.mse_loss, "huber": F.huber_loss}


class CriticFit(NamedTuple):
    """How the value function is fitted."""

    #: Passes over the batch.
    n_epochs: int
    #: Of the minibatches, in each process.
    batch_size: int
    #: One of `VALUE_LOSSES`; the Huber loss is linear in errors above 1.
    loss: str = "mse"
    #: Values are clipped to within this of those of the rollout, so that there is nothing to gain beyond it.
    clip_range: float | None = None
    #: The gradient of a minibatch is scaled down to this norm.
    max_grad_norm: float | None = None


class CriticStatus(Status):
    """How a fit of the value function ended; every one but the first leaves the critic as it was."""

    FITTED = 0
    NO_EPOCHS = 1
    NOTHING_TO_TRAIN = 2
    NON_FINITE_RETURNS = 3, "check the environment's rewards for NaN and infinity"
    NON_FINITE_FIT = 4, "check the environment's observations and rewards for extremes, and the learning rate"


class CriticResult(NamedTuple):
    """What came out of a fit."""

    #: Mean loss over all minibatches, each before its step; NaN if there was none.
    loss: float
    #: ``FITTED``, or why the critic is as it was.
    status: CriticStatus


def fit_critic(
    policy: ActorCriticPolicy,
    critic_params: Sequence[nn.Parameter],
    critic_modules: Sequence[nn.Module],
    batch: Batch,
    fit: CriticFit,
    shares: Shares = Shares(),  # noqa: B008 it is immutable
    calls: PolicyCalls | None = None,
) -> CriticResult:
    """
    Fit the values to the returns by minibatch gradient descent.

    Only the critic's own modules are put into training mode: BatchNorm statistics or dropout that the actor goes through
    would change the policy without regard to the trust region. If anything becomes NaN or infinite, parameters, running
    statistics and optimizer are restored.

    The policy's optimizer makes the steps. Only the critic's parameters have gradients then, so it moves nothing else.

    :param policy: with its optimizer; gradients that its parameters have are dropped
    :param critic_params: what is trained
    :param critic_modules: modules that only the values go through
    :param batch: the rollout
    :param fit: how
    :param shares: what each process counts in the means over samples
    :param calls: how the policy is asked for its values; ``None`` for one that needs nothing but observations
    :return: mean loss and status
    """
    calls = PolicyCalls(policy) if calls is None else calls
    if fit.n_epochs == 0:
        return CriticResult(math.nan, CriticStatus.NO_EPOCHS)
    held = {id(param) for group in policy.optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(map(id, critic_params)):
        return CriticResult(math.nan, CriticStatus.NOTHING_TO_TRAIN)
    if not all_true(bool(th.isfinite(batch.returns).all())):
        return CriticResult(math.nan, CriticStatus.NON_FINITE_RETURNS)
    # Sparse ones, such as the adjacency matrix of a graph, are no statistics
    buffers = [b for module in critic_modules for b in module.buffers(recurse=False) if b.layout is th.strided]
    for module in critic_modules:
        module.training = True
    try:
        with Transaction([*critic_params, *buffers], policy.optimizer) as transaction:
            mean_loss = shares.mean(_run_epochs(calls, critic_params, batch, fit, shares))
            # Running statistics of a BatchNorm are the only thing here that each process has for itself
            statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
            for tensor, mean in zip(statistics, shares.means(statistics), strict=True):
                tensor.copy_(mean)
            # Moments too: an infinite second moment leaves the parameters finite, and freezes them for good
            moments = [value for state in policy.optimizer.state.values() for value in state.values() if th.is_tensor(value)]
            checked = [*critic_params, *buffers, *moments]
            are_finite = th.stack([th.isfinite(tensor).all().to(mean_loss) for tensor in checked]).amin()
            loss, is_finite = th.stack([mean_loss, are_finite]).tolist()
            is_fitted = all_true(bool(is_finite))
            if is_fitted:
                transaction.commit()
    finally:
        for module in critic_modules:
            module.training = False
    return CriticResult(loss, CriticStatus.FITTED if is_fitted else CriticStatus.NON_FINITE_FIT)


def _run_epochs(
    calls: PolicyCalls, critic_params: Sequence[nn.Parameter], batch: Batch, fit: CriticFit, shares: Shares
) -> th.Tensor:
    """Make the steps; returns the mean loss, which stays on the device: reading it would stop an accelerator."""
    policy = calls.policy
    # A gradient of the actor, left from pretraining, would make the optimizer move the actor too
    policy.optimizer.zero_grad(set_to_none=True)
    gradient = flat_gradient_(critic_params)
    gradients = [param.grad for param in critic_params]
    sizes, weights = calls.plan(batch, fit.batch_size, shares)
    losses: list[th.Tensor] = []
    structure = critic_structure(policy, critic_params)
    if structure is None:
        minibatches = _gradients_by_autograd(calls, critic_params, gradient, batch, fit, sizes, losses)
    else:
        minibatches = _gradients_by_hand(policy, structure, batch, fit, sizes, losses)
    # One multiplication per sample and weight of a linear layer; convolutions use each weight many times
    size = math.inf if structure is None else max(sizes) * len(gradient)
    with threads_for(size, gradient.device):
        for _, weight in zip(minibatches, itertools.cycle(weights), strict=False):
            average_(gradient, weight)
            if fit.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(critic_params, fit.max_grad_norm)
            policy.optimizer.step()
            # An optimizer, or a hook of one, may have replaced them
            for param, part in zip(critic_params, gradients, strict=True):
                param.grad = part
    return th.stack(losses).mean()


def _gradients_by_autograd(
    calls: PolicyCalls,
    params: Sequence[nn.Parameter],
    gradient: th.Tensor,
    batch: Batch,
    fit: CriticFit,
    sizes: list[int],
    losses: list[th.Tensor],
) -> Iterator[None]:
    """
    Go through the minibatches of all epochs, by ``backward``, so that hooks of every kind see the gradients.

    :param params: of the critic, which may be any
    :param gradient: all gradients of ``params``, side by side in one vector: at each ``yield``, those of a minibatch
    :param sizes: of the minibatches
    :param losses: where the loss of each minibatch goes
    """
    for _ in range(fit.n_epochs):
        for indices in calls.minibatches(batch, sizes):
            values = calls.values(batch, indices)
            loss = _value_losses(values, batch.returns[indices], batch.old_values[indices], fit).mean()
            gradient.zero_()
            loss.backward(inputs=list(params))
            losses.append(loss.detach())
            yield


def _gradients_by_hand(
    policy: ActorCriticPolicy, structure: MlpStructure, batch: Batch, fit: CriticFit, sizes: list[int], losses: list[th.Tensor]
) -> Iterator[None]:
    """
    The same for a multilayer perceptron on flat features, without a graph.

    :param structure: of the critic, whose parameters have the gradients of a minibatch at each ``yield``
    :param sizes: of the minibatches
    :param losses: where the mean loss of each epoch goes
    """
    regression = MlpRegression(structure.layers, structure.activations)
    with th.no_grad():
        # As `predict_values` does, but once for all epochs
        features = BasePolicy.extract_features(policy, batch.observations, policy.vf_features_extractor)
    # Shuffled once per epoch and cut into slices, which costs less than gathering each minibatch
    sources = [features, batch.returns[:, None], batch.old_values[:, None]]
    shuffled = inputs, targets, old_values = [th.empty_like(source) for source in sources]
    values = th.empty_like(targets)
    minibatches = list(zip(*(tensor.split(sizes) for tensor in (inputs, values, targets, old_values)), strict=True))
    # Of each sample in the mean of the minibatches' mean losses: those in a small minibatch count more
    weights = th.cat([th.full_like(part[1], 1 / (len(part[1]) * len(sizes))) for part in minibatches])
    for _ in range(fit.n_epochs):
        order = sent_to(batch.returns.device, th.randperm(batch.n_samples))
        for source, tensor in zip(sources, shuffled, strict=True):
            th.index_select(source, 0, order, out=tensor)
        for some_inputs, some_values, some_targets, some_old_values in minibatches:
            regression.forward(some_inputs, out=some_values)
            regression.backward(_slope(some_values, some_targets, some_old_values, fit))
            yield
        losses.append((_value_losses(values, targets, old_values, fit) * weights).sum())


def _value_losses(values: th.Tensor, targets: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """The loss of each sample; all arguments have the same shape."""
    return VALUE_LOSSES[fit.loss](_clipped(values, old_values, fit), targets, reduction="none")


def _clipped(values: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """Values within ``clip_range`` of those of the rollout, as in SB3's PPO."""
    if fit.clip_range is None:
        return values
    return old_values + (values - old_values).clamp(-fit.clip_range, fit.clip_range)


def _slope(values: th.Tensor, targets: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """The gradient in the values of the mean loss of one minibatch; all have shape ``(n_samples, 1)``."""
    slope = _clipped(values, old_values, fit) - targets
    # Each loss by its name: a new one must not get the slope of another
    if fit.loss == "mse":
        slope.mul_(2 / len(targets))
    else:
        assert fit.loss == "huber"
        slope.clamp_(-1, 1).mul_(1 / len(targets))
    return slope if fit.clip_range is None else slope.mul_((values - old_values).abs() <= fit.clip_range)
