"""KL, Fisher matrix, entropy and std of each family, by second routes."""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import BetaDistribution, as_matrix, relative_error
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.nn import functional as F

from sb3_trpo_ext import Family, register_family
from sb3_trpo_ext.optim import HessianFisher
from sb3_trpo_ext.update import distributions
from sb3_trpo_ext.update.distributions import BernoulliFamily, CategoricalFamily, GaussianFamily, TorchFamily, family_of
from sb3_trpo_ext.update.mixed import MixedActions, MixedDistribution
from sb3_trpo_ext.update.settings import no_argument_checks

Statistics = tuple[th.Tensor, ...]
N_SAMPLES = 5


class Kind(NamedTuple):
    """A family with shapes of its statistics, and the same distribution by PyTorch: independent parts."""

    family: Family
    shapes: tuple[int, ...]
    in_torch: Callable[[Statistics], list[th.distributions.Distribution]]

    def random(self, n_samples: int = N_SAMPLES, scale: float = 1.0) -> Statistics:
        return tuple(scale * th.randn(n_samples, shape) for shape in self.shapes)


def normal(statistics: Statistics) -> list[th.distributions.Distribution]:
    return [Normal(statistics[0], statistics[1].exp(), validate_args=False)]


#: Of two Gaussians, a categorical of three and two Bernoullis.
MIXED = MixedActions(spaces.Tuple([spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(3), spaces.MultiBinary(2)]))


def mixed(statistics: Statistics) -> list[th.distributions.Distribution]:
    means, logits, binary_logits = statistics[0].split([2, 3, 2], dim=-1)
    return [*normal((means, statistics[1])), Categorical(logits=logits), Bernoulli(logits=binary_logits)]


KINDS = {
    "gaussian": Kind(GaussianFamily(), (3, 3), normal),
    "squashed": Kind(GaussianFamily(squashed=True), (3, 3), normal),
    "categorical": Kind(CategoricalFamily([4]), (4,), lambda s: [Categorical(logits=s[0])]),
    "multi_categorical": Kind(
        CategoricalFamily([2, 3]), (5,), lambda s: [Categorical(logits=part) for part in th.split(s[0], [2, 3], dim=-1)]
    ),
    "bernoulli": Kind(BernoulliFamily(), (3,), lambda s: [Bernoulli(logits=s[0])]),
    "mixed": Kind(family_of(MixedDistribution(MIXED)), (7, 2), mixed),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
double = pytest.mark.usefixtures("float64")


def summed(parts: list[th.Tensor]) -> th.Tensor:
    """One number per state, whether PyTorch gives one per action dimension or not."""
    return th.stack([part.sum(dim=1) if part.dim() > 1 else part for part in parts]).sum(dim=0)


@double
@each_kind
def test_kl_is_that_of_pytorch_old_to_new_and_summed_over_dimensions(kind: Kind) -> None:
    old, new = kind.random(), kind.random()
    forward = summed([kl_divergence(p, q) for p, q in zip(kind.in_torch(old), kind.in_torch(new), strict=True)])
    backward = summed([kl_divergence(q, p) for p, q in zip(kind.in_torch(old), kind.in_torch(new), strict=True)])
    kl = kind.family.kl(old, new)
    assert kl.shape == (N_SAMPLES,)
    assert relative_error(kl, forward) < 1e-12
    # The wrong direction would be seen
    assert ((kl - backward).abs() > 1e-3).all()


@double
@each_kind
def test_kl_is_the_mean_log_ratio_of_actions_of_the_old_distribution(kind: Kind) -> None:
    n_actions = 200_000
    old, new = kind.random(1, 0.5), kind.random(1, 0.5)
    log_ratio = th.zeros(n_actions)
    for p, q in zip(kind.in_torch(old), kind.in_torch(new), strict=True):
        actions = p.sample((n_actions,))
        log_ratio += (p.log_prob(actions) - q.log_prob(actions)).reshape(n_actions, -1).sum(dim=1)
    # Five standard errors of the mean: one seed in a million exceeds them
    assert abs(log_ratio.mean() - kind.family.kl(old, new)) < 5 * log_ratio.std() / math.sqrt(n_actions)


@double
@each_kind
def test_kl_to_itself_is_zero_and_else_positive(kind: Kind) -> None:
    old = kind.random(1000, 3.0)
    assert th.equal(kind.family.kl(old, old), th.zeros(1000))
    # Terms of order one cancel, so what rounding leaves is absolute
    assert (kind.family.kl(old, tuple(s + 1e-3 * th.randn_like(s) for s in old)) > -1e-15).all()
    assert (kind.family.kl(old, tuple(s + th.randn_like(s) for s in old)) > 0).all()


@double
@each_kind
def test_fisher_is_the_hessian_of_the_kl(kind: Kind) -> None:
    statistics = kind.random()
    for sample in range(N_SAMPLES):
        point = th.cat([s[sample] for s in statistics])
        row = tuple(s[sample : sample + 1] for s in statistics)

        def kl(new: th.Tensor, old: Statistics = row) -> th.Tensor:
            return kind.family.kl(old, tuple(part[None] for part in new.split([*kind.shapes]))).sum()

        tangents = [tuple(part[None] for part in basis.split([*kind.shapes])) for basis in th.eye(len(point))]
        explicit = th.stack([th.cat(kind.family.fisher(row, tangent), dim=1)[0] for tangent in tangents], dim=1)
        assert relative_error(explicit, th.func.hessian(kl)(point)) < 1e-12
        # At new = old the KL has no gradient, which is why its Hessian is all of it. Rounding is relative to terms of order 1
        assert th.func.grad(kl)(point).abs().max() < 1e-14


@double
@each_kind
def test_fisher_keeps_states_apart(kind: Kind) -> None:
    statistics, tangents = kind.random(), kind.random()
    whole = kind.family.fisher(statistics, tangents)
    for sample in range(N_SAMPLES):
        alone = kind.family.fisher(
            tuple(s[sample : sample + 1] for s in statistics), tuple(t[sample : sample + 1] for t in tangents)
        )
        for part, expected in zip(alone, whole, strict=True):
            assert relative_error(part[0], expected[sample]) < 1e-14


@each_kind
def test_sampled_score_has_the_fisher_matrix_as_covariance(kind: Kind) -> None:
    n_actions, shape = 200_000, kind.shapes[0]
    statistics = tuple(s.expand(n_actions, -1) for s in kind.random(1, 0.5))
    state = th.get_rng_state()
    score = kind.family.sample_score(statistics, th.Generator().manual_seed(3))
    assert score is not None
    assert score.shape == (n_actions, shape)
    # Reproducible from the generator, and no global random number is used
    again = kind.family.sample_score(statistics, th.Generator().manual_seed(3))
    assert again is not None
    assert th.equal(score, again)
    assert th.equal(th.get_rng_state(), state)
    row = tuple(s[:1] for s in statistics)
    zeros = [th.zeros(1, size) for size in kind.shapes[1:]]
    fisher = th.cat([kind.family.fisher(row, (basis[None], *zeros))[0] for basis in th.eye(shape)])
    # Five standard errors; the largest variance of a product of two scores is that of a fourth moment, 2 / std^4
    tolerance = 5 * math.sqrt(2) * float(fisher.diagonal().max()) / math.sqrt(n_actions)
    assert (score.T @ score / n_actions - fisher).abs().max() < tolerance
    assert score.mean(dim=0).abs().max() < 5 * math.sqrt(float(fisher.diagonal().max()) / n_actions)


@each_kind
@pytest.mark.parametrize("distance", [1e-1, 1e-2])
def test_kl_in_single_precision_is_good_enough_for_a_trust_region(kind: Kind, distance: float) -> None:
    """From KLs of about 1e-2 down to 1e-5, of the mean over a batch, which is what is compared with the target."""
    old = kind.random(2048)
    new = tuple(s + distance * th.randn_like(s) for s in old)
    exact = kind.family.kl(tuple(s.double() for s in old), tuple(s.double() for s in new)).mean()
    assert 1e-6 < exact < 0.2
    # Logits: each sample has an absolute error of about 1e-7, a few units in the last place of log-probabilities of order 1
    assert abs(kind.family.kl(old, new).mean() / exact - 1) < 1e-4 + 1e-8 / exact


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("kind", ["categorical", "multi_categorical", "bernoulli"])
def test_kl_of_logits_keeps_its_digits_at_tiny_radii(kind: str, distance: float) -> None:
    """Down to KLs of 1e-9, where schedules that fall to zero end: there the textbook form is negative, or far off."""
    family = KINDS[kind].family
    old = KINDS[kind].random(2048)
    new = tuple(s + distance * th.randn_like(s) for s in old)
    exact = family.kl(tuple(s.double() for s in old), tuple(s.double() for s in new)).mean()
    assert distance**2 / 100 < exact < 2 * distance**2
    # A log-probability of order 1 is known to 1e-7, which is 1e-3 of the smallest distance here
    assert abs(family.kl(old, new).mean() / exact - 1) < 1e-3
    assert (family.kl(old, new) >= 0).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (-200, -5),
        (-200, 0),
        (-110, -6),
        (-95, -5),
        (-90, -1),
        (-300, -200),
        (-200, -100),
        (-120, -20),
        (0, 3),
        (5, -4),
        (0, -80),
    ],
)
@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_kl_of_logits_far_apart(kind: str, old: float, new: float) -> None:
    """Also where a probability of single precision is zero, which it becomes again."""
    both = [th.tensor([[logit, 0.0] if kind == "categorical" else [logit]]) for logit in (float(old), float(new))]
    family = CategoricalFamily([2]) if kind == "categorical" else BernoulliFamily()
    leaf = both[1].clone().requires_grad_()
    kl = family.kl((both[0],), (leaf,))
    precise = both[1].double().requires_grad_()
    exact = family.kl((both[0].double(),), (precise,))
    logs = [(F.logsigmoid(sign * both[0].double()[:, :1]), F.logsigmoid(sign * both[1].double()[:, :1])) for sign in (1, -1)]
    textbook = sum(before.exp() * (before - after) for before, after in logs)
    assert abs(exact.item() - float(textbook)) < 1e-12 + 1e-9 * float(textbook)
    assert abs(kl.item() - exact.item()) < 1e-9 + 1e-5 * exact.item()
    (gradient,), (expected,) = th.autograd.grad(kl.sum(), leaf), th.autograd.grad(exact.sum(), precise)
    assert th.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_gaussian_kl_keeps_its_digits_where_the_textbook_form_loses_them(distance: float) -> None:
    family = GaussianFamily()
    old = (th.randn(2048, 3), 0.3 * th.randn(2048, 3))
    new = (old[0] + distance * th.randn(2048, 3), old[1] + distance * th.randn(2048, 3))
    exact = family.kl(tuple(s.double() for s in old), tuple(s.double() for s in new))
    # The step itself is known to one part in distance / epsilon
    tolerance = 10 * th.finfo(th.float32).eps / distance
    assert (family.kl(old, new) / exact - 1).abs().max() < tolerance
    textbook = summed([kl_divergence(p, q) for p, q in zip(normal(old), normal(new), strict=True)])
    assert (textbook / exact - 1).abs().max() > 5 * tolerance


@double
@pytest.mark.parametrize("mask", [-math.inf, -1e8], ids=["minus_inf", "sb3_contrib"])
def test_masked_actions_count_nothing(mask: float) -> None:
    family, without = CategoricalFamily([4, 3]), CategoricalFamily([2, 3])
    old, new, tangent = th.randn(N_SAMPLES, 7), th.randn(N_SAMPLES, 7), th.randn(N_SAMPLES, 7)
    is_allowed = th.tensor([True, False, True, False, True, True, True])
    masked_old = old.where(is_allowed, mask)
    leaf = new.clone().requires_grad_()
    masked_new = leaf.where(is_allowed, mask)

    kl, entropy = family.kl((masked_old,), (masked_new,)), family.entropy((masked_new,))
    (fisher,) = family.fisher((masked_old,), (tangent,))
    score = family.sample_score((masked_old,), th.Generator())

    assert relative_error(kl, without.kl((old[:, is_allowed],), (new[:, is_allowed],))) < 1e-12
    assert entropy is not None
    expected_entropy = without.entropy((new[:, is_allowed],))
    assert expected_entropy is not None
    assert relative_error(entropy, expected_entropy) < 1e-12
    (expected,) = without.fisher((old[:, is_allowed],), (tangent[:, is_allowed],))
    assert relative_error(fisher[:, is_allowed], expected) < 1e-12
    assert score is not None
    for unused in (fisher, score):
        assert not unused[:, ~is_allowed].any()
    # Gradients and second derivatives too, where 0 * inf lurks
    (gradient,) = th.autograd.grad(kl.sum() + entropy.sum(), leaf, create_graph=True)
    (second,) = th.autograd.grad(gradient.square().sum(), leaf)
    for derivative in (gradient, second):
        assert th.isfinite(derivative).all()
        assert derivative[:, is_allowed].any()
        assert not derivative[:, ~is_allowed].any()


@double
@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in KINDS.items() if name != "squashed"])
def test_entropy_without_squashing_is_that_of_pytorch(kind: Kind) -> None:
    statistics = kind.random()
    entropy = kind.family.entropy(statistics)
    assert entropy is not None
    assert entropy.shape == (N_SAMPLES,)
    assert relative_error(entropy, summed([part.entropy() for part in kind.in_torch(statistics)])) < 1e-12


@double
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 0.5), (0.1, 3.0)])
def test_squashed_entropy_is_that_of_its_density(mean: float, std: float) -> None:
    """One dimension, by the trapezoidal rule over -p log p of the action in (-1, 1), substituted by its inverse tanh."""
    u = th.linspace(mean - 12 * std, mean + 12 * std, 20_001)
    # Below the smallest that 1 - tanh(u)^2 can be in double precision
    log_slope = -2 * th.log(th.cosh(u))
    log_density = Normal(mean, std).log_prob(u) - log_slope
    exact = -float(th.trapezoid(Normal(mean, std).log_prob(u).exp() * log_density, u))

    n = 200_000
    statistics = (th.full((n, 1), mean), th.full((n, 1), math.log(std)))
    estimates = GaussianFamily(squashed=True).entropy(statistics, th.randn(n, 1))
    # Five standard errors of the Monte Carlo mean
    assert abs(float(estimates.mean()) - exact) < 5 * float(estimates.std()) / math.sqrt(n)


@double
def test_squashed_entropy_is_minus_the_log_prob_of_sb3s_distribution() -> None:
    """On average, not sample by sample: the Gaussian's own part is in closed form here."""
    n = 100_000
    mean, log_std = th.tensor([[0.3, -1.0]]).expand(n, 2), th.tensor([0.1, -0.5])
    distribution = SquashedDiagGaussianDistribution(2).proba_distribution(mean, log_std)
    sampled = -distribution.log_prob(distribution.sample(), distribution.gaussian_actions)
    ours = GaussianFamily(squashed=True).entropy((mean, log_std.expand(n, 2)), th.randn(n, 2))
    error = math.sqrt(float(sampled.var() + ours.var()) / n)
    # SB3 adds 1e-6 inside its logarithm
    assert abs(float(sampled.mean() - ours.mean())) < 5 * error + 1e-5


@pytest.mark.parametrize("mean", [-50.0, 50.0])
def test_squashed_entropy_is_finite_where_the_tanh_is_flat(mean: float) -> None:
    """In single precision 1 - tanh(50)^2 is zero; its logarithm is 2 log 2 - 100."""
    statistics = (th.full((1, 1), mean, requires_grad=True), th.zeros(1, 1, requires_grad=True))
    entropy = GaussianFamily(squashed=True).entropy(statistics, th.zeros(1, 1))
    expected = 0.5 * math.log(2 * math.pi * math.e) + 2 * math.log(2) - 100
    assert float(entropy.detach()) == pytest.approx(expected, rel=1e-6)
    gradient, _ = th.autograd.grad(entropy.sum(), statistics)
    assert float(gradient) == pytest.approx(-2.0 * math.copysign(1, mean), rel=1e-6)


@double
@each_kind
def test_entropy_with_the_same_noise_is_a_differentiable_function(kind: Kind) -> None:
    noise = th.randn(N_SAMPLES, kind.shapes[0])

    def entropy(*statistics: th.Tensor) -> th.Tensor:
        value = kind.family.entropy(statistics, noise)
        assert value is not None
        return value

    statistics = tuple(s.requires_grad_() for s in kind.random())
    # By central differences, hence to half of the digits
    assert th.autograd.gradcheck(entropy, statistics, rtol=1e-6, atol=1e-7)
    assert th.equal(entropy(*statistics), entropy(*statistics))


def test_squashed_entropy_without_noise_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="needs noise"):
        GaussianFamily(squashed=True).entropy((th.zeros(1, 1), th.zeros(1, 1)))


class Maker(NamedTuple):
    """How to make one of SB3's distribution objects, and random arguments for its ``proba_distribution``."""

    make: Callable[[], Any]
    shapes: tuple[tuple[int, ...], ...]

    def arguments(self) -> list[th.Tensor]:
        return [th.randn(shape) for shape in self.shapes]


def gsde(**kwargs: Any) -> Maker:
    def make() -> StateDependentNoiseDistribution:
        distribution = StateDependentNoiseDistribution(2, **kwargs)
        distribution.proba_distribution_net(latent_dim=3, latent_sde_dim=3)
        return distribution

    return Maker(make, ((N_SAMPLES, 2), (3, 2) if kwargs.get("full_std", True) else (3, 1), (N_SAMPLES, 3)))


MAKERS = {
    "gaussian": Maker(lambda: DiagGaussianDistribution(2), ((N_SAMPLES, 2), (2,))),
    "squashed": Maker(lambda: SquashedDiagGaussianDistribution(2), ((N_SAMPLES, 2), (2,))),
    "gsde": gsde(),
    "gsde_squashed": gsde(squash_output=True),
    "gsde_one_std_per_feature": gsde(full_std=False),
    "gsde_expln": gsde(use_expln=True),
    "categorical": Maker(lambda: CategoricalDistribution(3), ((N_SAMPLES, 3),)),
    "multi_categorical": Maker(lambda: MultiCategoricalDistribution([2, 3]), ((N_SAMPLES, 5),)),
    "bernoulli": Maker(lambda: BernoulliDistribution(2), ((N_SAMPLES, 2),)),
    "mixed": Maker(lambda: MixedDistribution(MIXED), ((N_SAMPLES, 7), (2,))),
    "users": Maker(lambda: BetaDistribution(2), ((N_SAMPLES, 4),)),
}


@double
@pytest.mark.parametrize("name", MAKERS)
def test_statistics_describe_sb3s_distribution_and_outlive_it(name: str) -> None:
    """SB3 puts each distribution into the same object, and yet the KL between an old one and a new one is right."""
    distribution = MAKERS[name].make()
    family = family_of(distribution)
    old = family.statistics(distribution.proba_distribution(*MAKERS[name].arguments()))
    old_inner = distribution.distribution
    new = family.statistics(distribution.proba_distribution(*MAKERS[name].arguments()))
    new_inner = distribution.distribution
    pairs = zip(old_inner, new_inner, strict=True) if isinstance(old_inner, list) else [(old_inner, new_inner)]
    assert relative_error(family.kl(old, new), summed([kl_divergence(p, q) for p, q in pairs])) < 1e-12
    assert family.needs_noise == ("squashed" in name)


@double
@pytest.mark.parametrize("name", MAKERS)
def test_std_is_that_of_the_gaussian_or_nothing(name: str) -> None:
    distribution = MAKERS[name].make()
    distribution.proba_distribution(*MAKERS[name].arguments())
    family = family_of(distribution)
    std = family.std(family.statistics(distribution))
    inner = distribution.distribution[0] if name == "mixed" else distribution.distribution
    if isinstance(inner, Normal):
        assert std is not None
        assert relative_error(std, inner.scale) < 1e-12
    else:
        assert std is None


@double
def test_users_distribution_is_served_through_pytorch() -> None:
    def make(outputs: th.Tensor) -> BetaDistribution:
        return BetaDistribution(2).proba_distribution(outputs)

    outputs = th.randn(N_SAMPLES, 4)
    old, new = make(outputs), make(th.randn(N_SAMPLES, 4))
    family = family_of(old)
    assert isinstance(family, TorchFamily)
    assert not family.has_fisher
    kl = family.kl(family.statistics(old), family.statistics(new))
    assert relative_error(kl, kl_divergence(old.distribution, new.distribution).sum(dim=1)) < 1e-14
    entropy = family.entropy(family.statistics(new))
    assert entropy is not None
    assert relative_error(entropy, new.distribution.entropy().sum(dim=1)) < 1e-14
    assert family.std(old) is None
    assert family.sample_score(old, th.Generator()) is None
    with pytest.raises(NotImplementedError, match="TorchFamily has no Fisher matrix"):
        family.fisher(old, (outputs,))


@double
def test_fisher_matrix_of_a_users_distribution_is_the_hessian_of_its_kl() -> None:
    leaf = th.randn(1, 4, requires_grad=True)
    family = TorchFamily()

    def distribution(outputs: th.Tensor) -> BetaDistribution:
        return BetaDistribution(2).proba_distribution(outputs)

    kl = family.kl(distribution(leaf.detach()), distribution(leaf))
    hessian = th.autograd.functional.hessian(
        lambda outputs: family.kl(distribution(leaf.detach()), distribution(outputs)).sum(), leaf.detach()
    )
    assert isinstance(hessian, th.Tensor)
    assert relative_error(as_matrix(HessianFisher(kl.mean(), [leaf]), 4), hessian.reshape(4, 4)) < 1e-12


def test_distribution_without_a_kl_is_refused_with_advice() -> None:
    unknown, other = BetaDistribution(2), BetaDistribution(2)
    unknown.distribution = th.distributions.Laplace(th.zeros(1, 2), th.ones(1, 2))  # type: ignore[assignment]
    other.distribution = th.distributions.Cauchy(th.zeros(1, 2), th.ones(1, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"BetaDistribution \(Laplace\) has no KL divergence: .* `register_family`"):
        TorchFamily().kl(unknown, other)


@pytest.mark.parametrize("answer", [None, NotImplementedError])
def test_distribution_without_an_entropy_says_so(answer: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def entropy(self: Distribution) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(BetaDistribution, "entropy", entropy)
    assert TorchFamily().entropy(BetaDistribution(2).proba_distribution(th.randn(3, 4))) is None


class MyGaussian(DiagGaussianDistribution):
    """A user's subclass."""


class MyGaussian2(MyGaussian):
    """A user's subclass of that."""


@pytest.fixture
def _own_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))


@pytest.mark.usefixtures("_own_families")
def test_family_is_registered_for_one_class_and_not_inherited() -> None:
    assert isinstance(family_of(MyGaussian(2)), TorchFamily), "what is known of a base class is not taken for granted"
    made_from = []

    def make_family(distribution: MyGaussian) -> Family:
        made_from.append(distribution)
        return GaussianFamily()

    register_family(MyGaussian, make_family)
    mine = MyGaussian(2)
    assert isinstance(family_of(mine), GaussianFamily)
    assert made_from == [mine]
    assert isinstance(family_of(MyGaussian2(2)), TorchFamily)


@pytest.fixture(params=[True, False])
def argument_checks(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(request.param)
    yield request.param
    th.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.parametrize("raises", [True, False])
def test_argument_checks_are_as_before_in_the_end(argument_checks: bool, raises: bool) -> None:
    nan = th.tensor([math.nan])
    try:
        with no_argument_checks:
            assert math.isnan(GaussianFamily().kl((nan[None], nan[None]), (nan[None], nan[None])))
            Normal(nan, nan)
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert th.distributions.Distribution._validate_args is argument_checks
    if argument_checks:
        with pytest.raises(ValueError, match="invalid values"):
            Normal(nan, nan)


def test_threads_that_overlap_leave_argument_checks_as_they_were(argument_checks: bool) -> None:
    """The second one in must not take what the first one has set for what was there before."""
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with no_argument_checks:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with no_argument_checks:
        leave.set()
        thread.join()
        # The other one has left: here they are still off
        assert not th.distributions.Distribution._validate_args
    assert th.distributions.Distribution._validate_args is argument_checks


@pytest.mark.parametrize("kind", [KINDS["gaussian"], KINDS["bernoulli"], KINDS["categorical"]])
def test_nan_in_the_statistics_is_a_nan_in_the_kl(kind: Kind) -> None:
    old = kind.random()
    new = tuple(s.clone() for s in old)
    new[0][2, 1] = math.nan
    kl = kind.family.kl(old, new)
    assert np.isnan(kl.numpy()).tolist() == [False, False, True, False, False]
