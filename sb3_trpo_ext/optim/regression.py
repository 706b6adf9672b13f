"""Regression by a multilayer perceptron with one output, with a hand-written gradient."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn

#: Activations whose derivative is known from their value.
REGRESSION_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.Identity)

#: Maps outputs of shape ``(n_samples,)`` to a scalar and its gradient in them.
LossAndSlope = Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]]


class MlpRegression:
    """
    A loss of an MLP's output and its gradient in the parameters, without a graph.

    On minibatches of a hundred samples, building and walking a graph takes a good part of the time of the matrix products
    themselves. Gradients go straight into ``param.grad``. Its memory and that of the activations are kept from one minibatch
    to the next, and stay in the cache.

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
        #: Outputs and cotangents of each layer, by the number of samples.
        self._buffers: dict[int, tuple[list[th.Tensor], list[th.Tensor]]] = {}
        for layer in layers:
            layer.weight.grad, layer.bias.grad = th.zeros_like(layer.weight), th.zeros_like(layer.bias)

    @th.no_grad()
    def backward(self, inputs: th.Tensor, loss_and_slope: LossAndSlope) -> th.Tensor:
        """
        Overwrite the gradients of all parameters with those of a loss.

        :param inputs: shape ``(n_samples, n_inputs)``
        :param loss_and_slope: the loss of the outputs
        :return: the loss, a scalar
        """
        outputs, cotangents = self._buffers_for(inputs)
        hidden = [inputs, *outputs]
        for index, (layer, kind) in enumerate(zip(self._layers, [*self._kinds, nn.Identity], strict=True)):
            value = th.addmm(layer.bias, hidden[index], layer.weight.t(), out=outputs[index])
            if kind is nn.Tanh:
                value.tanh_()
            elif kind is nn.ReLU:
                value.relu_()
        loss, slope = loss_and_slope(outputs[-1].squeeze(1))
        cotangent = slope[:, None]
        for index in reversed(range(len(self._layers))):
            layer = self._layers[index]
            assert layer.weight.grad is not None and layer.bias.grad is not None
            th.mm(cotangent.t(), hidden[index], out=layer.weight.grad)
            th.sum(cotangent, dim=0, out=layer.bias.grad)
            if index == 0:
                break
            cotangent = th.mm(cotangent, layer.weight, out=cotangents[index - 1])
            if self._kinds[index - 1] is nn.Tanh:
                th.ops.aten.tanh_backward.grad_input(cotangent, hidden[index], grad_input=cotangent)
            elif self._kinds[index - 1] is nn.ReLU:
                cotangent.mul_(hidden[index] > 0)
        return loss

    def _buffers_for(self, inputs: th.Tensor) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """
        Memory for one minibatch.

        :param inputs: shape ``(n_samples, n_inputs)``
        :return: tensors for the output of each layer, and for the cotangent of the output of each layer but the last
        """
        n_samples = len(inputs)
        if n_samples not in self._buffers:
            outputs = [inputs.new_empty(n_samples, layer.out_features) for layer in self._layers]
            self._buffers[n_samples] = outputs, [th.empty_like(output) for output in outputs[:-1]]
        return self._buffers[n_samples]
