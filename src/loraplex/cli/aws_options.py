"""Options and output that the commands for SageMaker's endpoints share."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex.cli.options import errors_to_exit, print_error, stderr
from loraplex.errors import LoraplexError

if TYPE_CHECKING:
    from loraplex.sagemaker.endpoints.aws import Aws

EndpointArgument = Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.", show_default=False)]
RegionOption = Annotated[
    str | None, typer.Option(help="AWS region. Default: AWS_REGION, AWS_DEFAULT_REGION or the profile's.")
]
ProfileOption = Annotated[str | None, typer.Option(help="Profile of ~/.aws. Default: AWS_PROFILE.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is in service.")]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print each call that would change something as a line of JSON, and make none."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def tell(line: str) -> None:
    stderr.print(line, markup=False)


@contextmanager
def account(
    region: str | None,
    profile: str | None,
    *,
    endpoint: str,
    rest: str = "",
    dry_run: bool = False,
    offline: bool = False,
) -> Iterator["Aws"]:
    """Yield the account. A LoraplexError, Ctrl-C or SIGTERM ends the command with what was made so far.

    rest:  what the user can do about that."""
    from loraplex.sagemaker.endpoints.aws import Aws

    region = region or os.environ.get("AWS_REGION") or None  # boto3 reads AWS_DEFAULT_REGION only
    show = (lambda call: typer.echo(call.to_json())) if dry_run else None
    aws = Aws(region=region, profile=profile, show=show, offline=offline)

    def report(error: LoraplexError) -> None:
        print_error(error)
        print_made(aws)
        if aws.made and rest:
            tell(rest)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI job that takes too long is sent it
    try:
        with errors_to_exit(report):
            yield aws
    except KeyboardInterrupt:
        print_made(aws)
        tell(f"stopped; what AWS has begun goes on: loraplex sagemaker status {endpoint}. The same command waits again")
        if aws.made and rest:
            tell(rest)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def print_made(aws: "Aws") -> None:
    for action, name in aws.made:
        tell(f"made by {action}: {name}")


def pairs(given: list[str] | None, option: str, *, from_environment: bool = False) -> dict[str, str]:
    """Return name -> value from NAME=VALUE options. Raises a usage error if an option has another form.

    from_environment:  NAME alone takes the value that the variable has here, so that no secret is in the command."""
    found: dict[str, str] = {}
    for item in given or ():
        name, separator, value = item.partition("=")
        if not separator and from_environment and name in os.environ:
            value = os.environ[name]
        elif not name or not separator:
            more = ", and no variable of this environment" if from_environment else ""
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE{more}", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        found[name] = value
    return found
