"""What audit logs prove: a pure function of their lines.

A promise is about one fragment, a number of one session. `PROMISES` and `APART` are all that can be found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rllink_zmq.audit import Closed, Entered, Handed, Records, Sent, Settled, Unnamed
from rllink_zmq.messages import DELIVERED

CUT = "handover_cut"

PROMISES = {
    "lost": "acked as delivered, and never handed to RLlib",
    "dropped": "acked as delivered and handed to RLlib, which dropped it before any train batch",
    "incomplete": "in a train batch, but not with all of its steps and no others",
    "twice": "in a train batch, or handed to RLlib, more than once",
    "untrue": "used, though its outcome says it was dropped (handover_cut may), or of an outcome that nobody knows",
    "resettled": "has two outcomes",
    "no_outcome": "never settled, and its simulator closed saying that it was",
    "unnamed": "in a train batch without the name of its fragment",
}
"""What must not be: each is a promise broken."""

APART = {
    "used_though_cut": "reported handover_cut, and used once: allowed",
    "held": "acked as delivered, and with RLlib when the logs end",
    "unsettled": "not settled when its simulator ended or the log does, and not used",
    "used_unsettled": "not settled when its simulator ended or the log does, and used once",
    "unsent": "used, and in no simulator's log: one is missing",
}
"""What breaks no promise, and is counted apart."""

Key = tuple[str, int]


class Breach(NamedTuple):
    """A fragment that breaks a promise, and how. `steps`: 0 where no log says it; `outcome`: '' = none."""

    session: str
    number: int
    steps: int
    outcome: str
    how: str


@dataclass(frozen=True)
class Verdict:
    """Counts are (fragments, env steps). `used`: delivered, and in a train batch once, whole."""

    logs: dict[str, int]
    torn: int
    sessions: int
    sent: tuple[int, int]
    used: tuple[int, int]
    outcomes: dict[str, tuple[int, int]]
    apart: dict[str, tuple[int, int]]
    broken: dict[str, list[Breach]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every promise was kept."""
        return not self.broken


@dataclass
class _Fragment:
    """What all logs together say of one. `steps` -1: no simulator's log has it. `handed`: (log, place in it)."""

    steps: int = -1
    outcomes: list[str] = field(default_factory=list)
    handed: list[tuple[str, int]] = field(default_factory=list)
    handed_steps: int = 0
    entered: list[tuple[int, int]] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        return self.outcomes[-1] if self.outcomes else ""

    @property
    def length(self) -> int:
        if self.steps >= 0:
            return self.steps
        return self.handed_steps or max((first + steps for first, steps in self.entered), default=0)


class _Gathered(NamedTuple):
    fragments: dict[Key, _Fragment]
    closed: dict[str, int]
    unnamed: dict[str, int]
    reached: dict[str, int]


def judge(logs: Iterable[Records]) -> Verdict:
    """Compare what simulators, runners and learners have written."""
    logs = list(logs)
    gathered = _gather(logs)
    broken: defaultdict[str, list[Breach]] = defaultdict(list)
    apart: defaultdict[str, list[int]] = defaultdict(list)
    outcomes: defaultdict[str, list[int]] = defaultdict(list)
    used: list[int] = []
    missing: defaultdict[str, list[Key]] = defaultdict(list)
    for key, fragment in gathered.fragments.items():
        for name, how in _breaches(fragment, gathered.reached):
            broken[name].append(Breach(*key, fragment.length, fragment.outcome, how))
        name = _apart(fragment, gathered.reached)
        if name:
            apart[name].append(fragment.length)
        if fragment.steps >= 0 and fragment.outcome:
            outcomes[fragment.outcome].append(fragment.length)
        elif fragment.steps >= 0:
            missing[key[0]].append(key)
        if fragment.outcome == DELIVERED and _coverage(fragment) == "once":
            used.append(fragment.length)
    for session, keys in missing.items():
        told = gathered.closed.get(session)
        if told is not None and len(keys) > told:
            how = f"{len(keys)} of this session have no outcome, and it closed with {told} unsettled"
            broken["no_outcome"] += [Breach(*key, gathered.fragments[key].length, "", how) for key in keys]
    for log, steps in gathered.unnamed.items():
        broken["unnamed"].append(Breach("", 0, steps, "", f"seen by {log}"))
    sent = [f.steps for f in gathered.fragments.values() if f.steps >= 0]
    sides: defaultdict[str, int] = defaultdict(int)
    for records in logs:
        sides[records.side] += 1
    return Verdict(
        logs=dict(sides),
        torn=sum(records.torn for records in logs),
        sessions=len(
            {session for (session, _), f in gathered.fragments.items() if f.steps >= 0} | set(gathered.closed)
        ),
        sent=_count(sent),
        used=_count(used),
        outcomes={name: _count(steps) for name, steps in sorted(outcomes.items())},
        apart={name: _count(apart[name]) for name in APART},
        broken={name: broken[name] for name in PROMISES if name in broken},
    )


def _count(steps: Sequence[int]) -> tuple[int, int]:
    return len(steps), sum(steps)


def _gather(logs: Sequence[Records]) -> _Gathered:
    fragments: defaultdict[Key, _Fragment] = defaultdict(_Fragment)
    closed: dict[str, int] = {}
    unnamed: defaultdict[str, int] = defaultdict(int)
    entered_by: defaultdict[str, set[Key]] = defaultdict(set)
    for records in logs:
        for place, line in enumerate(records.lines):
            if isinstance(line, Closed):
                closed[line.session] = line.unsettled
            elif isinstance(line, Unnamed):
                unnamed[records.name] += line.steps
            elif isinstance(line, Sent | Settled | Handed | Entered):
                fragment = fragments[line.session, line.number]
                if isinstance(line, Sent):
                    fragment.steps = line.steps
                elif isinstance(line, Settled):
                    fragment.outcomes.append(line.outcome)
                elif isinstance(line, Handed):
                    fragment.handed.append((records.name, place))
                    fragment.handed_steps = line.steps
                else:
                    fragment.entered.append((line.first, line.steps))
                    entered_by[records.name].add((line.session, line.number))
    return _Gathered(dict(fragments), closed, dict(unnamed), _reached(fragments, entered_by.values()))


def _reached(fragments: Mapping[Key, _Fragment], learners: Iterable[set[Key]]) -> dict[str, int]:
    """Runner's log -> how far into it every learner is that uses what this runner hands over.

    RLlib's queues keep a runner's order: what was handed over before that place and entered no batch was dropped; what
    came after it may be waiting still. Several learners need not be equally far: the slowest counts.
    """
    reached: dict[str, int] = {}
    for keys in learners:
        furthest: dict[str, int] = {}
        for key in keys:
            for log, place in fragments[key].handed:
                furthest[log] = max(furthest.get(log, place), place)
        for log, place in furthest.items():
            reached[log] = min(reached.get(log, place), place)
    return reached


def _coverage(fragment: _Fragment) -> str:
    """'none', 'once', 'part' or 'twice': how often its steps entered a batch."""
    if not fragment.entered:
        # Of several agents it may have no step that is complete: there is nothing to train on.
        nothing = not fragment.steps and fragment.handed and fragment.outcome == DELIVERED
        return "once" if nothing else "none"
    at, twice, gap = 0, False, False
    for first, steps in sorted(fragment.entered):
        twice |= first < at
        gap |= first > at
        at = max(at, first + steps)
    if twice:
        return "twice"
    return "part" if gap or at != fragment.length else "once"


def _overtaken(fragment: _Fragment, reached: Mapping[str, int]) -> bool:
    return any(place < reached.get(log, -1) for log, place in fragment.handed)


def _breaches(fragment: _Fragment, reached: Mapping[str, int]) -> list[tuple[str, str]]:
    """(promise, how it was broken)."""
    found = []
    coverage, outcome = _coverage(fragment), fragment.outcome
    if len(fragment.outcomes) > 1:
        found.append(("resettled", f"settled as {' and '.join(fragment.outcomes)}"))
    if coverage == "twice" or len(fragment.handed) > 1:
        found.append(("twice", _places(fragment)))
    if coverage == "part":
        found.append(("incomplete", _places(fragment)))
    if outcome == DELIVERED and coverage == "none":
        if not fragment.handed:
            found.append(("lost", "in no runner's and no learner's log"))
        elif _overtaken(fragment, reached):
            found.append(("dropped", f"{_places(fragment)}; what that runner handed over later is in a batch"))
    if (outcome not in ("", DELIVERED, CUT) and coverage != "none") or outcome == "unknown":
        found.append(("untrue", _places(fragment)))
    return found


def _places(fragment: _Fragment) -> str:
    steps = ", ".join(f"{first}-{first + n - 1}" for first, n in sorted(fragment.entered)) or "none"
    handed = " and ".join(log for log, _ in fragment.handed) or "nobody"
    return f"steps in a batch: {steps}; handed over by {handed}"


def _apart(fragment: _Fragment, reached: Mapping[str, int]) -> str:
    used = _coverage(fragment) == "once"
    if fragment.steps < 0:
        return "unsent" if fragment.entered else ""
    if not fragment.outcome:
        return "used_unsettled" if used else "unsettled"
    if fragment.outcome == CUT and used:
        return "used_though_cut"
    waiting = fragment.outcome == DELIVERED and not fragment.entered and fragment.handed
    return "held" if waiting and not _overtaken(fragment, reached) else ""


# ---- in words


SHOWN = 10
"""Breaches printed of each promise; the rest are counted."""


def as_json(verdict: Verdict, shown: int = SHOWN) -> dict[str, Any]:
    """For programs: all counts, and up to `shown` breaches of each promise."""

    def pair(count: tuple[int, int]) -> dict[str, int]:
        return {"fragments": count[0], "steps": count[1]}

    return {
        "holds": verdict.holds,
        "logs": verdict.logs,
        "torn": verdict.torn,
        "sessions": verdict.sessions,
        "sent": pair(verdict.sent),
        "used": pair(verdict.used),
        "outcomes": {name: pair(count) for name, count in verdict.outcomes.items()},
        "apart": {name: pair(count) for name, count in verdict.apart.items()},
        "broken": {
            name: {"fragments": len(found), "first": [breach._asdict() for breach in found[:shown]]}
            for name, found in verdict.broken.items()
        },
    }


def in_words(verdict: Verdict, shown: int = SHOWN) -> str:
    """For people: a table, and what breaks a promise."""
    logs = ", ".join(f"{number} {side}{'s' * (number != 1)}" for side, number in verdict.logs.items())
    torn = f" ({verdict.torn} with a last line that was not finished)" if verdict.torn else ""
    lines = [f"logs of {logs}{torn}; {verdict.sessions} sessions", f"{'':44s} fragments  env steps"]

    def row(what: str, count: tuple[int, int]) -> None:
        lines.append(f"{what:44s} {count[0]:9d} {count[1]:10d}")

    row("sent", verdict.sent)
    for name, count in verdict.outcomes.items():
        row(f"  settled as {name}", count)
    unsettled = verdict.sent[0] - sum(count[0] for count in verdict.outcomes.values())
    row("  not settled", (unsettled, verdict.sent[1] - sum(count[1] for count in verdict.outcomes.values())))
    row("delivered, and in a train batch once", verdict.used)
    apart = [(APART[name], count) for name, count in verdict.apart.items() if count[0]]
    if apart:
        lines.append("Counted apart:")
        lines += [f"  {_both(count)}: {what}" for what, count in apart]
    for name, found in verdict.broken.items():
        lines.append(f"BROKEN, {len(found)} x {name}: {PROMISES[name]}")
        lines += [f"  {_said(breach)}" for breach in found[:shown]]
        if len(found) > shown:
            lines.append(f"  and {len(found) - shown} more")
    lines.append("Every promise was kept." if verdict.holds else "Promises were broken.")
    return "\n".join(lines)


def _both(count: tuple[int, int]) -> str:
    return f"{count[0]} fragments, {count[1]} steps"


def _said(breach: Breach) -> str:
    if not breach.session:
        return f"{breach.steps} steps, {breach.how}"
    return (
        f"session {breach.session} number {breach.number} ({breach.steps} steps, {breach.outcome or 'no outcome'}): "
        f"{breach.how}"
    )
