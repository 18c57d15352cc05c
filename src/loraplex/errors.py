"""Every error a user can meet, with a stable code, an HTTP status and a remedy.

LoraplexError
├── BadInputError             400  bad_input            the body cannot be read
│   └── InvalidRequestError   422  invalid_request      it can be read, but a field is wrong
├── UnauthorizedError         401  unauthorized         no key, or not one of ours
├── ForbiddenError            403  forbidden            a key, but not for this
├── UnknownClassifierError    404  unknown_classifier
├── UnknownRouteError         404  unknown_route
├── UnknownVerdictError       404  unknown_verdict
├── RequestTimeoutError       408  request_timeout      the body did not come in time
├── AdapterExistsError        409  adapter_exists
├── AdapterInUseError         409  adapter_in_use       a route leads to it
├── NoRevisionError           409  no_revision          nothing to roll back
├── RefusedError              422  (the cause's)        what a client named is not sound
├── InputTooLongError         413  input_too_long
├── BodyTooLargeError         413  body_too_large
├── OverloadedError           429                       later, or elsewhere
│   ├── QueueFullError             queue_full
│   └── KeyBusyError               key_busy             too many requests in flight for one key
├── NotReadyError             503  not_ready
├── DeadlineExceededError     504  deadline_exceeded
├── CancelledError            499  cancelled            the client left
├── ServerError               —    (the server's)       for a server's clients: none of these codes, or no answer
├── StateError                500  state_error          in effect, but not written down
├── EngineError               500  engine_error         our fault, or the device's
└── ConfigurationError        500  configuration_error  what is on disk, found before serving
    ├── BundleError                bundle_error
    ├── ContractError              contract_error
    ├── AdapterError               adapter_error
    └── UnsupportedModelError      unsupported_model
"""

from collections.abc import Iterator
from typing import Self

MOST_SHOWN = 20  # names in a message, which may be one of thousands in an answer


class LoraplexError(Exception):
    """Base of all errors meant for users: `message` names the value at fault, `remedy` says what to do."""

    code: str = "error"
    status: int = 500

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    @classmethod
    def answered(cls, message: str, *, remedy: str, status: int) -> Self:
        """As a server answered it: its message is made, so a subclass's `__init__`, which makes one, is not called."""
        error = cls.__new__(cls)
        LoraplexError.__init__(error, message, remedy=remedy)
        error.status = status
        return error

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})"


class BadInputError(LoraplexError):
    code = "bad_input"
    status = 400


class InvalidRequestError(BadInputError):
    code = "invalid_request"
    status = 422


class UnknownClassifierError(LoraplexError):
    code = "unknown_classifier"
    status = 404

    def __init__(self, name: str, known: list[str]) -> None:
        some = ", ".join(known[:MOST_SHOWN]) or "(none loaded)"
        rest = f", … ({len(known)} in all: GET /v1/adapters)" if len(known) > MOST_SHOWN else ""
        super().__init__(f"no classifier named {name!r}", remedy=f"use one of: {some}{rest}")


class UnauthorizedError(LoraplexError):
    code = "unauthorized"
    status = 401


class ForbiddenError(LoraplexError):
    code = "forbidden"
    status = 403


class UnknownRouteError(LoraplexError):
    code = "unknown_route"
    status = 404

    def __init__(self, name: str) -> None:
        super().__init__(f"no route named {name!r}", remedy="GET /v1/routes lists them")


class UnknownVerdictError(LoraplexError):
    code = "unknown_verdict"
    status = 404

    def __init__(self, verdict_id: str) -> None:
        super().__init__(
            f"no verdict {verdict_id!r} is remembered",
            remedy="send the id of a verdict, sooner, or raise --keep-verdicts",
        )


class RequestTimeoutError(LoraplexError):
    code = "request_timeout"
    status = 408


class AdapterExistsError(LoraplexError):
    code = "adapter_exists"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is an adapter named {name!r}", remedy=f"unload it first, or replace it: PUT /v1/adapters/{name}"
        )


class AdapterInUseError(LoraplexError):
    code = "adapter_in_use"
    status = 409

    def __init__(self, name: str, routes: list[str]) -> None:
        super().__init__(
            f"{name!r} is a target of the routes {', '.join(map(repr, routes[:MOST_SHOWN]))}",
            remedy="change or delete them first",
        )


class NoRevisionError(LoraplexError):
    code = "no_revision"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__(f"no change to the route {name!r} can be rolled back", remedy=f"PUT /v1/routes/{name} sets it")


class InputTooLongError(LoraplexError):
    code = "input_too_long"
    status = 413


class BodyTooLargeError(LoraplexError):
    code = "body_too_large"
    status = 413


class OverloadedError(LoraplexError):
    """retry_after_s: when it is worth asking again."""

    status = 429
    retry_after_s = 1.0

    def __init__(self, message: str, *, remedy: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class QueueFullError(OverloadedError):
    code = "queue_full"


class KeyBusyError(OverloadedError):
    code = "key_busy"


class NotReadyError(LoraplexError):
    code = "not_ready"
    status = 503


class DeadlineExceededError(LoraplexError):
    code = "deadline_exceeded"
    status = 504


class CancelledError(LoraplexError):
    code = "cancelled"
    status = 499


class EngineError(LoraplexError):
    code = "engine_error"
    status = 500


class StateError(LoraplexError):
    code = "state_error"
    status = 500

    def __init__(self, name: str) -> None:
        super().__init__(
            f"what became of {name!r} is in effect, but could not be written down and will not survive a restart",
            remedy="see the server's log; mend the --state-dir and send it again",
        )


class ConfigurationError(LoraplexError):
    """Something on disk or on the command line is wrong. `source` is the file (and key) at fault; empty in a server's
    answer, whose message begins with it."""

    code = "configuration_error"
    source = ""

    def __init__(self, source: object, message: str, *, remedy: str) -> None:
        super().__init__(f"{source}: {message}", remedy=remedy)
        self.source = str(source)


class BundleError(ConfigurationError):
    code = "bundle_error"


class ContractError(ConfigurationError):
    code = "contract_error"


class AdapterError(ConfigurationError):
    code = "adapter_error"


class UnsupportedModelError(ConfigurationError):
    code = "unsupported_model"


class RefusedError(LoraplexError):
    """What a client named is not sound: it has the code of what is wrong with it."""

    status = 422

    def __init__(self, cause: LoraplexError) -> None:
        super().__init__(cause.message, remedy=cause.remedy)
        self.code = cause.code


class ServerError(LoraplexError):
    """A server that was asked over HTTP answered something else than the above, or nothing (status 0).

    code:  its own, or `unreachable` (no answer came), or `not_loraplex` (an answer, but not one of ours).
    """

    def __init__(self, code: str, message: str, *, remedy: str, status: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
        self.status = status


def _with_codes(kind: type[LoraplexError]) -> Iterator[tuple[str, type[LoraplexError]]]:
    for one in kind.__subclasses__():
        if "code" in vars(one):
            yield one.code, one
        yield from _with_codes(one)


_BY_CODE = dict(_with_codes(LoraplexError))


def error_answered(code: str, message: str, *, remedy: str, status: int) -> LoraplexError:
    """What a server answered, as the class that has this code, so that it is caught as in the server's own process."""
    if kind := _BY_CODE.get(code):
        return kind.answered(message, remedy=remedy, status=status)
    return ServerError(code, message, remedy=remedy, status=status)
