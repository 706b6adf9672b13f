"""Regression by a multilayer perceptron with one output, with a hand-written gradient."""

from collections.abc import Sequence

import torch as th
from torch import nn

#: Activations whose derivative is known from their value.
REGRESSION_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.Identity)


class MlpRegression:
    """
    An MLP's output, and the gradient in its parameters of any loss of it, without a graph.

    On minibatches of a hundred samples, building and walking a graph takes a good part of the time of the matrix products
    themselves, and so does every other call into PyTorch: there are as few of them as possible. Gradients are written into
    ``param.grad``, which is created if missing. The memory of the activations is kept from one minibatch to the next,
    and stays in the cache.

    :param layers: the linear layers with bias, from input to the one output
    :param activations: one per layer but the last, each of a type in :data:`REGRESSION_ACTIVATIONS`
    :raises ValueError: for an activation of another type, or more than one output
    """

    def __init__(self, layers: Sequence[nn.Linear], activations: Sequence[nn.Module]):
        self._kinds = [type(activation) for activation in activations]
        if unknown := set(self._kinds).difference(REGRESSION_ACTIVATIONS):
            raise ValueError(f"the derivatives of these activations are not known: {unknown}")
        if layers[-1].out_features != 1:
            raise ValueError(f"the last layer must have a single output, got {layers[-1].out_features}")
        for param in (param for layer in layers for param in layer.parameters()):
            if param.grad is None:
                param.grad = th.zeros_like(param)
        # Looked up once, since attributes of a module are slow. The weights themselves and no views of them: an optimizer may
        # replace `param.data`, and a view would keep the old weight
        self._params = [(layer.weight, layer.bias) for layer in layers]
        self._gradients = [(layer.weight.grad, layer.bias.grad) for layer in layers]
        self._minus_one = layers[-1].bias.new_full((), -1.0)
        #: Outputs and cotangents of each layer but the last, by the number of samples.
        self._buffers: dict[int, tuple[list[th.Tensor], list[th.Tensor]]] = {}
        #: Inputs of each layer in the last forward pass.
        self._hidden: list[th.Tensor] = []

    @th.no_grad()
    def forward(self, inputs: th.Tensor, out: th.Tensor) -> None:
        """
        Compute the outputs, and keep what :meth:`backward` needs.

        :param inputs: shape ``(n_samples, n_inputs)``
        :param out: where the outputs go, shape ``(n_samples, 1)``
        """
        outputs, _ = self._buffers_for(inputs)
        self._hidden = [inputs, *outputs]
        for (weight, bias), kind, hidden, output in zip(self._params, self._kinds, self._hidden, outputs, strict=False):
            # tanh(z) = 2 sigmoid(2 z) - 1, where the first factor costs nothing: PyTorch's tanh takes 83 us for 128 x 256
            # numbers on one core, and this 20. It rounds at 1e-7 of 1, as the sums in z do
            scale = 2 if kind is nn.Tanh else 1
            th.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=output)
            if kind is nn.Tanh:
                th.add(self._minus_one, output.sigmoid_(), alpha=2, out=output)
            elif kind is nn.ReLU:
                output.relu_()
        weight, bias = self._params[-1]
        th.addmm(bias, self._hidden[-1], weight.t(), out=out)

    @th.no_grad()
    def backward(self, slope: th.Tensor) -> None:
        """
        Overwrite the gradients of all parameters with those of a loss of the last outputs.

        :param slope: derivative of the loss in the outputs, shape ``(n_samples, 1)``
        """
        _, cotangents = self._buffers_for(self._hidden[0])
        cotangent = slope
        for index in range(len(self._params) - 1, -1, -1):
            hidden = self._hidden[index]
            weight_gradient, bias_gradient = self._gradients[index]
            th.mm(cotangent.t(), hidden, out=weight_gradient)
            th.sum(cotangent, dim=0, out=bias_gradient)
            if index == 0:
                break
            cotangent = th.mm(cotangent, self._params[index][0], out=cotangents[index - 1])
            kind = self._kinds[index - 1]
            if kind is nn.Tanh:
                th.ops.aten.tanh_backward.grad_input(cotangent, hidden, grad_input=cotangent)
            elif kind is nn.ReLU:
                cotangent.mul_(hidden > 0)

    def _buffers_for(self, inputs: th.Tensor) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """
        Memory for one minibatch.

        :param inputs: shape ``(n_samples, n_inputs)``
        :return: tensors for the output of each layer but the last, and for the cotangents of these outputs
        """
        n_samples = len(inputs)
        if n_samples not in self._buffers:
            outputs = [inputs.new_empty(n_samples, weight.shape[0]) for weight, _ in self._params[:-1]]
            self._buffers[n_samples] = outputs, [th.empty_like(output) for output in outputs]
        return self._buffers[n_samples]
