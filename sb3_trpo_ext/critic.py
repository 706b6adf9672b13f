"""The fit of the value function, by an optimiser that holds nothing but the critic's parameters."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.optim import MlpRegression
from sb3_trpo_ext.policies import critic_structure
from sb3_trpo_ext.surrogate import take


class CriticResult(NamedTuple):
    """What came out of a fit."""

    #: Mean squared error over all minibatches, each before its step; NaN if there was none.
    loss: float
    #: ``fitted``, or why the critic is as it was.
    status: str


def fit_critic(
    policy: ActorCriticPolicy,
    critic_params: Sequence[nn.Parameter],
    critic_modules: Sequence[nn.Module],
    observations: PyTorchObs,
    returns: th.Tensor,
    n_epochs: int,
    batch_size: int,
) -> CriticResult:
    """
    Fit the values to the returns by minibatch gradient descent on the squared error.

    Only the critic's own modules are put into training mode: BatchNorm statistics or dropout that the actor goes through
    would change the policy behind the back of the trust region. If anything becomes NaN or infinite, parameters, running
    statistics and optimiser are put back to where they were.

    :param policy: its ``optimizer`` holds ``critic_params`` alone
    :param critic_params: what is trained
    :param critic_modules: modules that only the values go through
    :param observations: a batch
    :param returns: targets, shape ``(n_batch,)``
    :param n_epochs: passes over the batch
    :param batch_size: of the minibatches
    :return: mean loss and status
    """
    if n_epochs == 0:
        return CriticResult(float("nan"), "no_epochs")
    if not th.isfinite(returns).all():
        return CriticResult(float("nan"), "non_finite_returns")
    weights = [*critic_params, *(buffer for module in critic_modules for buffer in module.buffers(recurse=False))]
    old_weights = [tensor.detach().clone() for tensor in weights]
    old_optimizer = copy.deepcopy(policy.optimizer.state_dict())
    total_loss = th.zeros((), device=returns.device)
    n_steps = 0
    is_fitted = False
    for module in critic_modules:
        module.training = True
    try:
        minibatches = _minibatch_gradients(policy, list(critic_params), observations, returns, batch_size)
        for _ in range(n_epochs):
            for loss in minibatches():
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
    policy: ActorCriticPolicy,
    critic_params: list[nn.Parameter],
    observations: PyTorchObs,
    returns: th.Tensor,
    batch_size: int,
) -> Callable[[], Iterator[th.Tensor]]:
    """
    Choose how an epoch gets its gradients: by hand for an MLP on flat features, by autograd for every other critic.

    :param policy: whose values are fitted
    :param critic_params: what is trained
    :param observations: a batch
    :param returns: targets
    :param batch_size: of the minibatches
    :return: makes one pass over the shuffled batch; for each minibatch it puts the gradients into the parameters and yields
        the loss, without a graph
    """

    def by_autograd() -> Iterator[th.Tensor]:
        for indices in th.randperm(len(returns)).to(returns.device).split(batch_size):
            values = policy.predict_values(take(observations, indices)).flatten()
            loss = F.mse_loss(values, returns[indices])
            for param, gradient in zip(critic_params, th.autograd.grad(loss, critic_params), strict=True):
                param.grad = gradient
            yield loss.detach()

    structure = critic_structure(policy, critic_params)
    if structure is None:
        return by_autograd
    regression = MlpRegression(structure.layers, structure.activations)
    with th.no_grad():
        # As `predict_values` does, but once for all epochs
        features = super(ActorCriticPolicy, policy).extract_features(observations, policy.vf_features_extractor)

    def by_hand() -> Iterator[th.Tensor]:
        order = th.randperm(len(returns)).to(returns.device)
        # Shuffled once and cut into slices, which costs less than gathering each minibatch
        shuffled, targets = features[order], returns[order]
        for inputs, target in zip(shuffled.split(batch_size), targets.split(batch_size), strict=True):
            yield regression.backward(inputs, target)

    return by_hand
