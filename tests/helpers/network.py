"""A network of machines on this machine: one namespace each, joined by a bridge. Links can be cut, and lose packets.

Needs root, iproute2 and nftables; `why_not` says what is missing. The machines have addresses of their own and see
nothing but each other.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from functools import cache

_NAMESPACE_OF_NETWORK = 0x40000000


def _do(*command, text=None):
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)


@cache
def why_not():
    """Why this machine cannot have such a network; None if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"network namespaces need {tool} (package {package})"
    try:
        with Network(["one", "two"]) as network:
            network.cut("one", "two")
            network.lose(5)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


def enter(namespace):
    """Moves this process, which must have one thread, into a namespace of `Network.namespace`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _NAMESPACE_OF_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


class Network:
    """Machines with names, up to 250, while the `with` block lasts. Several networks may exist at once."""

    _made = 0

    def __init__(self, names):
        Network._made += 1
        self._mark = f"{os.getpid() % 100_000}.{Network._made % 100}"
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._rules = {name: {} for name in names}

    def namespace(self, name):
        return f"decaf-{self._mark}-{name}"

    def address(self, name):
        return f"10.77.0.{self._numbers[name]}"

    def __enter__(self):
        self._leave = contextlib.ExitStack()
        bridge = f"dcb{self._mark}"
        try:
            _do("ip", "link", "add", bridge, "type", "bridge")
            self._leave.callback(_do, "ip", "link", "del", bridge)
            _do("ip", "link", "set", bridge, "up")
            for name, number in self._numbers.items():
                inside, near = self.namespace(name), f"dc{number}v{self._mark}"
                _do("ip", "netns", "add", inside)
                self._leave.callback(_do, "ip", "netns", "del", inside)
                _do("ip", "link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", inside)
                self._leave.callback(_do, "ip", "link", "del", near)
                _do("ip", "link", "set", near, "master", bridge, "up")
                _do("ip", "-n", inside, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _do("ip", "-n", inside, "link", "set", device, "up")
                self._apply(name)
        except BaseException:
            self._leave.close()
            raise
        return self

    def __exit__(self, *error):
        self._leave.close()

    def cut(self, one, other):
        """Drops every packet between two machines, without a word to either."""
        for here, there in ((one, other), (other, one)):
            self._rules[here]["cut", there] = f"ip saddr {self.address(there)} drop"
            self._apply(here)

    def mend(self, one, other):
        for here, there in ((one, other), (other, one)):
            self._rules[here].pop(("cut", there), None)
            self._apply(here)

    def lose(self, percent):
        """Every machine loses so many of the packets that reach it."""
        for name in self._numbers:
            self._rules[name]["lose"] = f"numgen random mod 100 < {percent} drop"
            self._apply(name)

    def close(self, name):
        """Nobody can dial this machine any more: a firewall that lets connections out, and none in."""
        self._rules[name]["close"] = "tcp flags & (syn|ack) == syn drop"
        self._apply(name)

    def _apply(self, name):
        rules = "\n".join(self._rules[name].values())
        here = "iifname lo accept"  # between processes of one machine nothing is cut
        chain = f"chain arriving {{\n type filter hook input priority 0; policy accept;\n{here}\n{rules}\n}}"
        # One file is one transaction: at no moment does the machine have no rules.
        text = f"table inet faults\ndelete table inet faults\ntable inet faults {{\n{chain}\n}}\n"
        _do("ip", "netns", "exec", self.namespace(name), "nft", "-f", "-", text=text)
