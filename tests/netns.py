"""Hosts on one machine: network namespaces joined by veth pairs and a bridge, with slow links and partitions.

Needs root on Linux, `ip` and `tc` (iproute2). A partition is an `nft` rule that drops everything where nftables is
installed, else the host's end of the link is taken off the bridge: both lose packets without a word.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
SUBNET = "10.213.77"
BRIDGE = "rllbr"
_numbers = itertools.count()


def run(*command: str) -> str:
    """Raises `CalledProcessError` when it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def why_not() -> str:
    """Why hosts can't be made here; "" when they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` (iproute2)"
    probe = f"rllprobe{os.getpid()}"
    try:
        run("ip", "netns", "add", probe)
        try:
            run("ip", "-n", probe, "link", "add", "name", "rll0", "type", "veth", "peer", "name", "rll1")
            run("ip", "-n", probe, "link", "add", "name", "rll2", "type", "bridge")
            run("ip", "netns", "exec", probe, "true")
        finally:
            run("ip", "netns", "del", probe)
    except (subprocess.SubprocessError, OSError) as e:
        return f"this machine makes no network namespaces: {(getattr(e, 'stderr', '') or str(e)).strip()}"
    return ""


class Host:
    """One namespace with one link, `address` on it."""

    def __init__(self, net: Net, name: str, number: int) -> None:
        self.name = f"{net.prefix}{name}"
        self.address = f"{SUBNET}.{number}"
        self._net = net
        self._link, self._far = f"{net.prefix}l{number}", f"{net.prefix}f{number}"
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        peer = ("peer", "name", self._link, "netns", self.name)
        run("ip", "-n", net.switch, "link", "add", "name", self._far, "type", "veth", *peer)
        run("ip", "-n", net.switch, "link", "set", self._far, "master", BRIDGE, "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", self._link)
        run("ip", "-n", self.name, "link", "set", self._link, "up")
        run("ip", "-n", self.name, "route", "add", "default", "dev", self._link)

    def command(self, *arguments: str) -> list[str]:
        """These arguments as a command that runs on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def slow(self, rate: str = "4mbit") -> None:
        """Both directions of its link."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        run("tc", "-n", self.name, "qdisc", "replace", "dev", self._link, *shape)
        run("tc", "-n", self._net.switch, "qdisc", "replace", "dev", self._far, *shape)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Nothing comes or goes, and nobody is told."""
        if shutil.which("nft") is None:
            run("ip", "-n", self._net.switch, "link", "set", self._far, "nomaster")
        else:
            rules = "; ".join(
                f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}; add rule inet cut {hook} "
                f"{side} {self._link} drop"
                for hook, side in (("input", "iifname"), ("output", "oifname"))
            )
            run(*self.command("nft", f"add table inet cut; {rules}"))
        try:
            yield
        finally:
            if shutil.which("nft") is None:
                run("ip", "-n", self._net.switch, "link", "set", self._far, "master", BRIDGE)
            else:
                run(*self.command("nft", "delete table inet cut"))

    def inside(self, question: Callable[[], T]) -> T:
        """The answer of a function that is called in a thread on this host: only its new sockets know."""
        answers: list[T] = []

        def enter() -> None:
            with Path(f"/var/run/netns/{self.name}").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            answers.append(question())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return answers[0]

    def processes(self) -> set[int]:
        """Ids of all processes on this host."""
        return {int(line) for line in run("ip", "netns", "pids", self.name).split()}

    def close(self) -> None:
        """Whatever still runs there is ended."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(("ip", "netns", "del", self.name), capture_output=True, timeout=20)


class Net:
    """A switch, and hosts at it."""

    def __init__(self) -> None:
        self.prefix = f"r{os.getpid() % 100_000}{next(_numbers)}"
        self.switch = f"{self.prefix}sw"
        self.hosts: list[Host] = []
        run("ip", "netns", "add", self.switch)
        run("ip", "-n", self.switch, "link", "add", "name", BRIDGE, "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", BRIDGE, "up")

    def host(self, name: str) -> Host:
        self.hosts.append(Host(self, name, len(self.hosts) + 1))
        return self.hosts[-1]

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        subprocess.run(("ip", "netns", "del", self.switch), capture_output=True, timeout=20)


@contextmanager
def network() -> Iterator[Net]:
    """Gone with the block, whatever happens in it."""
    net = Net()
    try:
        yield net
    finally:
        net.close()
