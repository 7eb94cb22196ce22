"""What one process of `rllink-zmq simulate` does: some simulators, each with its own environment and connection."""

from __future__ import annotations

import difflib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import gymnasium as gym

from rllink_zmq.client import Backpressure, Client, Inference, connect, settle
from rllink_zmq.client_agents import AgentsClient, connect_agents
from rllink_zmq.compression import Compression
from rllink_zmq.drive_loops import Tally, drive_many
from rllink_zmq.drive_loops_agents import Agents, agents_env, drive_agents_many, find_agents_env
from rllink_zmq.drive_loops_vector import drive_vectors
from rllink_zmq.errors import RllinkError, SettingsError

from . import output

REPORT_INTERVAL = 0.5
"""Seconds between two reports of a process while it works."""
SETTLE, SETTLE_INTERRUPTED = 5.0, 1.0
"""Seconds that all simulators of a process together wait at the end for what they sent to be settled."""


class Plan(NamedTuple):
    """Simulators `first` .. `first + number - 1`, with `episodes` each (None: without end). `vector`: how many
    environments each of them is, stepped together; 0 = a single one."""

    env: str
    broker: str
    first: int
    number: int
    episodes: int | None
    seed: int | None
    audit: str | None = None
    on_backpressure: Backpressure = "pause"
    inference: Inference = "local"
    evaluate: bool = False
    compression: Compression | None = None
    vector: int = 0


class Report(NamedTuple):
    """How far a process is. `returns`: of its last 100 episodes. The totals are (fragments, steps) by reason."""

    connected: int
    episodes: int
    steps: int
    returns: tuple[float, ...]
    outcomes: dict[str, tuple[int, int]]
    dropped: dict[str, tuple[int, int]]
    unsettled: int
    done: bool = False


def check_env(name: str) -> None:
    """Raises SettingsError, naming what comes close, for an environment that Gymnasium doesn't know."""
    if find_agents_env(name) is not None:
        return
    module, _, env_id = name.rpartition(":")
    if module and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python script.py` there would find it; processes inherit it
    try:
        if module:
            import_module(module)
        gym.spec(env_id)
    except ImportError as e:
        raise SettingsError(
            f"--env {name}: the module can't be imported ({e}): is it in the current directory or on PYTHONPATH?"
        ) from e
    except gym.error.Error as e:
        close = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "'module:Name-v0' imports a module of yours first"
        raise SettingsError(f"--env {name}: Gymnasium knows no such environment; {hint}") from e


def make_env(name: str, *, checked: bool) -> gym.Env[Any, Any]:
    """`gymnasium.make`. Raises SettingsError in one sentence if it can't."""
    try:
        return gym.make(name, disable_env_checker=not checked)
    except (gym.error.Error, ImportError) as e:
        raise SettingsError(f"--env {name} can't be made here: {e}") from e


def make_vector(name: str, number: int) -> gym.vector.VectorEnv[Any, Any, Any]:
    """`gymnasium.make_vec`: the environment's own vector form where it has one, else one after the other. Raises
    SettingsError in one sentence if it can't."""
    try:
        own = gym.spec(name.rpartition(":")[2]).vector_entry_point is not None
        return gym.make_vec(name, num_envs=number, vectorization_mode="vector_entry_point" if own else "sync")
    except (gym.error.Error, ImportError) as e:
        raise SettingsError(f"--env {name} --vector {number} can't be made here: {e}") from e


class Work:
    """Connect, run, close. `watch` is called with a report now and then."""

    def __init__(self, plan: Plan, watch: Callable[[Report], None]) -> None:
        self._plan = plan
        self._watch = watch
        self._tally = Tally()
        self._clients: list[Client] = []
        self._agents: list[tuple[AgentsClient, Agents]] = []
        self._envs: list[gym.Env[Any, Any]] = []
        self._vectors: list[gym.vector.VectorEnv[Any, Any, Any]] = []
        self._report_at = 0.0

    def report(self, *, done: bool = False) -> Report:
        """As of now."""
        outcomes: dict[str, tuple[int, int]] = {}
        dropped: dict[str, tuple[int, int]] = {}
        connected = unsettled = 0
        for stats in [client.stats for client in [*self._clients, *(client.base for client, _ in self._agents)]]:
            connected += stats.connected
            unsettled += stats.unsettled
            add(outcomes, stats.outcomes)
            add(dropped, stats.dropped)
        tally = self._tally
        return Report(
            connected, tally.episodes, tally.steps, tuple(tally.returns), outcomes, dropped, unsettled, done
        )  # fmt: skip

    def connect(self) -> None:
        """Make all environments and connections; waits for a broker as long as it takes."""
        plan = self._plan
        host = socket.gethostname()
        make = find_agents_env(plan.env)
        if make is not None:
            return self._connect_agents(make, host)
        for i in range(plan.first, plan.first + plan.number):
            if plan.vector:
                vector = make_vector(plan.env, plan.vector)
                self._vectors.append(vector)
                spaces = vector.single_observation_space, vector.single_action_space
            else:
                env = make_env(plan.env, checked=not self._envs)
                self._envs.append(env)
                spaces = env.observation_space, env.action_space
            self._clients.append(
                connect(
                    plan.broker,
                    observation_space=spaces[0],
                    action_space=spaces[1],
                    episodes=plan.vector or 1,
                    name=f"{host}/{os.getpid()}/{i}",
                    seed=None if plan.seed is None else plan.seed + plan.first,
                    on_backpressure=plan.on_backpressure,
                    inference=plan.inference,
                    compression=plan.compression,
                    timeout=None,
                    audit=plan.audit,
                )
            )

        return None

    def _connect_agents(self, make: Callable[[], Any], host: str) -> None:
        """`connect` for an environment of several agents. Raises SettingsError for what those can't do."""
        plan = self._plan
        if plan.vector:
            raise SettingsError(f"--env {plan.env} has several agents, which can't go with --vector yet")
        for i in range(plan.first, plan.first + plan.number):
            env = agents_env(make())
            client = connect_agents(
                plan.broker,
                observation_spaces=env.observation_spaces,
                action_spaces=env.action_spaces,
                name=f"{host}/{os.getpid()}/{i}",
                seed=None if plan.seed is None else plan.seed + plan.first,
                on_backpressure=plan.on_backpressure,
                inference=plan.inference,
                compression=plan.compression,
                timeout=None,
                audit=plan.audit,
            )
            self._agents.append((client, env))

    def run(self, stop: Callable[[], bool]) -> bool:
        """Run all simulators. True when they have done what was asked for."""

        def stopped() -> bool:
            now = time.monotonic()
            if now >= self._report_at:
                self._report_at = now + REPORT_INTERVAL
                self._watch(self.report())
            return stop()

        plan = self._plan
        seed = None if plan.seed is None else plan.seed + plan.first * (plan.vector or 1)
        if self._agents:
            drive_agents_many(
                self._agents, episodes=plan.episodes, seed=seed, stop=stopped, tally=self._tally,
                training_enabled=False if plan.evaluate else None,
            )  # fmt: skip
        elif plan.vector:
            drive_vectors(
                zip(self._clients, self._vectors, strict=True), episodes=plan.episodes, seed=seed, stop=stopped,
                tally=self._tally, training_enabled=not plan.evaluate,
            )  # fmt: skip
        else:
            drive_many(
                zip(self._clients, self._envs, strict=True), episodes=plan.episodes, seed=seed, stop=stopped,
                tally=self._tally, training_enabled=False if plan.evaluate else None,
            )  # fmt: skip
        return plan.episodes is not None and self._tally.episodes >= plan.episodes * plan.number

    def close(self, timeout: float) -> None:
        """Say BYE for all. `timeout` is for all of them together."""
        settle([*self._clients, *(client.base for client, _ in self._agents)], timeout)
        for client in self._clients:
            client.close(0.0)
        while self._agents:
            agents, several = self._agents.pop()
            agents.close(0.0)
            several.close()
        while self._envs:
            self._envs.pop().close()  # type: ignore[no-untyped-call]
        while self._vectors:
            self._vectors.pop().close()


def add(total: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]) -> None:
    """Sum up by reason."""
    for reason, (fragments, steps) in more.items():
        have = total.get(reason, (0, 0))
        total[reason] = (have[0] + fragments, have[1] + steps)


def in_child(plan: Plan, pipe: Connection) -> None:
    """The main function of a process of its own. Sends reports, and at last a report that is done, or an error's text.

    Ends when the parent does: the pipe breaks. SIGINT is the parent's business (a terminal sends it to all), SIGTERM
    asks to stop.
    """
    output.show_logs()
    stop = output.Stop()
    driving = False

    def handle(signum: int, _: FrameType | None) -> None:
        stop.ask(signum)
        if not driving:
            raise output.Interrupted(signum)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
    threading.Thread(target=_end_with_parent, args=(pipe, os.getppid()), daemon=True).start()
    work = Work(plan, pipe.send)
    result: Report | str
    try:
        try:
            work.connect()
            driving = True
            done = work.run(lambda: bool(stop))
            work.close(SETTLE if done else SETTLE_INTERRUPTED)
            result = work.report(done=done)
        except RllinkError as e:
            driving = True
            result = str(e)
        pipe.send(result)
    except (output.Interrupted, OSError):  # OSError: the parent is gone, and with it the pipe
        return
    finally:
        driving = True  # nothing may interrupt the BYEs
        work.close(0.0)


def _end_with_parent(pipe: Connection, parent: int) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
