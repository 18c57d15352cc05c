"""Ctrl-C, SIGTERM and SIGHUP: none is lost, whatever code runs when it comes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from loraplex.sagemaker.artifact.interrupts import SIGNALS, caught, check, held, raising


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_swallowed_signal_is_raised_again(number: int) -> None:
    with pytest.raises(SystemExit, match=str(128 + number)), caught():
        with raising():
            with suppress(BaseException):
                send(number)
    restore()


def test_what_a_library_makes_of_a_signal_is_an_interrupt() -> None:
    with pytest.raises(SystemExit, match="143"), caught(), raising():
        try:
            send(signal.SIGTERM)
        except BaseException:
            raise RuntimeError("cannot serialize: KeyboardInterrupt") from None
    restore()


def test_a_signal_waits_for_what_is_held() -> None:
    steps = []
    with pytest.raises(SystemExit), caught():
        with held():
            with held():
                send(signal.SIGINT)
                steps.append("inner")
            pytest.fail("the inner block has raised")
    restore()
    assert steps == ["inner"]


def test_a_repeated_signal_does_not_cut_the_removal() -> None:
    removed = []
    with pytest.raises(SystemExit, match="129"), caught():
        try:
            send(signal.SIGHUP)
        finally:
            for number in SIGNALS:
                send(number)
            removed.append(True)
    restore()
    assert removed


def test_what_comes_after_the_command_is_not_interrupted() -> None:
    with pytest.raises(SystemExit), caught():
        send(signal.SIGTERM)
    for number in SIGNALS:
        send(number)  # the process is ending
    restore()
    with raising(), held():
        check()


def test_without_a_signal_nothing_changes() -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with caught(), raising(), held():
        check()
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("with importing():\n try: os.kill(os.getpid(), signal.SIGTERM)\n except BaseException: pass", 143),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith caught(): os.kill(os.getpid(), signal.SIGHUP)", 0),
    ],
)
def test_an_import_ends_at_once_and_nohup_is_honoured(program: str, code: int) -> None:
    given = "import os, signal\nfrom loraplex.sagemaker.artifact.interrupts import caught, importing\n"
    if code:
        program = f"with caught():\n {program.replace(chr(10), chr(10) + ' ')}"
    run = subprocess.run([sys.executable, "-c", given + program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (code, "")


def restore() -> None:
    """Set pytest's handlers again: after a signal, `caught` leaves its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
