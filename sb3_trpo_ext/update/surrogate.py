"""The policy's side of an update: surrogate objective, KL and Fisher matrix of one rollout."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_trpo_ext.optim import (
    AutogradJacobian,
    ChunkedOperator,
    GaussNewtonFisher,
    HessianFisher,
    LinearOperator,
    MlpFisher,
    MlpJacobian,
    Problem,
    Projected,
)
from sb3_trpo_ext.optim.vectors import gradient_by_backward
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.update.batch import Batch, take
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.clipping import ActionBounds, clipped_log_prob
from sb3_trpo_ext.update.distributions import Family, family_of, standard_normal
from sb3_trpo_ext.update.structure import MlpStructure, has_gradient_hooks, mlp_structure


class Limits(NamedTuple):
    """What goes through the policy at once, which bounds the memory and changes no result."""

    #: Samples in one pass for objective, KL or gradient.
    n_samples: int
    #: Numbers in the observations of one pass, and of those samples whose graph is kept for the Fisher-vector products.
    n_numbers: int


#: Measured on two cores: 4,096 states of Humanoid-v5 at once are as fast as 8,192 (and 1,024 are 15% slower). 2^25 numbers are
#: 1,188 images of 4 x 84 x 84, with about 0.7 GiB of activations in the network of the Nature paper.
_CPU_LIMITS = Limits(4096, 2**25)
#: Not measured: an accelerator wants more work per call.
_ACCELERATOR_LIMITS = Limits(65536, 2**28)


class Surrogate(Problem):
    """
    What TRPO maximizes on a rollout, and the KL that it stays within.

    ``objective(theta) = mean(ratio * advantage) + ent_coef * mean(entropy)`` with ``ratio = pi(a|s) / pi_old(a|s)``; Schulman
    et al. (2015), equation 14, with an entropy bonus. Statistics of the old distribution are those at construction.

    :param policy: in evaluation mode, as during the rollout: dropout and BatchNorm must act as they did then
    :param params: the parameters to optimize, each reachable from the action distribution
    :param batch: the rollout, with advantages that are normalized already if they should be
    :param ent_coef: weight of the entropy
    :param fisher_stride: the Fisher matrix is taken on every k-th sample; objective and KL see all of them
    :param noise_seed: of the noise with which an entropy without closed form is estimated: the same for all evaluations, so
        that the line search compares like with like, and from a generator of its own, so that no global random number is used
    :param bounds: to which the actions were clipped before the environment got them, if the ratio is to be that of the
        clipped actions (:func:`~sb3_trpo_ext.update.clipping.clipped_log_prob`). The policy must then be that of the rollout
    :param shares: what each process counts in the means over samples
    :param calls: how the policy is asked for its distribution; ``None`` for one that needs nothing but observations
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        params: Sequence[th.Tensor],
        batch: Batch,
        ent_coef: float = 0.0,
        fisher_stride: int = 1,
        noise_seed: int = 0,
        bounds: ActionBounds | None = None,
        shares: Shares = Shares(),  # noqa: B008 it is immutable
        calls: PolicyCalls | None = None,
    ):
        self.policy = policy
        self._calls = PolicyCalls(policy) if calls is None else calls
        self.params = list(params)
        self.batch = batch
        self.n_samples = batch.n_samples
        self.shares = shares
        self.ent_coef = ent_coef
        self.fisher_stride = fisher_stride
        self._bounds = bounds
        self._structure = mlp_structure(policy, self.params)
        #: Whether there are hooks that see or change the gradient: then autograd computes it, on the parameters themselves.
        self._has_gradient_hooks = any(has_gradient_hooks(param) for param in self.params)
        self._generator = th.Generator().manual_seed(noise_seed)
        with th.no_grad():
            # Of two samples: a user's network may squeeze away a batch of one
            self.family: Family[Any] = family_of(self._calls.distribution(batch, slice(2)))
        limits = _CPU_LIMITS if policy.device.type == "cpu" else _ACCELERATOR_LIMITS
        #: Of how many samples the graph is kept for the Fisher-vector products.
        self._n_kept = max(limits.n_numbers // self._calls.numbers_per_sample(batch), 1)
        n_at_once = min(limits.n_samples, self._n_kept)
        if not self.family.is_batched:
            n_at_once = self._n_kept = batch.n_samples
        self._chunks = self._calls.cut(batch, n_at_once)
        self._noise: th.Tensor | None = None
        if self.family.needs_noise:
            self._noise = th.cat([standard_normal(batch.actions[chunk], self._generator) for chunk, _ in self._chunks])
        #: Log-probabilities of the actions at the old parameters; the rollout has those of the actions before clipping.
        self._old_log_prob = batch.old_log_prob if bounds is None else th.empty_like(batch.old_log_prob)
        #: How far log-probabilities of the policy are from those of the rollout, on the mean; a scalar.
        self.deviation: th.Tensor
        #: Of an MLP actor on the whole batch, if that is a single chunk.
        self._jacobian: MlpJacobian | None = None
        self._old, self._objective_and_gradient = self._first_pass()

    def _first_pass(self) -> tuple[Any, tuple[th.Tensor, th.Tensor]]:
        """Go through the batch once, forwards and backwards: statistics, and the objective with its gradient."""
        statistics, objectives, gradients, deviations = [], [], [], []
        for chunk, share in self._chunks:
            with th.enable_grad():
                jacobian, leaves, distribution = self._outputs(chunk)
                new = self.family.statistics(distribution)
                log_prob = self._log_prob(distribution, chunk)
                of_rollout = log_prob.detach()
                if self._bounds is not None:
                    self._old_log_prob[chunk] = of_rollout
                    of_rollout = distribution.log_prob(self.batch.actions[chunk]).detach()
                deviations.append((of_rollout - self.batch.old_log_prob[chunk]).abs().mean() * share)
                objective = self._objective(log_prob, chunk, new) * share
                if jacobian is None:
                    gradients.append(gradient_by_backward(objective, leaves))
                else:
                    gradients.append(jacobian.vjp(th.autograd.grad(objective, leaves, materialize_grads=True)))
            objectives.append(objective.detach())
            statistics.append(new)
            self._jacobian = jacobian if len(self._chunks) == 1 else None
        self.deviation = th.stack(deviations).sum()
        old: Any
        if self.family.is_batched:
            old = tuple(th.cat(columns).detach() for columns in zip(*statistics, strict=True))
        else:
            with th.no_grad():
                old = self.family.statistics(self._calls.distribution(self.batch, slice(None)))
        # In place, and one after the other: a gradient is as large as the policy
        return old, (sum(objectives, start=th.zeros_like(objectives[0])), functools.reduce(th.Tensor.add_, gradients))

    def _outputs(self, part: th.Tensor | slice) -> tuple[MlpJacobian | None, Sequence[th.Tensor], Distribution]:
        """
        The action distribution, and what its graph starts at.

        For an MLP actor autograd goes from the objective to the network's output and no further: the rest is the Jacobian's.
        For any other actor it goes to the parameters.

        :param part: the samples of a chunk
        :return: Jacobian, if the actor is an MLP; leaves; distribution
        """
        structure = None if self._has_gradient_hooks else self._structure
        if structure is None:
            return None, self.params, self._calls.distribution(self.batch, part)
        jacobian = self._mlp_jacobian(structure, take(self.batch.observations, part))
        leaves = [jacobian.output.detach().requires_grad_()]
        if structure.log_std is not None:
            leaves.append(structure.log_std.detach().expand(len(leaves[0]), -1).clone().requires_grad_())
        return jacobian, leaves, self._calls.distribution_of(leaves, self.batch, part)

    def _mlp_jacobian(self, structure: MlpStructure, observations: PyTorchObs) -> MlpJacobian:
        """The hand-written Jacobian at the current parameters on some observations."""
        # As `get_distribution` does: `ActorCriticPolicy.extract_features` would run the critic's extractor too
        with th.no_grad():
            features = BasePolicy.extract_features(self.policy, observations, self.policy.pi_features_extractor)
        # Contiguous samples are worth a copy to the products to come
        return MlpJacobian(features.contiguous(), structure.layers, structure.activations, self.params, structure.log_std)

    def evaluate(self, indices: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """Objective and mean KL(old || new) at the policy's current parameters, the whole batch in chunks."""
        if indices is not None:
            return self._evaluate_part(indices)
        parts = [th.stack(self._evaluate_part(chunk)) * share for chunk, share in self._chunks]
        objective, kl = sum(parts[1:], start=parts[0])
        return objective, kl

    def _evaluate_part(self, part: th.Tensor | slice) -> tuple[th.Tensor, th.Tensor]:
        """Objective and mean KL(old || new) of some samples, given by indices or a slice."""
        distribution = self._calls.distribution(self.batch, part)
        new = self.family.statistics(distribution)
        objective = self._objective(self._log_prob(distribution, part), part, new)
        return objective, self.family.kl(self._old_at(part), new).mean()

    def _old_at(self, part: th.Tensor | slice) -> Any:
        """
        Statistics of the old distribution at some samples; at all of them if the statistics cannot be cut.

        (The constructor of TRPO refuses the combination of a penalty, which needs minibatches, with such a distribution.)
        """
        return tuple(statistic[part] for statistic in self._old) if self.family.is_batched else self._old

    def minibatches(self, batch_size: int) -> Iterable[tuple[th.Tensor, float]]:
        """Those of the policy's calls."""
        sizes, weights = self._calls.plan(self.batch, batch_size, self.shares)
        return zip(self._calls.minibatches(self.batch, sizes), weights, strict=True)

    def objective_and_gradient(self) -> tuple[th.Tensor, th.Tensor]:
        """From the first pass through the batch, in which the old statistics were computed too."""
        return self._objective_and_gradient

    def _objective(self, log_prob: th.Tensor, part: th.Tensor | slice, new: Any) -> th.Tensor:
        """
        ``mean(ratio * advantage) + ent_coef * mean(entropy)`` of some samples.

        :param log_prob: of the rollout's actions, by the new distribution
        :param part: indices or slice of the samples
        :param new: statistics of the new distribution
        :return: scalar
        :raises ValueError: if ``ent_coef`` is not zero and the distribution has no entropy
        """
        log_ratio = log_prob - self._old_log_prob[part]
        objective = (th.exp(log_ratio) * self.batch.advantages[part]).mean()
        if self.ent_coef == 0:
            return objective
        entropy = self._entropy(new, part)
        if entropy is None:
            name = type(self.policy.action_dist).__name__
            raise ValueError(f"`ent_coef` is {self.ent_coef}, but {name} has no entropy: pass 0, or use `register_family`.")
        return objective + self.ent_coef * entropy.mean()

    def _entropy(self, new: Any, part: th.Tensor | slice) -> th.Tensor | None:
        """Entropy of some samples, with the noise for one without closed form; ``None`` if it is not known."""
        return self.family.entropy(new, None if self._noise is None else self._noise[part])

    def _log_prob(self, distribution: Distribution, part: th.Tensor | slice) -> th.Tensor:
        """Log-probabilities of the rollout's actions at some samples, or of the clipped actions; shape ``(n_samples,)``."""
        actions = self.batch.actions[part]
        return (
            distribution.log_prob(actions) if self._bounds is None else clipped_log_prob(distribution, actions, self._bounds)
        )

    def fisher(self) -> LinearOperator:
        """
        The Fisher matrix of the mean KL at the old parameters, in the cheapest form that is exact for this policy.

        Hooks on parameters see gradients, but not the products with this matrix. Where a hook has set a gradient to zero, the
        matrix has zeros too: that parameter must stay where it is.
        """
        if self._structure is not None:
            fisher: LinearOperator = self._mlp_fisher(self._structure)
        else:
            parts = self._calls.cut(self.batch, self._n_kept, self.fisher_stride)
            operators = [functools.partial(self._autograd_fisher, part) for part, _ in parts]
            fisher = operators[0]() if len(parts) == 1 else ChunkedOperator(operators, [share for _, share in parts])
        if not self._has_gradient_hooks:
            return fisher
        gradient = self._objective_and_gradient[1]
        hooked = th.cat([th.full((param.numel(),), has_gradient_hooks(param)) for param in self.params])
        return Projected(fisher, (gradient != 0) | hooked.logical_not().to(gradient.device))

    def _mlp_fisher(self, structure: MlpStructure) -> MlpFisher:
        """The Fisher matrix of an MLP actor, by products on cached activations."""
        thin = slice(None, None, self.fisher_stride)
        if self._jacobian is not None:
            jacobian = self._jacobian.thinned(self.fisher_stride)
        else:
            jacobian = self._mlp_jacobian(structure, take(self.batch.observations, thin))
        old = self._old_at(thin)
        return MlpFisher(
            jacobian,
            functools.partial(self.family.fisher, old),
            lambda: self.family.sample_score(old, self._generator),
            self.shares,
        )

    def _autograd_fisher(self, part: th.Tensor | slice) -> LinearOperator:
        """By automatic differentiation, on some samples."""
        outputs, params = _Outputs(self._calls, self.batch, self.family), list[th.Tensor](self.params)
        with th.enable_grad():
            if self._has_gradient_hooks:
                # The same numbers in other leaves, which have no hooks
                params = [param.detach().requires_grad_() for param in params]
                names = {id(param): name for name, param in outputs.named_parameters()}
                aliases = {names[id(param)]: alias for param, alias in zip(self.params, params, strict=True)}
                statistics = th.func.functional_call(outputs, aliases, (part,))
            else:
                statistics = outputs(part)
            if self.family.has_fisher:
                jacobian = AutogradJacobian(statistics, params)
                return GaussNewtonFisher(jacobian, functools.partial(self.family.fisher, self._old_at(part)))
            with th.no_grad():
                old = outputs(part)
            return HessianFisher(self.family.kl(old, statistics).mean(), params)

    @th.no_grad()
    def summary(self) -> tuple[float, float]:
        """Entropy and std at the policy's current parameters, for logging, over about 256 samples of each process."""
        # With 1,024 samples it took 7% of an update on 2,048; the numbers hardly differ between samples
        (every, _), *_ = self._calls.cut(self.batch, self.batch.n_samples, max(self.batch.n_samples // 256, 1))
        new = self.family.statistics(self._calls.distribution(self.batch, every))
        unknown = self.batch.advantages.new_full((), math.nan)
        entropy_and_std = self._entropy(new, every), self.family.std(new)
        means = th.stack([unknown if values is None else values.mean() for values in entropy_and_std]).tolist()
        mean_entropy, mean_std = self.shares.mean(th.tensor(means, dtype=th.float64)).tolist()
        return mean_entropy, mean_std


class _Outputs(nn.Module):
    """From samples of a batch to the statistics of the action distribution, as a module."""

    def __init__(self, calls: PolicyCalls, batch: Batch, family: Family[Any]):
        super().__init__()
        self.policy = calls.policy
        self._calls, self._batch, self._family = calls, batch, family

    def forward(self, part: th.Tensor | slice) -> Any:
        """The statistics, with their graph."""
        return self._family.statistics(self._calls.distribution(self._batch, part))
