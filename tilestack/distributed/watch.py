"""Ranks watch each other: one that dies, fails or hangs ends all, within seconds, and is named.

A collective whose peer has died waits until it times out (NCCL), or fails with words about sockets (gloo). So the ranks
form a ring of TCP connections of their own: each reads what the next one says, and the system closes the connection of
a process that ends, however it ends.

    rank r  <-- "at step 17, ..." -- rank r + 1        what it is about to do
    rank r  <-- "bye" --------------- rank r + 1        it ends because it is done
    rank r  <-- "end ..." ----------- rank r + 1        all must end, and why; r tells r - 1, and so on
    rank r  <-- connection closed -- rank r + 1        it died: r tells r - 1 to end

A thread reads, so that this works while the process waits in a collective. The same thread notices if its own process
has been at the same thing for longer than `timeout`: then every rank writes down where it is (the Python stacks, and
what NCCL has not finished) before all end. Nothing here is a collective, nothing is sent to more than one rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tilestack.distributed.world import World

EXIT_ENDED_BY_ANOTHER = 1
CONNECT_S = 20.0
STRANGER_S = 2.0  # in which who connects must know the word
VERDICT_S = 5.0  # a failed collective is the first sign of a dead rank; the ring tells a moment later
LEAVE_S = 3.0  # for the main thread to leave by itself when another rank has failed: most often they all do
PEER_BYTES = 1024
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Peer:
    """How a rank is found: its addresses, port, and the word by which the rank before it is known; and its name."""

    addresses: tuple[str, ...]
    port: int
    word: str
    host: str
    process: int


class Watch:
    """One rank's place in the ring. Begins to watch at once.

    gather: gives every rank's words, in order, for this rank's own; called twice, by every rank.
    timeout: seconds that one thing may take, from one `at` to the next.
    say: writes a message to people.

    hint: what to do after a failure, the end of its message. folder: where stacks are written.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        gather: Callable[[str], list[str]],
        timeout: float = math.inf,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ):
        self.rank, self.timeout, self.hint, self.folder = rank, timeout, "", None
        self._say = say
        self._main = threading.main_thread().ident
        self._doing, self._since = "its start", None
        self._next_rank, self._next_doing, self._next_is_done = (rank + 1) % world_size, "its start", False
        self._before_rank = (rank - 1) % world_size
        self._next: socket.socket | None = None
        self._before: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if world_size == 1:
            return
        with socket.create_server(("", 0)) as listener:  # open until all have joined, or a rank would be refused
            failure = self._join(listener, gather)
            incomplete = any(gather(failure))
        if incomplete:  # a ring with a hole would take the hole for a death: all watch, or none
            for connection in (self._next, self._before):
                if connection is not None:
                    connection.close()
            self._next = self._before = None
            if failure:  # no reason not to train: the collectives' own timeout is left
                say(f"warning: rank {rank} cannot watch rank {self._next_rank}, so no rank is watched: {failure}")
            return
        threading.Thread(target=self._run, name="tilestack watch", daemon=True).start()

    def _join(self, listener: socket.socket, gather: Callable[[str], list[str]]) -> str:
        """Connect to the next rank and let the one before connect; returns why that failed, if it did."""
        word = secrets.token_hex(8)
        own = Peer(_addresses(), listener.getsockname()[1], word, socket.gethostname(), os.getpid())
        peers = [Peer(**json.loads(each)) for each in gather(json.dumps(dataclasses.asdict(own)))]
        self._next_peer = peers[self._next_rank]
        try:
            self._next = _connect(self._next_peer)
            self._before = _accept(listener, word)
        except OSError as error:
            return str(error) or type(error).__name__
        return ""

    def at(self, doing: str) -> None:
        """Say what this rank is about to do, such as "step 17"; its time starts anew."""
        self._doing, self._since = doing, time.monotonic()
        self._tell(f"at {doing}")

    def close(self, failure: BaseException | None = None) -> None:
        """Stop watching. Without a failure this rank is done; with one, the others end too.

        If the failure is a collective's, waits a moment: a rank that died is the better explanation, and ends this one.
        """
        if isinstance(failure, RuntimeError) and self._before is not None:
            time.sleep(VERDICT_S)
        self._closed.set()
        if failure is None:
            self._tell("bye")
        else:
            name = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"
            self._tell(f"end {self.rank} {name} failed in {self._doing}: {type(failure).__name__}: {failure}")

    def _tell(self, line: str) -> None:
        if self._before is None:
            return
        with self._lock, contextlib.suppress(OSError):
            self._before.sendall(" ".join(line.split()).encode()[:4000] + b"\n")

    def _run(self) -> None:
        waiting = b""
        while not self._closed.is_set():
            ready, _, _ = select.select([] if self._next_is_done else [self._next], [], [], 0.5)
            if ready:
                try:
                    received = self._next.recv(65536)
                except OSError:
                    received = b""
                *lines, waiting = (waiting + received).split(b"\n")
                for line in lines:
                    self._hear(line.decode(errors="replace"))
                if not received and not self._next_is_done:
                    self._next_died()
            if self._since is not None and self.timeout < time.monotonic() - self._since:
                self._stuck(f"rank {self.rank} has been in {self._doing} for {self.timeout:g} s (distributed.timeout)")

    def _hear(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "at":
            self._next_doing = rest
        elif verb == "bye":
            self._next_is_done = True
        elif verb == "stuck":
            self._stuck(rest)
        elif verb in ("end", "dead"):
            origin, _, message = rest.partition(" ")
            if int(origin) != self._before_rank:
                self._tell(line)
            if verb == "end" and self._closed.wait(LEAVE_S):
                return  # the same happened here, or this rank was done
            self._leave(message, aloud=self.rank == 0)

    def _next_died(self) -> NoReturn:
        peer = self._next_peer
        message = (
            f"rank {self._next_rank} (host {peer.host}, process {peer.process}) died in {self._next_doing}: it was "
            "killed, or its machine failed; all ranks end"
        )
        self._tell(f"dead {self._next_rank} {message}")
        self._leave(message, aloud=True)

    def _leave(self, message: str, aloud: bool) -> NoReturn:
        try:
            if aloud:
                self._say(f"error: {message}" + (f". {self.hint}" if self.hint else ""))
        finally:
            os._exit(EXIT_ENDED_BY_ANOTHER)  # the main thread may wait in a collective for ever

    def _stuck(self, reason: str) -> NoReturn:
        """Write down where this rank is, and let the others do so too. Each comes here by the message or by itself."""
        try:
            self._tell(f"stuck {reason}")
            stack = self._write_stacks(reason)
            where = place(sys._current_frames().get(self._main))
            pending = unfinished_on_gpu()
            text = f"error: {reason}: rank {self.rank} (host {socket.gethostname()}, process {os.getpid()}) was in "
            text += f"{self._doing}, {where}" + (f"; on the GPU: {', '.join(pending[:3])}" if pending else "")
            self._say(text + (f"; its stacks: {stack}" if stack else "") + (f". {self.hint}" if self.hint else ""))
            time.sleep(2.0)  # for the message to go round: a closed connection would say "died"
        finally:
            os._exit(EXIT_ENDED_BY_ANOTHER)

    def _write_stacks(self, reason: str) -> Path | None:
        if self.folder is not None:
            path = Path(self.folder) / f"stuck-rank-{self.rank:05d}.txt"
            with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
                file.write(f"{reason}\nthis rank was in {self._doing}\n")
                file.writelines(f"not finished on the GPU: {each}\n" for each in unfinished_on_gpu())
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
                return path
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)  # also where the disk is why all hangs
        return None


def place(frame: FrameType | None) -> str:
    """Where a thread is, in a few words: the collective if it is in one, and the line of ours that it came from."""
    collective, ours = None, None
    while frame is not None and ours is None:
        path, line, name = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        if "distributed_c10d" in path:
            collective = name
        if path.startswith(PACKAGE) or path.endswith("train.py"):
            ours = f"at {Path(path).name}:{line}, {name}"
        if frame.f_back is None and ours is None:
            ours = f"at {Path(path).name}:{line}, {name}"
        frame = frame.f_back
    return " ".join(each for each in (f"in {collective}" if collective else None, ours or "nowhere") if each)


def unfinished_on_gpu() -> list[str]:
    """What NCCL has begun and not finished, oldest first, from torch's flight recorder; empty without NCCL."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    # NCCL has a recorder of its own; _dump_fr_trace_json reads that of the other backends
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    try:
        entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries", [])
    except (TypeError, ValueError, RuntimeError):  # another version of torch
        return []
    left = [each for each in entries if each.get("state") != "completed"]
    return [f"{each.get('profiling_name')} {each.get('state')} of {each.get('input_sizes')}" for each in left]


def _addresses() -> tuple[str, ...]:
    """Of this machine as the others may reach it: the one that the way to the first rank starts from, and its name."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        found.append(probe.getsockname()[0])
    return (*found, socket.gethostname())


def _connect(peer: Peer) -> socket.socket:
    failures = []
    for address in peer.addresses:
        try:
            connection = socket.create_connection((address, peer.port), timeout=CONNECT_S / len(peer.addresses))
        except OSError as error:
            failures.append(f"{address}: {error}")
            continue
        connection.settimeout(None)
        connection.sendall(peer.word.encode() + b"\n")
        # a machine that vanishes closes nothing: probes find out in half a minute
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection
    raise ConnectionError(f"port {peer.port} of {peer.host} cannot be reached ({'; '.join(failures)})")


def _accept(listener: socket.socket, word: str) -> socket.socket:
    """The connection of the rank before this one, which knows the word; others are closed."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        connection, _ = listener.accept()
        connection.settimeout(STRANGER_S)
        with contextlib.suppress(OSError):  # a stranger who hangs up, or says nothing
            if connection.recv(len(word) + 1, socket.MSG_WAITALL) == word.encode() + b"\n":
                connection.settimeout(None)
                return connection
        connection.close()


def watch_ranks(world: World, timeout: float) -> Watch:
    """This process's place in a ring of all ranks that `start` has joined. A collective."""
    import torch  # here, so that what else is in this file can be tested in processes that start at once
    import torch.distributed as dist

    def gather(own: str) -> list[str]:
        sent = torch.frombuffer(bytearray(own.encode()[:PEER_BYTES].ljust(PEER_BYTES)), dtype=torch.uint8)
        sent = sent.to(world.device)
        received = [torch.empty_like(sent) for _ in range(world.world_size)]
        dist.all_gather(received, sent)
        return [bytes(each.tolist()).decode(errors="ignore").strip() for each in received]

    return Watch(world.rank, world.world_size, gather, timeout)


@contextlib.contextmanager
def watched(watch: Watch, agreed: tuple[type[BaseException], ...] = ()) -> Iterator[Watch]:
    """Inside, a rank that leaves by an exception takes the others with it; leaving otherwise it is done.

    agreed: exceptions that all ranks raise together, each of which ends in its own time.
    """
    try:
        yield watch
    except agreed:
        watch.close()
        raise
    except BaseException as failure:
        watch.close(failure)
        raise
    watch.close()
