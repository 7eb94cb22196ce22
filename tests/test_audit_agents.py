"""The audit of several agents: made-up episodes through builder and learner connectors, whose logs are judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from test_agents_episodes import MODULE_OF, SPACES, fragments, mapping, trajectory
from test_agents_episodes import module as module

from rllink_zmq.audit import Log, Run, read
from rllink_zmq.audit_judge import Verdict, judge
from rllink_zmq.rllib.audit import AuditPiece
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.session_runner import Lease

CUTS = (1, 2, 3, 7, 8, 20)
CALLS = (3, 8)


def audited(directory: Path, module: MultiRLModule, style: str, again: Sequence[int] = ()) -> Verdict:
    """Of one episode: its simulator tells what it sent and that it was delivered, a runner what it handed over in three
    calls, a learner what entered its batches; those of `again` come twice."""
    leases = list(fragments(*trajectory(3, 30, style), CUTS))
    simulator, learner = Log(directory, "simulator"), Log(directory, "learner")
    builder = MultiAgentEpisodeBuilder(*SPACES, module, mapping, audit=Log(directory, "runner"))
    builder.dist_inputs = {"p": 3, "q": 3}
    piece = AuditPiece(log=learner)
    for lease in leases:
        message = lease.message
        simulator.sent(message.session, message.number, sum(rows.steps for rows in message.agents), message.run, 4)
    batches: list[list[MultiAgentEpisode]] = []
    pending: list[Lease] = []
    for lease in leases:
        pending.append(lease)
        if lease.message.t0 + lease.message.steps in CALLS or lease.message.end != "no":
            built, refused = builder.build(pending)
            assert not refused
            batches.append([one.episode for one in built if one.episode is not None])
            pending = []
    batches = [batch for batch in batches if batch]  # a call may have completed nobody's step
    for i in [*range(len(batches)), *again]:
        shared: dict[str, Any] = {}
        episodes = cloudpickle.loads(cloudpickle.dumps(batches[i]))
        AddOneTsToEpisodesAndTruncate()(rl_module=module, batch={}, episodes=episodes, shared_data=shared)
        piece(rl_module=module, batch={}, episodes=episodes, shared_data=shared)
    for lease in leases:
        simulator.settled(lease.message.session, lease.message.number, "delivered")
    simulator.closed(leases[0].message.session, 0)
    return judge(read([directory]))


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
def test_each_agents_steps_are_followed_into_the_batch(tmp_path: Path, module: MultiRLModule, style: str) -> None:
    verdict = audited(tmp_path, module, style)
    assert verdict.holds, verdict.broken
    assert verdict.used == verdict.sent
    assert verdict.used[0] == len(CUTS) + 1
    if style == "together":
        assert verdict.used[1] == 30 * len(MODULE_OF)


def test_agents_steps_that_come_twice_are_seen(tmp_path: Path, module: MultiRLModule) -> None:
    verdict = audited(tmp_path, module, "ragged", again=(1,))
    assert set(verdict.broken) == {"twice"}


def test_a_fragment_in_which_no_agent_completed_a_step_keeps_its_promise(tmp_path: Path) -> None:
    """Of agents that act in turn the first fragments have none."""
    simulator, runner, learner = (Log(tmp_path, side) for side in ("simulator", "runner", "learner"))  # type: ignore[arg-type]
    session = bytes(16)
    for number, steps in ((1, 0), (2, 3)):
        simulator.sent(session, number, steps, "run", 1)
        runner.handed([(session, number, steps)])
        simulator.settled(session, number, "delivered")
    learner.entered([Run(session.hex(), 2, 0, 3)], 0, 1)
    simulator.closed(session, 0)
    verdict = judge(read([tmp_path]))
    assert verdict.holds and verdict.used == (2, 3)
    # One that was delivered, and that no runner has handed over, is lost all the same.
    simulator.sent(session, 3, 0, "run", 1)
    simulator.settled(session, 3, "delivered")
    assert set(judge(read([tmp_path])).broken) == {"lost"}
