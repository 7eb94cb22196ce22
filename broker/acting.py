"""Single actions: requests to whichever service has the least to do, answers to who asked.

- A request is stateless. While it has no answer it may go to another service: when its own is lost or leaves, or has
  answered nothing for `act_patience`; until it answers it comes last then. The first answer counts, later ones find no
  request.
- Requests about episodes that a service follows name it, and go to it as long as it is there, however long it takes:
  another one knows nothing of them. Those about episodes that begin go where the fewest readers are followed, unless
  others of the reader's go on.
- Who asks has a credit of requests and bytes. What is over it is answered at once, and costs the others nothing.
- Nobody there: requests wait, within that credit. Who asked is told by time alone, and decides what to do.
"""

from __future__ import annotations

from rllink_zmq.messages import ACT, ACTION

from . import peers
from .events import Forward, Received, Side
from .peers import Peer, Reader, Request, Service
from .state import BrokerState


class Acting(BrokerState):
    """Requests in, answers out."""

    def _act(self, reader: Peer, message: ACT, event: Received, now: float) -> None:
        if not isinstance(reader, Reader):
            return self._refuse(event.side, event.route, "unexpected", "only a reader sends ACT", now)
        if message.session != reader.session:
            return self._refuse(event.side, event.route, "malformed", "this request names another session", now)
        if message.request in reader.requests:
            return None  # a repeat: its answer will come
        code, text = self._over_credit(reader, event.size)
        if code:
            self.acts["refused"] += 1
            return self._send(reader, ACTION(message.session, message.request, code=code, text=text))
        request = Request(reader, message, event.frames, event.size, now)
        reader.requests[message.request] = request
        reader.act_bytes += request.size
        self.act_bytes += request.size
        return self._serve(request, now)

    def _over_credit(self, reader: Reader, size: int) -> tuple[str, str]:
        """Why a request of `size` bytes is too much: a code and words; '' when it is not."""
        settings, count = self.settings, len(reader.requests)
        if size > settings.act_memory:
            return (
                "too_large",
                f"a request of {size} bytes; at most {settings.act_memory} are held: ask for fewer at once",
            )
        if count and (count >= settings.act_requests or reader.act_bytes + size > settings.act_bytes):
            held = f"{count} requests ({reader.act_bytes} bytes) are open"
            most = f"at most {settings.act_requests}, and {settings.act_bytes} bytes"
            return "over_credit", f"{held}; {most}: wait for answers first"
        if self.act_bytes + size > settings.act_memory:
            return (
                "over_credit",
                f"{self.act_bytes} bytes of all requests are open; {settings.act_memory} are held at most",
            )
        return "", ""

    def _serve(self, request: Request, now: float, but: Service | None = None) -> None:
        """Give it to the service with the fewest observations to see to, or to the one that follows its episodes;
        `but`: not to this one."""
        follower = self._follower(request, but) if request.follows else b""
        if follower and follower == self.returning:
            self.unserved[request.key] = request
            return
        able = [service for service in self.services if service is not but]
        best = next((service for service in able if service.session == follower), None) if follower else None
        if best is None:
            best = min(able, key=lambda service: self._busy(service, request), default=None)
        if best is None:
            self.unserved[request.key] = request
            return
        if request.follows:
            self._is_followed(request.reader, best.session)
        request.service, request.since = best, now
        best.open[request.key] = request
        best.rows += request.rows
        self._actions.append(Forward(best.route, request.frames))

    def _follower(self, request: Request, but: Service | None) -> bytes:
        """Which service is to follow the request's episodes; b'' = whichever has the least to do."""
        reader = request.reader
        if request.follower or any(other.follows and other is not request for other in reader.requests.values()):
            return request.follower or reader.follower
        mine = [service for service in self.services if service.session == reader.follower and service is not but]
        fewest = min((service.followed for service in self.services if service is not but), default=0)
        # A change costs nothing where episodes begin, and none is needed where they are balanced.
        return reader.follower if mine and mine[0].followed <= fewest + 1 else b""

    def _is_followed(self, reader: Reader, by: bytes) -> None:
        """From now on by this service; b'' = by none."""
        if reader.follower != by:
            for service in self.services:
                service.followed += (service.session == by) - (service.session == reader.follower)
            reader.follower = by

    def _busy(self, service: Service, request: Request) -> tuple[bool, int, int]:
        """How much a service has to do. What follows an episode is to do so for long: then it goes by how many do."""
        return service.late, service.followed if request.follows else 0, service.rows

    def _action(self, service: Peer, message: ACTION, event: Received, now: float) -> None:
        if not isinstance(service, Service):
            return self._refuse(event.side, event.route, "unexpected", "only a service sends ACTION", now)
        service.answered, service.late = now, False
        reader = self.readers.get(message.session)
        request = reader.requests.get(message.request) if reader is not None else None
        if reader is None or request is None:
            return None  # answered by another one, or nobody waits any longer
        self._close(request)
        self.acts["answered"] += 1
        self._actions.append(Forward(reader.route, event.frames, Side.FRONT))
        return None

    def _close(self, request: Request) -> None:
        """It is answered, or not wanted any more."""
        reader, key = request.reader, request.key
        del reader.requests[key[1]]
        reader.act_bytes -= request.size
        self.act_bytes -= request.size
        self.unserved.pop(key, None)
        self._withdraw(request)

    @staticmethod
    def _withdraw(request: Request) -> None:
        service = request.service
        if service is not None and service.open.pop(request.key, None) is not None:
            service.rows -= request.rows
        request.service = None

    # ---- who comes and goes

    def _serve_all(self, now: float) -> None:
        """A service has come: what waited is its."""
        waiting, self.unserved = self.unserved, {}
        for request in waiting.values():
            self._serve(request, now)

    def _asker_lost(self, reader: Reader) -> None:
        for request in list(reader.requests.values()):
            self._close(request)
        self._is_followed(reader, b"")
        if self.readers.get(reader.session) is reader:
            del self.readers[reader.session]

    def _service_lost(self, service: Service, now: float) -> None:
        if service in self.services:
            self.services.remove(service)
        for request in list(service.open.values()):
            self._withdraw(request)
            self.acts["moved"] += 1
            self._serve(request, now)

    def _sweep_acts(self, now: float) -> None:
        """What a service has goes to another one when it has answered nothing for too long: a queue that moves is
        only long, and copies would make it longer."""
        if len(self.services) < 2:
            return
        for service in list(self.services):
            patience = self.settings.act_patience
            if now - service.answered <= patience:
                continue
            # Another one knows nothing of episodes that this one follows.
            for request in [r for r in service.open.values() if now - r.since > patience and not r.follower]:
                service.late = True
                self._withdraw(request)
                self.acts["moved"] += 1
                self._serve(request, now, but=service)

    def check_acting(self) -> None:
        """Part of `check_invariants`."""
        for reader in self.readers.values():
            assert reader.state is peers.State.LIVE
            assert reader.act_bytes == sum(r.size for r in reader.requests.values())
            for request in reader.requests.values():
                served = request.service is not None and request.service.open.get(request.key) is request
                assert served != (self.unserved.get(request.key) is request)
        for service in self.services:
            assert service.state is peers.State.LIVE and service.run == self.run
            assert service.followed == sum(reader.follower == service.session for reader in self.readers.values())
            assert service.rows == sum(r.rows for r in service.open.values())
            assert all(r.reader.requests.get(r.key[1]) is r for r in service.open.values())
        assert self.act_bytes == sum(reader.act_bytes for reader in self.readers.values()) >= 0
        assert not (self.services and self.unserved)
