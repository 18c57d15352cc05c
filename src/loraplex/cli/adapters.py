"""`loraplex adapters …`: what a running server serves, and an adapter's proof before it gets there."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from loraplex.cli.options import errors_to_exit, quiet_libraries, stderr, stdout

app = typer.Typer(
    help="List, load, replace, unload, pin and verify adapters.\n\nExample: [bold]loraplex adapters list[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

UrlOption = Annotated[str, typer.Option(envvar="LORAPLEX_URL", help="The server.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]
URL = "http://127.0.0.1:8000"


def _ask(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer's JSON; an error becomes what it would be here."""
    import httpx

    from loraplex.errors import ServerError

    try:
        # Loading from afar and draining take their time; only the connection must come at once.
        response = httpx.request(method, url.rstrip("/") + path, json=body, timeout=httpx.Timeout(None, connect=10))
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServerError("unreachable", f"{url} does not answer: {exc}", remedy="check --url, or start it") from None
    try:
        answer = response.json()
        error = answer["error"] if response.is_error else None
        known = None if error is None else ServerError(error["code"], error["message"], remedy=error["remedy"])
    except (ValueError, KeyError, TypeError):
        answer, known = None, None
    if known is not None:
        raise known
    if answer is None or response.is_error:
        raise ServerError(
            "not_loraplex", f"{url} answers {response.status_code}, no JSON of ours", remedy="check --url"
        )
    return answer


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _show(info: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(info))
        return
    for key, value in info.items():
        if value is not None:
            stdout.print(f"{key}: {json.dumps(value) if isinstance(value, list | dict) else value}", markup=False)


@app.command("list")
def list_adapters(url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """All adapters with their states.

    Example: [bold]loraplex adapters list --url http://127.0.0.1:8000[/]
    """
    with errors_to_exit():
        adapters = _ask(url, "GET", "/v1/adapters")["adapters"]
    if as_json:
        typer.echo(json.dumps(adapters))
        return
    table = Table("name", "state", "version", "rank", "on device", "pinned", "error", box=None)
    for one in adapters:
        table.add_row(
            one["name"],
            one["state"],
            one["version"] or "",
            str(one["rank"] or ""),
            "yes" if one["on_device"] else "",
            "yes" if one["pinned"] else "",
            one["error"]["message"] if one["error"] else "",
        )
    stdout.print(table)


@app.command()
def show(name: NameArgument, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """One adapter.

    Example: [bold]loraplex adapters show issueResolved[/]
    """
    with errors_to_exit():
        _show(_ask(url, "GET", _path(name)), as_json)


@app.command()
def load(
    name: NameArgument,
    source: Annotated[
        str,
        typer.Argument(help="A path below the server's --adapter-root, hf://org/name@revision, s3://bucket/prefix."),
    ],
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Keep its place on the device.")] = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Load an adapter, or replace the one of that name while it serves.

    Example: [bold]loraplex adapters load issueResolved s3://models/issueResolved/v2[/]
    """
    with errors_to_exit(), stderr.status(f"loading {name} …"):
        _show(_ask(url, "PUT", _path(name), {"source": source, "pinned": pin}), as_json)


@app.command()
def unload(name: NameArgument, url: UrlOption = URL) -> None:
    """Unload an adapter: returns when its last request is answered and its memory is free.

    Example: [bold]loraplex adapters unload issueResolved[/]
    """
    with errors_to_exit(), stderr.status(f"unloading {name} …"):
        _ask(url, "DELETE", _path(name))
    stderr.print(f"unloaded {name}", markup=False)


@app.command()
def pin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Keep an adapter's place on the device.

    Example: [bold]loraplex adapters pin issueResolved[/]
    """
    with errors_to_exit():
        _show(_ask(url, "DELETE" if off else "PUT", _path(name) + "/pin"), as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The adapter's folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="A base or a bundle: a folder or a hub id. Default: the folder around PATH.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Compare on this text, too. Repeatable.")] = None,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="Compare with PEFT in float32.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Prove an adapter without a server: files, golden examples, and PEFT's probabilities beside ours.

    Example: [bold]loraplex adapters verify examples/support_desk/bundle/issueResolved[/]
    """
    with errors_to_exit():
        from dataclasses import asdict

        from loraplex.backends.verify import verify as prove

        quiet_libraries()
        with stderr.status(f"verifying {path} …"):
            proof = asyncio.run(prove(path, base or str(path.resolve().parent), texts=text or (), with_peft=peft))
    if as_json:
        typer.echo(json.dumps(asdict(proof)))
        return
    info = proof.adapter
    stdout.print(f"{path}: rank {info.rank}, {info.num_parameters:,} parameters, version {info.version}", markup=False)
    stdout.print(f"golden examples: {proof.num_golden} right" if proof.num_golden else "golden examples: none given")
    if proof.difference is None:
        stdout.print("PEFT: not compared" + (" (pip install 'loraplex\\[train]')" if peft else ""))
    else:
        stdout.print(f"PEFT: probabilities differ by at most {proof.difference:.1e} on {proof.num_compared} texts")
