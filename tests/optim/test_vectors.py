"""Flat vectors and lists of parameters."""

import math

import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.optim.vectors import assign_, flatten, unflatten

SHAPES = [(2, 3), (), (4,), (1, 2, 2), (0,)]


def make_params() -> list[nn.Parameter]:
    return [nn.Parameter(th.randn(shape)) for shape in SHAPES]


def test_flatten_keeps_order_and_row_major_layout() -> None:
    tensors = [th.tensor([[1.0, 2.0], [3.0, 4.0]]), th.tensor(5.0), th.tensor([[6.0, 7.0], [8.0, 9.0]]).t()]
    assert flatten(tensors).tolist() == [1, 2, 3, 4, 5, 6, 8, 7, 9]


def test_unflatten_is_the_inverse_of_flatten() -> None:
    params = make_params()
    parts = unflatten(flatten(params), params)
    assert [part.shape for part in parts] == [param.shape for param in params]
    assert all(th.equal(part, param) for part, param in zip(parts, params, strict=True))


def test_unflatten_gives_views() -> None:
    vector = th.zeros(6)
    unflatten(vector, [th.zeros(2), th.zeros(2, 2)])[1].fill_(1)
    assert vector.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("n_params", [1, 3])
def test_flatten_is_a_copy_without_a_graph(n_params: int) -> None:
    """One tensor alone too: the vector is what a rejected step goes back to."""
    params = [nn.Parameter(th.zeros(3)) for _ in range(n_params)]
    vector = flatten(params)
    with th.no_grad():
        params[0].fill_(1)
    assert not vector.requires_grad
    assert not vector.any()


def test_assign_restores_every_bit_and_keeps_the_storage() -> None:
    params = make_params()
    with th.no_grad():
        params[0][0] = th.tensor([-0.0, math.inf, 1e-45])
    before = [param.detach().clone() for param in params]
    addresses = [param.data_ptr() for param in params]
    vector = flatten(params)

    assign_(params, th.randn_like(vector))
    assert not th.equal(params[0], before[0])
    assign_(params, vector)

    for param, old in zip(params, before, strict=True):
        # As integers, because -0.0 == 0.0
        assert th.equal(param.detach().view(th.int32), old.view(th.int32))
    assert [param.data_ptr() for param in params] == addresses
    assert all(param.requires_grad and param.grad_fn is None for param in params)


@pytest.mark.parametrize("n_numbers", [4, 6])
def test_vector_of_the_wrong_length_is_an_error(n_numbers: int) -> None:
    with pytest.raises(RuntimeError):
        assign_([nn.Parameter(th.zeros(5))], th.zeros(n_numbers))
