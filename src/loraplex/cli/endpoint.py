"""`loraplex sagemaker deploy|update|status|delete`: an endpoint's life."""

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.cli.aws_options import (
    DryRunOption,
    EndpointArgument,
    ProfileOption,
    RegionOption,
    WaitOption,
    YesOption,
    account,
    pairs,
    print_made,
    tell,
)
from loraplex.cli.options import stdout
from loraplex.cli.remote import JsonOption

EnvOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Environment of the container, such as LORAPLEX_DTYPE=bfloat16. NAME alone takes the value from here. "
        "Repeatable.",
    ),
]
AmiOption = Annotated[
    str | None,
    typer.Option(
        help="Version of the machines' AMI, which has the GPU's driver. Default for ml.g… and ml.p…: "
        "al2023-ami-sagemaker-inference-gpu-4-1 (CUDA 13.0)."
    ),
]


def deploy(
    name: EndpointArgument,
    role: Annotated[str, typer.Option(help="ARN of the role that the endpoint runs as.", show_default=False)],
    image: Annotated[str, typer.Option(help="The container's image in a registry.", show_default=False)],
    model_data: Annotated[
        str, typer.Option(help="What `pack` wrote: s3://…/model.tar.gz, or a folder s3://…/.", show_default=False)
    ],
    instance_type: Annotated[str, typer.Option(help="The machine.")] = "ml.g5.2xlarge",
    instances: Annotated[int, typer.Option(help="How many machines.")] = 1,
    ami: AmiOption = None,
    env: EnvOption = None,
    volume_size: Annotated[
        int | None, typer.Option(help="GB, for machines without disks of their own. Default: AWS's.")
    ] = None,
    startup_timeout: Annotated[
        int, typer.Option(help="Seconds for the download and, again, until the server is ready.")
    ] = 900,
    inference_components: Annotated[
        bool, typer.Option("--inference-components", help="Make a base component, for `adapter add`.")
    ] = False,
    memory: Annotated[int, typer.Option(help="MB that the base component reserves.")] = 1024,
    accelerators: Annotated[int, typer.Option(help="GPUs that the base component reserves.")] = 1,
    max_instances: Annotated[
        int | None, typer.Option(help="With components: machines that AWS may add for their copies.")
    ] = None,
    async_output: Annotated[
        str | None, typer.Option(help="s3://…: an asynchronous endpoint that writes its answers there.")
    ] = None,
    data_capture: Annotated[str | None, typer.Option(help="s3://…: keep requests and answers there.")] = None,
    capture_percent: Annotated[int, typer.Option(help="Share of the requests that are kept.")] = 100,
    kms_key: Annotated[str | None, typer.Option(help="Key for what the endpoint writes to S3.")] = None,
    volume_kms_key: Annotated[
        str | None, typer.Option(help="Key for the volume of machines without disks of their own.")
    ] = None,
    subnet: Annotated[list[str] | None, typer.Option(help="Run in this VPC's subnet. Repeatable.")] = None,
    security_group: Annotated[list[str] | None, typer.Option(help="Beside --subnet. Repeatable.")] = None,
    metrics: Annotated[
        bool,
        typer.Option("--metrics", help="AWS scrapes the server's /metrics into CloudWatch, which costs by metric."),
    ] = False,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Tag all that is made. Repeatable.")
    ] = None,
    wait: WaitOption = True,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Make an endpoint. From then on it costs its machines' price, also when nobody asks, until `delete`.

    Run twice, it makes nothing twice; after a failure, it makes what is missing. With --dry-run it asks AWS nothing,
    and prints the calls as if nothing existed.

    Example: [bold]loraplex sagemaker deploy support --role arn:aws:iam::123456789012:role/loraplex --image
    123456789012.dkr.ecr.us-east-1.amazonaws.com/loraplex:1 --model-data s3://models/support/1/model.tar.gz[/]
    """
    variables = pairs(env, "--env", from_environment=True)
    tags = pairs(tag, "--tag")
    rest = f"to delete all of it: loraplex sagemaker delete {name}"
    with account(region, profile, endpoint=name, rest=rest, dry_run=dry_run, offline=dry_run) as aws:
        from loraplex.sagemaker.endpoints.deployment import Deployment
        from loraplex.sagemaker.endpoints.endpoint import deploy as make

        wanted = Deployment(
            name=name,
            role=role,
            image=image,
            model_data=model_data,
            instance_type=instance_type,
            instances=instances,
            ami=ami,
            env=variables,
            volume_gb=volume_size,
            startup_timeout=startup_timeout,
            components=inference_components,
            memory_mb=memory,
            accelerators=accelerators,
            max_instances=max_instances,
            async_output=async_output,
            data_capture=data_capture,
            capture_percent=capture_percent,
            kms_key=kms_key,
            volume_kms_key=volume_kms_key,
            subnets=tuple(subnet or ()),
            security_groups=tuple(security_group or ()),
            metrics=metrics,
            tags=tags,
        )
        make(aws, wanted, wait=wait, report=tell)
    print_made(aws)
    if not dry_run:
        tell(
            f"ask it: loraplex sagemaker invoke {name} --text …; it costs money until loraplex sagemaker delete {name}"
        )


def update(
    name: EndpointArgument,
    role: Annotated[str | None, typer.Option(help="The new role's ARN.")] = None,
    image: Annotated[str | None, typer.Option(help="The new image.")] = None,
    model_data: Annotated[
        str | None, typer.Option(help="The new model data. New bytes under the old URL are no change.")
    ] = None,
    instance_type: Annotated[str | None, typer.Option(help="The new kind of machine.")] = None,
    instances: Annotated[int | None, typer.Option(help="The new number of machines.")] = None,
    ami: AmiOption = None,
    env: EnvOption = None,
    unset_env: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Drop a variable. Repeatable.")] = None,
    startup_timeout: Annotated[int | None, typer.Option(help="Seconds, as in `deploy`.")] = None,
    alarm: Annotated[
        list[str] | None, typer.Option(help="A CloudWatch alarm that brings the old endpoint back. Repeatable.")
    ] = None,
    make_alarms: Annotated[
        bool,
        typer.Option(
            "--make-alarms",
            help="Make two alarms, on errors and on latency, and use them. With components they watch "
            "NAME-base only, and no adapter; for those, give --alarm.",
        ),
    ] = False,
    max_errors: Annotated[int, typer.Option(help="For --make-alarms: answers 5xx in a minute.")] = 5,
    max_latency: Annotated[float, typer.Option(help="For --make-alarms: the model's mean seconds in a minute.")] = 5.0,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Machines, or base component's copies, replaced at once: 5 to 50 %. Default: a quarter, or one."
        ),
    ] = None,
    bake: Annotated[
        int, typer.Option(help="Seconds for which the alarms are watched after each batch, at most 3600.")
    ] = 120,
    wait: WaitOption = True,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Change an endpoint while it answers. What is not given stays, also the number that autoscaling chose.

    Meanwhile old and new machines run, and cost, side by side. An alarm brings the old ones back. The old model and
    config are deleted after success, unless --no-wait.

    Example: [bold]loraplex sagemaker update support --model-data s3://models/support/2/model.tar.gz --make-alarms[/]
    """
    given = {"role": role, "image": image, "model_data": model_data, "instance_type": instance_type, "ami": ami}
    numbers = {"instances": instances, "startup_timeout": startup_timeout}
    changes: dict[str, Any] = {key: value for key, value in {**given, **numbers}.items() if value is not None}
    variables = pairs(env, "--env", from_environment=True)
    rest = f"models and configs that are not used are deleted by the next loraplex sagemaker update {name}"
    with account(region, profile, endpoint=name, rest=rest, dry_run=dry_run) as aws:
        from loraplex.sagemaker.endpoints.endpoint import Rollout
        from loraplex.sagemaker.endpoints.endpoint import update as change

        rollout = Rollout(
            alarms=tuple(alarm or ()),
            make_alarms=make_alarms,
            max_errors=max_errors,
            max_latency_s=max_latency,
            batch=batch,
            bake_s=bake,
        )
        is_changed = change(
            aws, name, changes, rollout, set_env=variables, unset_env=unset_env or (), wait=wait, report=tell
        )
    print_made(aws)
    if not is_changed:
        tell(f"{name} is so already; nothing is changed. New model data needs a URL of its own")


def status(
    name: EndpointArgument,
    as_json: JsonOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """List all that belongs to an endpoint, also what a failed deploy left.

    Example: [bold]loraplex sagemaker status support[/]
    """
    with account(region, profile, endpoint=name) as aws:
        from loraplex.errors import ConfigurationError
        from loraplex.sagemaker.endpoints.resources import inventory

        found = inventory(aws, name)
        if not found.resources and not found.problems:
            raise ConfigurationError(
                f"endpoint {name}",
                f"does not exist in {aws.region()}, and nothing of it is left",
                remedy="check the name and --region; loraplex sagemaker deploy makes an endpoint",
            )
    if as_json:
        kept = ("kind", "name", "arn", "state")
        resources = [{key: getattr(one, key) for key in kept} for one in found.resources]
        typer.echo(json.dumps({"resources": resources, "problems": [str(one) for one in found.problems]}))
        return
    print_resources(found.resources)
    if found.endpoint is not None and (reason := found.endpoint.get("FailureReason")):
        tell(f"AWS's reason: {reason}")
    for problem in found.problems:
        tell(f"not looked up: {problem}")


def print_resources(resources: list[Any]) -> None:
    table = Table("kind", "name", "state", box=None)
    table.add_column("ARN", overflow="fold")  # whole, for other tools
    for one in resources:
        table.add_row(one.kind, escape(one.name), escape(one.state), escape(one.arn))
    stdout.print(table)


def delete(
    name: EndpointArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    region: RegionOption = None,
    profile: ProfileOption = None,
) -> None:
    """Delete an endpoint with all that belongs to it: scaling, components, alarms, configs and models.

    What lies on S3, and the log in CloudWatch, stay. After a failed or interrupted command, it finds the rest.

    Example: [bold]loraplex sagemaker delete support --yes[/]
    """
    with account(region, profile, endpoint=name, dry_run=dry_run) as aws:
        from loraplex.sagemaker.endpoints.deletion import delete as remove
        from loraplex.sagemaker.endpoints.resources import inventory

        found = inventory(aws, name)
        if found.resources and not dry_run:
            print_resources(found.resources)
            if not yes:
                typer.confirm("Delete all of this?", abort=True)
        left = remove(aws, name, found, tell)
    for one in left:
        tell(f"left: {one.resource.kind} {one.resource.arn or one.resource.name}: {one.reason}")
    for problem in found.problems:
        tell(f"not looked up: {problem}")
    if left or found.problems:
        tell(f"to delete the rest: loraplex sagemaker delete {name}")
        raise typer.Exit(1)
    if not dry_run:
        tell(f"nothing of {name} is left but its log in CloudWatch and what lies on S3")
