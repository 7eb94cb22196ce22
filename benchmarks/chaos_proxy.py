"""A TCP proxy that breaks links: it stalls them, cuts them, or swallows what they carry.

It runs in a thread of its own with its own event loop. What is done to the *link* holds for the connections of later,
too, until it is mended; what is done to one connection holds for that one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from typing import TypeVar

T = TypeVar("T")

CHUNK = 65_536
LOOK_EVERY = 0.02


class Flow(Enum):
    """What becomes of bytes. STALL: they wait, and so does the sender at last. SILENCE: they vanish (half-open)."""

    PASS = "pass"
    STALL = "stall"
    SILENCE = "silence"


class Pair:
    """One accepted connection and the one behind it. `port`: the local port of who dialed."""

    def __init__(self, port: int, flow: Flow) -> None:
        self.port = port
        self.flow = flow
        self.writers: list[asyncio.StreamWriter] = []

    def close(self) -> None:
        """Both at once, without a word: an RST, as from a host that was switched off and on."""
        for writer in self.writers:
            with suppress(RuntimeError):
                writer.transport.abort()


class Proxy:
    """Listens at a free port of loopback, and dials `target` (a port of loopback) for each connection."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.flow = Flow.PASS
        self.carried = 0
        """Bytes, in both directions together."""
        self.pairs: set[Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{target}", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread.start()
        self.port: int = self._ask(self._listen())

    # ---- from any thread

    def set_link(self, flow: Flow) -> None:
        """The whole link, with all connections that come before the next call."""

        def do() -> None:
            self.flow = flow
            for pair in self.pairs:
                pair.flow = flow

        self._call(do)

    def set(self, ports: Iterable[int], flow: Flow) -> None:
        """Only the connections from these ports."""
        chosen = set(ports)

        def do() -> None:
            for pair in self.pairs:
                if pair.port in chosen:
                    pair.flow = flow

        self._call(do)

    def cut(self, ports: Iterable[int] | None = None) -> None:
        """Close the connections from these ports, or all."""
        chosen = None if ports is None else set(ports)

        def do() -> None:
            for pair in list(self.pairs):
                if chosen is None or pair.port in chosen:
                    pair.close()

        self._call(do)

    def ports(self) -> set[int]:
        """Of those who are connected."""
        return self._call(lambda: {pair.port for pair in self.pairs})

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    # ---- in the thread

    def _call(self, do: Callable[[], T]) -> T:
        async def soon() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(soon(), self._loop).result(10)

    def _ask(self, coroutine: object) -> int:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)  # type: ignore[arg-type]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _listen(self) -> int:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = Pair(writer.get_extra_info("peername")[1], self.flow)
        pair.writers.append(writer)
        self.pairs.add(pair)
        try:
            behind, onward = await asyncio.open_connection("127.0.0.1", self.target)
            pair.writers.append(onward)
            pumps = [
                asyncio.ensure_future(self._pump(reader, onward, pair)),
                asyncio.ensure_future(self._pump(behind, writer, pair)),
            ]
            self._tasks.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tasks.difference_update(pumps)
        except OSError:
            pass  # nobody listens behind it: who dialed is told by the end of the connection
        finally:
            self.pairs.discard(pair)
            pair.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: Pair) -> None:
        """One direction, until either end closes."""
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                self.carried += len(data)
                while pair.flow is Flow.STALL:
                    await asyncio.sleep(LOOK_EVERY)
                if pair.flow is Flow.PASS:
                    writer.write(data)
                    await writer.drain()
