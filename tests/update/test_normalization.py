"""Running statistics of observations and of returns, held to NumPy and to SB3's VecNormalize."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_trpo_ext.update.normalization import (
    CLIP,
    NormalizedExtractor,
    RewardScale,
    RunningNormalization,
    normalized_parts,
    one_hot_sizes,
)

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


def test_statistics_of_several_batches_are_those_of_all_samples() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(5, 3, (n, 3)).astype(np.float32) for n in (100, 7, 2000)]
    normalization = RunningNormalization((3,))
    for batch in batches:
        normalization.update(th.as_tensor(batch))
    together = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(normalization.mean, together.mean(0), rtol=1e-6)
    np.testing.assert_allclose(normalization.var, together.var(0), rtol=1e-6)
    assert int(normalization.n_samples) == 2107
    normalized = normalization(th.as_tensor(together, dtype=th.float32))
    expected = np.clip((together - together.mean(0)) / together.std(0), -CLIP, CLIP)
    np.testing.assert_allclose(normalized, expected, atol=1e-5)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_nothing_is_normalized_or_clipped_before_the_first_samples(is_frozen: bool) -> None:
    normalization = RunningNormalization((3,))
    if is_frozen:
        normalization.freeze()
    x = 1000 * th.randn(5, 3)
    np.testing.assert_array_equal(normalization(x), x)


def test_frozen_statistics_stay_and_still_clip() -> None:
    normalization = RunningNormalization((1,))
    normalization.update(th.tensor([[1.0], [2.0]]))
    for _ in range(2):
        normalization.freeze()
        normalization.update(th.tensor([[5.0]]))
        assert (float(normalization.mean), int(normalization.n_samples)) == (1.5, -3)
        assert float(normalization(th.tensor([[1e6]]))) == CLIP


def test_a_constant_stays_at_zero_and_what_is_far_out_is_clipped() -> None:
    normalization = RunningNormalization((2,))
    normalization.update(th.tensor([[3.0, 1.0], [3.0, 2.0]]))
    assert normalization(th.tensor([[3.0, 1e6]])).tolist() == [[0.0, CLIP]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_left_out(bad: float) -> None:
    normalization = RunningNormalization((1,))
    normalization.update(th.tensor([[1.0], [2.0]]))
    with pytest.warns(UserWarning, match="infinite or NaN"):
        normalization.update(th.tensor([[1.0], [bad]]))
    assert (float(normalization.mean), int(normalization.n_samples)) == (1.5, 2)


def test_parts_that_are_vectors_are_normalized_and_no_others() -> None:
    parts = {"image": IMAGE, "choice": spaces.Discrete(3), "number": spaces.Box(0, 1, ()), "vector": VECTOR}
    assert normalized_parts(spaces.Dict(parts)) == {"number": (), "vector": (3,)}
    assert normalized_parts(VECTOR) == {"": (3,)}
    assert normalized_parts(IMAGE) == normalized_parts(spaces.Discrete(3)) == {}
    assert one_hot_sizes(spaces.Dict(parts)) == {"choice": [3]}
    assert one_hot_sizes(spaces.MultiDiscrete([2, 5])) == {"": [2, 5]}
    assert one_hot_sizes(VECTOR) == one_hot_sizes(spaces.MultiBinary(3)) == {}


@pytest.mark.parametrize("space", [spaces.Discrete(50), spaces.MultiDiscrete([2, 50])], ids=["discrete", "multi_discrete"])
def test_entries_of_one_hot_vectors_have_the_mean_square_of_a_normalized_number(space: spaces.Space) -> None:
    extractor = NormalizedExtractor(space)
    space.seed(0)
    samples = th.as_tensor(np.stack([space.sample() for _ in range(5000)]))
    observations = preprocess_obs(samples, space)
    assert isinstance(observations, th.Tensor)
    features = extractor(observations)
    sizes = one_hot_sizes(space)[""]
    assert features.shape == (5000, sum(sizes))
    for size, part in zip(sizes, features.split(sizes, dim=1), strict=True):
        assert float(part.max()) == pytest.approx(size**0.5)
        # Each sample has one entry of each vector: whichever states are frequent
        assert float(part.square().mean()) == pytest.approx(1, rel=1e-5)
    # There are no statistics that the first rollout has to wait for
    assert not extractor.is_fresh
    extractor.update(samples.numpy())
    assert th.equal(extractor(observations), features)


def test_a_dict_is_normalized_key_by_key() -> None:
    space = spaces.Dict({"choice": spaces.Discrete(3), "vector": VECTOR})
    extractor = NormalizedExtractor(space)
    vectors = np.random.default_rng(0).normal(2, 3, (10, 4, 3)).astype(np.float32)
    extractor.update({"choice": np.zeros((10, 4, 1)), "vector": vectors})
    one_hot = th.tensor([[0.0, 1.0, 0.0]])
    features = extractor({"choice": one_hot, "vector": th.full((1, 3), 2.0)})
    flat = vectors.reshape(-1, 3)
    expected = np.concatenate([[0, np.sqrt(3), 0], (2 - flat.mean(0)) / flat.std(0)])
    np.testing.assert_allclose(features[0], expected, atol=1e-5)
    assert extractor.features_dim == 6


def test_the_extractor_of_a_user_gets_normalized_observations() -> None:
    extractor = NormalizedExtractor(VECTOR, FlattenExtractor)
    extractor.update(np.array([[0, 0, 0], [2, 4, 6]], np.float32))
    np.testing.assert_allclose(extractor(th.tensor([[2.0, 4.0, 6.0]])), [[1, 1, 1]], atol=1e-5)
    assert not extractor.is_fresh
    assert set(extractor.state_dict()) == {f"normalizations.observation.{name}" for name in ("mean", "var", "n_samples")}


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_rewards_are_divided_by_the_standard_deviation_of_the_discounted_return(dtype: type) -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(1, 2, (60, 4))
    dones: np.ndarray = (rng.random((60, 4)) < 0.1).astype(dtype)
    scale = RewardScale(gamma=0.9)
    assert scale.scale == 1.0
    for part in (slice(0, 25), slice(25, 60)):
        scale.update(rewards[part], dones[part])
    running, returns = np.zeros(4), []
    for reward, done in zip(rewards, dones, strict=True):
        running = running * 0.9 + reward
        returns.append(running)
        running = np.where(done, 0, running)
    assert scale.scale == pytest.approx(np.std(returns), rel=1e-8)


def test_rewards_without_variance_and_bad_rewards_change_no_scale() -> None:
    scale = RewardScale(gamma=0.9)
    scale.update(np.zeros((5, 2)), np.zeros((5, 2), bool))
    assert scale.scale == 1.0
    scale.update(np.array([[1.0], [np.nan]]), np.zeros((2, 1), bool))
    assert scale.scale == 1.0


def test_the_scale_is_saved_and_loaded() -> None:
    scale, other = RewardScale(gamma=0.9), RewardScale(gamma=0.9)
    other.load_state_dict(scale.state_dict())
    assert other.is_fresh
    scale.update(np.arange(6.0).reshape(3, 2), np.zeros((3, 2), bool))
    other.load_state_dict(scale.state_dict())
    assert other.scale == scale.scale != 1.0
