"""The HTTP admin: is it alive, is it ready, what is going on; and one wish, another number of runners.

It lives in a thread of its own and never looks at the core: each request is a question to the broker's loop, with a
deadline. So an answer also shows that the loop goes round.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import threading
from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from rllink_zmq.errors import SettingsError
from rllink_zmq.messages import MOST_WANTED

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import JSONResponse

log = logging.getLogger("rllink_zmq.broker")

ANSWER_WITHIN = 2.0
"""Seconds the loop has to answer."""

PATHS = "/healthz, /readyz, /status and /scale"


class Question(Enum):
    HEALTH = "health"
    READY = "ready"
    STATUS = "status"
    SCALE = "scale"


class Ask(Protocol):
    def __call__(self, question: Question, number: int = 0) -> Future[dict[str, Any]]: ...


class Admin:
    """Listens from construction on, answers from `start()` to `close()`. `address`: its URL, as bound.

    Raises `SettingsError` when the port can't be had or the packages it needs are not installed.
    """

    def __init__(self, host: str, port: int, ask: Ask) -> None:
        try:
            import uvicorn
        except ImportError:
            raise SettingsError(
                "the admin needs starlette and uvicorn: pip install 'rllink-zmq[broker]', or --admin off"
            ) from None
        self._socket = _listen(host, port)
        bound = self._socket.getsockname()[1]
        self.address = f"http://{host}:{bound}"
        config = uvicorn.Config(
            _app(ask), loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, log_level="warning",
            access_log=False, server_header=False, limit_concurrency=64, timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="rllink-admin", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop answering and give the port back."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(5.0)
        self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((bare, port))
        listening.listen(64)
    except OSError as e:
        listening.close()
        why = (
            "the port is in use; stop what listens there, or choose another port"
            if e.errno == errno.EADDRINUSE
            else e.strerror
        )
        raise SettingsError(f"can't bind --admin {host}:{port}: {why}") from None
    return listening


def _app(ask: Ask) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(question: Question, number: int = 0) -> dict[str, Any] | None:
        """None when the loop doesn't answer in time, or can't."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ask(question, number)), ANSWER_WITHIN)
        except (TimeoutError, asyncio.CancelledError):
            return None
        except Exception:
            log.exception("the question for %s failed", question.value)
            return None

    def busy() -> JSONResponse:
        text = f"the broker's loop has not answered within {ANSWER_WITHIN:g} s: it is overloaded, stopped or stopping"
        return JSONResponse({"error": text}, 503)

    async def healthz(_: Request) -> JSONResponse:
        found = await answer(Question.HEALTH)
        return JSONResponse(found) if found is not None else busy()

    async def readyz(_: Request) -> JSONResponse:
        found = await answer(Question.READY)
        if found is None:
            return busy()
        return JSONResponse({"ready": not found["waiting_for"]} | found, 503 if found["waiting_for"] else 200)

    async def status(_: Request) -> JSONResponse:
        found = await answer(Question.STATUS)
        return JSONResponse(found) if found is not None else busy()

    async def scale(request: Request) -> JSONResponse:
        # A page in a browser can send forms and plain text to loopback, but no JSON without asking first.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "expected a JSON body, with Content-Type: application/json"}, 415)
        try:
            body = json.loads(await request.body())
        except ValueError:
            body = None
        number = body.get("runners") if isinstance(body, dict) else None
        if type(number) is not int or not 0 <= number <= MOST_WANTED:
            text = f'expected {{"runners": N}} with N from 0 to {MOST_WANTED}'
            return JSONResponse({"error": text}, 422)
        found = await answer(Question.SCALE, number)
        if found is None:
            return busy()
        return JSONResponse(found, 409 if "error" in found else 202)

    async def not_found(request: Request, _: Exception) -> JSONResponse:
        return JSONResponse({"error": f"there is no {request.url.path} here; there are {PATHS}"}, 404)

    async def not_allowed(request: Request, _: Exception) -> JSONResponse:
        return JSONResponse(
            {"error": f"{request.method} is not possible here: only /scale takes POST, the others GET"}, 405
        )

    routes = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/status", status)]
    routes.append(Route("/scale", scale, methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={404: not_found, 405: not_allowed})
