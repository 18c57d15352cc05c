"""A process that writes over a file while others read the file."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WRITER = """
import itertools, sys, time
path, pauses, *versions = sys.argv[1:]
pauses = itertools.cycle(map(float, pauses.split()))
versions = [open(version, "rb").read() for version in versions]
print("writing", flush=True)
for data, pause in zip(itertools.cycle(versions), pauses):
    with open(path, "wb", 0) as file:
        file.write(data)
    time.sleep(pause)
"""


@contextmanager
def overwriting(path: Path, *versions: Path, pauses: Sequence[float] = (0, 0.002, 0.03)) -> Iterator[None]:
    """Write the versions in turn over `path`, in place as `cp` does. pauses: seconds after each, in turn."""
    command = [sys.executable, "-c", WRITER, str(path), " ".join(map(str, pauses)), *map(str, versions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield
            assert process.poll() is None, "the writer ended"
        finally:
            process.kill()
