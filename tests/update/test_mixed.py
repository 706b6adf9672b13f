"""A Tuple or a Dict of actions as one vector, and its distribution."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    BOX_ACTIONS,
    DICT_ACTIONS,
    TUPLE_ACTIONS,
    VECTOR,
    as_matrix,
    finite_difference,
    make_batch,
    make_policy,
    relative_error,
)
from torch.distributions import kl_divergence

from sb3_trpo_ext.optim import HessianFisher, MlpFisher
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.policies import MlpPolicy, mixed_policy
from sb3_trpo_ext.update.clipping import action_bounds, clipped_log_prob
from sb3_trpo_ext.update.distributions import family_of
from sb3_trpo_ext.update.mixed import MixedActions, MixedDistribution
from sb3_trpo_ext.update.structure import mlp_structure, split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

N_SAMPLES = 6
DISCRETE = spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)])
each_space = pytest.mark.parametrize("space", [TUPLE_ACTIONS, DICT_ACTIONS, DISCRETE], ids=["tuple", "dict", "discrete"])
double = pytest.mark.usefixtures("float64")


def mixed(space: Any, **kwargs: Any) -> Any:
    return make_policy(VECTOR, MixedActions(space), mixed_policy(MlpPolicy), **kwargs)


def types_of(action: Any) -> Any:
    parts = action.items() if isinstance(action, dict) else enumerate(action)
    return type(action), {key: (type(part), part.dtype, part.shape) for key, part in parts}


def test_numbers_are_side_by_side_in_the_order_of_the_parts() -> None:
    space = MixedActions(TUPLE_ACTIONS)
    assert space.low.tolist() == [0, -1, -1, 0, 0, 0, 0, 0]
    assert space.high.tolist() == [2, 1, 1, 1, 1, 5, 1, 2]
    (action,) = space.structures(np.array([[2, 0.5, -7, 1, 0, 2.5, 1, 2]], np.float32))
    assert types_of(action) == types_of(TUPLE_ACTIONS.sample())
    discrete, matrix, binary, box, multi = action
    assert (discrete, matrix.tolist(), binary.tolist()) == (1, [[0.5], [-1]], [[1, 0]])
    assert (box.tolist(), multi.tolist()) == ([2.5], [[1], [2]])
    # Gymnasium sorts the parts of a Dict
    (action,) = MixedActions(DICT_ACTIONS).structures(np.array([[1, 0.5, -0.25]], np.float32))
    assert types_of(action) == types_of(DICT_ACTIONS.sample())
    assert (list(action), action["grip"], action["move"].tolist()) == (["grip", "move"], 1, [0.5, -0.25])


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_integers_have_the_type_and_the_start_of_their_space(kind: type) -> None:
    space = spaces.Tuple([spaces.MultiDiscrete([3, 4], dtype=kind, start=[-1, 5])])
    actions = MixedActions(space).structures(np.array([[0, 3], [2, 0]], np.float32))
    assert [action[0].tolist() for action in actions] == [[-1, 8], [1, 5]]
    assert all(action[0].dtype == kind and space.contains(action) for action in actions)


def test_bounds_of_double_precision_hold() -> None:
    """0.1 and 0.3 are not numbers of single precision, and 0.3 is rounded up."""
    space = spaces.Tuple([spaces.Box(0.1, 0.3, (2,), np.float64)])
    flat = MixedActions(space)
    for row in (flat.low, flat.high):
        assert space.contains(flat.structures(row[None])[0])


@each_space
def test_equal_to_the_space_of_the_environment_alone(space: Any, tmp_path: Any) -> None:
    flat = MixedActions(space)
    for same in (flat, MixedActions(copy.deepcopy(space)), space, pickle.loads(pickle.dumps(flat)), copy.deepcopy(flat)):
        assert flat == same
        assert (flat != same) is False
    others = [MixedActions(spaces.Tuple([BOX_ACTIONS])), spaces.Tuple([BOX_ACTIONS]), spaces.Box(flat.low, flat.high), None]
    assert all(flat != other for other in others)
    assert repr(flat) == f"MixedActions({space})"


@double
@each_space
def test_log_prob_kl_and_entropy_are_sums_over_the_parts(space: Any) -> None:
    policy = mixed(space)
    batch = make_batch(policy, N_SAMPLES)
    dist = policy.get_distribution(batch.observations)
    family, old = family_of(dist), family_of(dist).statistics(dist)
    parts = copy.copy(dist.distribution)
    # A categorical has one column, a Gaussian or Bernoullis one for each number
    columns = batch.actions.split([part.batch_shape[1:].numel() for part in parts], dim=1)

    def summed(terms: Any) -> th.Tensor:
        return sum(term.reshape(N_SAMPLES, -1).sum(dim=1) for term in terms)

    def at(part: Any, column: th.Tensor) -> th.Tensor:
        return part.log_prob(column if len(part.batch_shape) > 1 else column[:, 0])

    log_prob = summed(at(part, column) for part, column in zip(parts, columns, strict=True))
    assert relative_error(dist.log_prob(batch.actions), log_prob) < 1e-12
    assert relative_error(dist.log_prob(batch.actions), batch.old_log_prob) < 1e-12
    entropy = family.entropy(old)
    assert entropy is not None
    for actual in (entropy, dist.entropy()):
        assert relative_error(actual, summed(part.entropy() for part in parts)) < 1e-12
    with th.no_grad():
        for param in policy.parameters():
            param.add_(0.1 * th.randn_like(param))
    dist = policy.get_distribution(batch.observations)
    expected = summed(kl_divergence(*pair) for pair in zip(parts, dist.distribution, strict=True))
    assert relative_error(family.kl(old, family.statistics(dist)), expected) < 1e-12


@double
@each_space
@pytest.mark.parametrize("kwargs", [{}, {"activation_fn": th.nn.Softplus}], ids=["by hand", "autograd"])
def test_fisher_matrix_is_the_hessian_of_the_kl(space: Any, kwargs: dict[str, Any]) -> None:
    policy = mixed(space, **kwargs)
    params = split_policy(policy).actor_params
    assert (mlp_structure(policy, params) is None) == bool(kwargs)
    surrogate = Surrogate(policy, params, make_batch(policy, N_SAMPLES))
    size = len(flatten(params))
    hessian = as_matrix(HessianFisher(surrogate.evaluate()[1], params), size)
    fisher = surrogate.fisher()
    assert isinstance(fisher, MlpFisher) != bool(kwargs)
    assert relative_error(as_matrix(fisher, size), hessian) < 1e-8


@double
@each_space
def test_preconditioner_is_exact_where_one_state_is_seen(space: Any) -> None:
    """Without hidden layers the matrix is then what K-FAC takes it for; in the block of the log std it always is."""
    policy = mixed(space, net_arch=[])
    params = split_policy(policy).actor_params
    batch = make_batch(policy, N_SAMPLES)
    assert isinstance(batch.observations, th.Tensor)
    batch = batch._replace(observations=batch.observations[:1].expand(N_SAMPLES, -1))
    fisher = Surrogate(policy, params, batch).fisher()
    preconditioner = fisher.preconditioner(0.1)
    assert preconditioner is not None
    size = len(flatten(params))
    inverse = th.linalg.inv(as_matrix(fisher, size) + 0.1 * th.eye(size))
    assert relative_error(as_matrix(preconditioner, size), inverse) < 1e-10


def test_samples_and_modes_are_actions() -> None:
    policy = mixed(TUPLE_ACTIONS)
    observations = np.stack([VECTOR.sample() for _ in range(50)])
    for deterministic in (False, True):
        actions, _ = policy.predict(observations, deterministic=deterministic)
        assert actions.shape == (50,)
        assert all(TUPLE_ACTIONS.contains(action) for action in actions)
        assert types_of(actions[0]) == types_of(TUPLE_ACTIONS.sample())
    first, _ = policy.predict(observations[0], deterministic=True)
    assert str(first) == str(actions[0])


@double
def test_likelihood_of_clipped_actions_is_that_of_each_part() -> None:
    policy = mixed(TUPLE_ACTIONS)
    batch = make_batch(policy, 200)
    bounds = action_bounds(policy)
    assert bounds is not None
    with th.no_grad():
        distribution = policy.get_distribution(batch.observations)
        assert isinstance(distribution, MixedDistribution)
        clipped = clipped_log_prob(distribution, batch.actions, bounds)
        is_beyond = ((batch.actions < bounds.low) | (batch.actions > bounds.high)).any(dim=1)
        assert 0.2 < is_beyond.double().mean() < 0.97
        assert th.allclose(clipped[~is_beyond], batch.old_log_prob[~is_beyond], rtol=1e-12)
        # Of the numbers beyond a bound only the bound counts
        again = clipped_log_prob(distribution, batch.actions.clamp(bounds.low, bounds.high), bounds)
        assert th.allclose(clipped, again, rtol=1e-12)
    params = split_policy(policy).actor_params
    surrogate = Surrogate(policy, params, batch, bounds=bounds)
    assert surrogate.evaluate()[0].item() == pytest.approx(batch.advantages.mean().item(), rel=1e-12)
    with th.no_grad():
        expected = finite_difference(lambda: surrogate.evaluate()[0].item(), params)
    assert relative_error(surrogate.objective_and_gradient()[1], expected) < 1e-7
    old = flatten(params)
    assign_(params, old + 0.1)
    assert surrogate.evaluate()[1] > 1e-3


def test_no_log_std_without_a_box() -> None:
    policy = mixed(DISCRETE)
    assert policy.log_std is None
    assert action_bounds(policy) is None
    distribution = policy.get_distribution(th.zeros(2, 3))
    family = family_of(distribution)
    assert len(family.statistics(distribution)) == 1
    assert family.std(family.statistics(distribution)) is None
