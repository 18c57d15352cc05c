"""All errors for users, each with a stable code, an HTTP status and a remedy.

LoraplexError
├── BadInputError             400  bad_input            the body cannot be read
│   └── InvalidRequestError   422  invalid_request      the body can be read, but a field is wrong
├── UnauthorizedError         401  unauthorized         no key, or an unknown one
├── ForbiddenError            403  forbidden            the key does not allow this request
├── UnknownClassifierError    404  unknown_classifier
├── UnknownRouteError         404  unknown_route
├── UnknownVerdictError       404  unknown_verdict
├── RequestTimeoutError       408  request_timeout      the body did not arrive in time
├── AdapterExistsError        409  adapter_exists
├── AdapterInUseError         409  adapter_in_use       a route leads to the adapter
├── NoRevisionError           409  no_revision          nothing to roll back
├── RefusedError              422  (the cause's)        a name, adapter or target in a request is wrong
├── InputTooLongError         413  input_too_long
├── BodyTooLargeError         413  body_too_large
├── UnsupportedEncodingError  415  unsupported_encoding the body is compressed in an unknown way
├── MalformedHttpError        400  malformed_http       the request is not HTTP/1.1
├── HeadTooLargeError         431  head_too_large       the request's head is too long
├── NotFoundError             404  not_found            no such path
├── MethodNotAllowedError     405  method_not_allowed
├── OverloadedError           429                       retry later
│   ├── QueueFullError             queue_full
│   ├── KeyBusyError               key_busy             too many requests in flight for one key
│   └── TooManyConnectionsError    too_many_connections (503)
├── NotReadyError             503  not_ready
├── DeadlineExceededError     504  deadline_exceeded
├── CancelledError            499  cancelled            the client left
├── ServerError               —    (the server's)       raised by clients: another code, or no answer
├── StateError                500  state_error          a change is not saved, or what was saved cannot be read
├── EngineError               500  engine_error         a fault of Loraplex or the device
└── ConfigurationError        500  configuration_error  a file or setting is wrong
    ├── BundleError                bundle_error
    ├── ContractError              contract_error
    ├── AdapterError               adapter_error
    └── UnsupportedModelError      unsupported_model
"""

import json
from collections.abc import Iterator, Sequence
from typing import Self

MOST_SHOWN = 20  # maximum names in a message; there may be thousands
MAX_QUOTED = 200  # maximum characters of a value in a message; a client may send megabytes


def encodable(text: str) -> str:
    """Return `text` with halves of surrogate pairs escaped: JSON can spell them, and UTF-8 cannot."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def shortened(text: str) -> str:
    """Return `text` for an error's message: its beginning and its length if it is long."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}… ({len(text)} characters)"


def quoted(value: object) -> str:
    """Return a value for an error's message: text in quotes, all else as JSON. A long value is cut."""
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_QUOTED else f"{value[:MAX_QUOTED]!r}… ({len(value)} characters)"
    try:
        return shortened(json.dumps(value, default=str))
    except (TypeError, ValueError, RecursionError):  # such as a number of thousands of digits
        return f"this {type(value).__name__}"


def listed(values: Sequence[object]) -> str:
    """Return the values for an error's message: the first few of them, and how many there are."""
    some = ", ".join(map(quoted, values[:MOST_SHOWN]))
    return f"{some}, … ({len(values)} in all)" if len(values) > MOST_SHOWN else some


class LoraplexError(Exception):
    """Base of all errors for users. `message` names the value at fault, `remedy` says what to do; both can be encoded.
    place: the path of the request's field at fault, if one is."""

    code: str = "error"
    status: int = 500
    place: tuple[str, ...] = ()

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = encodable(message), encodable(remedy)

    @classmethod
    def answered(cls, message: str, *, remedy: str, status: int) -> Self:
        """Build the error from a server's answer. Skips a subclass's `__init__`, which would make its own message."""
        error = cls.__new__(cls)
        LoraplexError.__init__(error, message, remedy=remedy)
        error.status = status
        return error

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})"


class BadInputError(LoraplexError):
    """The request's body cannot be read: it is not JSON, or not valid Unicode."""

    code = "bad_input"
    status = 400


class InvalidRequestError(BadInputError):
    """The body can be read, but one of its fields is wrong, missing or unknown."""

    code = "invalid_request"
    status = 422


class UnknownClassifierError(LoraplexError):
    """No adapter or route has this name. Loraplex never answers with the base instead."""

    code = "unknown_classifier"
    status = 404

    def __init__(self, names: str | Sequence[str], known: list[str]) -> None:
        unknown = (names,) if isinstance(names, str) else names
        some = ", ".join(known[:MOST_SHOWN]) or "(none loaded)"
        rest = f", … ({len(known)} in all: GET /v1/adapters)" if len(known) > MOST_SHOWN else ""
        super().__init__(f"no classifier named {listed(unknown)}", remedy=f"use one of: {some}{rest}")


class UnauthorizedError(LoraplexError):
    """The API key is missing or unknown."""

    code = "unauthorized"
    status = 401


class ForbiddenError(LoraplexError):
    """The API key's scope does not allow this request."""

    code = "forbidden"
    status = 403


class UnknownRouteError(LoraplexError):
    """No route has this name."""

    code = "unknown_route"
    status = 404

    def __init__(self, name: str) -> None:
        super().__init__(f"no route named {quoted(name)}", remedy="`loraplex routes list` or GET /v1/routes lists them")


class UnknownVerdictError(LoraplexError):
    """The verdict is not remembered: its id or its request's id is wrong, or newer verdicts replaced it."""

    code = "unknown_verdict"
    status = 404

    def __init__(self, verdict: str) -> None:
        """verdict: what says which, after the word "verdict"."""
        super().__init__(
            f"no verdict {verdict} is remembered",
            remedy="check the id, send feedback sooner, or raise --keep-verdicts",
        )


class NotFoundError(LoraplexError):
    """The server has no such path."""

    code = "not_found"
    status = 404


class MethodNotAllowedError(LoraplexError):
    """The path does not take this method. The header `Allow` names those that it takes."""

    code = "method_not_allowed"
    status = 405


class RequestTimeoutError(LoraplexError):
    """The request's body did not arrive in time. The connection is closed."""

    code = "request_timeout"
    status = 408


class AdapterExistsError(LoraplexError):
    """SageMaker's or vLLM's call to load an adapter names one that is loaded already."""

    code = "adapter_exists"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is an adapter named {name!r}", remedy=f"unload it first, or replace it: PUT /v1/adapters/{name}"
        )


class AdapterInUseError(LoraplexError):
    """The adapter cannot be unloaded, because a route leads to it."""

    code = "adapter_in_use"
    status = 409

    def __init__(self, name: str, routes: list[str]) -> None:
        super().__init__(f"{name!r} is a target of the routes {listed(routes)}", remedy="change or delete them first")


class NoRevisionError(LoraplexError):
    """The route has not been changed, so nothing can be rolled back."""

    code = "no_revision"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__(
            f"no change to the route {quoted(name)} can be rolled back",
            remedy=f"PUT /v1/routes/{shortened(name)} sets it",
        )


class InputTooLongError(LoraplexError):
    """The prompt has more tokens than the contract or the base allows."""

    code = "input_too_long"
    status = 413


class BodyTooLargeError(LoraplexError):
    """The body has more bytes than the server accepts. The connection is closed."""

    code = "body_too_large"
    status = 413


class UnsupportedEncodingError(LoraplexError):
    """The body is compressed in a way that is not read (`Content-Encoding`)."""

    code = "unsupported_encoding"
    status = 415


class MalformedHttpError(LoraplexError):
    """The request is not HTTP/1.1. The connection is closed."""

    code = "malformed_http"
    status = 400


class HeadTooLargeError(LoraplexError):
    """The request's line and headers have more than 16 KiB."""

    code = "head_too_large"
    status = 431


class OverloadedError(LoraplexError):
    """A limit is reached for now. retry_after_s: seconds after which a retry is worthwhile."""

    status = 429
    retry_after_s = 1.0

    def __init__(self, message: str, *, remedy: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class QueueFullError(OverloadedError):
    """As many evaluations or tokens wait as the server allows."""

    code = "queue_full"


class KeyBusyError(OverloadedError):
    """As many requests of this API key are in flight as the server allows."""

    code = "key_busy"


class TooManyConnectionsError(OverloadedError):
    """As many connections are open as the server allows."""

    code = "too_many_connections"
    status = 503

    def __init__(self, max_connections: int) -> None:
        super().__init__(
            f"{max_connections} connections to this server are open, as many as it allows",
            remedy="retry later, close idle connections, or raise --max-connections",
        )


class NotReadyError(LoraplexError):
    """The server is loading or stopping."""

    code = "not_ready"
    status = 503


class DeadlineExceededError(LoraplexError):
    """The request's own deadline has passed."""

    code = "deadline_exceeded"
    status = 504


class CancelledError(LoraplexError):
    """The client closed the connection before it had its answer."""

    code = "cancelled"
    status = 499


class EngineError(LoraplexError):
    """Loraplex or the device failed, or ran out of memory, threads or open files. The remedy says what to lower."""

    code = "engine_error"


class StateError(LoraplexError):
    """A change was not saved, what was saved cannot be read, or another server uses the folder."""

    code = "state_error"


class ConfigurationError(LoraplexError):
    """A file, a setting or an option is wrong.

    source:   the file (and key) at fault. Empty in a server's answer, whose message begins with the source.
    adapter:  name of the adapter that cannot be loaded; empty where it is something else.
    """

    code = "configuration_error"
    source = ""
    adapter = ""

    def __init__(self, source: object, message: str, *, remedy: str) -> None:
        super().__init__(f"{source}: {message}", remedy=remedy)
        self.source = str(source)


class BundleError(ConfigurationError):
    """The bundle's folder or its `loraplex.yaml` is wrong."""

    code = "bundle_error"


class ContractError(ConfigurationError):
    """A `classifier.yaml` is wrong, or a golden example is answered otherwise."""

    code = "contract_error"


class AdapterError(ConfigurationError):
    """An adapter's files are missing, broken, or not for this base."""

    code = "adapter_error"


class UnsupportedModelError(ConfigurationError):
    """The base cannot be served by this backend on this device."""

    code = "unsupported_model"


class RefusedError(LoraplexError):
    """A request names something invalid, such as a broken adapter. The error has the code and remedy of its cause."""

    status = 422

    def __init__(self, cause: LoraplexError) -> None:
        super().__init__(cause.message, remedy=cause.remedy)
        self.code = cause.code


class ServerError(LoraplexError):
    """A client got an error that is none of the above, or no answer (status 0).

    code:  the server's own, or `unreachable` (no answer), or `not_loraplex` (the answer is not Loraplex's).
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


BY_CODE = dict(_with_codes(LoraplexError))


def error_answered(code: str, message: str, *, remedy: str, status: int | None = None) -> LoraplexError:
    """Return a server's error as the class with its code, so that callers catch it as they would in process.
    status: by default that of the code."""
    if kind := BY_CODE.get(code):
        return kind.answered(message, remedy=remedy, status=status or kind.status)
    return ServerError(code, message, remedy=remedy, status=status or 500)
