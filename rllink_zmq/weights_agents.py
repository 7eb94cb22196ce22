"""What a process wants of several modules: the crew with their policies, once, and the weights of some: sans-IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rllink_zmq.arrays import Buffer
from rllink_zmq.messages import CONFIG, STATE, Message
from rllink_zmq.weights import Wanted, Weights


class ModuleWanted(Wanted):
    """The weights of one module, for a process that gets the policy in another way."""

    def told(self, run: str, version: int, policy: str, now: float) -> None:
        super().told(run, version, "", now)

    @property
    def newest(self) -> Weights | None:
        """This run's newest weights, once they are here."""
        held = self.weights
        return held if held is not None and held.run == self.run else None


class AgentsWanted(Wanted):
    """`blob`: the crew and its policies. `modules`: by id, what is wanted of each. `newest_told`: of all modules, the
    newest version that the broker has told of."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: dict[str, ModuleWanted] = {}
        self.newest_told = -1

    def want(self, modules: Iterable[str]) -> None:
        """The weights of these are wanted, and no others'."""
        self.modules = {module: self.modules.get(module) or ModuleWanted(module) for module in modules}

    def told_modules(self, run: str, version: int, modules: Mapping[str, int], policy: str, now: float) -> None:
        """As `told`, with the newest version of each module."""
        if run >= self.run:
            self.newest_told = version if run > self.run else max(self.newest_told, version)
        self.told(run, -1, policy, now)  # there are no weights but the modules'
        for name, wanted in self.modules.items():
            wanted.told(run, modules.get(name, -1), "", now)

    def missing(self) -> str:
        if not self.run or not self.policy or self.blob_hash != self.policy:
            return super().missing()
        for name, wanted in self.modules.items():
            if wanted.newest is not None:
                continue
            if wanted.version < 0:
                return f"run {self.run} has no weights of module '{name}' yet: no runner has offered any"
            return f"version {wanted.version} of the weights of module '{name}' is on its way"
        return ""

    def news(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, STATE) and message.module in self.modules:
            self.modules[message.module].news(message, body, now)

    def answer(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, CONFIG):
            super().answer(message, body, now)
        elif isinstance(message, STATE) and message.module in self.modules:
            self.modules[message.module].answer(message, body, now)

    def asks(self, now: float) -> list[Message]:
        return super().asks(now) + [ask for wanted in self.modules.values() for ask in wanted.asks(now)]

    @property
    def moved(self) -> float | None:
        every = [super().moved, *(wanted.moved for wanted in self.modules.values())]
        return min((moved for moved in every if moved is not None), default=None)

    def restart(self, now: float) -> None:
        super().restart(now)
        for wanted in self.modules.values():
            wanted.restart(now)

    def wants(self, now: float) -> bool:
        return super().wants(now) or any(wanted.wants(now) for wanted in self.modules.values())
