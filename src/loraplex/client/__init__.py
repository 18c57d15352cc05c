"""A running server over HTTP, with the types and errors of `loraplex` itself. Knows the API, and nothing of the server.

`call.py` says what is sent, `exchange.py` what becomes of it: retries, errors, answers. Both do no I/O; `Client` and
`AsyncClient` add it."""

from loraplex.client.async_client import AsyncClient
from loraplex.client.client import Client

__all__ = ["AsyncClient", "Client"]
