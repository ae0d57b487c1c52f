"""A Ray cluster that work is spread over: connecting, its size, errors that come back. Ray is an extra."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trawl.errors import PlanError, TrawlError

LOG = logging.getLogger("trawl")
ATTEMPTS = 4  # of a piece of work whose worker dies
ADDRESS = re.compile(r"(?:ray://)?\[?(?P<host>[^\s/]+?)\]?:(?P<port>\d{1,5})")
REACH_SECONDS = 5.0


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray, and what one worker takes of it.

    Attributes:
        threads: CPUs of one worker, and its torch threads: ``OMP_NUM_THREADS``, else 1.
        device: where a worker computes: ``cpu``, or ``cuda`` with one GPU of its own.
        folder: the working directory, against which workers read relative paths where they see it.
        owned: whether closing ends the connection.
    """

    threads: int
    device: str
    folder: str
    owned: bool

    @classmethod
    def connect(cls, address: str, device: str = "auto") -> Cluster:
        """Connect to a cluster, or start one on this machine.

        Args:
            address: ``local`` for all CPUs of this machine, ``auto`` or HOST:PORT for a running cluster. A connection
                that the program has already is used as it is.
            device: ``cpu``, ``cuda``, or ``auto`` for CUDA where the cluster has any.
        Returns: the connection.
        Raises: PlanError: Ray is not installed, there is no cluster at the address, or no GPU where one is asked for.
        """
        try:
            import ray  # noqa: PLC0415 (an extra)
        except ImportError as e:
            raise PlanError("--ray needs the package ray; install it with: pip install 'trawl-llm[ray]'") from e
        threads, owned = _threads(), not ray.is_initialized()
        if owned:
            _init(ray, address)
        any_gpu = ray.cluster_resources().get("GPU", 0) > 0
        chosen = "cuda" if device.startswith("cuda") or (device == "auto" and any_gpu) else "cpu"
        cluster = cls(threads, chosen, str(Path.cwd()), owned)
        if chosen == "cuda" and not any_gpu:
            cluster.close()
            raise PlanError(f"device {device!r} is on no machine of the Ray cluster; use cpu")
        if not cluster.room:
            LOG.warning("no machine of the Ray cluster has %d CPUs for a worker; waiting for one to join", threads)
        return cluster

    @property
    def room(self) -> int:
        """How many workers fit on the machines that are there now."""
        import ray  # noqa: PLC0415 (an extra)

        room = 0
        for node in ray.nodes():
            if node["Alive"]:
                found = node["Resources"]
                fit = int(found.get("CPU", 0)) // self.threads
                room += min(fit, int(found.get("GPU", 0))) if self.device == "cuda" else fit
        return room

    @property
    def needs(self) -> dict[str, Any]:
        """Options of a Ray task or actor that is one worker."""
        return {"num_cpus": self.threads, "num_gpus": int(self.device == "cuda")}

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.owned:
            import ray  # noqa: PLC0415 (an extra)

            ray.shutdown()


@contextmanager
def connected(address: str | None, device: str) -> Iterator[Cluster | None]:
    """Hold a connection for the length of a ``with`` block; none where no address is given."""
    cluster = None if address is None else Cluster.connect(address, device)
    try:
        yield cluster
    finally:
        if cluster:
            cluster.close()


def local_path(model: str | Path) -> str:
    """Return MODEL with a path made absolute, which means the same to every worker."""
    return str(Path(model).absolute() if Path(model).exists() else model)


def _threads() -> int:
    """Read the threads that a worker is to have."""
    value = os.environ.get("OMP_NUM_THREADS", "1")
    if not value.isdigit() or int(value) < 1:
        raise PlanError(f"OMP_NUM_THREADS is {value!r}; with --ray it is the threads of each worker, such as 1")
    return int(value)


def _init(ray: Any, address: str) -> None:
    """Start a cluster or join one, without Ray's own messages and reports."""
    where = {"address": _reached(address)} | ({"num_cpus": _cpus()} if address == "local" else {})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**where, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as e:
        raise PlanError(f"no Ray cluster at {address}: {_first_line(e)}; check ray status there, or use local") from e


def _cpus() -> int:
    """Return this process's CPUs, rounded to whole workers."""
    threads, available = _threads(), len(os.sched_getaffinity(0))
    return max(available // threads, 1) * threads


def _reached(address: str) -> str:
    """Check that something listens at an address; Ray itself waits for minutes."""
    if address in ("auto", "local"):
        return address
    match = ADDRESS.fullmatch(address)
    if not match or int(match["port"]) > 65535:
        raise PlanError(
            f"Ray address {address!r} cannot be read; expected local, auto or HOST:PORT, such as 10.0.0.1:6379"
        )
    reason = _unreachable(match["host"], int(match["port"]))
    if reason:
        raise PlanError(f"no Ray cluster at {address}: {reason}; start one there with ray start --head, or use local")
    return address


def _unreachable(host: str, port: int) -> str:
    """Say why nobody speaks HTTP/2 there, as Ray's head does (RFC 9113, section 3.4); empty where somebody does."""
    try:
        with socket.create_connection((host, port), REACH_SECONDS) as link:
            if "RAY_USE_TLS" in os.environ:
                return ""
            link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            frame = link.recv(9)
    except TimeoutError:
        return f"no answer in {REACH_SECONDS:.0f} s"
    except OSError as e:
        return e.strerror or str(e)
    return "" if frame[3:4] == b"\x04" else "what listens there is not Ray"


def begin_work(threads: int, folder: str) -> None:
    """Make a worker's process compute as the asker would."""
    torch.set_num_threads(threads)
    with suppress(OSError):  # another machine may lack it; then only absolute paths serve
        os.chdir(folder)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a worker raised as itself: a mistake stays one line."""
    import ray  # noqa: PLC0415 (an extra)

    try:
        yield
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, TrawlError):
            raise e.cause from e
        raise


def lost(what: str, error: Exception) -> PlanError:
    """Return the error of work whose workers die again and again."""
    return PlanError(
        f"{what} was given up: its worker died {ATTEMPTS} times, at last: {_first_line(error)}; a worker may need "
        "more memory than its machine has, so run fewer of them: set OMP_NUM_THREADS higher"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
