"""CartPole against the broker with nothing but pyzmq, msgpack, numpy and gymnasium: the protocol, spoken by hand.

    python examples/raw_dealer.py --broker tcp://127.0.0.1:5555 --episodes 500

`docs/protocol.md` is the text to this. The policy is RLlib's default network for CartPole, computed in numpy from the
weights' shapes (tanh between the layers, as RLlib has it by default). For any other network the actions are drawn with
equal probability: that trains too, since the learner is told the true probability of each, but slowly.
"""

import argparse
import hashlib
import os
import time
import zlib

import gymnasium as gym
import msgpack
import numpy as np
import zmq

PIECE = 512 * 1024  # no frame is larger, and a piece of a transfer is one
PING_AFTER, SILENCE, ANSWER, RETRY = 1.0, 30.0, 5.0, 0.2  # seconds


class Dealer:
    """A simulator's end of the conversation. `look` does everything that is not sampling."""

    def __init__(self, broker, spaces):
        self.broker, self.spaces = broker, spaces
        self.context, self.dealer = zmq.Context(), None
        self.session, self.greeting = os.urandom(16), 0
        self.live, self.greeted_at, self.greet_at = False, None, 0.0
        self.looked_at, self.sent_at, self.pinged_at = 0.0, 0.0, None
        # Fragments are kept until the broker has told their outcome: number -> (header, body).
        self.number, self.unsettled, self.settled_steps, self.outcomes = 0, {}, 0, {}
        self.window = self.fragment_bytes = 0
        self.steps_limit, self.fragment_steps = 1, 1
        # What there is to be had, what we have, and the pieces of what is on its way.
        self.run, self.version, self.policy = "", -1, ""
        self.manifest, self.manifest_of = None, ""
        self.weights, self.weights_of, self.layers = b"", ("", -1), None
        self.pieces, self.pieces_of, self.asked = b"", None, False
        self.connect()

    def connect(self):
        """A new DEALER. Options come before connect; the routing id is ZeroMQ's to choose."""
        if self.dealer is not None:
            self.dealer.close(0)
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.immediate = True  # no connection: a send fails, instead of going nowhere
        self.dealer.linger, self.dealer.rcvhwm, self.dealer.maxmsgsize, self.dealer.ipv6 = 0, 0, PIECE, True
        # ZeroMQ's own thread answers these, however long a step takes. The broker counts on them.
        self.dealer.heartbeat_ivl, self.dealer.heartbeat_ttl, self.dealer.heartbeat_timeout = 2000, 15000, 10000
        self.dealer.connect(self.broker)
        self.greeted_at = None

    # ---- sending

    def send(self, header, body=b""):
        """A header and its body, cut into frames; where it is cut means nothing. False: there is no connection."""
        frames = [msgpack.packb(header)] + [body[i : i + PIECE] for i in range(0, len(body), PIECE)]
        try:
            self.dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.live, self.greeted_at, self.greet_at = False, None, time.monotonic() + RETRY
            return False
        self.sent_at = time.monotonic()
        return True

    def base(self):
        """Every number below it is settled."""
        return min(self.unsettled, default=self.number + 1)

    def greet(self):
        """HELLO. Until WELCOME nothing else is sent."""
        self.live, self.pinged_at, self.greeting = False, None, self.greeting + 1
        peer = {"role": "simulator", "base": self.base(), "steps": self.settled_steps, "spaces": self.spaces}
        hello = {"type": "HELLO", "protocol": 1, "session": self.session, "greeting": self.greeting, "peer": peer}
        if self.send({**hello, "name": "raw_dealer"}):
            self.greeted_at = time.monotonic()

    def submit(self, fragment, columns):
        """Number a fragment, keep it, send it. Its body is the bytes of all columns, one after the other."""
        base = self.base()
        self.number += 1
        described = [[name, array.dtype.str, list(array.shape)] for name, array in columns.items()]
        header = {"type": "FRAGMENT", "session": self.session, "number": self.number, "columns": described, **fragment}
        body = b"".join(array.tobytes() for array in columns.values())
        self.unsettled[self.number] = (header, body)
        if self.live:
            self.send({**header, "base": base}, body)

    def room(self, steps, size):
        """Whether one more step may be taken, with a fragment of so many steps and bytes being built."""
        size += sum(len(body) for _, body in self.unsettled.values())
        steps += self.settled_steps + sum(header["steps"] for header, _ in self.unsettled.values())
        return size <= self.window and (not self.steps_limit or steps < self.steps_limit)

    def ready(self):
        """The run's policy is known, and weights of this run are here."""
        return self.policy and self.manifest_of == self.policy and self.weights_of >= (self.run, 0)

    # ---- receiving

    def look(self, wait=0.0):
        """Read what has come, within `wait` seconds; with nothing there, see whether the broker is."""
        if not self.dealer.poll(wait * 1000):
            self.judge()
        while self.dealer.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            header, *body = self.dealer.recv_multipart()
            message = msgpack.unpackb(header)
            self.pinged_at = None
            getattr(self, "on_" + message["type"].lower(), self.ignore)(message, b"".join(body))
        self.looked_at = time.monotonic()
        if self.live and not self.asked:
            self.fetch()

    def judge(self):
        """Greet, greet again, or PING: but only after a look that found nothing, never after a pause of our own."""
        now = time.monotonic()
        if not self.live:
            if self.greeted_at is not None and now > self.greeted_at + ANSWER:
                self.connect()
            if self.greeted_at is None and now >= self.greet_at:
                self.greet_at = now + RETRY
                self.greet()
        elif self.pinged_at is not None and now > self.pinged_at + SILENCE:
            self.connect()
            self.greet()
        elif now > self.sent_at + PING_AFTER and self.send({"type": "PING"}):
            self.pinged_at = self.pinged_at or now

    def on_welcome(self, message, _body):
        if message["greeting"] != self.greeting:
            return  # the answer to a HELLO of before
        self.live, self.asked, self.fragment_bytes = True, False, message["fragment_bytes"]
        self.limits(message)
        base = self.base()
        for number in sorted(self.unsettled):  # again, in order, before anything new
            header, body = self.unsettled[number]
            self.send({**header, "base": base}, body)

    def on_refused(self, message, _body):
        about = message.get("greeting", 0)
        if about and about != self.greeting:
            return
        if message.get("fatal"):
            raise SystemExit(f"refused ({message['code']}): {message['text']}")
        if message["code"] == "greet":
            if self.live:
                self.greet()
            return
        print(f"refused ({message['code']}): {message['text']}")
        if about:
            self.greeted_at, self.greet_at = None, time.monotonic() + 1.0

    def on_ack(self, message, _body):
        self.limits(message)
        for number, outcome in message["settled"]:
            if number in self.unsettled:  # an outcome may come twice
                header, _ = self.unsettled.pop(number)
                self.settled_steps += header["steps"]
                self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def on_pong(self, message, _body):
        self.learn(message)

    def ignore(self, message, _body):
        """Unknown messages are a newer broker's."""

    def limits(self, message):
        """Absolute, not increments: whatever came last counts."""
        self.window, self.steps_limit = message["window"], message["steps_limit"]
        self.fragment_steps = max(1, message["fragment_steps"])
        self.learn(message)

    def learn(self, message):
        """Where the training is. What has a default may be missing."""
        run, version = message.get("run", ""), message.get("version", -1)
        self.run, self.version = max((self.run, self.version), (run, version))
        if run == self.run:
            self.policy = message.get("policy", "") or self.policy

    # ---- policy and weights, asked for piece by piece; a SUB on the address in WELCOME would bring small ones sooner

    def fetch(self):
        if self.policy and self.policy != self.manifest_of:
            what, ask = self.policy, {"type": "GET_CONFIG", "policy": self.policy}
        elif self.version >= 0 and self.weights_of < (self.run, self.version):
            of = self.pieces_of if isinstance(self.pieces_of, tuple) else ("", -1)
            what, ask = of, {"type": "GET_STATE", "run": of[0], "version": of[1]}
        else:
            return
        if what != self.pieces_of:
            self.pieces, self.pieces_of = b"", what
        self.asked = self.send({**ask, "offset": len(self.pieces)})

    def collect(self, message, body, what):
        """Add a piece of `what`; the whole, once it is there."""
        if what != self.pieces_of:
            self.pieces, self.pieces_of = b"", what
        if message.get("offset", 0) == len(self.pieces):
            self.pieces += body
        if len(self.pieces) < message["size"]:
            return None
        whole, self.pieces, self.pieces_of = self.pieces, b"", None
        return whole

    def on_config(self, message, body):
        self.asked = False
        blob = self.collect(message, body, message["policy"]) if message["size"] else None
        if blob is not None and hashlib.blake2b(blob, digest_size=16).hexdigest() == message["policy"]:
            self.manifest, _graph = msgpack.unpackb(blob)  # we have no use for the ONNX graph
            self.manifest_of = message["policy"]
            self.rebuild()

    def on_state(self, message, body):
        self.asked = False
        self.learn({**message, "policy": ""})
        version = (message["run"], message["version"])
        if not message["size"] or version <= self.weights_of or version[0] < self.run:
            return
        data = self.collect(message, body, version)
        if data is not None and zlib.crc32(data) == message["crc32"]:
            self.weights, self.weights_of = data, version
            self.rebuild()

    def rebuild(self):
        """The layers of a small network, if the weights look like one: pairs of (outputs, inputs) and (outputs,)."""
        self.layers = None
        if self.manifest is None:
            return
        arrays, at = [], 0
        for _name, dtype, shape in self.manifest["weights"]:
            count = int(np.prod(shape))
            if at + count * np.dtype(dtype).itemsize > len(self.weights):
                return
            arrays.append(np.frombuffer(self.weights, np.dtype(dtype), count, at).reshape(shape))
            at += arrays[-1].nbytes
        layers, width = [], 4
        for weight, bias in zip(arrays[::2], arrays[1::2], strict=False):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                return
            layers.append((weight, bias))
            width = len(bias)
        if at == len(self.weights) and len(arrays) == 2 * len(layers) and width == 2:
            self.layers = layers

    def close(self):
        """Wait a little for the last outcomes, and leave in order."""
        deadline = time.monotonic() + 10.0
        while self.unsettled and time.monotonic() < deadline:
            self.look(0.1)
        if self.live:
            self.send({"type": "BYE"})
        self.dealer.close(1000)
        self.context.term()


def wire_space(space):
    if isinstance(space, gym.spaces.Discrete):
        return {"space": "Discrete", "n": int(space.n), "start": int(space.start)}
    bounds = {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
    return {"space": "Box", "shape": list(space.shape), "dtype": space.dtype.str, **bounds}


def act(layers, observation, rng):
    """An action, and the logarithm of the probability that it had."""
    if layers is None:
        return int(rng.integers(2)), float(np.log(0.5))
    *hidden, (weight, bias) = layers
    values = observation
    for w, b in hidden:
        values = np.tanh(w @ values + b)
    logits = (weight @ values + bias).astype(np.float64)
    logp = logits - np.logaddexp(*logits)
    action = int(rng.random() < np.exp(logp[1]))
    return action, float(logp[action])


def play(dealer, env, name, rng):
    """One episode, in fragments. Returns its return."""
    observation, _ = env.reset()
    total, t, end, began = 0.0, 0, "no", time.monotonic()
    while end == "no":
        dealer.look()
        while not dealer.ready():
            dealer.look(0.1)
        # One version for a whole fragment, whatever comes meanwhile.
        (run, version), layers, before = dealer.weights_of, dealer.layers, total
        observations, actions, rewards, logps = [observation], [], [], []
        while end == "no" and len(actions) < dealer.fragment_steps:
            size = 16 + 32 * len(actions)  # bytes so far; a step adds 32
            if actions and size + 32 > dealer.fragment_bytes:
                break
            while not dealer.room(len(actions), size + 32):
                dealer.look(0.1)
            if time.monotonic() > dealer.looked_at + 0.5:
                dealer.look()
            action, logp = act(layers, observation, rng)
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            actions.append(action)
            rewards.append(reward)
            logps.append(logp)
            total += float(reward)
            end = "terminated" if terminated else "truncated" if truncated else "no"
        fragment = {
            "episode": name, "t0": t, "steps": len(actions), "end": end, "run": run, "version": version,
            "return_so_far": before, "seconds": time.monotonic() - began,
        }  # fmt: skip
        columns = {
            "obs": np.array(observations, "<f4"),  # one row more than the others
            "actions": np.array(actions, "<i8"),
            "rewards": np.array(rewards, "<f4"),
            "action_logp": np.array(logps, "<f4"),
        }
        t += len(actions)
        dealer.submit(fragment, columns)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broker", default="tcp://127.0.0.1:5555", help="the broker's frontend")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    env, rng = gym.make("CartPole-v1"), np.random.default_rng(options.seed)
    env.reset(seed=options.seed)
    spaces = {"observation": wire_space(env.observation_space), "action": wire_space(env.action_space)}
    dealer = Dealer(options.broker, spaces)
    try:
        for i in range(options.episodes):
            total = play(dealer, env, str(i), rng)
            print(f"episode {i}: return {total:.0f}, version {dealer.weights_of[1]}, {dealer.outcomes}", flush=True)
    finally:
        dealer.close()
    print(f"outcomes: {dealer.outcomes}, unsettled: {len(dealer.unsettled)}")


if __name__ == "__main__":
    main()
