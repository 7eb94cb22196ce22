"""The HTTP admin beside a real broker."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from broker import admin as admin_module
from broker.admin import Admin, Question
from broker.server import Server
from rllink_zmq import __version__
from rllink_zmq.errors import SettingsError

ANY = "tcp://127.0.0.1:*"
TIMEOUT = 20.0


def get(url: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(Request(url, method=method), timeout=TIMEOUT) as response:
            return response.status, json.load(response)
    except HTTPError as e:
        with e:
            return e.code, json.load(e)


@contextmanager
def serving() -> Iterator[Server]:
    server = Server(None, frontend=ANY, backend=ANY, weights=ANY, admin="127.0.0.1:0")
    server.bind()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(TIMEOUT)
        server.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as server:
        assert server.admin is not None
        yield server.admin


def test_healthz(url: str) -> None:
    assert get(f"{url}/healthz") == (200, {"status": "ok"})


def test_readyz_names_what_is_missing(url: str) -> None:
    code, said = get(f"{url}/readyz")
    assert code == 503
    assert said["ready"] is False
    assert any("trainer" in what for what in said["waiting_for"])
    assert any("simulator" in what for what in said["waiting_for"])


def test_status(url: str) -> None:
    code, said = get(f"{url}/status")
    assert code == 200
    assert said["simulators"] == 0
    assert said["runners"] == []
    assert said["weights"]["version"] == -1
    assert "run_id" in said["weights"]
    zero = {"fragments": 0, "steps": 0}
    assert said["ledger"] == {"received": zero, "delivered": zero, "in_flight": zero, "dropped": {}}
    assert said["process"]["rss_bytes"] > 10e6
    assert said["process"]["cpu_s"] > 0
    assert said["package"] == __version__
    assert said["addresses"]["admin"] == url
    assert said["addresses"]["frontend"].startswith("tcp://127.0.0.1:")


@pytest.mark.parametrize("path", ["/", "/metrics", "/status/x", "/%00"])
def test_an_unknown_path_names_the_three(url: str, path: str) -> None:
    code, said = get(f"{url}{path}")
    assert code == 404
    for known in ("/healthz", "/readyz", "/status"):
        assert known in said["error"]


def test_nothing_can_be_changed(url: str) -> None:
    code, said = get(f"{url}/status", "POST")
    assert code == 405
    assert "GET" in said["error"]


def test_bytes_that_are_no_http(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), TIMEOUT) as raw:
        raw.sendall(b"\x00\xff" * 100 + b"\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert get(f"{url}/healthz")[0] == 200


def test_many_at_once(url: str) -> None:
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(get(f"{url}/status")[0])) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert codes == [200] * 20


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/status"])
def test_a_loop_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(admin_module, "ANSWER_WITHIN", 0.1)
    with serving() as server:
        on = threading.Event()
        say = server._say

        def stuck(question: Question, number: int) -> dict[str, Any]:
            on.wait(TIMEOUT)
            return say(question, number)

        monkeypatch.setattr(server, "_say", stuck)
        try:
            code, said = get(f"{server.admin}{path}")
            assert code == 503
            assert "not answered within" in said["error"]
        finally:
            on.set()
        monkeypatch.setattr(admin_module, "ANSWER_WITHIN", TIMEOUT)
        assert get(f"{server.admin}/healthz")[0] == 200


def test_a_question_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        say = server._say

        def broken(_: Question) -> dict[str, Any]:
            raise RuntimeError("a bug")

        monkeypatch.setattr(server, "_say", broken)
        assert get(f"{server.admin}/status")[0] == 503
        monkeypatch.setattr(server, "_say", say)
        assert get(f"{server.admin}/healthz")[0] == 200


def test_questions_do_not_pile_up() -> None:
    server = Server(None, frontend=ANY, backend=ANY, weights=ANY, admin=None)
    server.bind()
    asked = [server.ask(Question.STATUS) for _ in range(1000)]
    assert sum(future.cancelled() for future in asked) >= 900
    server.close()
    assert all(future.cancelled() for future in asked)


def test_the_port_is_given_back() -> None:
    def ask(_: Question) -> Future[dict[str, Any]]:
        raise AssertionError

    for _ in range(2):
        first = Admin("127.0.0.1", 0, ask)
        first.start()
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(SettingsError, match="the port is in use"):
            Admin("127.0.0.1", port, ask)
        first.close()
        again = Admin("127.0.0.1", port, ask)
        again.close()


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    request = Request(url, data=body, headers={"Content-Type": kind})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT) as response:
            return response.status, json.load(response)
    except HTTPError as e:
        with e:
            return e.code, json.load(e)


@pytest.mark.parametrize(
    ("body", "kind", "code", "says"),
    [
        (b'{"runners": 2}', "text/plain", 415, "expected a JSON body"),
        (b"2", "application/json", 422, 'expected {"runners": N}'),
        (b'{"runners": -1}', "application/json", 422, "N from 0 to 1000"),
        (b'{"runners": true}', "application/json", 422, "N from 0 to 1000"),
        (b'{"runners": 1001}', "application/json", 422, "N from 0 to 1000"),
        (b"{", "application/json; charset=utf-8", 422, 'expected {"runners": N}'),
        (b'{"runners": 2}', "application/json", 409, "no trainer is connected"),
    ],
)
def test_scale_wants_a_number_and_a_trainer(body: bytes, kind: str, code: int, says: str) -> None:
    with serving() as server:
        answered, said = post(f"{server.admin}/scale", body, kind)
    assert answered == code and says in said["error"]


def test_scale_takes_no_get() -> None:
    with serving() as server:
        code, said = get(f"{server.admin}/scale")
    assert code == 405 and "only /scale takes POST" in said["error"]
