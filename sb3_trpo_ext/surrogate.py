"""The policy's side of an update: surrogate objective, KL and Fisher matrix of one rollout."""

from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_trpo_ext.distributions import Family, family_of, standard_normal
from sb3_trpo_ext.optim import (
    AutogradJacobian,
    GaussNewtonFisher,
    HessianFisher,
    KroneckerPreconditioner,
    LinearOperator,
    MlpJacobian,
    Problem,
)
from sb3_trpo_ext.policies import mlp_structure


class Batch(NamedTuple):
    """One rollout, flattened to ``n_batch`` samples."""

    observations: PyTorchObs
    #: Shape ``(n_batch, n_actions)``, or ``(n_batch,)`` for Discrete.
    actions: th.Tensor
    #: Log-probabilities at the time of the rollout, shape ``(n_batch,)``.
    old_log_prob: th.Tensor
    #: Shape ``(n_batch,)``.
    advantages: th.Tensor
    #: Targets of the value function, shape ``(n_batch,)``.
    returns: th.Tensor

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return self.advantages.shape[0]


def take(observations: PyTorchObs, index: th.Tensor | slice) -> PyTorchObs:
    """
    Select samples of a batch of observations.

    :param observations: a tensor or a dict of tensors with first axis ``n_batch``
    :param index: indices, or a slice (then the result is a view)
    :return: the selected samples, in the same form
    """
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


class Surrogate:
    """
    What TRPO maximises on a rollout, and what it stays close to.

    ``objective(theta) = mean(ratio * advantage) + ent_coef * mean(entropy)`` with ``ratio = pi(a|s) / pi_old(a|s)``; Schulman
    et al. (2015), equation 14, with an entropy bonus. Statistics of the old distribution are those at construction.

    :param policy: in evaluation mode, as during the rollout: dropout and BatchNorm must act as they did then
    :param actor_params: the parameters to optimise, each reachable from the action distribution
    :param batch: the rollout, with advantages that are normalised already if they are to be
    :param ent_coef: weight of the entropy
    :param fisher_stride: the Fisher matrix is taken on every so many-th sample only; objective and KL see all of them
    :param noise_seed: of the noise with which an entropy without closed form is estimated: the same for all evaluations, so
        that the line search compares like with like, and from a generator of its own, so that no global random number is used
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        actor_params: list[nn.Parameter],
        batch: Batch,
        ent_coef: float = 0.0,
        fisher_stride: int = 1,
        noise_seed: int = 0,
    ):
        self.policy = policy
        self.actor_params = actor_params
        self.batch = batch
        self.ent_coef = ent_coef
        self.fisher_stride = fisher_stride
        self._structure = mlp_structure(policy, actor_params)
        #: Of the whole batch at the old parameters, if the actor is an MLP: one forward pass serves the old statistics, the
        #: gradient, the Fisher matrix and its preconditioner.
        self._jacobian: MlpJacobian | None = None
        with th.no_grad():
            if self._structure is None:
                distribution = policy.get_distribution(batch.observations)
            else:
                # As `get_distribution` does: `ActorCriticPolicy.extract_features` would run the critic's extractor too
                features = super(ActorCriticPolicy, policy).extract_features(batch.observations, policy.pi_features_extractor)
                layers, activations, log_std = self._structure
                self._jacobian = MlpJacobian(features, layers, activations, actor_params, log_std)
                distribution = self._distribution(self._jacobian.output, log_std)
            self.family: Family = family_of(distribution)
            self._old = self.family.statistics(distribution)
        self._generator = th.Generator().manual_seed(noise_seed)
        self._noise = standard_normal(self._old[0], self._generator) if self.family.needs_noise else None

    def problem(self) -> Problem:
        """
        This surrogate in the form that a policy update takes.

        :return: objective, KL and Fisher matrix
        """
        gradient = None if self._jacobian is None else self.gradient
        return Problem(self.actor_params, self.batch.n_samples, self.evaluate, self.fisher, self.preconditioner, gradient)

    def _distribution(self, output: th.Tensor, log_std: th.Tensor | None) -> Distribution:
        """
        The action distribution of an MLP actor.

        :param output: of the last layer, shape ``(n_samples, n_outputs)``
        :param log_std: shape ``(n_outputs,)`` or ``(n_samples, n_outputs)``, if there is one
        :return: SB3's distribution
        """
        return self.policy.action_dist.proba_distribution(*((output,) if log_std is None else (output, log_std)))

    def evaluate(self, indices: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        Objective and mean KL(old || new) at the policy's present parameters.

        :param indices: of the samples to average over, or ``None`` for all
        :return: two scalars, with a graph if gradients are enabled
        :raises ValueError: if ``ent_coef`` is not zero and the distribution cannot tell its entropy
        """
        batch, old, noise = self.batch, self._old, self._noise
        observations, actions = batch.observations, batch.actions
        old_log_prob, advantages = batch.old_log_prob, batch.advantages
        if indices is not None:
            observations, actions = take(observations, indices), actions[indices]
            old_log_prob, advantages = old_log_prob[indices], advantages[indices]
            noise = None if noise is None else noise[indices]
            old = self._old_at(indices)
        distribution = self.policy.get_distribution(observations)
        log_prob = distribution.log_prob(actions)
        new = self.family.statistics(distribution)
        objective = self._objective(log_prob - old_log_prob, advantages, new, noise)
        return objective, self.family.kl(old, new).mean()

    def gradient(self) -> tuple[th.Tensor, th.Tensor]:
        """
        Objective and its gradient at the old parameters, by the hand-written Jacobian of an MLP actor.

        Autograd goes from the objective to what the network puts out, and no further.

        :return: scalar, and vector of shape ``(n_params,)``
        """
        assert self._jacobian is not None and self._structure is not None
        outputs = [self._jacobian.output.detach().requires_grad_()]
        if self._structure.log_std is not None:
            outputs.append(self._structure.log_std.detach().expand_as(outputs[0]).clone().requires_grad_())
        with th.enable_grad():
            distribution = self._distribution(outputs[0], outputs[1] if len(outputs) == 2 else None)
            log_ratio = distribution.log_prob(self.batch.actions) - self.batch.old_log_prob
            new = self.family.statistics(distribution)
            objective = self._objective(log_ratio, self.batch.advantages, new, self._noise)
            cotangents = th.autograd.grad(objective, outputs, materialize_grads=True)
        return objective.detach(), self._jacobian.vjp(cotangents)

    def _objective(self, log_ratio: th.Tensor, advantages: th.Tensor, new: Any, noise: th.Tensor | None) -> th.Tensor:
        """
        ``mean(ratio * advantage) + ent_coef * mean(entropy)``.

        :param log_ratio: ``log pi(a|s) - log pi_old(a|s)``, shape ``(n_samples,)``
        :param advantages: shape ``(n_samples,)``
        :param new: statistics of the new distribution
        :param noise: for an entropy without closed form
        :return: scalar
        :raises ValueError: if ``ent_coef`` is not zero and the distribution cannot tell its entropy
        """
        objective = (th.exp(log_ratio) * advantages).mean()
        if self.ent_coef == 0:
            return objective
        entropy = self.family.entropy(new, noise)
        if entropy is None:
            raise ValueError(
                f"`ent_coef` is {self.ent_coef}, but {type(self.policy.action_dist).__name__} has no entropy: set "
                "`ent_coef=0` or register a family that estimates it with `sb3_trpo_ext.register_family`."
            )
        return objective + self.ent_coef * entropy.mean()

    def _old_at(self, indices: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        Statistics of the old distribution at some samples.

        :param indices: of the samples
        :return: the statistics
        """
        # The constructor of TRPO refuses the combination of a penalty with a distribution that cannot be cut
        assert isinstance(self._old, tuple)
        return tuple(statistic[indices] for statistic in self._old)

    def fisher(self) -> LinearOperator:
        """
        The Fisher matrix of the mean KL at the old parameters, in the cheapest form that is exact for this policy.

        :return: the operator, without damping
        """
        observations = take(self.batch.observations, slice(None, None, self.fisher_stride))
        if not self.family.has_fisher:
            return self._hessian_fisher(observations)
        if self._jacobian is not None:
            return GaussNewtonFisher(self._jacobian.thinned(self.fisher_stride), self._output_fisher)
        with th.enable_grad():
            statistics = self.family.statistics(self.policy.get_distribution(observations))
            return GaussNewtonFisher(AutogradJacobian(statistics, self.actor_params), self._output_fisher)

    def preconditioner(self, fisher: LinearOperator, damping: float) -> KroneckerPreconditioner | None:
        """
        An approximate inverse of the damped Fisher matrix.

        :param fisher: what :meth:`fisher` returned
        :param damping: added to the diagonal
        :return: the preconditioner; ``None`` where there is none, which is for actors that are no MLP, for distributions that
            cannot sample their score, without damping, and for a factor that is not finite
        """
        if not isinstance(fisher, GaussNewtonFisher) or not isinstance(fisher.jacobian, MlpJacobian) or damping <= 0:
            return None
        score = self.family.sample_score(self._thinned_old, self._generator)
        if score is None:
            return None
        try:
            return KroneckerPreconditioner(fisher.jacobian, self._output_fisher, score, damping)
        except th.linalg.LinAlgError:  # type: ignore[attr-defined]
            # The square of an observation of 1e20 is infinite in single precision, and has no eigenvalues
            return None

    @property
    def _thinned_old(self) -> tuple[th.Tensor, ...]:
        """Statistics of the old distribution at the samples that the Fisher matrix is taken on."""
        return tuple(statistic[:: self.fisher_stride] for statistic in self._old)

    def _output_fisher(self, tangents: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        """
        Multiply with the output-space Fisher matrix of the old distribution.

        :param tangents: of the statistics
        :return: cotangents
        """
        return self.family.fisher(self._thinned_old, tangents)

    def _hessian_fisher(self, observations: PyTorchObs) -> HessianFisher:
        """
        The Fisher matrix by double backpropagation.

        :param observations: the samples to take it on
        :return: the operator
        """
        with th.enable_grad():
            new = self.family.statistics(self.policy.get_distribution(observations))
            with th.no_grad():
                old = self.family.statistics(self.policy.get_distribution(observations))
            return HessianFisher(self.family.kl(old, new).mean(), self.actor_params)

    @th.no_grad()
    def summary(self) -> tuple[float, float]:
        """
        Entropy and std at the policy's present parameters, for logging: over 1,024 samples or a few more, if there are any.

        :return: mean entropy and mean std; NaN where the distribution has none
        """
        every = slice(None, None, max(self.batch.n_samples // 1024, 1))
        new = self.family.statistics(self.policy.get_distribution(take(self.batch.observations, every)))
        entropy, std = self.family.entropy(new, None if self._noise is None else self._noise[every]), self.family.std(new)
        return (
            float("nan") if entropy is None else entropy.mean().item(),
            float("nan") if std is None else std.mean().item(),
        )
