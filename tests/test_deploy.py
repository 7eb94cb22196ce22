"""`deploy/` without Docker: everything that its files say of the rest of the project is true.

No Docker engine runs where this project is developed, so nothing here builds an image.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose.yaml"

TARGETS = {"broker": "broker", "train": "train", "simulator": "simulate"}
"""Build target -> command of `rllink-zmq` that its image starts."""
EXTRAS = {"build-broker": "broker", "build-train": "train", "build-simulator": "zstd"}
"""Build stage -> extra of pyproject.toml that it installs."""


class Instruction(NamedTuple):
    word: str
    rest: str


class Stage(NamedTuple):
    parent: str
    instructions: list[Instruction]

    def all(self, word: str) -> list[str]:
        return [i.rest for i in self.instructions if i.word == word]


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name. Each has a name."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            parent, name = re.split(r"\s+AS\s+", rest)
            stage = found[name] = Stage(parent, [])
        else:
            stage.instructions.append(Instruction(word, rest))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those it is made from, the nearest first."""
    known = stages()
    line = []
    while name in known:
        line.append(known[name])
        name = known[name].parent
    return line


def last(name: str, word: str) -> str:
    """What `word` says at the end of a stage, its own or inherited."""
    return next((said[-1] for stage in lineage(name) if (said := stage.all(word))), "")


def interpolated(value: Any) -> Any:
    """`${NAME:-default}` -> default, all the way down: the file as it is with nothing set."""
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    if isinstance(value, list):
        return [interpolated(v) for v in value]
    if isinstance(value, dict):
        return {k: interpolated(v) for k, v in value.items()}
    return value


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = interpolated(yaml.safe_load(COMPOSE.read_text()))["services"]
    return found


def command_line(service: str) -> list[str]:
    """What the container of a service runs: the image's ENTRYPOINT, then the service's command."""
    spec = services()[service]
    entrypoint: list[str] = json.loads(last(spec["build"]["target"], "ENTRYPOINT"))
    return [*entrypoint, *spec["command"]]


def accept(line: list[str]) -> click.Context:
    """Let click read a command line without running it. Raises `click.ClickException` for what it would refuse."""
    from rllink_zmq.cli import main

    program, name, *arguments = line
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert name in main.commands, f"rllink-zmq has no command {name}"
    parent = click.Context(main, info_name=program, auto_envvar_prefix="RLLINK")
    context: click.Context = main.commands[name].make_context(name, list(arguments), parent=parent)
    return context


# ---- compose.yaml ---------------------------------------------------------------------------------------------


def test_compose_follows_the_compose_specification() -> None:
    line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_service_for_each_target() -> None:
    found = {name: s["build"]["target"] for name, s in services().items()}
    assert found == {"broker": "broker", "trainer": "train", "simulator": "simulator"}
    for spec in services().values():
        context = (COMPOSE.parent / spec["build"]["context"]).resolve()
        assert context == ROOT
        assert context / spec["build"]["dockerfile"] == DOCKERFILE


@pytest.mark.parametrize("service", ["broker", "trainer", "simulator"])
def test_each_command_is_one_that_the_cli_takes(service: str) -> None:
    line = command_line(service)
    assert line[:2] == ["rllink-zmq", TARGETS[services()[service]["build"]["target"]]]
    context = accept(line)
    known = {option for parameter in context.command.params for option in parameter.opts}
    used = {argument.split("=")[0] for argument in line[2:]}
    assert used
    assert used <= known


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(click.NoSuchOption):
        accept(["rllink-zmq", "broker", "--no-such-option=1"])


def test_environment_variables_are_options() -> None:
    """RLLINK_<COMMAND>_<OPTION>, wherever deploy/ names one."""
    from rllink_zmq.cli import main

    known = {
        f"RLLINK_{command}_{parameter.name}".upper().replace("-", "_")
        for command, body in main.commands.items()
        for parameter in body.params
    }
    text = "".join(p.read_text() for p in (COMPOSE, DOCKERFILE, ROOT / "deploy" / "README.md"))
    named = set(re.findall(r"\bRLLINK_[A-Z_]+\b", text))
    assert named
    assert named <= known


def test_peers_dial_what_the_broker_binds() -> None:
    bound = dict(a.removeprefix("--").split("=", 1) for a in command_line("broker")[2:] if "=" in a)
    port = {name: address.rsplit(":", 1)[1] for name, address in bound.items()}
    assert f"--broker=tcp://broker:{port['frontend']}" in command_line("simulator")
    assert f"--broker=tcp://broker:{port['backend']}" in command_line("trainer")
    assert set(port.values()) == set(last("broker", "EXPOSE").split())
    assert f"127.0.0.1:{port['admin']}/healthz" in last("broker", "HEALTHCHECK")


def test_the_open_broker_is_reached_by_its_own_network_only() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    assert "--insecure" in command_line("broker")
    assert compose["networks"]["private"] == {"internal": True}
    assert {s: spec["networks"] for s, spec in services().items()} == {
        "broker": ["private", "admin"],
        "trainer": ["private"],
        "simulator": ["private"],
    }
    published = {s: spec["ports"] for s, spec in services().items() if "ports" in spec}
    assert published == {"broker": ["127.0.0.1:5580:5580"]}


def test_all_wait_for_a_healthy_broker() -> None:
    waiting = {s: spec["depends_on"] for s, spec in services().items() if "depends_on" in spec}
    healthy = {"broker": {"condition": "service_healthy"}}
    assert waiting == {"trainer": healthy, "simulator": healthy}


def test_checkpoints_outlive_the_container() -> None:
    trainer = services()["trainer"]
    (mounted,) = trainer["volumes"]
    volume, path = mounted.split(":")
    assert volume in yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert f"--checkpoint={path}" in trainer["command"]
    assert last("train", "VOLUME") == path
    assert any(f"-o rllink -g rllink {path}" in run for run in lineage("train")[-1].all("RUN"))
    assert trainer["shm_size"]


# ---- Dockerfile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_each_image_runs_its_command_as_nobody_special(target: str) -> None:
    assert json.loads(last(target, "ENTRYPOINT")) == ["rllink-zmq", TARGETS[target]]
    user, _, group = last(target, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    said = [i.word for i in stages()[target].instructions]
    assert said.index("USER") < said.index("ENTRYPOINT")
    assert lineage(target)[-1].parent == "python:3.11-slim"


@pytest.mark.parametrize("target", TARGETS)
def test_each_image_starts_without_a_shell(target: str) -> None:
    said = [last(target, word) for word in ("ENTRYPOINT", "CMD")]
    said.append(last(target, "HEALTHCHECK").partition("CMD")[2].strip())
    for words in filter(None, said):
        assert all(isinstance(word, str) for word in json.loads(words))


@pytest.mark.parametrize(("stage", "extra"), EXTRAS.items())
def test_each_image_installs_its_extra_at_the_tested_versions(stage: str, extra: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not extra or extra in known
    dependencies, ours = stages()[stage].all("RUN")
    package = f'".[{extra}]"' if extra else "."
    assert dependencies == f"pip install --constraint constraints.txt {package}"
    assert ours == "pip install --no-deps --force-reinstall ."
    target = stage.removeprefix("build-")
    assert stages()[target].all("COPY") == [f"--from={stage} /opt/rllink /opt/rllink"]


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    copied = {
        source
        for stage in stages().values()
        for rest in stage.all("COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert {"pyproject.toml", "constraints.txt", "rllink_zmq", "broker"} <= copied
    patterns = DOCKERFILE.with_suffix(".dockerignore").read_text().splitlines()
    let_in = {p.removeprefix("!") for p in patterns if p.startswith("!")}
    assert "*" in patterns
    for source in sorted(copied):
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, p) for p in let_in), f"{source} is kept out by .dockerignore"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied


# ---- the health check, run ------------------------------------------------------------------------------------


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on loopback that answers /healthz with `status`; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health(port: int) -> int:
    """The exit code of the broker image's health check, asking `port` instead of 5580."""
    python, *arguments = json.loads(last("broker", "HEALTHCHECK").partition("CMD")[2])
    assert python == "python"
    line = [sys.executable, *(a.replace(":5580/", f":{port}/") for a in arguments)]
    environment = {"http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(line, capture_output=True, timeout=30, env=environment).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_the_health_check_says_what_the_admin_says(status: int, code: int) -> None:
    with answering(status) as port:
        assert health(port) == code


def test_the_health_check_fails_where_nobody_listens() -> None:
    with answering(200) as port:
        pass
    assert health(port) == 1
