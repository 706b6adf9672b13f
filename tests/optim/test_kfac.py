"""The Kronecker-factored preconditioner as a dense matrix."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch as th
from helpers import as_matrix, make_batch, make_policy, relative_error
from torch import nn

from sb3_trpo_ext.optim import (
    Damped,
    GaussNewtonFisher,
    KroneckerPreconditioner,
    MlpJacobian,
    conjugate_gradient,
)
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.update.distributions import CategoricalFamily, Family, GaussianFamily
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

pytestmark = pytest.mark.usefixtures("float64")

N_SAMPLES, N_INPUTS, N_OUTPUTS = 40, 3, 2
DAMPING = 0.1


class Preconditioned:
    """A small actor with its Fisher matrix and preconditioner; parameters are in any order."""

    def __init__(self, hidden: Sequence[int], family: Family | None = None):
        self.family = GaussianFamily() if family is None else family
        self.layers = [nn.Linear(i, o) for i, o in itertools.pairwise([N_INPUTS, *hidden, N_OUTPUTS])]
        self.log_std = nn.Parameter(th.randn(N_OUTPUTS)) if isinstance(self.family, GaussianFamily) else None
        self.params = [param for layer in self.layers for param in layer.parameters()][::-1]
        self.params += [] if self.log_std is None else [self.log_std]
        self.inputs = th.randn(N_SAMPLES, N_INPUTS)
        self.jacobian = MlpJacobian(self.inputs, self.layers, [nn.Tanh() for _ in hidden], self.params, self.log_std)
        self.activations = [self.inputs]
        with th.no_grad():
            for layer in self.layers:
                self.activations.append(th.tanh(layer(self.activations[-1])))
            output = self.layers[-1](self.activations[-2])
        self.statistics = (output,) if self.log_std is None else (output, self.log_std.detach().expand_as(output))
        score = self.family.sample_score(self.statistics, th.Generator().manual_seed(0))
        assert score is not None
        self.score = score
        self.fisher = GaussNewtonFisher(self.jacobian, self.output_fisher)
        self.preconditioner = KroneckerPreconditioner(self.jacobian, self.output_fisher, score, DAMPING, Shares())

    def output_fisher(self, tangents: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        return self.family.fisher(self.statistics, tangents)

    @property
    def n_params(self) -> int:
        return len(flatten(self.params))

    def matrix(self) -> th.Tensor:
        return th.stack([self.preconditioner @ basis for basis in th.eye(self.n_params)], dim=1)


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)], ids=str)
def test_layers_and_vectors_are_two_forms_of_the_same(hidden: Sequence[int]) -> None:
    actor = Preconditioned(hidden)
    vector = th.randn(actor.n_params)
    matrices, log_std = actor.jacobian.to_layers(vector)
    assert th.equal(actor.jacobian.from_layers(matrices, log_std), vector)
    for layer, matrix in zip(actor.layers, actor.jacobian.to_layers(flatten(actor.params))[0], strict=True):
        assert th.equal(matrix[:, : layer.in_features], layer.weight)
        assert th.equal(matrix[:, -1], layer.bias)


def test_it_is_the_inverse_of_the_damped_fisher_matrix_of_a_linear_gaussian() -> None:
    """One layer whose output Fisher matrix is the same in all states: nothing is left to approximate."""
    actor = Preconditioned(())
    inverse = th.linalg.inv(as_matrix(Damped(actor.fisher, DAMPING), actor.n_params))
    assert relative_error(actor.matrix(), inverse) < 1e-10


@pytest.mark.parametrize("family", [GaussianFamily(), CategoricalFamily([N_OUTPUTS])], ids=["gaussian", "categorical"])
@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)], ids=str)
def test_each_block_is_the_inverse_of_a_damped_kronecker_product(hidden: Sequence[int], family: Family) -> None:
    """Martens & Grosse (2015), section 3, with factors by automatic differentiation and the inverse of the dense matrix."""
    actor = Preconditioned(hidden, family)
    pre_activations, value = [], actor.inputs
    for layer in actor.layers:
        pre_activations.append(layer(value))
        value = th.tanh(pre_activations[-1])
    cotangents = th.autograd.grad(pre_activations[-1], pre_activations, grad_outputs=actor.score)
    row = tuple(statistic[:1] for statistic in actor.statistics)
    blocks = []
    for index, layer in enumerate(actor.layers):
        inputs = th.cat([actor.activations[index], th.ones(N_SAMPLES, 1)], dim=1)
        output_factor = cotangents[index].T @ cotangents[index] / N_SAMPLES
        if index == len(actor.layers) - 1:
            if isinstance(family, GaussianFamily):
                output_factor = th.diag(th.exp(-2 * row[1][0]))
            else:
                p = th.softmax(actor.statistics[0], dim=1)
                output_factor = (th.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(dim=0)
        damped = th.kron(output_factor, inputs.T @ inputs / N_SAMPLES)
        blocks.append(th.linalg.inv(damped + DAMPING * th.eye(len(damped))))
        assert blocks[-1].shape[0] == layer.out_features * (layer.in_features + 1)

    vector = th.randn(actor.n_params)
    matrices, log_std = actor.jacobian.to_layers(vector)
    solved, solved_log_std = actor.jacobian.to_layers(actor.preconditioner @ vector)
    for block, matrix, result in zip(blocks, matrices, solved, strict=True):
        assert relative_error(result.flatten(), block @ matrix.flatten()) < 1e-10
    if log_std is not None:
        assert solved_log_std is not None
        # The Fisher matrix of the log std is 2
        assert relative_error(solved_log_std, log_std / (2 + DAMPING)) < 1e-12


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)], ids=str)
def test_it_is_symmetric_and_positive_definite(hidden: Sequence[int]) -> None:
    matrix = Preconditioned(hidden).matrix()
    assert relative_error(matrix, matrix.T) < 1e-12
    eigenvalues = th.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= (1 + 1e-12) / DAMPING


@pytest.mark.parametrize("seed", range(4))
def test_it_changes_how_fast_conjugate_gradient_converges_and_not_to_what(seed: int) -> None:
    th.manual_seed(seed)
    actor = Preconditioned((8, 8))
    # A gradient is made of scores, as the Fisher matrix is
    cotangents = (actor.score * th.randn(N_SAMPLES, 1), th.randn(N_SAMPLES, N_OUTPUTS))
    gradient = actor.jacobian.vjp(cotangents) / N_SAMPLES
    damped = Damped(actor.fisher, DAMPING)
    expected = th.linalg.solve(as_matrix(damped, actor.n_params), gradient)

    def solve(max_steps: int, preconditioner: KroneckerPreconditioner | None) -> th.Tensor:
        return conjugate_gradient(damped, gradient, max_steps, 1e-10, preconditioner).x

    def error(x: th.Tensor) -> float:
        """In the norm of A, which is what conjugate gradient makes small."""
        return th.dot(x - expected, damped @ (x - expected)).item()

    for preconditioner in (None, actor.preconditioner):
        assert relative_error(solve(1000, preconditioner), expected) < 1e-8
    assert error(solve(1, actor.preconditioner)) < 0.7 * error(solve(1, None))


def test_singular_factors_are_no_obstacle() -> None:
    """Inputs that depend on each other and saturated units, as in a simulator and after a long training."""
    actor = Preconditioned((4,))
    # Three times the same input, whose correlation matrix has two eigenvalues that rounding makes positive or negative
    inputs = actor.inputs[:, :1].expand(-1, N_INPUTS)
    with th.no_grad():
        actor.layers[0].bias[2] = 1e3
    jacobian = MlpJacobian(inputs, actor.layers, [nn.Tanh()], actor.params, actor.log_std)
    # Less than what rounding leaves of these eigenvalues
    preconditioner = KroneckerPreconditioner(jacobian, actor.output_fisher, actor.score, 1e-20, Shares())
    for vector in (*th.eye(actor.n_params), *th.randn(20, actor.n_params)):
        assert 0 < th.dot(vector, preconditioner @ vector) < math.inf


@pytest.mark.parametrize("stride", [1, 3])
def test_surrogate_makes_it_of_the_samples_that_the_fisher_matrix_is_of(stride: int) -> None:
    """On a linear Gaussian it is the exact inverse, which it would not be of other samples."""
    policy = make_policy(net_arch=[])
    params = split_policy(policy).actor_params
    surrogate = Surrogate(policy, params, make_batch(policy, 20), fisher_stride=stride)
    fisher = surrogate.fisher()
    preconditioner = fisher.preconditioner(DAMPING)
    assert preconditioner is not None
    vector = th.randn(flatten(params).shape)
    assert relative_error(preconditioner @ (Damped(fisher, DAMPING) @ vector), vector) < 1e-10


def test_surrogate_makes_it_without_global_random_numbers_and_reproducibly() -> None:
    policy = make_policy()
    params = split_policy(policy).actor_params
    batch, vector = make_batch(policy), th.randn(flatten(params).shape)
    state = th.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        surrogate = Surrogate(policy, params, batch, noise_seed=seed)
        preconditioner = surrogate.fisher().preconditioner(DAMPING)
        assert preconditioner is not None
        results.append(preconditioner @ vector)
    assert th.equal(th.get_rng_state(), state)
    assert th.equal(results[0], results[1])
    assert not th.equal(results[0], results[2])


@pytest.mark.parametrize("size", [1e200, math.inf])
def test_surrogate_has_none_of_what_is_not_finite(size: float) -> None:
    """A finite observation whose square is infinite is a matter for plain conjugate gradient, which gives a status."""
    policy = make_policy()
    batch = make_batch(policy)
    assert isinstance(batch.observations, th.Tensor)
    observations = batch.observations.double()
    observations[2, 1] = size
    surrogate = Surrogate(policy, split_policy(policy).actor_params, batch._replace(observations=observations))
    assert surrogate.fisher().preconditioner(DAMPING) is None


@pytest.mark.parametrize(
    "kwargs",
    [{"use_sde": True}, {"activation_fn": nn.Softplus}],
    ids=["gsde", "unknown_activation"],
)
def test_surrogate_has_none_where_there_is_none(kwargs: dict[str, Any]) -> None:
    policy = make_policy(**kwargs)
    surrogate = Surrogate(policy, split_policy(policy).actor_params, make_batch(policy))
    assert surrogate.fisher().preconditioner(DAMPING) is None
    assert surrogate.fisher().preconditioner_cost == math.inf


def test_surrogate_has_none_for_a_family_that_cannot_sample_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianFamily, "sample_score", Family.sample_score)
    policy = make_policy()
    surrogate = Surrogate(policy, split_policy(policy).actor_params, make_batch(policy))
    assert surrogate.fisher().preconditioner(DAMPING) is None
