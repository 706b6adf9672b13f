"""A puzzle in which most actions are invalid at any moment, for agents with action masks."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

#: Rows and columns of the board.
SIZE = 6
#: The shapes of the pieces.
PIECES = tuple(
    np.array(rows, dtype=bool)
    for rows in (
        [[1, 1]],
        [[1], [1]],
        [[1, 1, 1]],
        [[1], [1], [1]],
        [[1, 1], [1, 1]],
        [[1, 1], [1, 0]],
        [[1, 1], [0, 1]],
        [[1, 0], [1, 1]],
        [[0, 1], [1, 1]],
    )
)


class Blocks(gym.Env[np.ndarray, Any]):
    """
    Put pieces on a board of 6 x 6 cells; rows and columns that are full become empty.

    An action is the cell, counted row by row, that the top left corner of the piece goes to. A piece must lie on empty cells
    of the board: :meth:`action_masks` tells where it fits. The reward is 1 for a piece and 5 for each row or column that it
    fills. The episode ends when the next piece fits nowhere, with an invalid action, or after 200 pieces. The environment's id
    is ``sb3_trpo_ext/Blocks-v0``.

    The observation, of shape ``(45,)``, has a 1 for each full cell of the 36, and another for the next of the 9 pieces.

    :param max_pieces: an episode is truncated after this many
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, max_pieces: int = 200):
        self.max_pieces = max_pieces
        self.observation_space = spaces.Box(0, 1, (SIZE * SIZE + len(PIECES),), np.float32)
        self.action_space = spaces.Discrete(SIZE * SIZE)
        self.board = np.zeros((SIZE, SIZE), dtype=bool)
        self.piece = 0
        self.n_pieces = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start with an empty board."""
        super().reset(seed=seed)
        self.board = np.zeros((SIZE, SIZE), dtype=bool)
        self.n_pieces = 0
        self._draw()
        return self._observation(), {}

    def action_masks(self) -> np.ndarray:
        """Where the piece fits: one bool per cell."""
        shape = PIECES[self.piece]
        fits = np.zeros((SIZE, SIZE), dtype=bool)
        n_rows, n_columns = SIZE - shape.shape[0] + 1, SIZE - shape.shape[1] + 1
        fits[:n_rows, :n_columns] = True
        for row, column in np.argwhere(shape):
            fits[:n_rows, :n_columns] &= ~self.board[row : row + n_rows, column : column + n_columns]
        return fits.flatten()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Put the piece down."""
        if not self.action_masks()[action]:
            return self._observation(), 0.0, True, False, {}
        row, column = divmod(int(action), SIZE)
        shape = PIECES[self.piece]
        self.board[row : row + shape.shape[0], column : column + shape.shape[1]] |= shape
        full_rows, full_columns = self.board.all(axis=1), self.board.all(axis=0)
        self.board[full_rows] = False
        self.board[:, full_columns] = False
        self.n_pieces += 1
        self._draw()
        reward = 1.0 + 5.0 * float(full_rows.sum() + full_columns.sum())
        terminated = not self.action_masks().any()
        return self._observation(), reward, terminated, not terminated and self.n_pieces == self.max_pieces, {}

    def _draw(self) -> None:
        """Choose the next piece."""
        self.piece = int(self.np_random.integers(len(PIECES)))

    def _observation(self) -> np.ndarray:
        """The board and the piece."""
        piece = np.arange(len(PIECES)) == self.piece
        return np.concatenate([self.board.flatten(), piece]).astype(np.float32)
