"""The fit of the value function, by an optimiser that holds nothing but the critic's parameters."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.batch import Batch, take
from sb3_trpo_ext.optim import MlpRegression
from sb3_trpo_ext.policies import critic_structure

#: Losses by name; each maps values and targets to a scalar.
VALUE_LOSSES: dict[str, Callable[[th.Tensor, th.Tensor], th.Tensor]] = {"mse": F.mse_loss, "huber": F.huber_loss}


class CriticFit(NamedTuple):
    """How the value function is fitted."""

    #: Passes over the batch.
    n_epochs: int
    #: Of the minibatches.
    batch_size: int
    #: One of `VALUE_LOSSES`; the Huber loss is linear in errors above 1.
    loss: str = "mse"
    #: Values count as no further than this from what they were during the rollout, so that there is nothing to gain beyond it.
    clip_range: float | None = None
    #: The gradient of a minibatch is scaled down to this norm.
    max_grad_norm: float | None = None


class CriticResult(NamedTuple):
    """What came out of a fit."""

    #: Mean loss over all minibatches, each before its step; NaN if there was none.
    loss: float
    #: ``fitted``, or why the critic is as it was.
    status: str


def fit_critic(
    policy: ActorCriticPolicy,
    critic_params: Sequence[nn.Parameter],
    critic_modules: Sequence[nn.Module],
    batch: Batch,
    fit: CriticFit,
) -> CriticResult:
    """
    Fit the values to the returns by minibatch gradient descent.

    Only the critic's own modules are put into training mode: BatchNorm statistics or dropout that the actor goes through
    would change the policy behind the back of the trust region. If anything becomes NaN or infinite, parameters, running
    statistics and optimiser are put back to where they were.

    :param policy: its ``optimizer`` holds ``critic_params`` alone
    :param critic_params: what is trained
    :param critic_modules: modules that only the values go through
    :param batch: the rollout
    :param fit: how
    :return: mean loss and status
    """
    if fit.n_epochs == 0:
        return CriticResult(float("nan"), "no_epochs")
    if not th.isfinite(batch.returns).all():
        return CriticResult(float("nan"), "non_finite_returns")
    weights = [*critic_params, *(buffer for module in critic_modules for buffer in module.buffers(recurse=False))]
    old_weights = [tensor.detach().clone() for tensor in weights]
    old_optimizer = copy.deepcopy(policy.optimizer.state_dict())
    total_loss = th.zeros((), device=batch.returns.device)
    n_steps = 0
    is_fitted = False
    for module in critic_modules:
        module.training = True
    try:
        minibatches = _minibatch_gradients(policy, list(critic_params), batch, fit)
        for _ in range(fit.n_epochs):
            for loss in minibatches():
                if fit.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(critic_params, fit.max_grad_norm)
                policy.optimizer.step()
                # The loss stays on the device: reading it here would stop an accelerator at every step
                total_loss += loss
                n_steps += 1
        mean_loss = (total_loss / n_steps).item()
        # An infinite second moment leaves the parameters finite: it freezes them for good
        moments = [value for state in policy.optimizer.state.values() for value in state.values() if th.is_tensor(value)]
        is_fitted = all(bool(th.isfinite(tensor).all()) for tensor in [*weights, *moments])
    finally:
        for module in critic_modules:
            module.training = False
        policy.optimizer.zero_grad(set_to_none=True)
        if not is_fitted:
            with th.no_grad():
                for tensor, old in zip(weights, old_weights, strict=True):
                    tensor.copy_(old)
            policy.optimizer.load_state_dict(old_optimizer)
    return CriticResult(mean_loss, "fitted" if is_fitted else "non_finite_fit")


def _minibatch_gradients(
    policy: ActorCriticPolicy, critic_params: list[nn.Parameter], batch: Batch, fit: CriticFit
) -> Callable[[], Iterator[th.Tensor]]:
    """
    Choose how an epoch gets its gradients: by hand for an MLP on flat features, by autograd for every other critic.

    :param policy: whose values are fitted
    :param critic_params: what is trained
    :param batch: the rollout
    :param fit: how
    :return: makes one pass over the shuffled batch; for each minibatch it puts the gradients into the parameters and yields
        the loss, without a graph
    """
    device = batch.returns.device

    def by_autograd() -> Iterator[th.Tensor]:
        for indices in th.randperm(batch.n_samples).to(device).split(fit.batch_size):
            values = policy.predict_values(take(batch.observations, indices)).flatten()
            loss = _value_loss(values, batch.returns[indices], batch.old_values[indices], fit)
            for param, gradient in zip(critic_params, th.autograd.grad(loss, critic_params), strict=True):
                param.grad = gradient
            yield loss.detach()

    structure = critic_structure(policy, critic_params)
    if structure is None:
        return by_autograd
    regression = MlpRegression(structure.layers, structure.activations)
    with th.no_grad():
        # As `predict_values` does, but once for all epochs
        features = super(ActorCriticPolicy, policy).extract_features(batch.observations, policy.vf_features_extractor)

    def by_hand() -> Iterator[th.Tensor]:
        order = th.randperm(batch.n_samples).to(device)
        # Shuffled once and cut into slices, which costs less than gathering each minibatch
        shuffled = (tensor[order].split(fit.batch_size) for tensor in (features, batch.returns, batch.old_values))
        for inputs, targets, old_values in zip(*shuffled, strict=True):
            yield regression.backward(inputs, functools.partial(_loss_and_slope, targets, old_values, fit))

    return by_hand


def _value_loss(values: th.Tensor, targets: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """
    The loss of one minibatch.

    :param values: shape ``(n_samples,)``
    :param targets: the same shape
    :param old_values: values at the time of the rollout, the same shape
    :param fit: with the kind of loss
    :return: scalar
    """
    if fit.clip_range is not None:
        # As in SB3's PPO
        values = old_values + (values - old_values).clamp(-fit.clip_range, fit.clip_range)
    return VALUE_LOSSES[fit.loss](values, targets)


def _loss_and_slope(
    targets: th.Tensor, old_values: th.Tensor, fit: CriticFit, values: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    The loss of one minibatch and its gradient in the values.

    :param targets: shape ``(n_samples,)``
    :param old_values: the same shape
    :param fit: with the kind of loss
    :param values: the same shape
    :return: scalar, and the shape of the values
    """
    if fit.loss == "mse" and fit.clip_range is None:
        error = values - targets
        return error.square().mean(), error * (2.0 / len(targets))
    with th.enable_grad():
        leaf = values.clone().requires_grad_()
        loss = _value_loss(leaf, targets, old_values, fit)
        (slope,) = th.autograd.grad(loss, leaf)
    return loss.detach(), slope
