"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP from a terminal that closes.

The KeyboardInterrupt that a signal's handler raises can be lost, because imports, destructors and libraries catch it.
So the signal is remembered, and `check` raises it again. Without `caught`, all of this does nothing."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0  # a wrapper passes on the Ctrl-C that the terminal sends as well


class _State:
    """came: the first signal, and when. holds: how many `held` blocks there are. ends_at_once: see `importing`.
    is_over: whether a signal has ended the block of `caught`."""

    came: int | None = None
    came_at = 0.0
    holds = 0
    ends_at_once = False
    is_over = False


@contextmanager
def caught() -> Iterator[None]:
    """Catch the signals that were not ignored before. A block that one of them ended ends the process, with the exit
    code 128 + the signal's number."""
    _State.came, _State.is_over = None, False
    before = {one: signal.getsignal(one) for one in SIGNALS}
    for one, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(one, _take)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + (_State.came or signal.SIGINT)) from None
    finally:
        if _State.came is None:
            for one, handler in before.items():
                signal.signal(one, handler)
        else:  # the process ends, and another signal must not cut that short
            _State.came, _State.is_over = None, True


@contextmanager
def importing() -> Iterator[None]:
    """End the process at once where a signal comes in the block, which makes nothing that must be removed."""
    _State.ends_at_once = True
    try:
        check()
        yield
    finally:
        _State.ends_at_once = False


@contextmanager
def raising() -> Iterator[None]:
    """Raise KeyboardInterrupt if a signal came, whatever the block made of it."""
    try:
        yield
    except BaseException:
        check()
        raise
    check()


@contextmanager
def held() -> Iterator[None]:
    """Let no signal cut the block, which is short. Raise KeyboardInterrupt at its end if one came."""
    _State.holds += 1
    try:
        yield
    finally:
        _State.holds -= 1
    check()


def check() -> None:
    """Raise KeyboardInterrupt if a signal came."""
    if _State.came is not None:
        raise KeyboardInterrupt


def _take(number: int, frame: FrameType | None) -> None:
    if _State.ends_at_once:
        os._exit(128 + number)
    if _State.is_over:
        return
    if _State.came is None:
        _State.came, _State.came_at = number, time.monotonic()
    elif number != signal.SIGINT or time.monotonic() - _State.came_at < SAME_S:
        return  # what was begun is being removed; a second Ctrl-C ends that, too
    if not _State.holds:
        raise KeyboardInterrupt
