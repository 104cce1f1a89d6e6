"""The server as a child process: its output without the keys, its signals passed on, its end as an exit status.

A child, because SGLang's own processes write to the same streams, and because SGLang ends a clean stop by killing
itself: only a parent can tell that from a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sglang_misa.key_mask import Mask
from sglang_misa.procs import PR_SET_PDEATHSIG

STOPS = (signal.SIGTERM, signal.SIGINT)  # by which a server is asked to stop
FORWARDED = (*STOPS, signal.SIGHUP)
OWN_ENDS = {-signum for signum in (*FORWARDED, signal.SIGKILL)}  # statuses of a child that was asked to stop
CHUNK = 65536  # bytes
LAST_WORDS = 5.0  # seconds in which the streams of a child that has ended must close


@contextmanager
def stoppable() -> Iterator[None]:
    """Let STOPS end a launch with status 0 before there is a server too, as they end one that has started."""
    before = {signum: signal.signal(signum, lambda *_: sys.exit(0)) for signum in STOPS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(serve: Callable[[], None], keys: Sequence[str]) -> int:
    """Call `serve` in a child until it ends, and write its output without `keys`; returns the exit status.

    SIGTERM, SIGINT and SIGHUP go on to the child. The status is 0 where it then ended as asked, 128 + n where signal n
    ended it unasked, and the child's own otherwise. The child is a session of its own and leaves no process behind.
    """
    _open_streams()
    pipes = {stream: os.pipe() for stream in (1, 2)}
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until someone stands ready for them
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _set_up_child(parent, pipes)
        try:
            serve()
        except KeyboardInterrupt:  # no traceback, and an end that the parent knows as asked for
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 0
    for _, sink in pipes.values():
        os.close(sink)
    process = os.pidfd_open(child)  # its number alone may be another's once it has ended
    asked = False

    def forward(signum: int, _: object) -> None:
        nonlocal asked
        asked = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signum)

    for signum in FORWARDED:
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    _copy(child, process, {stream: source for stream, (source, _) in pipes.items()}, keys)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if asked and status in OWN_ENDS:
        return 0
    return status if status >= 0 else 128 - status


def end_with(parent: int) -> None:
    """Have this process killed when its parent, `parent`, ends in whatever way."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(128 + signal.SIGKILL)


def _open_streams() -> None:
    """Open /dev/null for each standard stream that is closed, whose number a pipe or a file would get otherwise."""
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _set_up_child(parent: int, pipes: Mapping[int, tuple[int, int]]) -> None:
    os.setsid()  # signals come by the parent alone, and SGLang may kill its group
    end_with(parent)
    for stream, (source, sink) in pipes.items():
        os.dup2(sink, stream)
        os.close(source)
        os.close(sink)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job would ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def _copy(child: int, process: int, sources: Mapping[int, int], keys: Sequence[str]) -> None:
    """Copy each source to its stream until all are closed, or LAST_WORDS after the end of `child` and its group.

    process: a file descriptor of the child itself.
    """
    masks = {stream: Mask(keys) for stream in sources}
    deadline = None
    with selectors.DefaultSelector() as selector:
        for stream, source in sources.items():
            selector.register(source, selectors.EVENT_READ, stream)
        selector.register(process, selectors.EVENT_READ)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                break
            for key, _ in selector.select(left):
                if key.fd == process:
                    deadline = time.monotonic() + LAST_WORDS
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
                elif chunk := os.read(key.fd, CHUNK):
                    _write(key.data, masks[key.data].feed(chunk))
                    continue
                selector.unregister(key.fd)
                if key.fd != process:  # which signals go to until this program ends
                    os.close(key.fd)
    for stream, mask in masks.items():
        _write(stream, mask.end())


def _write(stream: int, text: bytes) -> None:
    """All of `text`, or what a full disk or a reader that left still takes: the server goes on without its log."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(stream, text) :]
