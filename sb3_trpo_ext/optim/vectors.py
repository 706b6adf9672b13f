"""Conversions between lists of parameters and one flat vector."""

from collections.abc import Sequence

import torch as th


def flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """Concatenate at least one tensor into a vector of shape ``(n_params,)``, in order and without a graph."""
    return th.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: th.Tensor, like: Sequence[th.Tensor]) -> list[th.Tensor]:
    """Cut a vector of shape ``(n_params,)`` into views shaped like the given tensors: the inverse of :func:`flatten`."""
    chunks = th.split(vector, [tensor.numel() for tensor in like])
    return [chunk.view(tensor.shape) for chunk, tensor in zip(chunks, like, strict=True)]


@th.no_grad()
def assign_(params: Sequence[th.Tensor], vector: th.Tensor) -> None:
    """Overwrite parameters with the values of a vector of shape ``(n_params,)``, in place."""
    for param, value in zip(params, unflatten(vector, params), strict=True):
        param.copy_(value)


def flat_gradient_(params: Sequence[th.Tensor]) -> th.Tensor:
    """
    Give parameters gradients that are views into one flat tensor.

    :param params: the parameters, of one type and on one device; the gradients they have are dropped
    :return: vector of shape ``(n_params,)``, zero
    """
    flat = th.zeros_like(flatten(params))
    for param, gradient in zip(params, unflatten(flat, params), strict=True):
        param.grad = gradient
    return flat


def gradient_by_backward(output: th.Tensor, params: Sequence[th.Tensor]) -> th.Tensor:
    """
    The flat gradient of a scalar, by ``backward``: hooks of every kind run once, and may change it.

    (``th.autograd.grad`` accumulates nothing, so post-accumulate hooks would not run.)

    :param output: scalar with its graph
    :param params: the parameters, at least one; the gradients they have are dropped
    :return: vector of shape ``(n_params,)``, zero where the scalar does not depend on a parameter
    """
    for param in params:
        param.grad = None
    output.backward(inputs=list(params))
    gradient = flatten([th.zeros_like(param) if param.grad is None else param.grad for param in params])
    for param in params:
        param.grad = None
    return gradient
