"""Which Ray a job connects to, asked before it does: Ray's own client waits for minutes, and in silence, for a dead one."""

from __future__ import annotations

import os
import socket

import psutil

from medlora.errors import InputError

START_S = 60.0
"""How long a Ray of the job's own may take to start."""


PROBE_S = 3.0
"""How long another one may take to answer."""


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How an HTTP/2 connection begins, with empty settings; every gRPC server answers with its own settings."""


def find_ray() -> str | None:
    """The address of the running Ray to connect to; None where a local one has to be started.

    RAY_ADDRESS names it, else Ray's own file or its processes do. Raises InputError where it is dead, does not answer
    within seconds, or refuses this process's token.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    from ray._private import services

    try:
        address = str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return None
    source = "RAY_ADDRESS" if named not in ("", "auto") else _name_source(address)
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS: {address} is where jobs are submitted; to connect, give the host and port of Ray itself, mostly "
            "6379, or set RAY_ADDRESS=local for a Ray of this job's own"
        )
    _probe(address, source)
    return address


def _name_source(address: str) -> str:
    from ray._private import utils

    written = utils.read_ray_address(None) == address
    return str(utils.get_ray_address_file(None)) if written else "a Ray process of this machine"


def _probe(address: str, source: str) -> None:
    advice = "start Ray there, or set RAY_ADDRESS=local for a Ray of this job's own"
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        raise InputError(f"{source}: {address!r} is no host:port; name the running Ray as host:port, or {advice[16:]}")
    try:
        answered = _answers(host.strip("[]") or "127.0.0.1", int(port), plain="://" in address)
    except OSError as error:
        raise InputError(f"{source} names a Ray at {address}, where nothing answers ({error}); {advice}") from None
    if not answered:
        raise InputError(f"{source} names a Ray at {address}, which did not answer in {PROBE_S:.0f} s; {advice}")
    if "://" in address:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub leaves it out
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise InputError(
            f"{source} names a Ray at {address}, which refuses this job's token; give its own token with "
            "RAY_AUTH_TOKEN_PATH, or set RAY_ADDRESS=local for a Ray of this job's own"
        ) from None


def _answers(host: str, port: int, plain: bool) -> bool:
    """Whether a gRPC server answers there; only whether something listens where it does not speak `plain` HTTP/2."""
    with socket.create_connection((host, port), timeout=PROBE_S) as connection:
        if plain or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return True
        try:
            connection.sendall(_PREFACE)
            # A frame's type is its fourth byte; the settings, of type 4, come first.
            return connection.recv(9)[3:4] == b"\x04"
        except TimeoutError:
            return False


def explain_slow_start(why: str = "") -> str:
    """The message where a local Ray does not start: nearly always the machine has too much to do."""
    load, memory = os.getloadavg()[0], psutil.virtual_memory()
    return (
        f"Ray did not start within {START_S:.0f} s{f' ({why})' if why else ''}; the machine's load is {load:.1f} on "
        f"{os.cpu_count()} CPUs, and {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory are free; try "
        f"again when less runs on it (Ray's logs: {os.environ.get('RAY_TMPDIR') or '/tmp'}/ray/session_latest/logs)"
    )
