"""Clients of a running server over HTTP, with Loraplex's own types and errors. They know the API, not the server.

`call.py` describes the requests; `exchange.py` decides on retries and reads answers and errors. Neither does I/O:
`Client` and `AsyncClient` do.
"""

from loraplex.client.async_client import AsyncClient
from loraplex.client.client import Client

__all__ = ["AsyncClient", "Client"]
