"""`loraplex adapters …`: manages the adapters of a running server, and verifies an adapter without one."""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.cli.options import errors_to_exit, quiet_libraries, stderr, stdout, tell
from loraplex.cli.remote import URL, JsonOption, NameArgument, UrlOption, asking, print_fields, print_json

BaseOption = Annotated[
    str | None,
    typer.Option(
        help="A base or a bundle: a folder or a hub id. Default: the folder above the adapter that holds one."
    ),
]

app = typer.Typer(
    help="List, load, replace, unload, pin and verify adapters.\n\nExample: [bold]loraplex adapters list[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command("list")
def list_adapters(
    skipped: Annotated[
        bool, typer.Option("--skipped", help="List the bundle's folders that were left out instead, and why.")
    ] = False,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """List all adapters with their states.

    Example: [bold]loraplex adapters list --url http://127.0.0.1:8000[/]
    """
    with asking(url) as client:
        adapters, folders = ((), client.skipped()) if skipped else (client.adapters(), ())
    if as_json:
        print_json(folders if skipped else adapters)
        return
    if skipped:
        for folder in folders:
            stdout.print(f"{folder.path}: {folder.reason}", markup=False)
        return
    table = Table("name", "state", "version", "rank", "on device", "pinned", "error", "warnings", box=None)
    for one in adapters:
        table.add_row(
            one.name,
            one.state,
            one.version or "",
            str(one.rank or ""),
            "yes" if one.on_device else "",
            "yes" if one.pinned else "",
            escape(one.error.message) if one.error else "",
            escape("; ".join(one.warnings or ())),
        )
    stdout.print(table)


@app.command()
def show(name: NameArgument, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """Show one adapter.

    Example: [bold]loraplex adapters show issueResolved[/]
    """
    with asking(url) as client:
        print_fields(client.adapter(name), as_json)


@app.command()
def load(
    name: NameArgument,
    source: Annotated[
        str,
        typer.Argument(help="A path below the server's --adapter-root, hf://org/name@revision or s3://bucket/prefix."),
    ],
    pin: Annotated[
        bool | None, typer.Option("--pin/--no-pin", help="Keep the adapter on the device. Default: unchanged.")
    ] = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Load an adapter, or replace the adapter of this name while it serves.

    Example: [bold]loraplex adapters load issueResolved s3://models/issueResolved/v2[/]
    """
    with asking(url) as client, stderr.status(f"loading {name} …"):
        print_fields(client.load_adapter(name, source, pin=pin), as_json)


@app.command()
def unload(name: NameArgument, url: UrlOption = URL) -> None:
    """Unload an adapter. Returns when its last request is answered and its memory is free.

    Example: [bold]loraplex adapters unload issueResolved[/]
    """
    with asking(url) as client, stderr.status(f"unloading {name} …"):
        client.unload_adapter(name)
    stderr.print(f"unloaded {name}", markup=False)


@app.command()
def pin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Unpin the adapter.")] = False,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Pin an adapter: it stays on the device. With --off, unpin it.

    Example: [bold]loraplex adapters pin issueResolved[/]
    """
    with asking(url) as client:
        print_fields(client.pin_adapter(name, not off), as_json)


@app.command()
def verify(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or an archive, org/name on the hub, hf://… or s3://….",
            show_default=False,
        ),
    ],
    base: BaseOption = None,
    text: Annotated[list[str] | None, typer.Option(help="Also compare on this text. Repeatable.")] = None,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="Compare with PEFT in float32.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Verify an adapter without a server: its files, its golden examples, and its probabilities against PEFT's.

    Example: [bold]loraplex adapters verify examples/support_desk/bundle/issueResolved[/]
    """
    with errors_to_exit():
        from dataclasses import asdict

        from loraplex.adapters.cache import cache_folder
        from loraplex.adapters.files import telling
        from loraplex.adapters.peft_config import read_peft_config
        from loraplex.adapters.source import resolve_source
        from loraplex.bundle import open_adapter, open_base
        from loraplex.classifier import conversation_text

        # Whatever can be wrong is told before PyTorch is imported.
        is_here = os.path.lexists(os.path.expanduser(source))
        if base is None and not is_here and "://" in source:
            raise typer.BadParameter("no base lies above an adapter that is fetched; name one", param_hint="--base")
        found = resolve_source(source, roots=None, cache_dir=cache_folder(None), progress=telling(source, tell))
        path, base = found.path, base or _base_above(Path(found.source))
        open_adapter("adapter", path)
        read_peft_config(path)
        open_base(base)
        for one in text or ():
            conversation_text(one, {})
        from loraplex.service.verify import verify as prove

        quiet_libraries()
        with stderr.status(f"verifying {source} …"):
            proof = asyncio.run(prove(path, base, texts=text or (), with_peft=peft))
    if as_json:
        typer.echo(json.dumps(asdict(proof)))
        return
    info = proof.adapter
    stdout.print(
        f"{source}: rank {info.rank}, {info.num_parameters:,} parameters, version {info.version}", markup=False
    )
    for warning in info.warnings or ():
        stdout.print(f"warning: {warning}", markup=False)
    stdout.print(f"golden examples: {proof.num_golden} right" if proof.num_golden else "golden examples: none")
    if proof.difference is None:
        stdout.print("PEFT: not compared" + (" (pip install 'loraplex\\[train]')" if peft else ""))
    else:
        stdout.print(f"PEFT: probabilities differ by at most {proof.difference:.1e} on {proof.num_compared} texts")


@app.command()
def repair(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The adapter's folder.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="NEW_FOLDER", help="The folder to write.", show_default=False)],
    base: BaseOption = None,
) -> None:
    """Write an adapter again under PEFT's tensor names, and check the new files against a base.

    torch.compile, FSDP and data parallelism change the names where the wrapped model was saved. PATH is not changed.

    Example: [bold]loraplex adapters repair trained/isFraud --out bundle/isFraud --base bundle[/]
    """
    with errors_to_exit():
        from loraplex.service.repair import repair as rename

        quiet_libraries()
        num_renamed = rename(path, out, base or _base_above(path))
    stdout.print(f"{out}: {num_renamed} tensors renamed, and all of them fit the base", markup=False)


def _base_above(adapter: Path) -> str:
    """Return the nearest folder above the adapter that is a base or a bundle: other adapters may lie between."""
    from loraplex.bundle import SETTINGS

    above = adapter.resolve().parents
    names = ("config.json", SETTINGS)
    return str(next((folder for folder in above if any((folder / name).is_file() for name in names)), above[0]))


@app.command("import")
def import_adapter(
    path: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An adapter's folder with an io.yaml.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="The classifier's name.", show_default=False)],
    argument: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Fill a {NAME} in the io.yaml's instruction. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Copy the adapter to BUNDLE/NAME, and write the classifier.yaml there. Default: write it into FOLDER.",
        ),
    ] = None,
) -> None:
    """Write the classifier.yaml of one of IBM's intrinsics: an adapter that an io.yaml describes.

    An intrinsic whose instruction has a {placeholder} becomes a classifier for each text that you give it.

    Example: [bold]loraplex adapters import hub/uncertainty/lora --name isCertain --out bundle[/]
    """
    arguments = {}
    for one in argument or ():
        key, separator, text = one.partition("=")
        if not (key and separator):
            raise typer.BadParameter(f"{one!r} is not NAME=TEXT", param_hint="--argument")
        if key in arguments:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--argument")
        arguments[key] = text
    with errors_to_exit():
        from loraplex.adapters.intrinsics import import_intrinsic
        from loraplex.classifier import read_contract

        made = import_intrinsic(path, name, arguments, out)
        labels = ", ".join(read_contract(made).labels)
    stdout.print(f"{made}: written; the labels are {labels}", markup=False)
    stdout.print(f"serve it: loraplex serve BASE --adapter {name}={made.parent}", markup=False)
