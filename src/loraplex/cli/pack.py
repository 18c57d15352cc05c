"""`loraplex sagemaker pack` and `verify`: a bundle as the artifact that SageMaker loads."""

import shlex
from typing import Annotated

import typer

from loraplex.cli.options import (
    AdapterOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    quiet_libraries,
    stderr,
    stdout,
    tell,
)
from loraplex.sagemaker.artifact.interrupts import caught, importing, raising


def pack(
    path: PathArgument,
    out: Annotated[
        str,
        typer.Option(
            metavar="OUT",
            help="NAME.tar.gz or s3://bucket/name.tar.gz; with --uncompressed a new folder or s3://bucket/prefix/.",
            show_default=False,
        ),
    ],
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="Write the files themselves, for SageMaker's CompressionType None.")
    ] = False,
    compression: Annotated[
        int,
        typer.Option(
            min=0,
            max=9,
            metavar="LEVEL",
            help="gzip's level. 1 saves a fifth, and packs and unpacks several times slower.",
        ),
    ] = 0,
    adapter: AdapterOption = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Load the bundle on this machine first, and ask its golden examples.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an archive that exists already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files, write nothing.")
    ] = False,
) -> None:
    """Pack a bundle as one artifact: the base at the root, a folder for each adapter, and the code that serves them.

    A bundle that would not load is refused before anything is written. The same bundle gives the same bytes.

    Example: [bold]loraplex sagemaker pack examples/support_desk/bundle --out model.tar.gz[/]

    Example: [bold]loraplex sagemaker pack examples/support_desk/bundle --out s3://my-bucket/support.tar.gz[/]
    """
    adapters = named_adapters(adapter)
    with errors_to_exit(), caught():
        with importing():
            from loraplex.adapters.files import telling
            from loraplex.bundle import open_bundle
            from loraplex.config import EngineConfig
            from loraplex.service.named_adapters import add_adapters

        # Whatever can be wrong is told before PyTorch is imported.
        with raising():
            bundle = add_adapters(open_bundle(path), adapters, EngineConfig(), tell)
        with importing():
            from loraplex.sagemaker.artifact.pack import pack as write

            quiet_libraries()
        tell(f"checking {path} …")
        packed = write(
            bundle,
            out,
            uncompressed=uncompressed,
            level=compression,
            replaces=force,
            proves=prove,
            is_dry=dry_run,
            tell=tell,
            progress=telling(out, tell, begins=False),
        )
    if dry_run:
        for name, size in packed.files.items():
            stdout.print(f"{size:>14,}  {name}", markup=False)
    did = "would hold" if dry_run else "holds"
    stdout.print(
        f"{out} {did} {len(packed.adapters)} adapters in {len(packed.files)} files, {packed.size:,} bytes; "
        f"{packed.seconds:.1f} s",
        markup=False,
    )
    if dry_run:
        return
    stdout.print(f"SHA-256{' of its manifest' if uncompressed else ''}: {packed.sha256}", markup=False)
    if out.startswith("s3://"):
        place = out.rstrip("/") + "/" if uncompressed else out
        next_step = f"loraplex sagemaker deploy NAME --model-data {shlex.quote(place)} --role ROLE --image IMAGE"
    else:
        next_step = f"loraplex sagemaker verify {shlex.quote(out)}"
    stdout.print(f"next: {next_step}", markup=False)


def verify(
    where: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="A .tar.gz or a folder, here or s3://….", show_default=False)
    ],
) -> None:
    """Compare an artifact that `pack` made with the manifest in it, and name each file that differs.

    This finds damage. It does not show who made the artifact.

    Example: [bold]loraplex sagemaker verify model.tar.gz[/]

    Exit code 0: the artifact is whole; 1: a file is missing, changed or extra, or the artifact cannot be read.
    """
    with errors_to_exit(), caught(), importing():  # it makes nothing that must be removed
        from loraplex.adapters.files import telling
        from loraplex.sagemaker.artifact.verify import verify as read

        found = read(where, telling(where, tell, begins=False))
    for what in ("missing", "changed", "extra"):
        for name in getattr(found, what):
            stdout.print(f"{what}: {ascii(name)[1:-1]}", markup=False)
    if not found.is_whole:
        stderr.print("the artifact is not as it was packed: pack it or copy it again")
        raise typer.Exit(1)
    stdout.print(
        f"{where} is whole: {len(found.manifest.adapters)} adapters, {len(found.manifest.files)} files", markup=False
    )
