"""Least squares for a multilayer perceptron with one output, with a hand-written gradient."""

from collections.abc import Sequence

import torch as th
from torch import nn

#: Activations whose derivative is known from their value.
REGRESSION_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.Identity)


class MlpRegression:
    """
    Mean squared error of an MLP and its gradient, without a graph.

    On minibatches of a hundred samples, building and walking a graph takes a good part of the time of the matrix products
    themselves. Gradients go straight into ``param.grad``, whose memory is kept from one minibatch to the next.

    :param layers: the linear layers with bias, from input to the one output
    :param activations: one per layer but the last, each of a type in :data:`REGRESSION_ACTIVATIONS`
    :raises ValueError: for an activation of another type, a layer without bias or more than one output
    """

    def __init__(self, layers: Sequence[nn.Linear], activations: Sequence[nn.Module]):
        for activation in activations:
            if type(activation) not in REGRESSION_ACTIVATIONS:
                raise ValueError(f"{type(activation).__name__} is not among the activations whose derivative is known")
        if any(layer.bias is None for layer in layers) or layers[-1].out_features != 1:
            raise ValueError("all layers must have a bias, and the last one a single output")
        self._layers = list(layers)
        self._kinds = [type(activation) for activation in activations]
        for layer in layers:
            layer.weight.grad, layer.bias.grad = th.zeros_like(layer.weight), th.zeros_like(layer.bias)

    @th.no_grad()
    def backward(self, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Overwrite the gradients of all parameters with those of ``mean((output - target)^2)``.

        :param inputs: shape ``(n_samples, n_inputs)``
        :param targets: shape ``(n_samples,)``
        :return: the loss, a scalar
        """
        hidden = [inputs]
        for layer, kind in zip(self._layers, [*self._kinds, nn.Identity], strict=True):
            value = th.addmm(layer.bias, hidden[-1], layer.weight.t())
            if kind is nn.Tanh:
                value.tanh_()
            elif kind is nn.ReLU:
                value.relu_()
            hidden.append(value)
        error = hidden.pop() - targets[:, None]
        cotangent = error * (2.0 / len(targets))
        for index in reversed(range(len(self._layers))):
            layer = self._layers[index]
            assert layer.weight.grad is not None and layer.bias.grad is not None
            th.mm(cotangent.t(), hidden[index], out=layer.weight.grad)
            th.sum(cotangent, dim=0, out=layer.bias.grad)
            if index == 0:
                break
            cotangent = cotangent @ layer.weight
            if self._kinds[index - 1] is nn.Tanh:
                th.ops.aten.tanh_backward.grad_input(cotangent, hidden[index], grad_input=cotangent)
            elif self._kinds[index - 1] is nn.ReLU:
                cotangent.mul_(hidden[index] > 0)
        return error.square().mean()
