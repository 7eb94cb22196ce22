"""Bytes on the wire against the bytes of the arrays, and what zstd makes of both bytes and CPU time.

A simulator's process with this package's client, a broker's process, and a runner's that unpacks what it takes; between
them proxies that count every byte that TCP carries for them, in both directions: ZeroMQ's framing, headers, HELLO,
acknowledgements and heartbeats. (Not IP's and TCP's own headers: 2 to 4 % on Ethernet, whoever sends.) The arrays are
the columns as the runner has them in the end.

Observations are real ones, recorded before: two Atari games of ale-py as single frames of 84x84 and stacked by four,
CartPole, and MuJoCo's HalfCheetah, random actions. They are played back, so that CPU time is that of sending
(simulator) and of receiving and unpacking (runner). zstd and none take turns.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import measure
import numpy as np
from chaos_proxy import Proxy
from numpy.typing import NDArray
from processes import Helper, broker, helpers, questions

from rllink_zmq import connect
from rllink_zmq.compression import arrays_of
from rllink_zmq.messages import TrainerHello
from rllink_zmq.session_runner import RunnerSession, TrainerSession
from rllink_zmq.spaces import spaces_to_wire
from rllink_zmq.transport import Connection, poll

sys.path.append(str(Path(__file__).parent.parent / "examples" / "atari"))

RUN = "0123456789ab-00000000"
FRAGMENT_STEPS = 200
"""Of floats. Images are cut where a fragment has its 1 MB: at 148 frames, or 36 stacks of four."""

RECORDED = 1000
"""Env steps that are played back again and again."""


class Load(NamedTuple):
    """`make()`: an environment. `steps`: of one round."""

    title: str
    make: Callable[[], gym.Env[Any, Any]]
    steps: int


def atari(name: str, stacked: int) -> gym.Env[Any, Any]:
    from game import Game

    return Game(name, stacked=stacked)


LOADS = {
    "Boxing": Load("Boxing, 84x84", lambda: atari("Boxing", 1), 4_000),
    "Boxing, stacked": Load("Boxing, 84x84x4", lambda: atari("Boxing", 4), 2_000),
    "Breakout": Load("Breakout, 84x84", lambda: atari("Breakout", 1), 4_000),
    "Breakout, stacked": Load("Breakout, 84x84x4", lambda: atari("Breakout", 4), 2_000),
    "CartPole": Load("CartPole, 4 floats", lambda: gym.make("CartPole-v1"), 40_000),
    "HalfCheetah": Load("HalfCheetah, 17 floats", lambda: gym.make("HalfCheetah-v5"), 40_000),
}
WAYS = ("none", "zstd")


class Played(NamedTuple):
    """What an environment gave: `ends[i]` says that the episode ended with step i, or an observation began one."""

    observations: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    ends: NDArray[np.bool_]


def record(env: gym.Env[Any, Any], steps: int) -> Played:
    """Random actions, `steps` of them."""
    env.action_space.seed(1)
    observation, _ = env.reset(seed=1)
    rows: list[tuple[Any, Any, float, bool]] = []
    while len(rows) < steps:
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((np.array(observation), action, float(reward), terminated or truncated))
        observation = env.reset()[0] if terminated or truncated else after
    observations, actions, rewards, ends = zip(*rows, strict=True)
    return Played(np.stack(observations), np.stack(actions), np.array(rewards, np.float32), np.array(ends))


def simulator(connection: Pipe, name: str, recorded: int) -> None:
    """Plays back, over a new connection for each question: CPU seconds from the first step until all is settled."""
    env = LOADS[name].make()
    played = record(env, recorded)
    connection.send("ready")
    for address, way, steps in questions(connection):
        with connect(
            address, observation_space=env.observation_space, action_space=env.action_space, timeout=30,
            compression="zstd" if way == "zstd" else None,
        ) as client:  # fmt: skip
            before = time.process_time()
            done = 0
            while done < steps:
                done += _episode(client, played, steps - done, done)
            client.close(60)
            connection.send(time.process_time() - before)


def _episode(client: Any, played: Played, most: int, at: int) -> int:
    """One episode from step `at` of what was recorded on: its steps."""
    length = len(played.ends)
    with client.start_episode() as episode:
        for done in range(1, most + 1):
            i = (at + done - 1) % length
            episode.log_action(played.observations[i], played.actions[i], -0.5)
            episode.log_returns(float(played.rewards[i]))
            if played.ends[i] or done == most:
                episode.end_episode(played.observations[(i + 1) % length], truncated=True)
                return done
    raise AssertionError("an episode has at least one step")


def runner(connection: Pipe, address: str, name: str) -> None:
    """The learner's side, played: what it takes it unpacks. Answers with CPU seconds, bytes of arrays, fragments."""
    env = LOADS[name].make()
    terms = TrainerHello(
        RUN, 4000, 1 << 30, 0, 1, FRAGMENT_STEPS, spaces_to_wire(env.observation_space, env.action_space), "policy", 1
    )
    trainer = TrainerSession(secrets.token_bytes(16), terms, b"-", name="played")
    session = RunnerSession(secrets.token_bytes(16), RUN, name="played")
    connections = [Connection(trainer, address), Connection(session, address)]
    for each in connections:
        each.open()
    connection.send("ready")
    for (steps,) in questions(connection):
        before = time.process_time()
        size = fragments = 0
        while steps > 0:
            poll(connections, None, 0.1)
            for each in connections:
                each.look()
            if session.taken is not None:
                for lease in session.taken:
                    size += sum(array.nbytes for array in arrays_of(lease.message, lease.body).values())
                    steps -= lease.message.steps
                    fragments += 1
                session.taken = None
                session.give_back(time.monotonic())
            session.take(1 << 30, time.monotonic())
            for each in connections:
                each.flush()
        connection.send((time.process_time() - before, size, fragments))


def proxies(connection: Pipe, *targets: int) -> None:
    """Proxies before these ports: theirs at first, then what they have carried so far."""
    between = [Proxy(target) for target in targets]
    connection.send([proxy.port for proxy in between])
    for _ in questions(connection):
        connection.send([proxy.carried for proxy in between])


def measured(load: str, options: Any) -> dict[str, list[dict[str, float]]]:
    """Rounds of one load, by way."""
    title, _, steps = LOADS[load]
    steps = steps // 20 if options.quick else steps
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with broker() as addresses:
        ports = [int(addresses[side].rpartition(":")[2]) for side in ("frontend", "backend")]
        with helpers((proxies, *ports)) as (between,):
            front, back = (f"tcp://127.0.0.1:{port}" for port in between.ready)
            recorded = RECORDED // 4 if options.quick else RECORDED
            with helpers((simulator, load, recorded), (runner, back, load)) as (plays, takes):
                for i, way in measure.rounds(2 if options.quick else 5, WAYS):
                    rounds[way].append(_round(between, plays, takes, front, way, steps))
                    print(f"  {title}, {way}, round {i + 1}: {rounds[way][-1]}", flush=True)
    return rounds


def _round(between: Helper, plays: Helper, takes: Helper, front: str, way: str, steps: int) -> dict[str, float]:
    before = between.ask()
    takes.tell(steps)
    plays.tell(front, way, steps)
    sending = plays.answer()
    receiving, size, fragments = takes.answer()
    carried = [after - then for after, then in zip(between.ask(), before, strict=True)]
    return {
        "steps": steps, "fragments": fragments, "arrays": size, "simulator to broker": carried[0],
        "broker to runner": carried[1], "simulator_us": 1e6 * sending / steps, "runner_us": 1e6 * receiving / steps,
    }  # fmt: skip


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("bytes", options)
    rows = []
    for load, (title, *_) in LOADS.items():
        rounds = measured(load, options)
        report.rounds[load] = rounds
        figures: dict[str, dict[str, float]] = {}
        for way in WAYS:
            shares = {
                hop: [each[hop] / each["arrays"] for each in rounds[way]]
                for hop in ("simulator to broker", "broker to runner")
            }
            costs = {key: measure.median([each[key] for each in rounds[way]]) for key in ("simulator_us", "runner_us")}
            per_step = measure.median([each["simulator to broker"] / each["steps"] for each in rounds[way]])
            figures[way] = {"bytes_per_step": per_step, **{h: measure.median(s) for h, s in shares.items()}, **costs}
            rows.append((title, way, per_step, *(f"{measure.median(s):.4f}" for s in shares.values()), *costs.values()))
            if way == "none" and "84x84" in title:
                worst = [max(pair) for pair in zip(*shares.values(), strict=True)]
                report.targets.append(measure.target(f"{title}: bytes on the wire / of arrays", worst, "at most", 1.02))
        report.figures[load] = figures
    report.table(
        "Bytes that TCP carries, both directions, and CPU time of sending and of receiving",
        ("observations", "compression", "bytes a step", "/ arrays, simulator to broker", "broker to runner",
         "µs a step, simulator", "runner"),
        rows,
    )  # fmt: skip
    report.show()


if __name__ == "__main__":
    main()
