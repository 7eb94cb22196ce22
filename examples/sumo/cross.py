"""A crossing with traffic lights in Eclipse SUMO: the traffic, what the lights see, and what they can do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

NET = Path(__file__).parent / "cross.net.xml"
ARMS = ("north", "east", "south", "west")
LANES = tuple(f"from_{arm}_{lane}" for arm in ARMS for lane in (0, 1))

SECONDS = 1800
"""Of an episode."""
DECIDED_EVERY = 5
"""Seconds between two decisions."""
YELLOW = 3
"""Seconds of yellow when the green goes to the other road."""
GREENS = {0: 0, 1: 2}
"""Action -> phase of the program in `cross.net.xml`; the phase after it is its yellow. 0: north and south go."""

OBSERVATIONS = gym.spaces.Box(0.0, 1.0, (len(LANES) * 2 + 2,), np.float32)
ACTIONS = gym.spaces.Discrete(len(GREENS))


class Crossing:
    """One half hour of traffic after the other. `traci`: the module `traci` (SUMO as a process of its own) or
    `libsumo` (SUMO in this one): they have the same functions. `sumo`: the command that starts it."""

    def __init__(self, traci: ModuleType, sumo: str = "sumo") -> None:
        self._traci = traci
        self._command = [sumo, "--net-file", str(NET), "--no-step-log", "--no-warnings", "--time-to-teleport", "-1"]
        self._running = False

    def begin(self, seed: int) -> None:
        """Empty roads, and other traffic than the last time: how much each road has is drawn for each episode."""
        self.close()
        self._traci.start([*self._command, "--seed", str(seed)])
        self._running = True
        for origin in ARMS:
            for target in ARMS:
                if target != origin:
                    self._traci.route.add(f"{origin}-{target}", [f"from_{origin}", f"to_{target}"])
        self._rng = np.random.default_rng(seed)
        busy, quiet = self._rng.uniform(0.18, 0.26), self._rng.uniform(0.02, 0.08)
        north_south = self._rng.random() < 0.5
        self._per_second = {arm: busy if (arm in ("north", "south")) == north_south else quiet for arm in ARMS}
        self.time, self._vehicles = 0, 0
        self._green, self._green_since = 0, 0
        self._traci.trafficlight.setPhase("centre", GREENS[0])

    @property
    def over(self) -> bool:
        return self.time >= SECONDS

    def observe(self) -> NDArray[np.float32]:
        """(18,): of each lane how many stand there and how many drive there, over 30; which road is green; for how
        long, over a minute."""
        lane = self._traci.lane
        standing = [lane.getLastStepHaltingNumber(name) / 30 for name in LANES]
        there = [lane.getLastStepVehicleNumber(name) / 30 for name in LANES]
        seen = [*standing, *there, self._green, (self.time - self._green_since) / 60]
        return np.clip(np.array(seen, np.float32), 0.0, 1.0)

    def run(self, green: int) -> float:
        """Five seconds with this road green, yellow first if it was the other's. Returns the minutes that vehicles have
        stood meanwhile, all together."""
        waited = 0
        for second in range(DECIDED_EVERY):
            if green != self._green:
                if second == 0:
                    self._traci.trafficlight.setPhase("centre", GREENS[self._green] + 1)
                elif second == YELLOW:
                    self._green, self._green_since = green, self.time
            if green == self._green:
                self._traci.trafficlight.setPhase("centre", GREENS[green])
            self._arrive()
            self._traci.simulationStep()
            self.time += 1
            waited += sum(self._traci.lane.getLastStepHaltingNumber(name) for name in LANES)
        return waited / 60

    def _arrive(self) -> None:
        for arm, likely in self._per_second.items():
            if self._rng.random() < likely:
                target = self._rng.choice([other for other in ARMS if other != arm])
                self._vehicles += 1
                self._traci.vehicle.add(str(self._vehicles), f"{arm}-{target}", departLane="best", departSpeed="max")

    def close(self) -> None:
        if self._running:
            self._running = False
            self._traci.close()
