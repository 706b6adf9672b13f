"""The Jacobian of a multilayer perceptron by hand, on activations that are computed once per update."""

import copy
from collections.abc import Sequence

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
    """
    Value and derivative of an elementwise activation, both without a graph.

    :param activation: one of :data:`ELEMENTWISE_ACTIVATIONS`
    :param pre_activation: its input, of any shape
    :return: value and derivative, of the input's shape; no derivative for the identity
    """
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


class MlpJacobian(Jacobian):
    """
    J of an MLP with an optional state-independent log std, by hand-written products on cached activations.

    The statistics are ``(output,)``, or ``(output, log_std)`` with the log std repeated for each sample. With
    ``h_0 = inputs``, ``z_l = W_l h_(l-1) + b_l`` and ``h_l = phi_l(z_l)``, the tangents along ``(V, c)`` obey
    ``z'_l = V_l h_(l-1) + c_l + W_l h'_(l-1)``, ``h'_l = phi_l'(z_l) z'_l`` with ``h'_0 = 0``, and the cotangents run the same
    recursion backwards (Pearlmutter 1994, "Fast exact multiplication by the Hessian", section 3; Schraudolph 2002, section 3).
    All that does not depend on the vector is computed once: a product is nothing but matrix multiplications.

    :param inputs: shape ``(n_samples, n_inputs)``, without a graph
    :param layers: the linear layers, from input to output
    :param activations: one per layer but the last, each of a type in :data:`ELEMENTWISE_ACTIVATIONS`
    :param params: the parameters in the order of the flat vectors: those of the layers, and ``log_std``
    :param log_std: shape ``(n_outputs,)``, if there is one
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
        if len(activations) != len(layers) - 1:
            raise ValueError(f"{len(layers)} layers need {len(layers) - 1} activations between them, got {len(activations)}")
        for activation in activations:
            if type(activation) not in ELEMENTWISE_ACTIVATIONS:
                raise ValueError(f"{type(activation).__name__} is not among the activations whose slope is known")
        self.n_samples = inputs.shape[0]
        self._sizes = [param.numel() for param in params]
        position = {id(param): index for index, param in enumerate(params)}
        used: list[th.Tensor] = [param for layer in layers for param in layer.parameters()]
        used += [] if log_std is None else [log_std]
        if len(used) != len(params) or any(id(tensor) not in position for tensor in used):
            raise ValueError("`params` must be the parameters of the layers and `log_std`, each once")
        self._weight_index = [position[id(layer.weight)] for layer in layers]
        self._bias_index: list[int | None] = [None if layer.bias is None else position[id(layer.bias)] for layer in layers]
        self._log_std_index = None if log_std is None else position[id(log_std)]
        # Copies: a product in the middle of a line search must still be the one at the old parameters
        self._weights = [layer.weight.detach().clone() for layer in layers]
        self._hidden = [inputs.detach()]
        self._slopes: list[th.Tensor | None] = []
        with th.no_grad():
            for layer, activation in zip(layers, activations, strict=False):
                value, slope = _value_and_slope(activation, layer(self._hidden[-1]))
                self._hidden.append(value)
                self._slopes.append(slope)
            #: What the network puts out, shape ``(n_samples, n_outputs)``.
            self.output: th.Tensor = layers[-1](self._hidden[-1])

    def thinned(self, stride: int) -> "MlpJacobian":
        """The Jacobian on every so many-th sample, without computing anything again."""
        if stride == 1:
            return self
        smaller = copy.copy(self)
        # Copies are contiguous, which the products are worth
        smaller._hidden = [hidden[::stride].contiguous() for hidden in self._hidden]
        smaller._slopes = [None if slope is None else slope[::stride].contiguous() for slope in self._slopes]
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
        for index, (weight, hidden) in enumerate(zip(self._weights, self._hidden, strict=True)):
            direction = parts[self._weight_index[index]].view_as(weight)
            bias_index = self._bias_index[index]
            if bias_index is None:
                moved = hidden @ direction.t()
            else:
                moved = th.addmm(parts[bias_index], hidden, direction.t())
            tangent = moved if tangent is None else moved.addmm_(tangent, weight.t())
            if index < len(self._slopes):
                slope = self._slopes[index]
                tangent = tangent if slope is None else tangent.mul_(slope)
        assert tangent is not None
        if self._log_std_index is None:
            return (tangent,)
        return tangent, parts[self._log_std_index].expand_as(tangent)

    @th.no_grad()
    def vjp(self, cotangents: Statistics) -> th.Tensor:
        """
        J^T u, from the last layer to the first.

        :param cotangents: those of the output and of the log std, each of shape ``(n_samples, n_outputs)``
        :return: shape ``(n_params,)``
        """
        result = cotangents[0].new_empty(sum(self._sizes))
        parts = th.split(result, self._sizes)
        if self._log_std_index is not None:
            th.sum(cotangents[1], dim=0, out=parts[self._log_std_index])
        for index, cotangent in enumerate(self.layer_cotangents(cotangents[0])):
            weight_part = parts[self._weight_index[index]].view_as(self._weights[index])
            th.mm(cotangent.t(), self._hidden[index], out=weight_part)
            bias_index = self._bias_index[index]
            if bias_index is not None:
                th.sum(cotangent, dim=0, out=parts[bias_index])
        return result

    @th.no_grad()
    def layer_cotangents(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Backpropagate a cotangent of the output to the output of each linear layer.

        :param cotangent: shape ``(n_samples, n_outputs)``
        :return: one cotangent per layer, from the first to the last
        """
        cotangents = [cotangent]
        for weight, slope in zip(reversed(self._weights[1:]), reversed(self._slopes), strict=True):
            cotangent = cotangent @ weight
            cotangents.append(cotangent if slope is None else cotangent.mul_(slope))
        return cotangents[::-1]

    @property
    def device(self) -> th.device:
        """Where it is."""
        return self._hidden[0].device

    @property
    def has_log_std(self) -> bool:
        """Whether the log std is the second statistic."""
        return self._log_std_index is not None

    def layer_inputs(self) -> list[th.Tensor]:
        """
        The inputs of each linear layer, with a column of ones where it has a bias.

        :return: tensors of shape ``(n_samples, n_in)`` or ``(n_samples, n_in + 1)``
        """
        return [
            hidden if bias_index is None else th.cat([hidden, hidden.new_ones(self.n_samples, 1)], dim=1)
            for hidden, bias_index in zip(self._hidden, self._bias_index, strict=True)
        ]

    def layer_shapes(self) -> list[tuple[int, int]]:
        """
        Shapes of the matrices that :meth:`to_layers` returns.

        :return: pairs ``(n_out, n_in)``, with the bias counted as an input
        """
        return [
            (weight.shape[0], weight.shape[1] + (bias_index is not None))
            for weight, bias_index in zip(self._weights, self._bias_index, strict=True)
        ]

    def to_layers(self, vector: th.Tensor) -> tuple[list[th.Tensor], th.Tensor | None]:
        """
        Cut a vector into one matrix per layer, with the bias as its last column, and the part of the log std.

        :param vector: shape ``(n_params,)``
        :return: matrices of shape ``(n_out, n_in)`` or ``(n_out, n_in + 1)``; log std, if there is one
        """
        parts = th.split(vector, self._sizes)
        matrices = []
        for weight, weight_index, bias_index in zip(self._weights, self._weight_index, self._bias_index, strict=True):
            matrix = parts[weight_index].view_as(weight)
            matrices.append(matrix if bias_index is None else th.cat([matrix, parts[bias_index][:, None]], dim=1))
        return matrices, None if self._log_std_index is None else parts[self._log_std_index]

    def from_layers(self, matrices: Sequence[th.Tensor], log_std: th.Tensor | None) -> th.Tensor:
        """
        The inverse of :meth:`to_layers`.

        :param matrices: one per layer
        :param log_std: the part of the log std, if there is one
        :return: shape ``(n_params,)``
        """
        result = matrices[0].new_empty(sum(self._sizes))
        parts = th.split(result, self._sizes)
        for matrix, weight, weight_index, bias_index in zip(
            matrices, self._weights, self._weight_index, self._bias_index, strict=True
        ):
            parts[weight_index].view_as(weight).copy_(matrix[:, : weight.shape[1]])
            if bias_index is not None:
                parts[bias_index].copy_(matrix[:, -1])
        if self._log_std_index is not None:
            assert log_std is not None
            parts[self._log_std_index].copy_(log_std)
        return result
