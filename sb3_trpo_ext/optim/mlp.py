"""The Jacobian of a multilayer perceptron by hand, on activations that are computed once per update."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_trpo_ext.optim.operators import Jacobian, Statistics

#: Activations that act on each number alone, so that their derivative is a tensor of their input's shape.
ELEMENTWISE_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.Tanh,
    nn.ReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Identity,
)


def _value_and_slope(activation: nn.Module, pre_activation: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
    """Value and derivative of an elementwise activation, both without a graph; no derivative for the identity."""
    if type(activation) is nn.Identity:
        return pre_activation, None
    if type(activation) is nn.Tanh:
        value = pre_activation.tanh()
        return value, th.addcmul(th.ones((), dtype=value.dtype, device=value.device), value, value, value=-1)
    with th.enable_grad():
        leaf = pre_activation.detach().requires_grad_()
        # An in-place activation (nn.ReLU(inplace=True)) would overwrite a leaf, which autograd refuses
        value = activation(leaf.clone())
        (slope,) = th.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


class _Layer(NamedTuple):
    """A linear layer at the old parameters, with the activation after it."""

    #: Shape ``(n_out, n_in)``.
    weight: th.Tensor
    #: Where weight and bias are among the parameters.
    weight_index: int
    bias_index: int
    #: Shape ``(n_samples, n_in)``.
    inputs: th.Tensor
    #: Derivative of the activation, shape ``(n_samples, n_out)``; ``None`` for the identity, and at the output.
    slope: th.Tensor | None


class MlpJacobian(Jacobian):
    """
    J of an MLP with an optional state-independent log std, by hand-written products on cached activations.

    The statistics are ``(output,)``, or ``(output, log_std)`` with the log std repeated for each sample. With
    ``h_0 = inputs``, ``z_l = W_l h_(l-1) + b_l`` and ``h_l = phi_l(z_l)``, the tangents along ``(V, c)`` obey
    ``z'_l = V_l h_(l-1) + c_l + W_l h'_(l-1)``, ``h'_l = phi_l'(z_l) z'_l`` with ``h'_0 = 0``, and the cotangents run the same
    recursion backwards (Pearlmutter 1994, "Fast exact multiplication by the Hessian", section 3; Schraudolph 2002, section 3).
    All that does not depend on the vector is computed once: a product is nothing but matrix multiplications.

    :param inputs: shape ``(n_samples, n_inputs)``, without a graph
    :param layers: the linear layers, which have a bias, from input to output
    :param activations: one per layer but the last, each of a type in :data:`ELEMENTWISE_ACTIVATIONS`
    :param params: the parameters in the order of the flat vectors: those of the layers, and ``log_std``
    :param log_std: shape ``(n_stds,)``, if there is one: not every output needs to be a mean
    :raises ValueError: if ``params`` are not exactly the parameters of the layers and ``log_std``, or an activation is not
        elementwise
    """

    def __init__(
        self,
        inputs: th.Tensor,
        layers: Sequence[nn.Linear],
        activations: Sequence[nn.Module],
        params: Sequence[th.Tensor],
        log_std: th.Tensor | None = None,
    ):
        for activation in activations:
            if type(activation) not in ELEMENTWISE_ACTIVATIONS:
                raise ValueError(f"{type(activation).__name__} is not among the activations whose slope is known")
        self.n_samples = inputs.shape[0]
        self._sizes = [param.numel() for param in params]
        used = [*(param for layer in layers for param in (layer.weight, layer.bias)), *([] if log_std is None else [log_std])]
        if sorted(map(id, used)) != sorted(map(id, params)):
            raise ValueError("`params` must be the weights and biases of the layers and `log_std`, each once")
        position = {id(param): index for index, param in enumerate(params)}
        self._log_std_index = None if log_std is None else position[id(log_std)]
        self._layers: list[_Layer] = []
        hidden = inputs.detach()
        with th.no_grad():
            for layer, activation in zip(layers, [*activations, nn.Identity()], strict=True):
                value, slope = _value_and_slope(activation, layer(hidden))
                # A copy: a product in the middle of a line search must still be the one at the old parameters
                weight = layer.weight.detach().clone()
                self._layers.append(_Layer(weight, position[id(layer.weight)], position[id(layer.bias)], hidden, slope))
                hidden = value
        #: The output of the network, shape ``(n_samples, n_outputs)``.
        self.output: th.Tensor = hidden

    def thinned(self, stride: int) -> "MlpJacobian":
        """The Jacobian on every k-th sample, without computing anything again."""
        if stride == 1:
            return self
        smaller = copy.copy(self)
        # Contiguous copies make the products faster
        smaller._layers = [
            layer._replace(
                inputs=layer.inputs[::stride].contiguous(),
                slope=None if layer.slope is None else layer.slope[::stride].contiguous(),
            )
            for layer in self._layers
        ]
        smaller.output = self.output[::stride].contiguous()
        smaller.n_samples = smaller.output.shape[0]
        return smaller

    @th.no_grad()
    def jvp(self, vector: th.Tensor) -> Statistics:
        """
        J v, from the first layer to the last.

        :param vector: shape ``(n_params,)``
        :return: the tangent of the output, of shape ``(n_samples, n_outputs)``, and that of the log std if there is one
        """
        parts = th.split(vector, self._sizes)
        tangent: th.Tensor | None = None
        for layer in self._layers:
            direction = parts[layer.weight_index].view_as(layer.weight)
            moved = th.addmm(parts[layer.bias_index], layer.inputs, direction.t())
            tangent = moved if tangent is None else moved.addmm_(tangent, layer.weight.t())
            if layer.slope is not None:
                tangent.mul_(layer.slope)
        assert tangent is not None
        return (tangent,) if self._log_std_index is None else (tangent, parts[self._log_std_index].expand(len(tangent), -1))

    @th.no_grad()
    def vjp(self, cotangents: Statistics) -> th.Tensor:
        """
        J^T u, from the last layer to the first.

        :param cotangents: those of the output, of shape ``(n_samples, n_outputs)``, and of the log std if there is one
        :return: shape ``(n_params,)``
        """
        result = cotangents[0].new_empty(sum(self._sizes))
        parts = th.split(result, self._sizes)
        if self._log_std_index is not None:
            th.sum(cotangents[1], dim=0, out=parts[self._log_std_index])
        for layer, cotangent in zip(self._layers, self.layer_cotangents(cotangents[0]), strict=True):
            th.mm(cotangent.t(), layer.inputs, out=parts[layer.weight_index].view_as(layer.weight))
            th.sum(cotangent, dim=0, out=parts[layer.bias_index])
        return result

    @th.no_grad()
    def layer_cotangents(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Backpropagate a cotangent of the output to the output of each linear layer.

        :param cotangent: shape ``(n_samples, n_outputs)``
        :return: one cotangent per layer, from the first to the last
        """
        cotangents = [cotangent]
        for before, layer in zip(self._layers[-2::-1], self._layers[:0:-1], strict=True):
            cotangent = cotangent @ layer.weight
            cotangents.append(cotangent if before.slope is None else cotangent.mul_(before.slope))
        return cotangents[::-1]

    @property
    def n_stds(self) -> int:
        """Length of the log std, the second statistic; 0 if there is none."""
        return 0 if self._log_std_index is None else self._sizes[self._log_std_index]

    def layer_inputs(self) -> list[th.Tensor]:
        """The inputs of each linear layer, with a column of ones for the bias; shape ``(n_samples, n_in + 1)``."""
        ones = self.output.new_ones(self.n_samples, 1)
        return [th.cat([layer.inputs, ones], dim=1) for layer in self._layers]

    def layer_shapes(self) -> list[tuple[int, int]]:
        """Shapes ``(n_out, n_in + 1)`` of the matrices that :meth:`to_layers` returns."""
        return [(layer.weight.shape[0], layer.weight.shape[1] + 1) for layer in self._layers]

    def to_layers(self, vector: th.Tensor) -> tuple[list[th.Tensor], th.Tensor | None]:
        """
        Cut a vector into one matrix per layer, with the bias as its last column, and the part of the log std.

        :param vector: shape ``(n_params,)``
        :return: matrices of shape ``(n_out, n_in + 1)``; log std, if there is one
        """
        parts = th.split(vector, self._sizes)
        matrices = [
            th.cat([parts[layer.weight_index].view_as(layer.weight), parts[layer.bias_index][:, None]], dim=1)
            for layer in self._layers
        ]
        return matrices, None if self._log_std_index is None else parts[self._log_std_index]

    def from_layers(self, matrices: Sequence[th.Tensor], log_std: th.Tensor | None) -> th.Tensor:
        """The inverse of :meth:`to_layers`."""
        result = matrices[0].new_empty(sum(self._sizes))
        parts = th.split(result, self._sizes)
        for layer, matrix in zip(self._layers, matrices, strict=True):
            parts[layer.weight_index].view_as(layer.weight).copy_(matrix[:, :-1])
            parts[layer.bias_index].copy_(matrix[:, -1])
        if self._log_std_index is not None:
            assert log_std is not None
            parts[self._log_std_index].copy_(log_std)
        return result
