"""A helper process that outlives ours by a moment, and kills given processes if ours is killed."""

import contextlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# Waits for the end of standard input, which comes however the parent process ends. Then kills the given processes. They
# are identified by PID and start time, so that a process with a reused PID is spared.
_WATCHER = """
import os, signal, sys
from pathlib import Path
told = [line.split() for line in sys.stdin]
for pid, started in told:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] == started:
            os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass
"""


def watch(pids: Iterable[int]) -> subprocess.Popen[str]:
    """Start a watcher that kills these processes when ours ends. The caller kills the watcher once they have ended."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert watcher.stdin is not None
    for pid in pids:
        with contextlib.suppress(OSError):  # gone already, or no /proc
            stat = Path(f"/proc/{pid}/stat").read_text()
            watcher.stdin.write(f"{pid} {stat.rpartition(')')[2].split()[19]}\n")
    watcher.stdin.flush()
    return watcher
