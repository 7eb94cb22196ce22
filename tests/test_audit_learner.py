"""The learner's side of an audit: real episodes, through RLlib's own learner connectors, without a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray import cloudpickle
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.minibatch_utils import ShardEpisodesIterator
from test_episodes import ACT, OBS, lease

from rllink_zmq.audit import Entered, Handed, Log, Run, Unnamed, read_one
from rllink_zmq.errors import SettingsError
from rllink_zmq.rllib import attach
from rllink_zmq.rllib.audit import COLUMN, AuditPiece, names, runs
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.settings import LinkSettings
from rllink_zmq.session_runner import Lease

NOWHERE = "tcp://127.0.0.1:9"
SESSION, OTHER = b"s" * 16, bytes(range(240, 256))


class Mine(ConnectorV2):
    """A piece of a user's own."""

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        return batch


def chunks(directory: Path, *leases: Lease) -> list[SingleAgentEpisode]:
    """What a runner hands over, as it arrives at a learner."""
    builder = EpisodeBuilder(OBS, ACT, None, audit=Log(directory, "runner"))
    built, refused = builder.build(leases)
    assert not refused
    return [cloudpickle.loads(cloudpickle.dumps(one.episode)) for one in built]


def told(directory: Path, side: str = "learner") -> list[Any]:
    """The lines of all logs of one side."""
    return [line for path in sorted(directory.glob(f"{side}-*")) for line in read_one(path).lines]


def rows(directory: Path) -> list[tuple[bytes, int, int, int]]:
    """(session, number, first, steps) of what entered, sorted."""
    entered = [line for line in told(directory) if isinstance(line, Entered)]
    return sorted((bytes.fromhex(e.session), e.number, e.first, e.steps) for e in entered)


def piece(directory: Path) -> AuditPiece:
    return AuditPiece(log=Log(directory, "learner"))


def see(piece: AuditPiece, episodes: list[SingleAgentEpisode], *, extend: bool = True) -> None:
    """One train batch, as RLlib's pipelines make it: lengthened first."""
    shared: dict[str, Any] = {}
    if extend:
        AddOneTsToEpisodesAndTruncate()(rl_module=None, batch={}, episodes=episodes, shared_data=shared)
    piece(rl_module=None, batch={}, episodes=episodes, shared_data=shared)


def test_a_column_says_session_number_and_step() -> None:
    for session in (SESSION, OTHER):
        assert runs(names(session, 2**53 - 1, 3)) == [Run(session.hex(), 2**53 - 1, 0, 3)]
    joined = np.concatenate([names(SESSION, 1, 2), names(SESSION, 2, 3), names(OTHER, 3, 1)])
    assert runs(joined) == [Run(SESSION.hex(), 1, 0, 2), Run(SESSION.hex(), 2, 0, 3), Run(OTHER.hex(), 3, 0, 1)]
    assert runs(joined[1:4]) == [Run(SESSION.hex(), 1, 1, 1), Run(SESSION.hex(), 2, 0, 2)]
    assert runs(joined[:0]) == []


@pytest.mark.parametrize("extend", [True, False])
def test_joined_fragments_are_told_apart(tmp_path: Path, extend: bool) -> None:
    episodes = chunks(
        tmp_path,
        lease(steps=2, number=1),
        lease(steps=3, t0=2, number=2, end="terminated"),
        lease(steps=1, number=1, session=OTHER),
    )
    assert len(episodes) == 2
    see(piece(tmp_path), episodes, extend=extend)
    assert rows(tmp_path) == [(SESSION, 1, 0, 2), (SESSION, 2, 0, 3), (OTHER, 1, 0, 1)]
    assert [(h.number, h.steps) for h in told(tmp_path, "runner") if isinstance(h, Handed)] == [(1, 2), (2, 3), (1, 1)]


@pytest.mark.parametrize("learners", [2, 3])
def test_slices_for_several_learners_make_the_whole(tmp_path: Path, learners: int) -> None:
    episodes = chunks(
        tmp_path, lease(steps=4, number=1), lease(steps=5, t0=4, number=2), lease(steps=6, number=1, session=OTHER)
    )
    for shard in ShardEpisodesIterator(episodes, num_shards=learners, len_lookback_buffer=2):
        see(piece(tmp_path), shard)
    steps = sorted((s, n, i) for s, n, first, k in rows(tmp_path) for i in range(first, first + k))
    whole = ((SESSION, 1, 4), (SESSION, 2, 5), (OTHER, 1, 6))
    assert steps == [(s, n, i) for s, n, k in whole for i in range(k)]
    assert len(list(tmp_path.glob("learner-*"))) == learners


def test_an_episode_that_comes_again_is_seen_again(tmp_path: Path) -> None:
    episodes = chunks(tmp_path, lease(steps=2, number=5))
    one = piece(tmp_path)
    see(one, episodes)
    see(one, episodes)
    assert rows(tmp_path) == [(SESSION, 5, 0, 2)] * 2
    assert [line.batch for line in told(tmp_path)] == [1, 2]


def test_steps_without_a_name_are_counted(tmp_path: Path) -> None:
    built, _ = EpisodeBuilder(OBS, ACT, None).build([lease(steps=3)])
    see(piece(tmp_path), [built[0].episode])
    assert [line.steps for line in told(tmp_path) if isinstance(line, Unnamed)] == [3]


def test_a_refused_fragment_was_not_handed_over(tmp_path: Path) -> None:
    builder = EpisodeBuilder(OBS, ACT, None, audit=Log(tmp_path, "runner"))
    builder.build([lease(number=1, action_logp=None), lease(number=2)])
    assert [h.number for h in told(tmp_path, "runner")] == [2]


def test_without_an_audit_there_is_no_column() -> None:
    built, _ = EpisodeBuilder(OBS, ACT, None).build([lease()])
    assert COLUMN not in built[0].episode.extra_model_outputs


@pytest.mark.parametrize("make", [PPOConfig, APPOConfig])
def test_the_train_batch_is_what_it_is_without_an_audit(tmp_path: Path, make: type[AlgorithmConfig]) -> None:
    batches = []
    for audit in (None, tmp_path):
        config = make().environment(observation_space=OBS, action_space=ACT)
        attach(config, NOWHERE, audit=audit)
        module = config.get_multi_rl_module_spec(spaces={"default_policy": (OBS, ACT)}).build()
        assert isinstance(module, MultiRLModule)
        pipeline = config.build_learner_connector(None, None, device=torch.device("cpu"))
        if make is PPOConfig:
            pipeline.prepend(AddOneTsToEpisodesAndTruncate())  # as PPOLearner.build() does
        assert [type(p) for p in pipeline.connectors[:2]].count(AuditPiece) == (audit is not None)
        builder = EpisodeBuilder(OBS, ACT, None, audit=None if audit is None else Log(audit, "runner"))
        built, _ = builder.build([lease(steps=2, number=1), lease(steps=3, t0=2, number=2), lease(session=OTHER)])
        batch = pipeline(rl_module=module, batch={}, episodes=[b.episode for b in built], shared_data={})
        batches.append(batch["default_policy"])
    plain, audited = batches
    assert plain.keys() == audited.keys() and COLUMN not in audited
    for key in plain:
        assert torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(audited[key])), key
    assert rows(tmp_path) == [(SESSION, 1, 0, 2), (SESSION, 2, 0, 3), (OTHER, 1, 0, 3)]


def test_the_users_own_connectors_stay(tmp_path: Path) -> None:
    def pieces(config: AlgorithmConfig) -> list[type]:
        return [type(p) for p in config.build_learner_connector(None, None).connectors][:4]

    for own in (lambda *_: Mine(), lambda *_: [Mine()], lambda *_: (Mine(),)):
        config = PPOConfig().environment("CartPole-v1").learners(learner_connector=own)
        attach(attach(config, NOWHERE, audit=tmp_path), NOWHERE, audit=tmp_path)
        assert pieces(config)[:2] == [AuditPiece, Mine] and pieces(config).count(AuditPiece) == 1
        attach(config, NOWHERE)
        assert pieces(config)[0] is Mine and AuditPiece not in pieces(config)
    assert attach(PPOConfig().environment("CartPole-v1"), NOWHERE)._learner_connector is None


def test_an_audit_survives_copies_dicts_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = attach(PPOConfig().environment("CartPole-v1"), NOWHERE, audit="logs")
    made = [
        config.copy(),
        PPOConfig().update_from_dict(config.to_dict()),
        cloudpickle.loads(cloudpickle.dumps(config)),
    ]
    for other in made:
        assert LinkSettings.of(other).audit == str(tmp_path / "logs")
        first = other.build_learner_connector(None, None).connectors[0]
        assert isinstance(first, AuditPiece)
        first(batch={}, episodes=[])
    assert len(list((tmp_path / "logs").glob("learner-*"))) == len(made)


def test_a_directory_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="can't be made"):
        attach(PPOConfig().environment("CartPole-v1"), NOWHERE, audit=tmp_path / "file")


def test_images_and_discrete_observations_need_nothing_special(tmp_path: Path) -> None:
    images = gym.spaces.Box(0, 255, (8, 8, 1), np.uint8)
    builder = EpisodeBuilder(images, ACT, None, audit=Log(tmp_path, "runner"))
    built, refused = builder.build([lease(obs=np.zeros((4, 8, 8, 1), np.uint8))])
    assert not refused
    see(piece(tmp_path), [built[0].episode])
    assert rows(tmp_path) == [(SESSION, 1, 0, 3)]
