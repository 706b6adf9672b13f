"""The Fisher matrix by every route that there is, as dense matrices in double precision."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    DICT,
    IMAGE,
    BetaPolicy,
    Dense,
    as_matrix,
    make_batch,
    make_policy,
    relative_error,
    thinned,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from sb3_trpo_ext.optim import (
    AutogradJacobian,
    Averaged,
    Damped,
    GaussNewtonFisher,
    HessianFisher,
    Jacobian,
    MlpJacobian,
)
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.policies import CnnPolicy, MultiInputPolicy, SquashedMlpPolicy
from sb3_trpo_ext.update.distributions import BernoulliFamily, CategoricalFamily, Family, GaussianFamily, family_of
from sb3_trpo_ext.update.structure import mlp_structure, split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

pytestmark = pytest.mark.usefixtures("float64")

N_SAMPLES = 5
#: Relative, in double precision: all routes are exact, and what they multiply is of order one.
TOLERANCE = 1e-10


class Kind(NamedTuple):
    """A family, and what PyTorch says of it: the second opinion."""

    family: Family
    n_outputs: int
    has_log_std: bool
    #: From the flat statistics of one state to independent distributions of PyTorch's.
    distributions: Callable[[th.Tensor], list[th.distributions.Distribution]]


KINDS = {
    "gaussian": Kind(GaussianFamily(), 2, True, lambda s: [Normal(s[:2], s[2:].exp(), validate_args=False)]),
    "categorical": Kind(CategoricalFamily([3]), 3, False, lambda s: [Categorical(logits=s)]),
    "multi_categorical": Kind(
        CategoricalFamily([2, 3]), 5, False, lambda s: [Categorical(logits=part) for part in s.split([2, 3])]
    ),
    "bernoulli": Kind(BernoulliFamily(), 2, False, lambda s: [Bernoulli(logits=s)]),
}
ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Identity)
HIDDEN = ((), (4,), (4, 3), (3, 4, 3))
SHAPES = [
    *((hidden, nn.Tanh) for hidden in HIDDEN),
    *(((4, 3), activation) for activation in ACTIVATIONS[1:]),
]


class Network:
    """An MLP with the statistics of a kind of distribution as outputs, and all that the routes to its Fisher matrix need."""

    def __init__(self, kind: Kind, hidden: Sequence[int], activation: Callable[[], nn.Module]):
        sizes = [3, *hidden, kind.n_outputs]
        self.layers = [nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)]
        self.activations = [activation() for _ in hidden]
        modules = [module for pair in zip(self.layers, self.activations, strict=False) for module in pair]
        self.net = nn.Sequential(*modules, self.layers[-1])
        self.log_std = nn.Parameter(0.5 * th.randn(kind.n_outputs)) if kind.has_log_std else None
        # The log std comes first here and the layers backwards: nothing may rely on the order of the parameters
        self.params = [] if self.log_std is None else [self.log_std]
        self.params += list(self.net.parameters())[::-1]
        self.inputs = th.randn(N_SAMPLES, 3)

    def statistics(self) -> tuple[th.Tensor, ...]:
        output = self.net(self.inputs)
        return (output,) if self.log_std is None else (output, self.log_std.expand_as(output))

    def mlp_jacobian(self) -> MlpJacobian:
        return MlpJacobian(self.inputs, self.layers, self.activations, self.params, self.log_std)

    def explicit_jacobian(self) -> th.Tensor:
        """Row by row; shape ``(n_samples, n_statistics, n_params)``, with the statistics of a sample side by side."""
        rows = [
            flatten(th.autograd.grad(number, self.params, retain_graph=True, materialize_grads=True))
            for number in th.cat(self.statistics(), dim=1).flatten()
        ]
        return th.stack(rows).view(N_SAMPLES, -1, len(rows[0]))


def explicit_output_fisher(kind: Kind, statistics: th.Tensor) -> th.Tensor:
    """The Hessian of PyTorch's KL(old || new) in the statistics of one state."""
    old = kind.distributions(statistics)

    def kl(new: th.Tensor) -> th.Tensor:
        return th.stack([kl_divergence(p, q).sum() for p, q in zip(old, kind.distributions(new), strict=True)]).sum()

    hessian = th.autograd.functional.hessian(kl, statistics)
    assert isinstance(hessian, th.Tensor)
    return hessian


@pytest.mark.parametrize(("hidden", "activation"), SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_all_routes_to_the_fisher_matrix_of_an_mlp_agree(
    kind: Kind, hidden: Sequence[int], activation: type[nn.Module]
) -> None:
    network = Network(kind, hidden, activation)
    statistics = network.statistics()
    old = tuple(statistic.detach() for statistic in statistics)
    jacobian = network.explicit_jacobian()
    output_fisher = th.stack([explicit_output_fisher(kind, row) for row in th.cat(old, dim=1)])
    expected = th.einsum("nip,nij,njq->pq", jacobian, output_fisher, jacobian) / N_SAMPLES

    def output_product(tangents: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        return kind.family.fisher(old, tangents)

    routes = {
        "hessian": HessianFisher(kind.family.kl(old, statistics).mean(), network.params),
        "autograd": GaussNewtonFisher(AutogradJacobian(statistics, network.params), output_product),
        "by hand": GaussNewtonFisher(network.mlp_jacobian(), output_product),
    }
    for name, operator in routes.items():
        matrix = as_matrix(operator, len(expected))
        assert relative_error(matrix, expected) < TOLERANCE, name
        assert relative_error(matrix, matrix.T) < TOLERANCE, name
        assert th.linalg.eigvalsh(matrix).min() > -TOLERANCE * matrix.norm(), name


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("kind", [KINDS["gaussian"], KINDS["categorical"]], ids=["gaussian", "categorical"])
@pytest.mark.parametrize("route", ["by hand", "autograd"])
def test_vjp_is_the_adjoint_of_jvp_and_both_are_the_jacobian(kind: Kind, hidden: Sequence[int], route: str) -> None:
    network = Network(kind, hidden, nn.Tanh)
    statistics = network.statistics()
    jacobian: Jacobian = network.mlp_jacobian()
    if route == "autograd":
        jacobian = AutogradJacobian(statistics, network.params)
    explicit = network.explicit_jacobian()
    vector = th.randn(explicit.shape[-1])
    cotangents = tuple(th.randn_like(statistic) for statistic in statistics)

    tangents, pulled_back = jacobian.jvp(vector), jacobian.vjp(cotangents)

    assert jacobian.n_samples == N_SAMPLES
    assert [tangent.shape for tangent in tangents] == [statistic.shape for statistic in statistics]
    assert relative_error(th.cat(tangents, dim=1), explicit @ vector) < TOLERANCE
    assert relative_error(pulled_back, th.einsum("nip,ni->p", explicit, th.cat(cotangents, dim=1))) < TOLERANCE
    on_the_left = sum(th.sum(u * t) for u, t in zip(cotangents, tangents, strict=True))
    assert float(on_the_left) == pytest.approx(float(th.dot(pulled_back, vector)), rel=TOLERANCE)


def test_a_parameter_outside_the_statistics_has_a_row_of_zeros() -> None:
    used, unused = th.randn(2, requires_grad=True), th.randn(3, requires_grad=True)
    statistics = (used.exp().expand(N_SAMPLES, 2),)
    jacobian = AutogradJacobian(statistics, [unused, used])
    assert th.equal(jacobian.jvp(th.tensor([1.0, 2.0, 3.0, 0.0, 0.0]))[0], th.zeros(N_SAMPLES, 2))
    assert th.equal(jacobian.vjp((th.ones(N_SAMPLES, 2),))[:3], th.zeros(3))
    assert relative_error(jacobian.jvp(th.ones(5))[0], used.detach().exp().expand(N_SAMPLES, 2)) < TOLERANCE


def quadrature(policy: ActorCriticPolicy, observations: Any) -> list[tuple[th.Tensor, th.Tensor]]:
    """
    Actions and their weights, one per state, with which the expectation of the Fisher matrix over actions is a finite sum.

    All actions with their probabilities if these can be counted. For a Gaussian, three Gauss-Hermite nodes per dimension,
    exact for polynomials up to degree five: the outer product of two scores has degree four in the noise.
    """
    space = policy.action_space
    with th.no_grad():
        distribution = policy.get_distribution(observations)
        if isinstance(space, spaces.Box):
            assert isinstance(distribution.distribution, Normal)
            mean, std = distribution.distribution.loc, distribution.distribution.scale
            nodes, weights = np.polynomial.hermite_e.hermegauss(3)
            weights = weights / weights.sum()
            pairs = []
            for index in itertools.product(range(3), repeat=mean.shape[1]):
                action = mean + std * th.as_tensor(nodes[list(index)])
                action = th.tanh(action) if family_of(distribution).needs_noise else action
                pairs.append((action, th.full((len(mean),), weights[list(index)].prod())))
            return pairs
        choices: list[Any]
        if isinstance(space, spaces.Discrete):
            choices = list(range(int(space.n)))
        elif isinstance(space, spaces.MultiDiscrete):
            choices = list(itertools.product(*(range(n) for n in space.nvec)))
        else:
            assert isinstance(space, spaces.MultiBinary)
            choices = list(itertools.product((0.0, 1.0), repeat=space.shape[0]))
        actions = [th.tensor(choice).expand(N_SAMPLES, *th.tensor(choice).shape) for choice in choices]
        return [(action, distribution.log_prob(action).exp()) for action in actions]


def weighted_scores(policy: ActorCriticPolicy, params: list[nn.Parameter], observations: Any) -> th.Tensor:
    """
    S with ``S^T S = E_state E_action[score score^T]``, the definition of the Fisher matrix.

    Uses nothing but the log-probabilities of SB3's distributions: no KL, no statistics, no second derivative.
    """
    rows = []
    for actions, weights in quadrature(policy, observations):
        log_prob = policy.get_distribution(observations).log_prob(actions)
        for number, weight in zip(log_prob, weights, strict=True):
            score = flatten(th.autograd.grad(number, params, retain_graph=True, materialize_grads=True))
            rows.append(score * (weight / N_SAMPLES).sqrt())
    return th.stack(rows)


POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "gsde": {"use_sde": True},
    "gsde_squashed": {"use_sde": True, "squash_output": True},
    "gsde_one_std_per_feature": {"use_sde": True, "full_std": False},
    "gsde_expln": {"use_sde": True, "use_expln": True},
    "gsde_squashed_expln": {"use_sde": True, "squash_output": True, "use_expln": True},
    "categorical": {"action_space": spaces.Discrete(3)},
    "multi_categorical": {"action_space": spaces.MultiDiscrete([2, 3])},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "no_hidden_layer": {"net_arch": []},
    "separate_layers": {"net_arch": {"pi": [4, 3], "vf": [5]}, "activation_fn": nn.ELU},
    "layer_norm": {"activation_fn": lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh())},
    "discrete_observations": {"observation_space": spaces.Discrete(4)},
    "binary_observations": {"observation_space": spaces.MultiBinary(3), "action_space": spaces.Discrete(3)},
    "dict_observations": {"observation_space": DICT, "policy_class": MultiInputPolicy},
    "dict_observations_multi_categorical": {
        "observation_space": DICT,
        "policy_class": MultiInputPolicy,
        "action_space": spaces.MultiDiscrete([2, 3]),
    },
    "images": {"observation_space": IMAGE, "policy_class": CnnPolicy},
    "images_gsde": {"observation_space": IMAGE, "policy_class": CnnPolicy, "use_sde": True},
    "images_shared_extractor": {
        "observation_space": IMAGE,
        "policy_class": CnnPolicy,
        "share_features_extractor": True,
        "action_space": spaces.Discrete(3),
    },
    "images_bernoulli": {"observation_space": IMAGE, "policy_class": CnnPolicy, "action_space": spaces.MultiBinary(2)},
}
#: Those whose actor is a plain MLP, so that the hand-written Jacobian must be chosen.
BY_HAND = {
    "gaussian",
    "squashed",
    "categorical",
    "multi_categorical",
    "bernoulli",
    "no_hidden_layer",
    "separate_layers",
    "discrete_observations",
    "binary_observations",
}


@pytest.mark.parametrize("name", POLICIES)
def test_fisher_matrix_of_a_policy_is_the_expected_outer_product_of_its_scores(name: str) -> None:
    is_image = name.startswith("images")
    kwargs: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": 8}} if is_image else {}
    policy = make_policy(**POLICIES[name], **kwargs)
    params = split_policy(policy).actor_params
    surrogate = Surrogate(policy, params, make_batch(policy, N_SAMPLES))
    scores = weighted_scores(policy, params, surrogate.batch.observations)
    # The matrix of an image policy has too many columns to be written down
    vectors = th.randn(scores.shape[1], 3) if is_image else th.eye(scores.shape[1])
    expected = scores.T @ (scores @ vectors)

    assert (mlp_structure(policy, params) is not None) == (name in BY_HAND)
    fisher = surrogate.fisher()
    hessian = HessianFisher(surrogate.evaluate()[1], params)
    for operator in (fisher, hessian):
        # SB3's inverse of the tanh loses a few digits of the oracle's actions
        assert relative_error(th.stack([operator @ v for v in vectors.T], dim=1), expected) < 1e-8


def test_fisher_matrix_of_a_users_distribution_is_its_closed_form() -> None:
    policy = make_policy(action_space=spaces.Box(0.0, 1.0, (2,)), policy_class=BetaPolicy)
    params = split_policy(policy).actor_params
    surrogate = Surrogate(policy, params, make_batch(policy, N_SAMPLES))
    distribution = policy.get_distribution(surrogate.batch.observations).distribution
    assert isinstance(distribution, th.distributions.Beta)
    concentrations = (distribution.concentration1, distribution.concentration0)
    jacobian = th.stack(
        [flatten(th.autograd.grad(number, params, retain_graph=True)) for c in concentrations for number in c.flatten()]
    ).unflatten(0, (2, -1))
    # The Hessian of the log normalizer ln B(a, b): trigamma(a) - trigamma(a + b) and so on
    trigamma = [th.special.polygamma(1, c).detach().flatten() for c in (*concentrations, sum(concentrations))]
    output_fisher = th.diag_embed(th.stack(trigamma[:2], dim=1)) - trigamma[2].view(-1, 1, 1)
    expected = th.einsum("inp,nij,jnq->pq", jacobian, output_fisher, jacobian) / N_SAMPLES

    fisher = surrogate.fisher()

    assert isinstance(fisher, HessianFisher)
    assert relative_error(as_matrix(fisher, len(expected)), expected) < TOLERANCE


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("name", ["gaussian", "gsde", "dict_observations"])
def test_fisher_stride_takes_every_so_many_th_sample(name: str, stride: int) -> None:
    policy = make_policy(**POLICIES[name])
    params = split_policy(policy).actor_params
    batch = make_batch(policy, 7)
    vector = th.randn(flatten(params).shape)

    thin = Surrogate(policy, params, batch, fisher_stride=stride)
    expected = Surrogate(policy, params, thinned(batch, stride))
    whole = Surrogate(policy, params, batch)

    assert relative_error(thin.fisher() @ vector, expected.fisher() @ vector) < TOLERANCE
    assert relative_error(thin.fisher() @ vector, whole.fisher() @ vector) > 0.01
    # Objective and KL see all samples
    for actual, full in zip(thin.evaluate(), whole.evaluate(), strict=True):
        assert th.equal(actual, full)


def test_fisher_stride_of_a_users_distribution() -> None:
    policy = make_policy(action_space=spaces.Box(0.0, 1.0, (2,)), policy_class=BetaPolicy)
    params = split_policy(policy).actor_params
    batch = make_batch(policy, 7)
    vector = th.randn(flatten(params).shape)
    thin = Surrogate(policy, params, batch, fisher_stride=3).fisher()
    assert relative_error(thin @ vector, Surrogate(policy, params, thinned(batch, 3)).fisher() @ vector) < TOLERANCE


def test_fisher_matrix_stays_at_the_old_parameters_when_the_parameters_move() -> None:
    policy = make_policy()
    params = split_policy(policy).actor_params
    fisher = Surrogate(policy, params, make_batch(policy)).fisher()
    vector = th.randn(flatten(params).shape)
    before = fisher @ vector
    with th.no_grad():
        for param in params:
            param.add_(1.0)
    assert th.equal(fisher @ vector, before)


def test_damped_adds_to_the_diagonal() -> None:
    matrix = th.randn(4, 4)
    assert relative_error(as_matrix(Damped(Dense(matrix), 0.3), 4), matrix + 0.3 * th.eye(4)) < TOLERANCE


def test_averaged_is_the_operator_itself_on_one_process() -> None:
    matrix, vector = th.randn(4, 4), th.randn(4)
    assert th.equal(Averaged(Dense(matrix), Shares()) @ vector, matrix @ vector)
