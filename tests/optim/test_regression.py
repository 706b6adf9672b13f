"""The hand-written gradient of a least-squares fit."""

import pytest
import torch as th
from helpers import relative_error
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext.optim import MlpRegression
from sb3_trpo_ext.optim.vectors import flat_gradient_, flatten

pytestmark = pytest.mark.usefixtures("float64")


def network(sizes: list[int], activation: type[nn.Module]) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Layers of these widths with one output, and the activations between them."""
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, [*sizes[1:], 1], strict=True)]
    return layers, [activation() for _ in layers[1:]]


def fit(regression: MlpRegression, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """Leave the gradient of the mean squared error in the parameters, and return the outputs."""
    outputs = th.empty(len(inputs), 1)
    regression.forward(inputs, out=outputs)
    regression.backward(2 * (outputs - targets[:, None]) / len(targets))
    return outputs


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("sizes", [[3], [3, 4], [3, 5, 4]])
def test_outputs_and_gradient_are_those_of_autograd(sizes: list[int], activation: type[nn.Module]) -> None:
    layers, activations = network(sizes, activation)
    inputs, targets = th.randn(7, 3), th.randn(7)
    modules = [module for pair in zip(layers, [*activations, nn.Identity()], strict=True) for module in pair]
    expected_outputs = nn.Sequential(*modules)(inputs)
    params = [param for layer in layers for param in layer.parameters()]
    expected = th.autograd.grad(F.mse_loss(expected_outputs.flatten(), targets), params)

    regression = MlpRegression(layers, activations)
    # Twice: what is left of the first minibatch must not reach the second
    fit(regression, th.randn(5, 3), th.randn(5))
    fit(regression, th.randn(7, 3), th.randn(7))
    assert relative_error(fit(regression, inputs, targets), expected_outputs) < 1e-12
    for param, gradient in zip(params, expected, strict=True):
        assert param.grad is not None
        assert relative_error(param.grad, gradient) < 1e-12


def test_weights_may_be_replaced_between_two_steps() -> None:
    """As an optimizer does that writes ``param.data = ...``."""
    layers, activations = network([3, 4], nn.Tanh)
    regression = MlpRegression(layers, activations)
    inputs, targets = th.randn(7, 3), th.randn(7)
    fit(regression, inputs, targets)
    for layer in layers:
        layer.weight.data = th.randn_like(layer.weight)
    expected = nn.Sequential(layers[0], activations[0], layers[1])(inputs)
    assert relative_error(fit(regression, inputs, targets), expected) < 1e-12


def test_gradients_that_are_there_are_overwritten_in_place() -> None:
    layers, activations = network([3, 4], nn.Tanh)
    params = [param for layer in layers for param in layer.parameters()]
    flat = flat_gradient_(params)
    fit(MlpRegression(layers, activations), th.randn(7, 3), th.randn(7))
    assert flat.abs().min() > 0
    assert th.equal(flat, flatten([param.grad for param in params if param.grad is not None]))


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="ELU"):
        MlpRegression(*network([3, 4], nn.ELU))
    with pytest.raises(ValueError, match="single output"):
        MlpRegression([nn.Linear(3, 2)], [])
