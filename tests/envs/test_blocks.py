"""The puzzle: its masks against its steps, its rewards, and the checkers of Gymnasium and SB3."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import sb3_trpo_ext  # noqa: F401
from sb3_trpo_ext.envs.blocks import PIECES, SIZE, Blocks


def test_checkers_accept_it() -> None:
    env = gym.make("sb3_trpo_ext/Blocks-v0")
    check_env(env.unwrapped, skip_render_check=True)
    sb3_check_env(env.unwrapped)
    assert isinstance(env.unwrapped, Blocks)


@pytest.mark.parametrize("piece", range(len(PIECES)))
def test_mask_is_where_the_piece_lies_on_empty_cells(piece: int) -> None:
    env, shape = Blocks(), PIECES[piece]
    env.reset(seed=0)
    env.board, env.piece = np.random.default_rng(piece).random((SIZE, SIZE)) < 0.4, piece
    for action, is_valid in enumerate(env.action_masks()):
        cells = np.argwhere(shape) + divmod(action, SIZE)
        expected = bool((cells < SIZE).all()) and not env.board[tuple(cells.T)].any()
        assert is_valid == expected


def test_full_rows_and_columns_are_worth_five_and_become_empty() -> None:
    env = Blocks()
    env.reset(seed=0)
    env.board[0, 2:] = True
    env.board[1:, 0] = True
    env.board[3, 3] = True
    env.piece = 0  # two cells side by side
    _, reward, terminated, _, _ = env.step(0)
    assert (reward, terminated) == (1 + 5 + 5, False)
    assert np.argwhere(env.board).tolist() == [[3, 3]]


def test_episode_ends_with_an_invalid_action_or_no_place_left() -> None:
    env = Blocks(max_pieces=2)
    env.reset(seed=0)
    env.board[0, 0] = True
    assert env.step(0)[1:4] == (0.0, True, False)
    env.reset(seed=0)
    # The last row and column are empty, and two cells: nowhere a square
    env.board[:-1, :-1] = True
    env.board[1, 1:3] = False
    env.piece = 0
    env._draw = lambda: setattr(env, "piece", 4)  # type: ignore[method-assign]
    assert env.step(SIZE + 1)[1:4] == (1.0, True, False)


def test_pieces_are_counted() -> None:
    env = Blocks(max_pieces=2)
    env.reset(seed=0)
    for is_last in (False, True):
        action = int(np.flatnonzero(env.action_masks())[0])
        assert env.step(action)[2:4] == (False, is_last)
