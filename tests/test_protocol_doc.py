"""`docs/protocol.md` says what the code does: its tables, parsed from the Markdown, against structs, settings, source.

Each table is found by the heading above it. A failure names the table and the row.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from msgspec import NODEFAULT, inspect

from broker import fragments, peers
from broker.settings import Settings
from rllink_zmq import arrays, messages, policy, sampling, session, session_runner, transfer, transport
from rllink_zmq.messages import MESSAGES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "protocol.md").read_text()

PARTS: dict[str, type] = {
    "peer of a simulator": messages.SimulatorHello,
    "peer of a runner": messages.RunnerHello,
    "peer of a trainer": messages.TrainerHello,
    "peer of an observer": messages.ObserverHello,
    "peer of a reader": messages.ReaderHello,
    "peer of a service": messages.ServiceHello,
    "Spaces": messages.Spaces,
    "Box": messages.BoxSpace,
    "Discrete": messages.DiscreteSpace,
    "MultiDiscrete": messages.MultiDiscreteSpace,
    "MultiBinary": messages.MultiBinarySpace,
    "Dict": messages.DictSpace,
    "Tuple": messages.TupleSpace,
    "Column": messages.Column,
    "Segment": messages.Segment,
    "AgentRows": messages.AgentRows,
    "Place": messages.Place,
    "Told": messages.Told,
    "Claim": messages.Claim,
    "Handed": messages.Handed,
    "Assigned": messages.Assigned,
    "Present": messages.Present,
    "Dropped": messages.Dropped,
}
"""Heading -> struct, beside the messages, which have headings of their own names."""

LITERALS = ("no", "terminated", "truncated", "serve", "park", "leave", "end")
"""All values of literals, in their order in the document."""

STRUCTS = {c.__name__: c for c in MESSAGES} | PARTS
NAMES = {cls: name for name, cls in STRUCTS.items()}


# ---- the document ----------------------------------------------------------------------------------------------------


def section(heading: str) -> str:
    """The text below a heading of any level, up to the next heading."""
    found = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"docs/protocol.md has {len(found)} headings '{heading}'"
    return str(found[0])


def table(heading: str) -> list[dict[str, str]]:
    """The first table below a heading: a row is column -> cell, without backquotes around a whole cell."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    assert len(lines) > 2, f"there is no table below '{heading}' in docs/protocol.md"
    split = (re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines)
    head, _, *rows = ([cell.strip().replace("\\|", "|") for cell in cells] for cells in split)
    for row in rows:
        assert len(row) == len(head), f"'{heading}': a row of {len(row)} cells below {len(head)}: {row}"
    return [{h: re.sub("^`([^`]*)`$", r"\1", cell) for h, cell in zip(head, row, strict=True)} for row in rows]


def same(heading: str, told: set[Any], real: set[Any]) -> None:
    more, less = sorted(told - real), sorted(real - told)
    assert told == real, f"docs/protocol.md, '{heading}': only in the document {more}, only in the code {less}"


# ---- messages --------------------------------------------------------------------------------------------------------


def power(n: int) -> str:
    """A number as the document writes it."""
    for k in (31, 32, 53):
        if n == (1 << k) - 1:
            return f"2^{k} - 1"
        if n == -(1 << k):
            return f"-2^{k}"
    return f"{n}"


def described(kind: inspect.Type) -> str:
    """A type with its bounds as the document writes it."""
    match kind:
        case inspect.IntType():
            most = kind.lt - 1 if kind.lt is not None else kind.le
            assert kind.ge is not None and most is not None
            return "count" if (kind.ge, most) == (0, (1 << 53) - 1) else f"int {power(kind.ge)} .. {power(most)}"
        case inspect.FloatType():
            if kind.ge is None:
                return "float"
            return "finite float >= 0" if kind.ge == 0 else "finite float"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "nil"
        case inspect.StrType():
            if kind.pattern:
                return "reason"
            return f"str {kind.min_length} .. {kind.max_length}" if kind.min_length else f"str <= {kind.max_length}"
        case inspect.BytesType():
            if not kind.min_length:
                return f"bytes <= {kind.max_length}"
            assert kind.min_length == kind.max_length
            return f"bytes {kind.max_length}"
        case inspect.LiteralType():
            return ", ".join(json.dumps(v) for v in LITERALS if v in kind.values)
        case inspect.ListType() | inspect.VarTupleType():
            length = f"{kind.min_length} .. {kind.max_length}" if kind.min_length else f"<= {kind.max_length}"
            return f"list {length} of {described(kind.item_type)}"
        case inspect.TupleType():
            return f"[{', '.join(described(k) for k in kind.item_types)}]"
        case inspect.DictType():
            return f"map <= {kind.max_length} of {described(kind.key_type)} to {described(kind.value_type)}"
        case inspect.UnionType():
            return " or ".join(dict.fromkeys(described(k) for k in kind.types))
        case inspect.StructType():
            return "peer" if NAMES[kind.cls].startswith("peer") else NAMES[kind.cls]
    raise AssertionError(f"the document has no word for {kind}")


def default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not NODEFAULT else field.default_factory()
    return "nil" if value is None else json.dumps(value.decode() if isinstance(value, bytes) else value)


def rows_of(cls: type) -> list[tuple[str, str, str]]:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return [(f.encode_name, described(f.type), default(f)) for f in info.fields]


@pytest.mark.parametrize("name", STRUCTS)
def test_fields(name: str) -> None:
    real = rows_of(STRUCTS[name])
    if not real:
        assert "no fields" in section(name).lower(), f"'{name}' has no fields; the document doesn't say so"
        return
    told = [(row["field"], row["type"], row["default"]) for row in table(name)]
    same(name, {row[0] for row in told}, {row[0] for row in real})
    for mine, its in zip(told, real, strict=True):
        assert mine == its, f"docs/protocol.md, '{name}': the row is {mine}, the struct has {its}"
    assert all(row["meaning"] for row in table(name)), f"'{name}': a field without a meaning"


def test_every_message_is_in_the_overview_in_order() -> None:
    rows = table("All messages")
    assert [row["message"] for row in rows] == [c.__name__ for c in MESSAGES]
    for row in rows:
        assert f"**{row['from -> to']}.**" in section(row["message"]), f"'{row['message']}': another direction there"


def test_protocol_version() -> None:
    assert f"This is protocol version **{messages.PROTOCOL_VERSION}**" in TEXT


def test_lists_of_parts_are_arrays() -> None:
    for name, cls in PARTS.items():
        info = inspect.type_info(cls)
        assert isinstance(info, inspect.StructType)
        assert info.array_like == ("An array, in this order" in section(name)), name
        if info.tag_field:
            assert f'`{info.tag_field}` = `"{info.tag}"`' in section(name), f"'{name}' doesn't tell its tag"


# ---- dtypes, limits, settings ----------------------------------------------------------------------------------------


def test_dtypes() -> None:
    told = {(row["dtype"], int(row["bytes"])) for row in table("Dtypes")}
    same("Dtypes", told, set(arrays.ITEM_BYTES.items()))


def test_limits() -> None:
    told = {(row["limit"], int(row["value"].replace(",", ""))) for row in table("Limits")}
    real = {(name, value) for name, value in vars(messages).items() if name.startswith("MAX_")}
    same("Limits", told, real)


def numbers(heading: str) -> dict[str, float]:
    return {row["name"]: float(row["value"].replace(",", "")) for row in table(heading)}


def test_broker_settings() -> None:
    real = {f.name: float(getattr(Settings(), f.name)) for f in dataclasses.fields(Settings)}
    same("Settings of the broker", set(numbers("Settings of the broker").items()), set(real.items()))


def test_timing_of_endpoints() -> None:
    rows = table("Timing of endpoints")
    for column, timing in (("simulator", session.Timing()), ("runner, trainer", session_runner.SERVICE_TIMING)):
        told = {(row["name"], float(row[column])) for row in rows}
        same(f"Timing of endpoints ({column})", told, {(n, float(v)) for n, v in timing._asdict().items()})


def constant(file: str, name: str) -> float:
    """A number assigned at the top of a module that can't be imported here (it needs ray)."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return float(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no {name}")


def test_other_numbers() -> None:
    real = {
        "heartbeat interval": transport.HEARTBEAT_MS / 1000,
        "heartbeat time to live": transport.HEARTBEAT_TTL_MS / 1000,
        "heartbeat timeout": transport.HEARTBEAT_TIMEOUT_MS / 1000,
        "piece of a transfer": transfer.CHUNK_BYTES,
        "pieces outstanding": transfer.OUTSTANDING,
        "return delay": constant("rllink_zmq/rllib/link.py", "RETURN_DELAY"),
        "memory of hand-overs": session_runner.MEMORY_OF_HANDED,
        "linger of a round": constant("rllink_zmq/rllib/settings.py", "ROUND_LINGER"),
        "linger of a stream": constant("rllink_zmq/rllib/settings.py", "STREAM_LINGER"),
        "patience of a round": sampling.PROGRESS_WAIT,
        "past the timeout": sampling.LATE,
        "too late": sampling.TOO_LATE,
    }
    same("Other numbers", set(numbers("Other numbers").items()), {(k, float(v)) for k, v in real.items()})


# ---- state tables ----------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[tuple[Any, Any], Any]] = {
    "States of a peer": peers.TABLE,
    "States of a fragment": fragments.TABLE,
    "States of an endpoint": session.STATES,
}


@pytest.mark.parametrize("heading", TABLES)
def test_states(heading: str) -> None:
    def word(value: Enum) -> str:
        return str(value.value)

    rows = table(heading)
    told = {(row["state"], row["verb"], row["next"]) for row in rows}
    real = {(word(state), word(verb), word(after)) for (state, verb), after in TABLES[heading].items()}
    assert len(told) == len(rows), f"'{heading}' has a row twice"
    same(heading, told, real)


# ---- codes and outcomes, from the source -----------------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """(what it is called on, name, call) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, node
            elif isinstance(node.func, ast.Name):
                yield "", node.func.id, node


def trees(*patterns: str) -> Iterator[tuple[Path, ast.Module]]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield path, ast.parse(path.read_text())


def word_in(node: ast.AST | None, tree: ast.Module) -> list[str]:
    """The reason or code that an expression may be: a literal, a constant of its module, either side of an `if`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch("[a-z_]+", node.value):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return word_in(node.body, tree) + word_in(node.orelse, tree)
    if isinstance(node, ast.Name):
        if node.id in ("DELIVERED", "EVALUATED", "UNWANTED"):
            return [str(getattr(messages, node.id))]
        for line in tree.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == node.id:
                return word_in(line.value, tree)
    return []


def argument(call: ast.Call, at: int) -> ast.AST | None:
    return call.args[at] if len(call.args) > at else None


def is_true(call: ast.Call, keyword: str, otherwise: bool) -> bool:
    for k in call.keywords:
        if k.arg == keyword and isinstance(k.value, ast.Constant):
            return bool(k.value.value)
    return otherwise


def refusals() -> set[tuple[str, bool]]:
    """(code, fatal) of every REFUSED that the source can send."""
    found: set[tuple[str, bool]] = set()
    for _, tree in trees("broker/*.py", "rllink_zmq/wire.py", "rllink_zmq/arrays.py"):
        for _, name, call in calls(tree):
            if name == "_refuse":
                found |= {(w, is_true(call, "fatal", False)) for w in word_in(argument(call, 2), tree)}
            elif name == "no":
                found |= {(w, is_true(call, "fatal", True)) for w in word_in(argument(call, 0), tree)}
            elif name == "_expel":
                found |= {(w, True) for w in word_in(argument(call, 1), tree)}
            elif name == "ProtocolError":
                code = argument(call, 1)
                found |= {(w, False) for w in (["malformed"] if code is None else word_in(code, tree))}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "_unfit":
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Tuple):
                        found |= {(w, True) for w in word_in(inner.value.elts[0], tree)}
    return found


def test_codes_of_refused() -> None:
    told = set()
    for row in table("Codes of REFUSED"):
        assert row["fatal"] in ("yes", "no", "both"), f"'Codes of REFUSED': fatal is {row['fatal']!r} of {row['code']}"
        told |= {(row["code"], fatal) for fatal in (True, False) if row["fatal"] in ("both", "yes" if fatal else "no")}
        assert row["what to do"], f"'Codes of REFUSED': {row['code']} doesn't say what to do"
    same("Codes of REFUSED", told, refusals())


def outcomes() -> set[str]:
    """Every outcome that the source can settle a fragment with."""
    found: set[str] = set()
    for _, tree in trees("broker/*.py", "rllink_zmq/session*.py", "rllink_zmq/sampling.py", "rllink_zmq/rllib/*.py"):
        for on, name, call in calls(tree):
            if name in ("_drop", "drop", "_settle"):
                found |= set(word_in(argument(call, 1), tree))
            elif name in ("resolve", "_ack"):
                found |= set(word_in(argument(call, 2), tree))
            elif name in ("get", "setdefault") and on.endswith(("outcomes", "_dropped", "why")):
                found |= set(word_in(argument(call, 1), tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "told":
                found |= set(word_in(node.value, tree))
            if isinstance(node, ast.FunctionDef) and node.name == "_too_old":
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return):
                        found |= set(word_in(inner.value, tree))
    return found


def test_outcomes() -> None:
    same("Outcomes", {row["outcome"] for row in table("Outcomes")}, outcomes())


def test_reasons_of_simulators() -> None:
    found: set[str] = set()
    for _, tree in trees("rllink_zmq/client*.py"):
        for _, name, call in calls(tree):
            if name == "_count_dropped":
                found |= {n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    same("What a simulator drops itself", {row["reason"] for row in table("What a simulator drops itself")}, found)


# ---- the policy ------------------------------------------------------------------------------------------------------


def test_manifest() -> None:
    assert [row["field"] for row in table("The manifest")] == list(policy.PolicyManifest.__struct_fields__)
    told = {row["noise"] for row in table("Noise")}
    same("Noise", told, set(policy.Noise.__args__))


def test_graph() -> None:
    source = (ROOT / "rllink_zmq" / "policy.py").read_text()
    names = [row["name"] for row in table("The graph")]
    for name in names:
        of = "part" if name.startswith("state") else "weight"
        filled = name.replace("<name>", f"{{{of}.name}}").replace("<i>", "{i}")
        assert f'"{name}"' in source or f'f"{filled}"' in source, name
    assert len(names) == 13


# ---- the golden frames -----------------------------------------------------------------------------------------------


def test_the_example_is_golden() -> None:
    frames = {e["name"]: e for e in json.loads((ROOT / "tests" / "golden" / "frames.json").read_text())}
    shown = re.findall(r"```hex (.+?)\n(.*?)```", TEXT, re.DOTALL)
    assert shown, "docs/protocol.md shows no golden frame"
    for name, text in shown:
        frame = "".join(text.split())
        assert frame in frames[name]["frames"], f"docs/protocol.md: the frame of '{name}' is not the golden one"


if __name__ == "__main__":
    # What the tables of fields must say, to be pasted after a change; the meanings are yours.
    for name, cls in STRUCTS.items():
        print(f"### {name}\n\n| field | type | default | meaning |\n|---|---|---|---|")
        for field in rows_of(cls):
            print(f"| `{field[0]}` | `{field[1]}` | `{field[2]}` |  |")
        print()
    print(sorted(refusals()), sorted(outcomes()))
