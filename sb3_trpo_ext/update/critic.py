"""The fit of the value function, by an optimiser that holds nothing but the critic's parameters."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.optim import MlpRegression, Status
from sb3_trpo_ext.optim.adam import adam_step
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.vectors import flat_gradient_
from sb3_trpo_ext.parallel.reductions import all_mean, all_means, all_true, average_, minibatch_shares, minibatch_sizes
from sb3_trpo_ext.update.batch import Batch, take
from sb3_trpo_ext.update.structure import critic_structure

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
    #: Values count as no further than this from what they were during the rollout, so that there is nothing to gain beyond it.
    clip_range: float | None = None
    #: The gradient of a minibatch is scaled down to this norm.
    max_grad_norm: float | None = None


class CriticStatus(Status):
    """How a fit of the value function ended; every one but the first leaves the critic as it was."""

    FITTED = 0, ""
    NO_EPOCHS = 1, ""
    NOTHING_TO_TRAIN = 2, ""
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
) -> CriticResult:
    """
    Fit the values to the returns by minibatch gradient descent.

    Only the critic's own modules are put into training mode: BatchNorm statistics or dropout that the actor goes through
    would change the policy behind the back of the trust region. If anything becomes NaN or infinite, parameters, running
    statistics and optimiser are put back to where they were.

    The policy's optimizer makes the steps, and can move the critic's parameters only: no others have a gradient meanwhile.

    :param policy: with its optimizer; gradients that its parameters have are dropped
    :param critic_params: what is trained
    :param critic_modules: modules that only the values go through
    :param batch: the rollout
    :param fit: how
    :return: mean loss and status
    """
    if fit.n_epochs == 0:
        return CriticResult(float("nan"), CriticStatus.NO_EPOCHS)
    held = {id(param) for group in policy.optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(map(id, critic_params)):
        return CriticResult(float("nan"), CriticStatus.NOTHING_TO_TRAIN)
    if not all_true(bool(th.isfinite(batch.returns).all())):
        return CriticResult(float("nan"), CriticStatus.NON_FINITE_RETURNS)
    weights = [*critic_params, *(buffer for module in critic_modules for buffer in module.buffers(recurse=False))]
    old_weights = [tensor.detach().clone() for tensor in weights]
    old_optimizer = copy.deepcopy(policy.optimizer.state_dict())
    is_fitted = False
    for module in critic_modules:
        module.training = True
    try:
        # Those of the actor, left by a pretraining, would be a step behind the back of the trust region
        policy.optimizer.zero_grad(set_to_none=True)
        gradient = flat_gradient_(critic_params)
        gradients = [param.grad for param in critic_params]
        shares = minibatch_shares(batch.n_samples, fit.batch_size)
        losses: list[th.Tensor] = []
        minibatches = _minibatch_gradients(policy, list(critic_params), gradient, batch, fit, losses)
        step = adam_step(policy.optimizer)
        for _ in range(fit.n_epochs):
            for _, share in zip(minibatches(), shares, strict=True):
                # Here the gradients of all parameters are there, as views of one vector
                average_(gradient, share)
                if fit.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(critic_params, fit.max_grad_norm)
                step()
                for param, part in zip(critic_params, gradients, strict=True):
                    if param.grad is not part:
                        # An optimizer, or a hook of one, has put something else in its place
                        param.grad = part
        # Losses stay on the device: reading one would stop an accelerator at every step
        mean_loss = all_mean(th.stack(losses).mean())
        # An infinite second moment leaves the parameters finite: it freezes them for good
        moments = [
            value
            for state in policy.optimizer.state.values()
            for name, value in state.items()
            if th.is_tensor(value) and name != "step"
        ]
        # Running statistics of a BatchNorm are the one thing here that each process has by itself
        statistics = [tensor for tensor in weights[len(critic_params) :] if tensor.is_floating_point()]
        for tensor, mean in zip(statistics, all_means(statistics) if statistics else [], strict=True):
            tensor.copy_(mean)
        are_finite = th.stack([th.isfinite(tensor).all().to(mean_loss) for tensor in [*weights, *moments]]).amin()
        loss, is_finite = th.stack([mean_loss, are_finite]).tolist()
        is_fitted = all_true(bool(is_finite))
    finally:
        for module in critic_modules:
            module.training = False
        policy.optimizer.zero_grad(set_to_none=True)
        if not is_fitted:
            with th.no_grad():
                for tensor, old in zip(weights, old_weights, strict=True):
                    tensor.copy_(old)
            policy.optimizer.load_state_dict(old_optimizer)
    return CriticResult(loss, CriticStatus.FITTED if is_fitted else CriticStatus.NON_FINITE_FIT)


def _minibatch_gradients(
    policy: ActorCriticPolicy,
    critic_params: list[nn.Parameter],
    gradient: th.Tensor,
    batch: Batch,
    fit: CriticFit,
    losses: list[th.Tensor],
) -> Callable[[], Iterator[None]]:
    """
    Choose how an epoch gets its gradients: by hand for an MLP on flat features, by autograd for every other critic.

    :param policy: whose values are fitted
    :param critic_params: what is trained
    :param gradient: all of their gradients, side by side in one vector
    :param batch: the rollout
    :param fit: how
    :param losses: where the losses go, of each minibatch or the mean of an epoch
    :return: makes one pass over the shuffled batch, and stops wherever the gradients of a minibatch are in the parameters
    """
    device = batch.returns.device
    sizes = minibatch_sizes(batch.n_samples, fit.batch_size)

    def by_autograd() -> Iterator[None]:
        for indices in sent_to(device, th.randperm(batch.n_samples)).split(sizes):
            values = policy.predict_values(take(batch.observations, indices)).flatten()
            loss = _value_losses(values, batch.returns[indices], batch.old_values[indices], fit).mean()
            # By `backward`, into the vector: that way hooks of every kind hear of it
            gradient.zero_()
            loss.backward(inputs=critic_params)
            losses.append(loss.detach())
            yield

    structure = critic_structure(policy, critic_params)
    if structure is None:
        return by_autograd
    regression = MlpRegression(structure.layers, structure.activations)
    with th.no_grad():
        # As `predict_values` does, but once for all epochs
        features = super(ActorCriticPolicy, policy).extract_features(batch.observations, policy.vf_features_extractor)
    # Shuffled once per epoch and cut into slices, which costs less than gathering each minibatch
    sources = [features, batch.returns[:, None], batch.old_values[:, None]]
    inputs, targets, old_values = shuffled = [th.empty_like(source) for source in sources]
    values = th.empty_like(targets)
    parts = list(zip(*(tensor.split(sizes) for tensor in (inputs, values, targets, old_values)), strict=True))
    # Of each sample in the mean over minibatches of their mean losses: those of the last one may count more
    weights = th.cat([th.full_like(part[1], 1 / (len(part[1]) * len(parts))) for part in parts])

    def by_hand() -> Iterator[None]:
        order = sent_to(device, th.randperm(batch.n_samples))
        for source, tensor in zip(sources, shuffled, strict=True):
            th.index_select(source, 0, order, out=tensor)
        for part_inputs, part_values, part_targets, part_old_values in parts:
            regression.forward(part_inputs, out=part_values)
            regression.backward(_slope(part_values, part_targets, part_old_values, fit))
            yield
        losses.append((_value_losses(values, targets, old_values, fit) * weights).sum())

    return by_hand


def _value_losses(values: th.Tensor, targets: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """
    The loss of each sample.

    :param values: of any shape
    :param targets: the same shape
    :param old_values: values at the time of the rollout, the same shape
    :param fit: with the kind of loss
    :return: the same shape
    """
    return VALUE_LOSSES[fit.loss](_clipped(values, old_values, fit), targets, reduction="none")


def _clipped(values: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """
    What values count as.

    :param values: of any shape
    :param old_values: values at the time of the rollout, the same shape
    :param fit: with the range around these
    :return: the same shape
    """
    if fit.clip_range is None:
        return values
    # As in SB3's PPO
    return old_values + (values - old_values).clamp(-fit.clip_range, fit.clip_range)


def _slope(values: th.Tensor, targets: th.Tensor, old_values: th.Tensor, fit: CriticFit) -> th.Tensor:
    """
    The gradient in the values of the mean loss of one minibatch.

    :param values: shape ``(n_samples, 1)``
    :param targets: the same shape
    :param old_values: the same shape
    :param fit: with the kind of loss
    :return: the same shape
    """
    slope = _clipped(values, old_values, fit) - targets
    # Each loss by its name: one that is new must not get the slope of another
    if fit.loss == "mse":
        slope.mul_(2 / len(targets))
    else:
        assert fit.loss == "huber"
        slope.clamp_(-1, 1).mul_(1 / len(targets))
    return slope if fit.clip_range is None else slope.mul_((values - old_values).abs() <= fit.clip_range)
