"""`rllink_zmq.weights`: which weights a process has and asks for. No sockets: the broker is a few lines here."""

import zlib

import pytest

from rllink_zmq.messages import CONFIG, GET_CONFIG, GET_STATE, STATE
from rllink_zmq.transfer import CHUNK_BYTES, chunk
from rllink_zmq.weights import ASK_AGAIN, PUB_GRACE, Wanted, Weights

RUN, LATER = "000000000001-a", "000000000002-b"
BLOB = bytes(range(256)) * 5000  # three pieces
SMALL = b"weights"
LARGE = bytes(reversed(range(256))) * 8000  # four pieces


class Broker:
    """Answers as the broker does: the newest weights, whatever is asked for."""

    def __init__(self, run=RUN, version=0, data=SMALL, policy="p"):
        self.run, self.version, self.data, self.policy = run, version, data, policy

    def state(self, body=True, **changes):
        header = STATE(self.run, self.version, len(self.data), 0, zlib.crc32(self.data))
        return header, [self.data] if body else []

    def answers(self, messages):
        for message in messages:
            if isinstance(message, GET_CONFIG):
                if message.policy != self.policy:
                    yield CONFIG(message.policy, 0), []
                else:
                    yield CONFIG(message.policy, len(BLOB), message.offset), [chunk(BLOB, message.offset)]
            elif self.version < 0:
                yield STATE(self.run, -1, 0), []
            else:
                same = (message.run, message.version) == (self.run, self.version)
                offset = message.offset if same else 0
                header = STATE(self.run, self.version, len(self.data), offset, zlib.crc32(self.data))
                yield header, [chunk(self.data, offset)]

    def serve(self, wanted, now, most=1000):
        """Answer until nothing is asked any more. Returns how many questions there were."""
        count = 0
        while count < most and (messages := wanted.asks(now)):
            count += len(messages)
            for header, body in self.answers(messages):
                wanted.answer(header, body, now)
        return count


@pytest.fixture
def wanted():
    return Wanted()


def ready_with_version_0(wanted):
    wanted.told(RUN, 0, "p", 0.0)
    Broker().serve(wanted, 0.0)
    assert wanted.ready == Weights(RUN, 0, SMALL)


def test_a_late_joiner_pulls_policy_and_weights_at_once(wanted):
    assert wanted.asks(0.0) == []
    assert "no trainer" in wanted.missing()
    wanted.told(RUN, 3, "p", 0.0)
    assert wanted.asks(0.0) == [GET_CONFIG("p", 0), GET_STATE(RUN, -1, 0)]
    assert wanted.asks(0.0) == []  # each question once
    assert wanted.ready is None
    assert "policy of run" in wanted.missing()
    wanted.restart(0.0)
    assert Broker(version=3, data=LARGE).serve(wanted, 0.0) == 3 + 4
    assert (wanted.blob, wanted.blob_hash) == (BLOB, "p")
    assert wanted.ready == Weights(RUN, 3, LARGE)
    assert wanted.missing() == ""
    assert wanted.asks(9.0) == []


def test_two_pieces_are_asked_for_at_a_time(wanted):
    wanted.told(RUN, -1, "p", 0.0)
    (first,) = wanted.asks(0.0)
    (answer,) = Broker().answers([first])
    wanted.answer(*answer, 0.0)
    assert [m.offset for m in wanted.asks(0.0)] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert f"({CHUNK_BYTES} of {len(BLOB)} bytes)" in wanted.missing()


def test_small_weights_come_whole_on_pub_and_are_not_pulled(wanted):
    ready_with_version_0(wanted)
    wanted.news(*Broker(version=1, data=b"newer").state(), 1.0)
    wanted.told(RUN, 1, "p", 1.0)
    assert wanted.ready == Weights(RUN, 1, b"newer")
    assert wanted.asks(99.0) == []


def test_pub_has_a_moment_to_bring_what_a_session_has_heard_of(wanted):
    ready_with_version_0(wanted)
    wanted.told(RUN, 1, "p", 1.0)
    wanted.told(RUN, 1, "p", 1.0 + PUB_GRACE / 2)
    assert wanted.asks(1.0 + PUB_GRACE - 0.01) == []
    assert wanted.asks(1.0 + PUB_GRACE) == [GET_STATE(RUN, -1, 0)]
    wanted.restart(2.0)
    Broker(version=1, data=b"lost").serve(wanted, 2.0)
    assert wanted.ready == Weights(RUN, 1, b"lost")


def test_announced_weights_are_pulled_at_once(wanted):
    ready_with_version_0(wanted)
    broker = Broker(version=1, data=LARGE)
    wanted.news(*broker.state(body=False), 1.0)
    assert wanted.ready == Weights(RUN, 0, SMALL)
    broker.serve(wanted, 1.0)
    assert wanted.ready == Weights(RUN, 1, LARGE)


def test_only_the_newest_counts(wanted):
    ready_with_version_0(wanted)
    for version in (4, 2, 3, 4):
        wanted.news(*Broker(version=version, data=b"%d" % version).state(), 1.0)
    wanted.news(*Broker(run="0", version=99).state(), 1.0)
    assert wanted.ready == Weights(RUN, 4, b"4")
    wanted.told("0", 99, "old", 1.0)
    assert (wanted.run, wanted.policy) == (RUN, "p")


def test_a_transfer_moves_to_the_version_that_came_meanwhile(wanted):
    ready_with_version_0(wanted)
    wanted.news(*Broker(version=1, data=LARGE).state(body=False), 1.0)
    Broker(version=1, data=LARGE).serve(wanted, 1.0, most=2)
    newer = Broker(version=2, data=LARGE[::-1])
    newer.serve(wanted, 1.0)
    assert wanted.ready == Weights(RUN, 2, LARGE[::-1])


def test_a_transfer_gives_way_to_newer_weights_on_pub(wanted):
    ready_with_version_0(wanted)
    old = Broker(version=1, data=LARGE)
    wanted.news(*old.state(body=False), 1.0)
    old.serve(wanted, 1.0, most=2)
    questions = wanted.asks(1.0)
    wanted.news(*Broker(version=2, data=b"new").state(), 1.0)
    for header, body in old.answers(questions):
        wanted.answer(header, body, 1.0)
    assert wanted.ready == Weights(RUN, 2, b"new")
    assert wanted.asks(2.0) == []


def test_a_lost_connection_costs_only_what_was_on_its_way(wanted):
    ready_with_version_0(wanted)
    broker = Broker(version=1, data=LARGE)
    wanted.news(*broker.state(body=False), 1.0)
    broker.serve(wanted, 1.0, most=2)
    lost = wanted.asks(1.0)
    assert lost
    assert wanted.asks(1.0) == []
    assert wanted.moved == 1.0
    wanted.restart(5.0)
    assert wanted.moved == 5.0
    again = wanted.asks(5.0)
    assert again[0].offset >= CHUNK_BYTES
    late = [answer for question in (again, lost) for answer in broker.answers(question)]
    for header, body in late:  # the lost ones come too, after all
        wanted.answer(header, body, 5.0)
    broker.serve(wanted, 5.0)
    assert wanted.ready == Weights(RUN, 1, LARGE)


def test_what_is_not_there_yet_is_asked_for_again_but_not_at_once(wanted):
    wanted.told(RUN, 0, "p", 0.0)
    nothing = Broker(version=-1, policy="")
    assert nothing.serve(wanted, 0.0) == 2
    assert wanted.asks(ASK_AGAIN - 0.01) == []
    assert nothing.serve(wanted, ASK_AGAIN) == 2
    Broker().serve(wanted, 2 * ASK_AGAIN)
    assert wanted.ready == Weights(RUN, 0, SMALL)


@pytest.mark.parametrize("pub", [True, False])
def test_damaged_weights_are_asked_for_again(wanted, pub, caplog):
    ready_with_version_0(wanted)
    header = STATE(RUN, 1, 3, 0, zlib.crc32(b"abc") ^ 1)
    if pub:
        wanted.news(header, [b"abc"], 1.0)
    else:
        wanted.told(RUN, 1, "p", 0.5)
        wanted.asks(1.0)
        wanted.answer(header, [b"abc"], 1.0)
    assert "came damaged" in caplog.text
    assert wanted.ready == Weights(RUN, 0, SMALL)
    assert wanted.asks(1.0) == []
    Broker(version=1, data=b"abc").serve(wanted, 1.0 + ASK_AGAIN)
    assert wanted.ready == Weights(RUN, 1, b"abc")


def test_a_new_run_replaces_everything(wanted):
    ready_with_version_0(wanted)
    wanted.told(LATER, -1, "", 1.0)
    assert wanted.ready is None
    assert "has not sent its policy" in wanted.missing()
    wanted.told(LATER, -1, "p", 1.0)
    assert "has no weights yet" in wanted.missing()
    assert wanted.asks(9.0) == []  # the same policy, and no version to ask for
    wanted.news(*Broker(run=RUN, version=50).state(), 9.0)
    wanted.news(*Broker(run=LATER, version=0, data=b"first").state(), 9.0)
    assert wanted.ready == Weights(LATER, 0, b"first")


def test_weights_wait_for_their_policy(wanted):
    ready_with_version_0(wanted)
    wanted.news(*Broker(run=LATER, version=0, data=b"first").state(), 1.0)  # PUB is ahead of the sessions
    assert wanted.ready is None
    wanted.told(LATER, 0, "q", 1.0)
    assert wanted.ready is None
    Broker(run=LATER, policy="q").serve(wanted, 1.0)
    assert wanted.blob_hash == "q"
    assert wanted.ready == Weights(LATER, 0, b"first")


def test_weights_that_do_not_fit_wait_for_another_policy_or_version(wanted):
    ready_with_version_0(wanted)
    wanted.reject()
    assert wanted.ready is None
    assert "doesn't fit" in wanted.missing()
    assert wanted.asks(9.0) == []
    wanted.told(RUN, 0, "q", 9.0)
    Broker(policy="q").serve(wanted, 9.0)
    assert wanted.ready == Weights(RUN, 0, SMALL)
    wanted.reject()
    wanted.news(*Broker(version=1).state(), 10.0)
    assert wanted.ready == Weights(RUN, 1, SMALL)


def test_strays_change_nothing(wanted):
    ready_with_version_0(wanted)
    wanted.answer(CONFIG("p", len(BLOB), 0), [b"x"], 1.0)
    wanted.answer(STATE(RUN, 5, 100, 50), [b"x" * 50], 1.0)
    wanted.answer(STATE(RUN, 0, len(SMALL), 0), [SMALL], 1.0)
    wanted.answer(STATE(RUN, 7, 1 << 40, 0), [b"x"], 1.0)
    wanted.news(GET_STATE(RUN), [], 1.0)
    wanted.news(STATE(RUN, -1, 0), [], 1.0)
    assert (wanted.ready, wanted.blob) == (Weights(RUN, 0, SMALL), BLOB)
    assert wanted.asks(9.0) == []
