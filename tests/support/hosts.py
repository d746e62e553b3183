"""Several hosts on one machine: each a network, process and mount namespace with an address, a name and an sshd of its own.

Needs root, iproute2, openssh-server and rsync. What a host starts lives in its process namespace and ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_NEEDED = ("ip", "unshare", "setpriv", "sshd", "ssh", "ssh-keygen", "rsync")
_MOUNT = Path("/shared")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def find_obstacle() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if missing := [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]:
        return f"not installed: {', '.join(missing)}"
    name = f"ml{os.getpid()}t"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode == 0:
        made = _run("ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--uts", "--fork", "true", check=False)
        _run("ip", "netns", "delete", name, check=False)
    return f"namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


def _run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), check=check, text=True, capture_output=True, env={**os.environ, "PATH": _PATH}
    )


@dataclass
class Host:
    """One host: its name, address, network namespace, private folders and the process that all others descend from."""

    name: str
    ip: str
    network: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        """Its /root, as seen from outside."""
        return self.folder / "root"

    @property
    def tmp(self) -> Path:
        """Its /tmp, as seen from outside."""
        return self.folder / "tmp"

    def cut_off(self) -> None:
        """Pull the plug: the network is gone before the processes, so that nobody is told."""
        _run("ip", "netns", "exec", self.network, "ip", "link", "set", "eth0", "down")
        self.kill()

    def kill(self) -> None:
        """End every process of the host at once."""
        # unshare --kill-child ends the namespace's first process, and with it the kernel ends all others.
        self.process.kill()
        self.process.wait(timeout=30)


@dataclass
class Network:
    """Hosts on one bridge; `key` logs in to all of them as root, `ip` is this machine's own address among them."""

    ip: str
    key: Path
    hosts: list[Host] = field(default_factory=list)

    def log_in(self, host: Host, command: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command on the host over ssh, as root, on a terminal where something is typed."""
        ssh = self._ssh(host, command, *(["-tt"] if typed else []))
        return subprocess.run(ssh, text=True, capture_output=True, input=typed)

    def start(self, host: Host, command: str) -> subprocess.Popen[str]:
        """Start a command on the host over ssh, as root; it ends with the host."""
        return subprocess.Popen(
            self._ssh(host, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _ssh(self, host: Host, command: str, *more: str) -> list[str]:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=2", "LogLevel=ERROR")
        given = [part for option in options for part in ("-o", option)]
        return ["ssh", "-i", str(self.key), *given, *more, f"root@{host.ip}", command]


@contextmanager
def make_hosts(names: Sequence[str], folder: Path, shared: Sequence[Path], mount: Path) -> Iterator[Network]:
    """Hosts with these names, `folder`/<name> holding their private /tmp and /root; all see the folders `shared`, and
    `mount` at /shared.

    Everything is removed at the end, whatever happened.
    """
    tag = f"ml{os.getpid()}"
    subnet = f"10.{213 + os.getpid() % 20}.{os.getpid() // 20 % 250}"
    kept = [*map(Path.resolve, shared), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    key = folder / "key"
    network = Network(f"{subnet}.1", key)
    _remove_leftovers()
    made = not _MOUNT.exists()
    _MOUNT.mkdir(exist_ok=True)
    try:
        _run("ip", "link", "add", tag, "type", "bridge")
        _run("ip", "address", "add", f"{subnet}.1/24", "dev", tag)
        _run("ip", "link", "set", tag, "up")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
        for n, name in enumerate(names, 2):
            network.hosts.append(_start(f"{tag}h{n}", tag, name, f"{subnet}.{n}", folder, kept, mount))
        for host in network.hosts:
            _wait_for_sshd(network, host)
        yield network
    finally:
        for host in network.hosts:
            host.kill()
        _remove(tag)
        if made:
            _MOUNT.rmdir()


def _remove(tag: str) -> None:
    for name in _list(f"{tag}h"):
        _run("ip", "link", "delete", name, check=False)
        _run("ip", "netns", "delete", name, check=False)
    _run("ip", "link", "delete", tag, check=False)


def _remove_leftovers() -> None:
    """Networks of test processes that were killed."""
    for tag in {name.partition("h")[0] for name in _list("ml")}:
        if tag[2:].isdigit() and not Path(f"/proc/{tag[2:]}").exists():
            _remove(tag)


def _list(prefix: str) -> list[str]:
    lines = _run("ip", "netns", "list", check=False).stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith(prefix)]


def _start(network: str, bridge: str, name: str, ip: str, folder: Path, kept: Sequence[Path], mount: Path) -> Host:
    private = folder / name
    _run("ip", "netns", "add", network)
    _run("ip", "link", "add", network, "type", "veth", "peer", "name", "eth0", "netns", network)
    _run("ip", "link", "set", network, "master", bridge, "up")
    inside = ("ip", "netns", "exec", network, "ip")
    _run(*inside, "address", "add", f"{ip}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run(*inside, "link", "set", device, "up")
    # Ray finds its own address by the route to the world; without one it takes 127.0.0.1 and nobody can join it.
    _run(*inside, "route", "add", "default", "via", f"{ip.rpartition('.')[0]}.1")
    binds = [f"mount --bind {mount} {_MOUNT}"]
    for place in ("root", "tmp"):  # `folder` itself may stand in /tmp, which is hidden last
        (private / place).mkdir(parents=True)
        for path in kept:
            if path.is_relative_to(f"/{place}"):
                inner = private / place / path.relative_to(f"/{place}")
                inner.mkdir(parents=True, exist_ok=True)
                binds.append(f"mount --bind {path} {inner}")
        binds.append(f"mount --rbind {private / place} /{place}")
    (private / "tmp").chmod(0o1777)
    (private / "root" / ".bashrc").touch()
    (private / "hosts").write_text(f"127.0.0.1 localhost\n{ip} {name}\n")
    config = private / "sshd_config"
    config.write_text(
        f"ListenAddress {ip}\nHostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'key.pub'}\n"
        "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    copies = " ".join(str(path) for path in (folder / "host_key", folder / "key.pub", config))
    script = f"""
        set -e
        hostname {name}
        mount --bind {private / "hosts"} /etc/hosts
        mkdir -p /run/sshd {private / "tmp" / "ssh"}
        cp {copies} {private / "tmp" / "ssh"}
        {"; ".join(binds)}
        sed -i 's#{folder}/host_key#/tmp/ssh/host_key#; s#{folder}/key.pub#/tmp/ssh/key.pub#' /tmp/ssh/sshd_config
        cd /
        # The first process waits for those whose parents are gone, so that `ray stop` sees them go.
        /usr/sbin/sshd -D -e -f /tmp/ssh/sshd_config & wait $!
    """
    unshare = ("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            # The hosts end with this process, however it ends.
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", network, *unshare, "bash", "-c", script],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={"PATH": _PATH, "HOME": "/root"},
        )
    return Host(name, ip, network, private, process)


def _wait_for_sshd(network: Network, host: Host) -> None:
    end = time.monotonic() + 20
    while (tried := network.log_in(host, "hostname")).returncode:
        log = host.folder.parent / f"{host.name}.log"
        assert host.process.poll() is None and time.monotonic() < end, tried.stderr + log.read_text()
        time.sleep(0.2)
    assert tried.stdout.strip() == host.name
