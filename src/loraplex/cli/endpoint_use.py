"""`loraplex sagemaker logs|invoke|autoscale|adapter`: an endpoint at work."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.aws_options import (
    DryRunOption,
    EndpointArgument,
    ProfileOption,
    RegionOption,
    WaitOption,
    account,
    print_made,
    tell,
)

adapter = typer.Typer(
    help="Load adapters into an endpoint with --inference-components.\n\n"
    "Example: [bold]loraplex sagemaker adapter add support isFraud s3://models/isFraud/1/adapter.tar.gz[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter's name.", show_default=False)]


def logs(
    name: EndpointArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    since: Annotated[float, typer.Option(help="Minutes back from now.")] = 60.0,
    component: Annotated[
        str | None, typer.Option(help="The component whose log it is, such as NAME-base. Default: the endpoint's.")
    ] = None,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Print the containers' log, from CloudWatch.

    Example: [bold]loraplex sagemaker logs support --since 10 --follow[/]
    """
    with account(region, profile, endpoint=name) as aws:
        from loraplex.sagemaker.endpoints.logs import log_events, log_group

        try:
            for at, stream, message in log_events(aws, log_group(name, component), since * 60, follow=follow):
                moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
                typer.echo(f"{moment} {stream.rpartition('/')[2]} {message}")
        except KeyboardInterrupt:
            if not follow:
                raise


def invoke(
    name: EndpointArgument,
    text: Annotated[str | None, typer.Option(help="The text to judge.")] = None,
    body: Annotated[Path | None, typer.Option(help="Send this file instead; - is standard input.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="For --text: ask this classifier. Repeatable. Default: all of them.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Ask this inference component. Default: the base, NAME-base, where there are components."),
    ] = None,
    content_type: Annotated[str, typer.Option(help="What the body is.")] = "application/json",
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    input_url: Annotated[
        str | None, typer.Option("--input", help="s3://… of a body, for an asynchronous endpoint.")
    ] = None,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Ask an endpoint, and print its answer.

    Example: [bold]loraplex sagemaker invoke support --text "Customer: is it done?" --adapter issueResolved[/]
    """
    if sum(one is not None for one in (text, body, input_url)) != 1:
        raise typer.BadParameter("give one of --text, --body and --input")
    if adapter and text is None:
        raise typer.BadParameter("goes with --text; a body names its adapters itself", param_hint="--adapter")
    if input_url is not None and (component or stream):
        raise typer.BadParameter("an asynchronous request has no --component or --stream", param_hint="--input")
    if body is not None and str(body) != "-" and not body.is_file():
        raise typer.BadParameter(f"{str(body)!r} is no file", param_hint="--body")
    with account(region, profile, endpoint=name) as aws:
        from loraplex.sagemaker.endpoints.invocation import body_of, invoke_async
        from loraplex.sagemaker.endpoints.invocation import invoke as ask

        if input_url is not None:
            typer.echo(invoke_async(aws, name, input_url, content_type=content_type))
            return
        if body is None:
            content = body_of(text or "", adapter or ())
        else:
            content = sys.stdin.buffer.read() if str(body) == "-" else body.read_bytes()
        parts = ask(aws, name, content, content_type=content_type, component=component, stream=stream)
        last = b""
        for part in parts:
            typer.echo(part, nl=False)
            last = part or last
        if not last.endswith(b"\n"):
            typer.echo()


def autoscale(
    name: EndpointArgument,
    least: Annotated[
        int, typer.Option("--min", help="Fewest machines, or copies of the base component; 1 or more.")
    ] = 1,
    most: Annotated[int | None, typer.Option("--max", help="Most machines or copies.", show_default=False)] = None,
    target_concurrency: Annotated[
        float | None,
        typer.Option(help="Requests in flight for each machine or copy, which AWS tries to keep.", show_default=False),
    ] = None,
    scale_in_cooldown: Annotated[int, typer.Option(help="Seconds between two steps down.")] = 300,
    scale_out_cooldown: Annotated[int, typer.Option(help="Seconds between two steps up.")] = 60,
    off: Annotated[bool, typer.Option("--off", help="End it. The machines that run then stay.")] = False,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Let AWS add and remove machines by the number of concurrent requests.

    Each machine costs its price while it runs. AWS makes two CloudWatch alarms for it.

    Example: [bold]loraplex sagemaker autoscale support --min 1 --max 4 --target-concurrency 8[/]
    """
    if off == (most is not None or target_concurrency is not None):
        raise typer.BadParameter("give --max and --target-concurrency, or --off alone")
    if not off and (most is None or target_concurrency is None):
        raise typer.BadParameter("give both --max and --target-concurrency")
    with account(region, profile, endpoint=name, dry_run=dry_run) as aws:
        from loraplex.sagemaker.endpoints.autoscaling import autoscaling_calls, component_target, variant_target
        from loraplex.sagemaker.endpoints.deployment import base_component
        from loraplex.sagemaker.endpoints.resources import has_components, known_endpoint, scaling_of

        if off:
            resources = scaling_of(aws, name)
            for one in resources:
                aws.run(one.delete)
            if not dry_run:
                tell("; ".join(f"deleted {one.kind} {one.name}" for one in resources) or f"{name} has no autoscaling")
            return
        found = known_endpoint(aws, name)
        with_components = has_components(aws, found)
        assert most is not None and target_concurrency is not None, "checked above"
        for call in autoscaling_calls(
            component_target(base_component(name)) if with_components else variant_target(name),
            least=least,
            most=most,
            concurrency=target_concurrency,
            scale_in_s=scale_in_cooldown,
            scale_out_s=scale_out_cooldown,
        ):
            aws.run(call)
    print_made(aws)


@adapter.command()
def add(
    name: EndpointArgument,
    adapter: AdapterArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://…/adapter.tar.gz", show_default=False)],
    wait: WaitOption = True,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Load an adapter into the endpoint, or replace it. It uses the base component's machines and costs nothing more.

    Example: [bold]loraplex sagemaker adapter add support isFraud s3://models/isFraud/1/adapter.tar.gz[/]
    """
    with account(region, profile, endpoint=name, dry_run=dry_run) as aws:
        from loraplex.sagemaker.endpoints.components import add_adapter

        add_adapter(aws, name, adapter, url, wait=wait, report=tell)
    print_made(aws)
    if not dry_run:
        tell(f"ask it: loraplex sagemaker invoke {name} --component {adapter} --text …")


@adapter.command()
def remove(
    name: EndpointArgument,
    adapter: AdapterArgument,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Unload an adapter from the endpoint.

    Example: [bold]loraplex sagemaker adapter remove support isFraud[/]
    """
    with account(region, profile, endpoint=name, dry_run=dry_run) as aws:
        from loraplex.sagemaker.endpoints.components import remove_adapter

        is_removed = remove_adapter(aws, name, adapter, tell)
    if not dry_run:
        tell(f"removed {adapter}" if is_removed else f"{name} has no adapter {adapter}")
