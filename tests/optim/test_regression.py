"""The hand-written gradient of a least-squares fit."""

import pytest
import torch as th
from helpers import relative_error
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.optim import MlpRegression
from sb3_trpo_ext.optim.regression import LossAndSlope

pytestmark = pytest.mark.usefixtures("float64")


def network(sizes: list[int], activation: type[nn.Module]) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Layers of these widths with one output, and the activations between them."""
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, [*sizes[1:], 1], strict=True)]
    return layers, [activation() for _ in layers[1:]]


def squared_error(targets: th.Tensor) -> LossAndSlope:
    """The mean squared error and its derivative."""
    return lambda outputs: ((outputs - targets).square().mean(), 2 * (outputs - targets) / len(targets))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("sizes", [[3], [3, 4], [3, 5, 4]])
def test_loss_and_gradient_are_those_of_autograd(sizes: list[int], activation: type[nn.Module]) -> None:
    layers, activations = network(sizes, activation)
    inputs, targets = th.randn(7, 3), th.randn(7)
    modules = [module for pair in zip(layers, [*activations, nn.Identity()], strict=True) for module in pair]
    expected_loss = F.mse_loss(nn.Sequential(*modules)(inputs).flatten(), targets)
    params = [param for layer in layers for param in layer.parameters()]
    expected = th.autograd.grad(expected_loss, params)

    regression = MlpRegression(layers, activations)
    # Twice: what is left of the first minibatch must not reach the second
    regression.backward(th.randn(5, 3), squared_error(th.randn(5)))
    regression.backward(th.randn(7, 3), squared_error(th.randn(7)))
    loss = regression.backward(inputs, squared_error(targets))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    for param, gradient in zip(params, expected, strict=True):
        assert param.grad is not None
        assert relative_error(param.grad, gradient) < 1e-12


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="ELU"):
        MlpRegression(*network([3, 4], nn.ELU))
    with pytest.raises(ValueError, match="bias"):
        MlpRegression([nn.Linear(3, 1, bias=False)], [])
    with pytest.raises(ValueError, match="single output"):
        MlpRegression([nn.Linear(3, 2)], [])
