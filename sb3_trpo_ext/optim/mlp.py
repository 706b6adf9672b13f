"""The Jacobian of a multilayer perceptron by hand, on activations that are computed once per update."""

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
    if isinstance(activation, nn.Identity):
        return pre_activation, None
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
        cotangent = cotangents[0]
        result = cotangent.new_empty(sum(self._sizes))
        parts = th.split(result, self._sizes)
        if self._log_std_index is not None:
            th.sum(cotangents[1], dim=0, out=parts[self._log_std_index])
        for index in reversed(range(len(self._weights))):
            weight = self._weights[index]
            th.mm(cotangent.t(), self._hidden[index], out=parts[self._weight_index[index]].view_as(weight))
            bias_index = self._bias_index[index]
            if bias_index is not None:
                th.sum(cotangent, dim=0, out=parts[bias_index])
            if index > 0:
                slope = self._slopes[index - 1]
                cotangent = cotangent @ weight
                cotangent = cotangent if slope is None else cotangent.mul_(slope)
        return result
