"""The hand-written Jacobian of an MLP against PyTorch's own forward and reverse mode."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch as th
from helpers import relative_error
from torch import nn

from sb3_trpo_ext.optim import MlpJacobian
from sb3_trpo_ext.optim.mlp import ELEMENTWISE_ACTIVATIONS
from sb3_trpo_ext.optim.vectors import flatten, unflatten

pytestmark = pytest.mark.usefixtures("float64")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in ELEMENTWISE_ACTIVATIONS},
    "LeakyReLU with a slope": lambda: nn.LeakyReLU(0.3),
    "ELU with a scale": lambda: nn.ELU(0.7),
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ELU in place": lambda: nn.ELU(inplace=True),
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "LeakyReLU in place": lambda: nn.LeakyReLU(inplace=True),
}
HIDDEN = ((), (5,), (5, 4), (3, 5, 4))
N_SAMPLES, N_INPUTS, N_OUTPUTS = 6, 3, 2


def make_layers(hidden: Sequence[int]) -> list[nn.Linear]:
    return [nn.Linear(i, o) for i, o in itertools.pairwise([N_INPUTS, *hidden, N_OUTPUTS])]


def parameters_of(layers: Sequence[nn.Linear]) -> list[nn.Parameter]:
    return [param for layer in layers for param in layer.parameters()]


def forward(
    inputs: th.Tensor, layers: Sequence[nn.Linear], activations: Sequence[nn.Module], values: dict[int, th.Tensor]
) -> th.Tensor:
    """The network as a function of its parameters, given by the id of each."""
    hidden = inputs
    for index, layer in enumerate(layers):
        hidden = nn.functional.linear(hidden, values[id(layer.weight)], values[id(layer.bias)])
        if index < len(activations):
            # The clone is for activations in place
            hidden = activations[index](hidden.clone())
    return hidden


@pytest.mark.parametrize("has_log_std", [True, False])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_are_those_of_automatic_differentiation(activation: str, hidden: Sequence[int], has_log_std: bool) -> None:
    inputs, layers = th.randn(N_SAMPLES, N_INPUTS), make_layers(hidden)
    activations = [ACTIVATIONS[activation]() for _ in hidden]
    log_std = nn.Parameter(th.randn(N_OUTPUTS)) if has_log_std else None
    params = parameters_of(layers) + ([] if log_std is None else [log_std])
    # Any order will do
    params = params[1::2] + params[::2]
    before = inputs.clone()

    def statistics(vector: th.Tensor) -> tuple[th.Tensor, ...]:
        values = dict(zip(map(id, params), unflatten(vector, params), strict=True))
        output = forward(inputs, layers, activations, values)
        return (output,) if log_std is None else (output, values[id(log_std)].expand_as(output))

    point = flatten(params)
    vector = th.randn_like(point)
    _, expected_tangents, *_ = th.func.jvp(statistics, (point,), (vector,))
    cotangents = tuple(th.randn_like(tangent) for tangent in expected_tangents)
    _, pullback, *_ = th.func.vjp(statistics, point)

    jacobian = MlpJacobian(inputs, layers, activations, params, log_std)

    # Twice: a product must not write into what the next one uses
    for _ in range(2):
        tangents = jacobian.jvp(vector)
        assert [tangent.shape for tangent in tangents] == [tangent.shape for tangent in expected_tangents]
        for tangent, expected_tangent in zip(tangents, expected_tangents, strict=True):
            assert relative_error(tangent, expected_tangent) < 1e-12
        saved = [cotangent.clone() for cotangent in cotangents]
        assert relative_error(jacobian.vjp(cotangents), pullback(cotangents)[0]) < 1e-12
        assert all(th.equal(cotangent, copy) for cotangent, copy in zip(cotangents, saved, strict=True))
    assert th.equal(inputs, before)


def test_products_stay_at_the_old_parameters_when_the_parameters_move() -> None:
    layers, log_std = make_layers((5, 4)), nn.Parameter(th.randn(N_OUTPUTS))
    params = [*parameters_of(layers), log_std]
    jacobian = MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [nn.Tanh(), nn.Tanh()], params, log_std)
    vector, cotangents = th.randn(flatten(params).shape), (th.randn(N_SAMPLES, N_OUTPUTS), th.randn(N_SAMPLES, N_OUTPUTS))
    before = (*jacobian.jvp(vector), jacobian.vjp(cotangents))
    with th.no_grad():
        for param in params:
            param.add_(1.0)
    after = (*jacobian.jvp(vector), jacobian.vjp(cotangents))
    assert all(th.equal(x, y) for x, y in zip(before, after, strict=True))


def test_products_of_a_graph_free_input_have_no_graph() -> None:
    layers = make_layers((5,))
    jacobian = MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [nn.Tanh()], parameters_of(layers))
    assert not jacobian.jvp(flatten(parameters_of(layers)))[0].requires_grad
    assert not jacobian.vjp((th.randn(N_SAMPLES, N_OUTPUTS),)).requires_grad


@pytest.mark.parametrize("activation", [nn.Softmax(dim=1), nn.LayerNorm(5), nn.PReLU(), nn.Dropout()])
def test_activation_that_is_not_elementwise_or_not_known_is_refused(activation: nn.Module) -> None:
    layers = make_layers((5,))
    with pytest.raises(ValueError, match=type(activation).__name__):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [activation], parameters_of(layers))


def test_subclass_of_an_activation_is_refused() -> None:
    class Shifted(nn.Tanh):
        pass

    layers = make_layers((5,))
    with pytest.raises(ValueError, match="Shifted"):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [Shifted()], parameters_of(layers))


@pytest.mark.parametrize("n_activations", [0, 2])
def test_wrong_number_of_activations_is_refused(n_activations: int) -> None:
    layers = make_layers((5,))
    with pytest.raises(ValueError, match="zip"):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [nn.Tanh()] * n_activations, parameters_of(layers))


@pytest.mark.parametrize(
    ("position", "replacement", "has_log_std"),
    [
        (slice(3, 4), [], False),
        (slice(4, 4), ["log_std"], False),
        (slice(0, 0), [], True),
        (slice(3, 4), ["log_std"], False),
        (slice(3, 4), [0], False),
    ],
    ids=["one_missing", "one_too_many", "log_std_missing", "a_stranger", "one_twice"],
)
def test_parameters_that_are_not_those_of_the_network_are_refused(
    position: slice, replacement: list[int | str], has_log_std: bool
) -> None:
    layers, log_std = make_layers((5,)), nn.Parameter(th.zeros(N_OUTPUTS))
    params = parameters_of(layers)
    params[position] = [params[entry] if isinstance(entry, int) else log_std for entry in replacement]
    with pytest.raises(ValueError, match="each once"):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), layers, [nn.Tanh()], params, log_std if has_log_std else None)


def test_layer_without_a_bias_is_refused() -> None:
    layer = nn.Linear(N_INPUTS, N_OUTPUTS, bias=False)
    with pytest.raises(ValueError, match="weights and biases"):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), [layer], [], parameters_of([layer]))


def test_layer_that_is_used_twice_is_refused() -> None:
    square = nn.Linear(N_INPUTS, N_INPUTS)
    with pytest.raises(ValueError, match="each once"):
        MlpJacobian(th.randn(N_SAMPLES, N_INPUTS), [square, square], [nn.Tanh()], parameters_of([square]))
