"""Recognizes that the machine ran out of memory, threads or open files. Imports no torch."""

import errno

from loraplex.errors import EngineError, shortened

_EXHAUSTED = {
    "threads": "lower the load, or raise the limit of threads: the container's pids limit, or ulimit -u",
    "open files": "lower the load, or raise the limit of open files: ulimit -n",
    "host memory": "lower --kv-cache and --max-step-tokens (on a CPU) or --host-memory, or raise the container's limit",
    "device memory": "lower --kv-cache, --adapter-memory or --max-step-tokens, or stop what else uses the device",
}


def exhaustion(exc: BaseException) -> EngineError | None:
    """Return the error for an exception that says that the machine ran out of something, such as memory or threads.
    The error says what to lower. None for any other exception."""
    if isinstance(exc, BaseExceptionGroup):
        return next((error for one in exc.exceptions if (error := exhaustion(one)) is not None), None)
    what = _exhausted(exc)
    if what is None:
        return None
    detail = f"{type(exc).__name__}: {shortened(' '.join(str(exc).split()))}".removesuffix(": ")
    return EngineError(
        f"the server ran out of {what}: {detail}", remedy=f"send it again; if it recurs, {_EXHAUSTED[what]}"
    )


def _exhausted(exc: BaseException) -> str | None:
    if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno == errno.ENOMEM):
        return "host memory"
    if isinstance(exc, OSError):
        return "open files" if exc.errno in (errno.EMFILE, errno.ENFILE) else None
    if not isinstance(exc, RuntimeError):
        return None
    if "can't start new thread" in str(exc):
        return "threads"
    if "DefaultCPUAllocator" in str(exc):  # torch raises a plain RuntimeError
        return "host memory"
    # torch.OutOfMemoryError, by its name: clients need no torch. cuBLAS has an error of its own.
    is_device = type(exc).__name__ == "OutOfMemoryError" or "out of memory" in str(exc)
    return "device memory" if is_device or "CUBLAS_STATUS_ALLOC_FAILED" in str(exc) else None
