"""The policies of several agents: which modules there are, which policy each has, and which agent acts by which.

A *crew* says all of it. It travels with the policies as one `bytes` object in CONFIG, as a single policy does. The
trainer's `policy_mapping_fn` is a Python function and stays there: the crew has *draws*, the answers that it gave for
many episodes, and each episode takes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from rllink_zmq.errors import PolicyError
from rllink_zmq.messages import MAX_AGENTS, MAX_MODULE_ID, MAX_MODULES, AgentId
from rllink_zmq.policy import MAX_BLOB_BYTES, Buffer, PolicyManifest, unpack_policy

MAX_DRAWS = 1024
NOBODY = -1
"""In a draw: the mapping fails for this agent."""


class CrewModule(Struct, frozen=True, array_like=True):
    """`policy`: which of the policies it has. `trained`: whether the learner changes its weights."""

    id: Annotated[str, Meta(min_length=1, max_length=MAX_MODULE_ID)]
    policy: Annotated[int, Meta(ge=0, lt=MAX_MODULES)]
    trained: bool


class Draw(Struct, frozen=True, array_like=True):
    """One way to map agents to modules: for each agent of the crew the index of its module, or `NOBODY`. An episode
    takes it with a probability in proportion to its `weight`."""

    weight: Annotated[int, Meta(ge=1, lt=1 << 31)]
    modules: Annotated[tuple[Annotated[int, Meta(ge=-1, lt=MAX_MODULES)], ...], Meta(max_length=MAX_AGENTS)]


class Crew(Struct, frozen=True):
    """`agents`: all that there may be. `failures`: why the mapping fails for an agent, where it does."""

    format: Literal[1]
    agents: Annotated[tuple[AgentId, ...], Meta(min_length=1, max_length=MAX_AGENTS)]
    modules: Annotated[tuple[CrewModule, ...], Meta(min_length=1, max_length=MAX_MODULES)]
    draws: Annotated[tuple[Draw, ...], Meta(min_length=1, max_length=MAX_DRAWS)]
    failures: Annotated[dict[AgentId, Annotated[str, Meta(max_length=4096)]], Meta(max_length=MAX_AGENTS)] = {}

    def needed(self, agents: Sequence[AgentId]) -> list[str]:
        """The modules that these agents may be mapped to."""
        places = [i for i, agent in enumerate(self.agents) if agent in set(agents)]
        wanted = {draw.modules[i] for draw in self.draws for i in places} - {NOBODY}
        return [module.id for i, module in enumerate(self.modules) if i in wanted]

    def mapping(self, draw: Draw) -> Mapping[AgentId, CrewModule]:
        """Agent -> module, of this draw."""
        return {
            agent: self.modules[module]
            for agent, module in zip(self.agents, draw.modules, strict=True)
            if module != NOBODY
        }


_Blob: TypeAlias = tuple[Crew, Annotated[tuple[bytes, ...], Meta(max_length=MAX_MODULES)]]
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Blob] = msgspec.msgpack.Decoder(_Blob)


def pack_crew(crew: Crew, policies: Sequence[bytes]) -> bytes:
    """The blob of a crew and its policies, each as `pack_policy` made it."""
    return _encoder.encode((crew, tuple(policies)))


def is_crew(blob: Buffer) -> bool:
    """Whether this is of several agents, rather than one policy."""
    try:
        _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def unpack_crew(blob: Buffer) -> tuple[Crew, tuple[bytes, ...]]:
    """Crew and policies of a blob. Raises PolicyError for anything that `pack_crew` would not have made."""
    size = memoryview(blob).nbytes
    if size > MAX_BLOB_BYTES:
        raise PolicyError(f"policies of {size} bytes are over the limit of {MAX_BLOB_BYTES}")
    try:
        crew, policies = _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"not the policies of several agents: {error}") from error
    if any(module.policy >= len(policies) for module in crew.modules):
        raise PolicyError("a module has a policy that didn't come")
    for draw in crew.draws:
        if len(draw.modules) != len(crew.agents) or max(draw.modules) >= len(crew.modules):
            raise PolicyError("a draw doesn't fit the agents and modules")
    return crew, policies


def manifests(crew: Crew, policies: Sequence[bytes]) -> dict[str, PolicyManifest]:
    """Of each module, by its id. Raises PolicyError."""
    read = [unpack_policy(blob)[0] for blob in policies]
    return {module.id: read[module.policy] for module in crew.modules}
