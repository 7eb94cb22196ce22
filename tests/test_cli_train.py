"""`rllink-zmq train` and `demo` as a user would mistype them. No Ray is started here."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from processes import PATIENCE_S, broker, rllink, until

from rllink_zmq.cli import main, output
from rllink_zmq.errors import SettingsError
from rllink_zmq.rllib.train import TrainOptions, make_config, newest_checkpoint, read_config, save

NOWHERE = "tcp://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--runers", "3"], "'--runners'"),
        (["train", "--algo", "DDPG"], "'DDPG' is not one of 'PPO', 'APPO'"),
        (["train", "--runners", "-1"], "-1 is not in the range x>=0"),
        (["train", "--stop-time", "0"], "0.0 is not in the range x>0"),
        (["demo", "--simulators", "0"], "0 is not in the range x>=1"),
        (["trian"], "No such command 'trian'"),
        (["train", "--config", "missing.yaml"], "'missing.yaml' does not exist"),
        (["train", "--resume", "missing"], "'missing' does not exist"),
        (["train", "--auto-resume"], "give --checkpoint"),
        (["train", "--audit", "README.md"], "'README.md' is a file"),
        (["audit"], "Missing argument 'DIR...'"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize("name", ["broker", "train", "simulate", "status", "audit", "demo"])
def test_every_command_has_examples(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output and f"rllink-zmq {name}" in result.output


def test_options_come_from_the_environment() -> None:
    result = CliRunner().invoke(main, ["train"], env={"RLLINK_TRAIN_BROKER": "nowhere"})
    assert result.exit_code == 1
    assert "expected an address like tcp://127.0.0.1:5555, got 'nowhere'" in result.output


def test_without_a_broker_it_says_so_keeps_trying_and_stops_on_ctrl_c() -> None:
    with rllink("train", "--env", "CartPole-v1", "--broker", NOWHERE, stderr=subprocess.PIPE) as training:
        assert training.stderr is not None
        assert f"waiting for the broker at {NOWHERE}" in training.stderr.readline()
        assert "is `rllink-zmq broker` running there?" in training.stderr.readline()
        training.send_signal(signal.SIGINT)
        training.wait(PATIENCE_S)
    assert training.returncode == 130


def test_without_simulators_and_env_it_waits_for_the_first_ones_spaces() -> None:
    with (
        broker() as addresses,
        rllink("train", "--broker", addresses["backend"], stderr=subprocess.PIPE) as training,
    ):
        stderr = training.stderr
        assert stderr is not None
        until(lambda: "0 simulators are connected" in stderr.readline(), "it says what it waits for")
        training.send_signal(signal.SIGTERM)
        training.wait(PATIENCE_S)
    assert training.returncode == 143


@pytest.mark.parametrize(
    ("algo", "env"), [("IMPALA", "CartPole-v1"), ("DQN", "CartPole-v1"), ("SAC", "Pendulum-v1"), ("SAC", "CartPole-v1")]
)
def test_rllib_takes_what_train_sets(algo: str, env: str) -> None:
    config = make_config(TrainOptions(broker=NOWHERE, env=env, algo=algo, runners=1))
    config.copy(copy_frozen=False).validate()
    assert type(config).__name__ == f"{algo}Config" and "fcnet_hiddens" in config.model_config


def test_an_env_that_does_not_exist(tmp_path: Path) -> None:
    with broker() as addresses:
        result = CliRunner().invoke(main, ["train", "--broker", addresses["backend"], "--env", "CartPole-v11"])
    assert result.exit_code == 1
    assert "'CartPole-v11' can't be made here" in result.output and "Traceback" not in result.output


def test_a_config_file_with_a_typo(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gama: 0.9\n")
    with pytest.raises(SettingsError, match="PPO has no setting 'gama': did you mean gamma"):
        make_config(TrainOptions(broker=NOWHERE, env="CartPole-v1", config=file))
    file.write_text("rllink:\n  lag: 3\n")
    with pytest.raises(SettingsError, match="'rllink' has no setting 'lag'; it has lag_limit"):
        make_config(TrainOptions(broker=NOWHERE, env="CartPole-v1", config=file))
    file.write_text("- 1\n")
    with pytest.raises(SettingsError, match="expected a mapping"):
        read_config(file)
    file.write_text("a: [")
    with pytest.raises(SettingsError, match="is no YAML"):
        read_config(file)
    with pytest.raises(SettingsError, match="No such file"):
        read_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rllink: 5", "'rllink' must be a mapping, it is 5"),
        ("model_config: 5", "'model_config' must be a mapping, it is 5"),
        ("rllink: {lag_limit: a}", "'lag_limit' of 'rllink' must be a whole number, it is 'a'"),
        ("training: {lr: 1}", "PPO has no setting 'training'"),
        ("lr: abc", "RLlib refuses it: Invalid `lr`"),
    ],
)
def test_a_config_file_with_a_wrong_value(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        make_config(TrainOptions(broker=NOWHERE, env="CartPole-v1", config=file))


def test_a_config_file_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "lr: 0.002\ntrain_batch_size_per_learner: 700\nrllink:\n  lag_limit: 3\nmodel_config:\n  fcnet_hiddens: [8]\n"
    )
    config = make_config(TrainOptions(broker=NOWHERE, env="CartPole-v1", config=file, runners=3, seed=5))
    assert (config.lr, config.train_batch_size_per_learner, config.num_env_runners, config.seed) == (0.002, 700, 3, 5)
    assert config.env_config["rllink_zmq"]["lag_limit"] == 3
    assert config.model_config["fcnet_hiddens"] == [8]


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no checkpoint there"):
        newest_checkpoint(tmp_path)


def test_checkpoints_of_another_training_in_the_folder_do_not_outlive_new_ones(tmp_path: Path) -> None:
    class Saved:
        def __init__(self, iteration: int) -> None:
            self.iteration = iteration
            self.rllink_trainer = SimpleNamespace(pool=SimpleNamespace(target=iteration))

        def save_to_path(self, path: str) -> None:
            Path(path).mkdir()

    for iteration in (100, 101, 6):
        newest = save(Saved(iteration), tmp_path)  # type: ignore[arg-type]
        assert newest_checkpoint(tmp_path) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-000101", "checkpoint-000006"}
    spaces = "CartPole-v1"
    assert make_config(TrainOptions(env=spaces, resume=tmp_path)).num_env_runners == 6, "as the pool was"
    assert make_config(TrainOptions(env=spaces, resume=tmp_path, runners=3)).num_env_runners == 3
    assert make_config(TrainOptions(env=spaces)).num_env_runners == 2


def test_a_signal_that_comes_back_from_inside_of_ray_ends_the_command_as_any() -> None:
    """Its compiled code makes a SystemError of what a handler raises."""
    with pytest.raises(click.exceptions.Exit) as ended, output.ending(click.Context(click.Command("train"))):
        try:
            raise output.Interrupted(signal.SIGTERM)
        except output.Interrupted as e:
            raise SystemError("CoreWorker.wait returned a result with an exception set") from e
    assert ended.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(SystemError), output.ending(click.Context(click.Command("train"))):
        raise SystemError("another")
