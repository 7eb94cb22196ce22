"""A scenario of ViZDoom: what the player sees, and what it can do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import vizdoom
from numpy.typing import NDArray

ROWS, COLUMNS = 60, 80
TICS = 4
"""Of the game for each action: 35 make a second."""

OBSERVATIONS = gym.spaces.Box(0, 255, (ROWS, COLUMNS, 2), np.uint8)
"""The last two frames, grey."""


class Doom:
    """The engine, without a window unless `window`."""

    def __init__(self, scenario: str, seed: int, *, window: bool = False) -> None:
        game = vizdoom.DoomGame()
        game.load_config(f"{vizdoom.scenarios_path}/{scenario}.cfg")
        game.set_screen_format(vizdoom.ScreenFormat.GRAY8)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_window_visible(window)
        game.set_render_hud(False)
        game.set_seed(seed)
        self._settings = tempfile.TemporaryDirectory()  # else the engine leaves its own where one happens to be
        game.set_doom_config_path(str(Path(self._settings.name) / "vizdoom.ini"))
        game.init()
        self.game = game
        buttons = game.get_available_buttons_size()
        self._presses = [[int(i == pressed) for i in range(buttons)] for pressed in range(buttons)]
        self.actions = gym.spaces.Discrete(buttons)
        self._seen = np.zeros(OBSERVATIONS.shape, np.uint8)

    def begin(self) -> None:
        self.game.new_episode()
        self._seen[:] = 0

    def see(self) -> NDArray[np.uint8]:
        """(60, 80, 2): the frame before and this one, at half the engine's size. Nothing is new after the end."""
        state = self.game.get_state()
        if state is not None:
            screen = state.screen_buffer.astype(np.uint16)
            half = (screen[::2, ::2] + screen[1::2, ::2] + screen[::2, 1::2] + screen[1::2, 1::2]) >> 2
            self._seen[..., 0] = self._seen[..., 1]
            self._seen[..., 1] = half
        return self._seen

    def press(self, button: int) -> float:
        """The engine goes on for four tics with one button pressed. Returns the reward of them."""
        return float(self.game.make_action(self._presses[button], TICS))

    @property
    def over(self) -> bool:
        return self.game.is_episode_finished()

    @property
    def out_of_time(self) -> bool:
        return self.game.is_episode_timeout_reached()

    def close(self) -> None:
        self.game.close()
        self._settings.cleanup()
