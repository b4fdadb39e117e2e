"""Catch fruit, dodge bombs: a small pixel task for convolutional policies, 36 x 36 gray pixels.

Things fall in straight columns, two pixels a step; a paddle at the bottom moves three pixels a step. Bright
things are fruit (+1 when caught), dim things are bombs (-1 when caught). An episode drops 20 fruits and 6 bombs
in random order, a new thing every 6 steps, so that up to three are in sight and the paddle has to plan. Each
column lies within reach of the one before: 20 is the highest return. Positions alone decide, so one
frame is enough. Executing this file registers ``PixelCatch-v1`` with Gymnasium.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

ID = "PixelCatch-v1"
SIZE = 36
THING = 3  # pixels, width and height
PADDLE_WIDTH, PADDLE_HEIGHT = 7, 2
FALL_SPEED, PADDLE_SPEED = 2, 3  # pixels a step
SPACING = 6  # steps between two things
FRUITS, BOMBS = 20, 6
FRUIT_SHADE, BOMB_SHADE, PADDLE_SHADE = 255, 90, 170
_LANDING_ROW = SIZE - PADDLE_HEIGHT - THING
_STEPS_TO_LAND = -(-_LANDING_ROW // FALL_SPEED)
EPISODE_STEPS = (FRUITS + BOMBS - 1) * SPACING + _STEPS_TO_LAND


class PixelCatch(gym.Env[np.ndarray, int]):
    """Observation [36, 36, 1] uint8; actions 0 left, 1 stay, 2 right; 166 steps an episode; return in [-6, 20]."""

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own convention)

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.episode_steps = EPISODE_STEPS

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the kinds and columns of all things and put the paddle in the middle."""
        super().reset(seed=seed, options=options)
        self._is_fruit = self.np_random.permutation(np.arange(FRUITS + BOMBS) < FRUITS)
        self._columns = self._draw_columns()
        self._paddle = (SIZE - PADDLE_WIDTH) // 2
        self._time = 0
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle, then let everything fall; reward +1 or -1 where something lands on the paddle."""
        self._paddle = int(np.clip(self._paddle + PADDLE_SPEED * (int(action) - 1), 0, SIZE - PADDLE_WIDTH))
        self._time += 1
        reward = self._landed()
        return self._draw(), reward, self._time >= EPISODE_STEPS, False, {}

    def _draw_columns(self) -> np.ndarray:
        """Left edges, [things]: each at most as far from the one before as the paddle moves in between."""
        reach = PADDLE_SPEED * SPACING
        columns = np.empty(FRUITS + BOMBS, np.int64)
        column = (SIZE - THING) // 2
        for index in range(len(columns)):
            low, high = max(0, column - reach), min(SIZE - THING, column + reach)
            column = columns[index] = self.np_random.integers(low, high + 1)
        return columns

    def _rows(self) -> np.ndarray:
        """Top edges of all things now, [things]: negative before a thing appears."""
        return FALL_SPEED * (self._time - SPACING * np.arange(FRUITS + BOMBS))

    def _landed(self) -> float:
        """The reward of the thing that lands in this step, if any."""
        elapsed = self._time - _STEPS_TO_LAND
        if elapsed < 0 or elapsed % SPACING:
            return 0.0
        index = elapsed // SPACING
        column = self._columns[index]
        caught = column + THING > self._paddle and column < self._paddle + PADDLE_WIDTH
        return (1.0 if self._is_fruit[index] else -1.0) if caught else 0.0

    def _draw(self) -> np.ndarray:
        image = np.zeros((SIZE, SIZE, 1), np.uint8)
        rows = self._rows()
        for index in np.flatnonzero((rows >= 0) & (rows < _LANDING_ROW + FALL_SPEED)):
            row, column = rows[index], self._columns[index]
            shade = FRUIT_SHADE if self._is_fruit[index] else BOMB_SHADE
            image[row : row + THING, column : column + THING] = shade
        image[SIZE - PADDLE_HEIGHT :, self._paddle : self._paddle + PADDLE_WIDTH] = PADDLE_SHADE
        return image


if ID not in gym.registry:
    gym.register(ID, entry_point=PixelCatch)
