"""`loraplex classify`: classifies one conversation in this process."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.bundle import open_bundle
from loraplex.classifier import conversation_text
from loraplex.cli.options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    origins,
    quiet_libraries,
    tell,
)
from loraplex.cli.verdict_table import print_verdicts
from loraplex.config import EngineConfig, resolve
from loraplex.disk import refuse_pointer
from loraplex.errors import ConfigurationError, InvalidRequestError, UnknownClassifierError
from loraplex.text.question import check_question
from loraplex.types import ClassifyRequest, Question, classifier_names


def classify(
    context: typer.Context,
    path: PathArgument,
    stdin: Annotated[
        str | None, typer.Argument(metavar="[-]", help="Read the conversation from standard input.")
    ] = None,
    classifier: Annotated[
        list[str] | None,
        typer.Option("--classifier", "-c", metavar="NAME", help="Run this classifier. Repeatable."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every classifier.")] = False,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", "-q", metavar="TEXT", help="Put this yes/no question to the bare base, in words. Repeatable."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The conversation.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file with the conversation; - reads standard input.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same object as POST /v1/classify.")] = False,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print each prompt and its token ids first.")
    ] = False,
    cascade: Annotated[
        bool, typer.Option("--cascade/--no-cascade", help="Skip classifiers whose gate says no, as a server does.")
    ] = True,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Classify one conversation, without a server.

    Example: [bold]loraplex classify examples/support_desk/bundle --all --text "Customer: Thanks, that was all. Bye!"[/]

    Example: [bold]loraplex classify examples/support_desk/bundle -c issueResolved --json - < conversation.txt[/]

    Example: [bold]loraplex classify path/to/base -q "Is the customer polite?" --text "Customer: Thanks, bye!"[/]

    Exit code 0: every classifier gave a verdict; 1: something failed; 2: wrong usage.
    """
    if (every and classifier) or not (every or classifier or question):
        raise typer.BadParameter(
            "name classifiers with --classifier, give --all, or ask a --question",
            param_hint="--classifier/--all/--question",
        )
    if sum(source is not None for source in (stdin, text, file)) != 1:
        raise typer.BadParameter("give exactly one conversation", param_hint="--text/--file/-")
    if stdin not in (None, "-"):
        raise typer.BadParameter(f"{stdin!r}: only - is accepted here; give text with --text", param_hint="[-]")
    adapters = named_adapters(adapter)
    with errors_to_exit():
        conversation = text if text is not None else _read(None if file in (None, Path("-")) else file)
        # Whatever can be wrong is told before PyTorch is imported, and before the base is loaded.
        conversation_text(conversation, {})
        if text is not None and "\\n" in text and "\n" not in text:
            typer.echo(
                "warning: --text holds \\n as two characters and no line end; give $'…\\n…', or --file", err=True
            )
        bundle = open_bundle(path)
        given = {"device": device, "dtype": dtype, "adhoc_questions": bool(question) or None}
        config = resolve(EngineConfig, bundle.settings.engine, given, origins(context))
        from loraplex.inprocess import Loraplex
        from loraplex.service.named_adapters import add_adapters
        from loraplex.service.preparation import check_effects, prepare

        check_effects(config, origins(context))
        bundle = add_adapters(bundle, adapters, config, tell)
        preparation = prepare(bundle, config)
        request = ClassifyRequest(
            input=conversation,
            classifiers=classifier_names("*" if every else classifier or ()),
            questions={one: Question(type="predicate", instructions=one) for one in question or ()},
            cascade=cascade,
        )
        for name, asked in request.questions.items():
            check_question(name, asked)
        known = [*sorted(preparation.names), *bundle.settings.routes]
        for name in () if request.classifiers == "*" else request.classifiers:
            if name not in known:
                raise UnknownClassifierError(name, known)
        quiet_libraries()
        with Loraplex.start(bundle, config, preparation) as loraplex:
            prompts = loraplex.show_prompt(request) if show_prompt else ()
            result = loraplex.run(loraplex.router.classify(request))
    if as_json:
        from loraplex.server.schemas import result_json

        answer = json.loads(result_json(result))
        if show_prompt:
            answer["prompts"] = [{"classifier": name, "text": shown, "token_ids": ids} for name, shown, ids in prompts]
        typer.echo(json.dumps(answer, ensure_ascii=False))
    else:
        for name, shown, ids in prompts:
            typer.echo(f"--- {name}: {len(ids)} tokens\n{shown}\n{list(ids)}\n")
        print_verdicts(Console(), result)
    if any(verdict.error is not None for verdict in result.verdicts):
        raise typer.Exit(1)


def _read(file: Path | None) -> str:
    """Return the text of `file`, or of standard input if `file` is None."""
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        refuse_pointer(file or Path("standard input"), data, ConfigurationError)
        return data.decode("utf-8-sig")  # as it is: an adapter without a contract gets it verbatim, as over HTTP
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"{file or 'standard input'}: {exc}", remedy="give a UTF-8 text file") from None
