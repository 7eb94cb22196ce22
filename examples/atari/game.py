"""Atari games as a policy sees them: 84x84 grey pixels, the last four frames, an action for four frames of the game.

Makes Gymnasium environments of them, so that ``rllink-zmq simulate --env game:RoadRunner-84-v0`` runs one; any game of
ale-py has such a name. No OpenCV: a simulator's host stays small.
"""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

STACKED = 4
SKIPPED = 4
NOOPS = 30


class Game(gym.Env[NDArray[np.uint8], int]):
    """One game. Observations are uint8, (84, 84, 4): RLlib's CNNs want channels last.

    As everywhere in the literature an action is repeated for four frames, an observation is the brighter of the last
    two (sprites flicker), an episode begins with up to 30 frames of doing nothing, and a reward is only whether the
    score went up or down: 1, 0 or -1.
    """

    def __init__(self, name: str, stacked: int = STACKED) -> None:
        self._ale = gym.make(f"ALE/{name}-v5", obs_type="grayscale", frameskip=1, repeat_action_probability=0.0)
        self.action_space = self._ale.action_space
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, stacked), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        super().reset(seed=seed)
        screen, _ = self._ale.reset(seed=seed)
        for _ in range(int(self.np_random.integers(NOOPS))):
            screen, _, over, cut, _ = self._ale.step(0)
            if over or cut:
                screen, _ = self._ale.reset()
        self._frames = np.zeros(self.observation_space.shape, np.uint8)
        return self._seen(screen), {}

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        total, newest = 0.0, None
        for _ in range(SKIPPED):
            before = newest
            newest, reward, over, cut, info = self._ale.step(action)
            total += float(reward)
            if over or cut:
                break
        brighter = newest if before is None else np.maximum(newest, before)
        return self._seen(brighter), float(np.sign(total)), over, cut, info

    def _seen(self, screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The screen's middle, 168 of its 210 rows, at half the size; the newest of the frames that are seen."""
        rows = screen[28:196].astype(np.uint16)
        half = (rows[::2, ::2] + rows[1::2, ::2] + rows[::2, 1::2] + rows[1::2, 1::2]) >> 2
        self._frames = np.roll(self._frames, -1, axis=-1)
        self._frames[:, 2:82, -1] = half
        return self._frames

    def render(self) -> Any:
        return self._ale.render()

    def close(self) -> None:
        self._ale.close()


gym.register_envs(ale_py)
for _id in list(gym.registry):
    if _id.startswith("ALE/"):
        _name = _id.removeprefix("ALE/").removesuffix("-v5")
        gym.register(f"{_name}-84-v0", entry_point=Game, kwargs={"name": _name})
