"""Who may know whom: the import rules of `docs/architecture.md`, read off the source of every module.

The rules are the data below. A breach is reported as file, line, rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rllink_zmq", "broker")

CLI = ("rllink_zmq/cli.py", "rllink_zmq/cli_*.py", "rllink_zmq/cli/*.py")

LAYERS = (
    "errors", "messages", "arrays", "wire", "compression", "transfer", "policy", "packing", "spaces", "fragments",
    "weights", "session", "sampling", "audit", "transport", "client", "drive", "cli",
)  # fmt: skip
"""Inside rllink_zmq a module imports only its own layer and those before it. `session_runner` counts as `session`."""

RLLIB_MAY_NOT = ("cli", "client", "drive")
"""rllink_zmq/rllib/ may import every layer but these."""

BROKER_MAY = ("errors", "messages", "wire", "transfer")
"""What broker/ may import of rllink_zmq."""

BROKER_THIRD_PARTY = {
    "events": ("msgspec",),
    "server": ("zmq", "click", "uvicorn", "starlette"),
    "admin": ("click", "uvicorn", "starlette"),
    "__main__": ("click", "uvicorn", "starlette"),
}
"""Everything else in broker/ runs on the standard library."""

ONLY = {
    "ray": ("rllink_zmq/rllib/*",),
    "torch": ("rllink_zmq/rllib/*",),
    "rllink_zmq.rllib": ("rllink_zmq/rllib/*", *CLI),
    "zmq": ("rllink_zmq/transport*", *CLI, "broker/server.py"),
    "broker": ("broker/*", *CLI),
}
"""What only these files may import."""

CLI_LATE = ("broker", "rllink_zmq.rllib")
"""What the command line imports inside functions only (or for its types): a simulator host has neither starlette nor
ray."""

NEVER = ("pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve")
"""Nothing a peer sends can run code. The examples keep this one too."""

SANS_IO = ("rllink_zmq/session*", "rllink_zmq/sampling*", "broker/*")
SANS_IO_BUT = ("broker/server*", "broker/admin*", "broker/metrics*", "broker/__main__.py")
SANS_IO_MAY_NOT = ("time", "socket", "select", "selectors", "threading", "multiprocessing", "asyncio", "subprocess")
"""These modules take the time as an argument and return what is to be sent."""


class Import(NamedTuple):
    """`name` is absolute: `package.module`, or `package.module.thing` for `from package.module import thing`."""

    file: str
    line: int
    name: str
    relative: bool
    late: bool


def imports(file: str, source: str) -> Iterator[Import]:
    """Every import of one file, those inside functions and under TYPE_CHECKING too."""
    package = file.removesuffix(".py").split("/")[:-1]

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, False, late)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield Import(file, node.lineno, ".".join([*base, alias.name]), node.level > 0, late)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(file, node.lineno, node.args[0].value, False, late)
        typing = isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"
        inside = late or typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source, file), False)


def layer(stem: str) -> str:
    """The layer of a module of rllink_zmq, '' for a module that LAYERS doesn't know."""
    return max((a for a in LAYERS if stem == a or stem.startswith(f"{a}_")), key=len, default="")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, p) for p in patterns)


def rule_broken(i: Import) -> str:
    """The rule that an import breaks, in words; '' for none."""
    top, *rest = i.name.split(".")
    if any(part in NEVER for part in i.name.split(".")):
        return f"nobody imports {', '.join(NEVER)}"
    if not i.file.startswith(PACKAGES):
        return ""
    for package, files in ONLY.items():
        if within(i.name, package) and not matches(i.file, files):
            return f"only {' and '.join(files)} may import {package}"
    if matches(i.file, CLI) and not i.late and any(within(i.name, p) for p in CLI_LATE):
        return f"the command line imports {' and '.join(CLI_LATE)} inside functions only"
    if top in SANS_IO_MAY_NOT and matches(i.file, SANS_IO) and not matches(i.file, SANS_IO_BUT):
        return f"no clock, socket or thread in a module without I/O ({', '.join(SANS_IO_MAY_NOT)})"
    if top == "rllink_zmq" and rest not in ([], ["__version__"]):
        return _broken_of_ours(i.file.split("/"), rest[0])
    if i.file.startswith("broker/"):
        return _broken_of_broker(i, top)
    return ""


def _broken_of_ours(file: list[str], target: str) -> str:
    stem = file[1].removesuffix(".py")
    if file[0] == "broker":
        return "" if target in BROKER_MAY else f"broker/ knows only {', '.join(BROKER_MAY)} of rllink_zmq"
    if stem == "__init__" or target == "rllib":
        return ""
    for module in {target, stem} - {"rllib"}:
        if not layer(module):
            return f"{module} is in no layer: give it its place in LAYERS"
    if stem == "rllib":
        return f"rllib/ may not import {', '.join(RLLIB_MAY_NOT)}" if layer(target) in RLLIB_MAY_NOT else ""
    if LAYERS.index(layer(target)) > LAYERS.index(layer(stem)):
        return f"{layer(stem)} comes before {layer(target)} and may not import it"
    return ""


def _broken_of_broker(i: Import, top: str) -> str:
    if top == "broker":
        return "" if i.relative else "inside broker/ imports are relative"
    allowed = BROKER_THIRD_PARTY.get(i.file.split("/")[1].removesuffix(".py"), ())
    if top == "rllink_zmq" or top in allowed or top in sys.stdlib_module_names:
        return ""
    return f"{i.file} may import {', '.join(('the standard library', *allowed))}"


def breaches(file: str, source: str) -> list[str]:
    return [f"{i.file}:{i.line}: imports {i.name}: {rule}" for i in imports(file, source) if (rule := rule_broken(i))]


FILES = sorted(p.relative_to(ROOT).as_posix() for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
EXAMPLES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples").rglob("*.py"))


@pytest.mark.parametrize("file", [*FILES, *EXAMPLES])
def test_imports_keep_the_rules(file: str) -> None:
    found = breaches(file, (ROOT / file).read_text())
    assert not found, "\n".join(["", *found])


def test_there_is_something_to_read() -> None:
    assert {f"rllink_zmq/{m}.py" for m in ("__init__", "errors", "messages", "wire")} <= set(FILES)
    assert {f"broker/{m}.py" for m in ("__init__", "core", "server")} <= set(FILES)
    assert any(f.startswith("rllink_zmq/rllib/") for f in FILES)
    read = [i for f in FILES for i in imports(f, (ROOT / f).read_text())]
    for package in ("ray", "torch", "zmq", "rllink_zmq"):
        assert any(within(i.name, package) for i in read), f"no import of {package} was seen"


def test_every_module_has_a_layer() -> None:
    stems = {f.split("/")[1].removesuffix(".py") for f in FILES if f.startswith("rllink_zmq/")}
    lost = sorted(s for s in stems - {"__init__", "rllib"} if not layer(s))
    assert not lost, f"in no layer: {', '.join(lost)}; give each its place in LAYERS"
    missing = sorted(set(LAYERS) - {layer(s) for s in stems})
    assert not missing, f"LAYERS names modules that don't exist: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rllink_zmq/client.py", "import broker"),
        ("rllink_zmq/client.py", "def f():\n    from broker.core import Broker"),
        ("rllink_zmq/cli.py", "from broker import server"),
        ("rllink_zmq/cli/start.py", "import broker.server"),
        ("rllink_zmq/cli_train.py", "from rllink_zmq.rllib.train import train"),
        ("rllink_zmq/cli_train.py", "from .rllib import train"),
        ("rllink_zmq/client.py", "def f():\n    from rllink_zmq.rllib import runner"),
        ("rllink_zmq/policy.py", "def f():\n    import torch.nn as nn"),
        ("rllink_zmq/spaces.py", "from ray.rllib import env"),
        ("rllink_zmq/session.py", "import zmq"),
        ("rllink_zmq/session_runner.py", "from time import monotonic"),
        ("rllink_zmq/rllib/runner.py", "import zmq"),
        ("rllink_zmq/rllib/pool.py", "from ray import cloudpickle"),
        ("rllink_zmq/rllib/pool.py", "from rllink_zmq.client import connect"),
        ("rllink_zmq/rllib/pool.py", "from ..drive import drive"),
        ("rllink_zmq/rllib/pool.py", "from rllink_zmq import cli"),
        ("rllink_zmq/wire.py", "import pickle"),
        ("rllink_zmq/wire.py", "import importlib\nimportlib.import_module('pickle')"),
        ("rllink_zmq/wire.py", "from rllink_zmq.session_runner import X"),
        ("rllink_zmq/messages.py", "from . import wire"),
        ("rllink_zmq/messages.py", "if TYPE_CHECKING:\n    from rllink_zmq.wire import encode"),
        ("rllink_zmq/drive.py", "from rllink_zmq import nowhere"),
        ("broker/core.py", "from rllink_zmq.session import Session"),
        ("broker/core.py", "from rllink_zmq import client"),
        ("broker/core.py", "from broker.peers import Peer"),
        ("broker/core.py", "import broker"),
        ("broker/core.py", "import time"),
        ("broker/core.py", "import numpy as np"),
        ("broker/core.py", "import click"),
        ("broker/admin.py", "import zmq"),
        ("broker/admin.py", "import zmq.asyncio"),
        ("broker/server.py", "import ray"),
        ("broker/server.py", "import dill"),
        ("examples/loop.py", "import pickle"),
    ],
)
def test_a_breach_is_seen(file: str, source: str) -> None:
    (breach,) = breaches(file, source)
    line = len(source.splitlines())
    assert breach.startswith(f"{file}:{line}: imports ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rllink_zmq/__init__.py", "from rllink_zmq.client import connect"),
        ("rllink_zmq/cli.py", "def f():\n    from broker.server import serve\n    import zmq"),
        ("rllink_zmq/cli/train.py", "async def f():\n    from rllink_zmq.rllib.train import train"),
        ("rllink_zmq/client.py", "from rllink_zmq import __version__\nfrom . import session\nimport time"),
        ("rllink_zmq/session_runner.py", "from rllink_zmq.session import Session"),
        ("rllink_zmq/transport.py", "import zmq, time\nfrom rllink_zmq.session_simulator import S"),
        ("rllink_zmq/rllib/runner.py", "import ray, torch\nfrom ..transport import Link\nfrom . import pool"),
        ("examples/train.py", "import ray, torch\nfrom rllink_zmq.rllib import attach"),
        ("broker/core.py", "import logging\nfrom . import peers\nfrom .events import Tick"),
        ("broker/server.py", "import time, zmq, uvicorn\nfrom rllink_zmq.wire import decode"),
    ],
)
def test_what_is_allowed_is_no_breach(file: str, source: str) -> None:
    assert breaches(file, source) == []


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("rllink_zmq", ("ray", "torch", "onnxruntime", "zmq", "broker")),
        ("rllink_zmq.cli", ("ray", "torch", "broker", "starlette", "uvicorn")),
        ("rllink_zmq.cli.audit", ("ray", "torch", "onnxruntime", "zmq", "broker")),
        ("broker.core", ("ray", "torch", "onnxruntime", "zmq", "starlette", "uvicorn")),
    ],
)
def test_import_loads_no_more_than_it_says(module: str, without: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print({module}.__name__, *(m for m in {without!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [module]
