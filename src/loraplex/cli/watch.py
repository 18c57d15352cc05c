"""`loraplex watch`: a live table of a running server's classifiers, from its metrics."""

import time
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from loraplex.cli.options import errors_to_exit, stdout
from loraplex.cli.remote import URL
from loraplex.client.call import Call
from loraplex.client.exchange import Connection, Exchange
from loraplex.errors import ServerError
from loraplex.measuring.readings import Reading

METRICS: Call[str] = Call(method="GET", path="/metrics", answer=str, is_safe=True)
TIMEOUT_S = 10.0
BAR, MOST_LABELS = 12, 3  # characters of a bar, and labels that are written out
ANSWERED = ("ok", "abstained")
LOW_MASS_ALARM = 0.02  # share of verdicts with improbable labels from which a classifier is marked


@dataclass(kw_only=True)
class Row:
    """A classifier's verdicts since the server's start. labels: label -> verdicts; the contract's first one first."""

    name: str
    num_answered: float = 0
    num_abstained: float = 0
    num_errors: float = 0
    num_low_mass: float = 0
    per_second: float = 0
    labels: dict[str, float] = field(default_factory=dict)


def watch(
    url: Annotated[
        str,
        typer.Argument(metavar="[URL]", envvar="LORAPLEX_URL", help="The server. Set its API key in LORAPLEX_API_KEY."),
    ] = URL,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, from two readings, and end.")] = False,
) -> None:
    """Show what a running server answers, until Ctrl-C: verdicts a second, the share of each label, and warnings.

    Needs a key that may read the metrics, if the server has keys.

    Example: [bold]loraplex watch http://127.0.0.1:8000 --once[/]
    """
    with errors_to_exit():
        connection = Connection.to(url, None, TIMEOUT_S, 0)
        with httpx.Client(**connection.options()) as client:
            before = read(client, connection)
            time.sleep(every)
            now = read(client, connection)
            if once:
                stdout.print(view(before, now))
                return
            with Live(view(before, now), console=stdout, auto_refresh=False, screen=stdout.is_terminal) as live:
                try:
                    while True:
                        time.sleep(every)
                        before, now = now, read(client, connection)
                        live.update(view(before, now), refresh=True)
                except KeyboardInterrupt:
                    pass


def read(client: httpx.Client, connection: Connection) -> Reading:
    """Return the server's metrics. Raises its error as a LoraplexError, or ServerError if they are no metrics."""
    exchange = Exchange(connection, METRICS)
    try:
        response = client.request(**exchange.request())
    except httpx.HTTPError as exc:
        exchange.result(exc)
        raise AssertionError("an HTTPError is no answer") from exc
    if not response.is_success:
        exchange.result(response)
    try:
        return Reading(response.text, time.monotonic())
    except ValueError:
        raise ServerError(
            "not_loraplex", f"{connection.url} has no metrics at /metrics", remedy="check the URL"
        ) from None


def rows(before: Reading, now: Reading) -> list[Row]:
    """Return a row for each classifier or route that was asked, the busiest first."""
    found: dict[str, Row] = {}
    for labels, value in now.samples("loraplex_classifications_total"):
        row = found.setdefault(labels["classifier"], Row(name=labels["classifier"]))
        if labels["outcome"] in ANSWERED:
            row.num_answered += value
            row.num_abstained += value if labels["outcome"] == "abstained" else 0
        elif labels["outcome"] != "skipped":
            row.num_errors += value
    # The contract's first label comes first.
    for labels, value in sorted(now.samples("loraplex_labels_total"), key=lambda one: one[0]["is_positive"] != "true"):
        counts = found[labels["classifier"]].labels
        counts[labels["label"]] = counts.get(labels["label"], 0) + value
    for row in found.values():
        row.num_low_mass = now.sum("loraplex_warnings_total", classifier=row.name, code="low_label_mass")
        row.per_second = now.per_second(before, "loraplex_classifications_total", classifier=row.name)
    return sorted(
        (row for row in found.values() if row.num_answered or row.num_errors),
        key=lambda row: (-row.per_second, -row.num_answered, row.name),
    )


def view(before: Reading, now: Reading) -> Group:
    """Return the table with a line above it about the server as a whole."""
    table = Table("classifier", box=None)
    for column in ("verdicts/s", "verdicts", "abstained", "errors", "low label mass"):
        table.add_column(column, justify="right")
    table.add_column("labels")
    for row in rows(before, now):
        num = max(row.num_answered, 1)
        low_mass = f"{row.num_low_mass / num:.1%}"
        table.add_row(
            escape(row.name),
            f"{row.per_second:.1f}",
            f"{row.num_answered:,.0f}",
            f"{row.num_abstained / num:.1%}",
            f"[red]{row.num_errors:,.0f}[/]" if row.num_errors else "0",
            f"[red]{low_mass}[/]" if row.num_low_mass / num >= LOW_MASS_ALARM else low_mass,
            _shares(row.labels),
        )
    if not table.row_count:
        table.add_row("nothing was asked yet")
    return Group(_summary(before, now), table)


def _summary(before: Reading, now: Reading) -> str:
    seconds = "loraplex_request_seconds"
    times = [now.percentile(before, seconds, share, phase="total") for share in (0.5, 0.99)]
    p50, p99 = ("none" if one is None else f"{one * 1000:.0f} ms" for one in times)
    return (
        f"{now.per_second(before, f'{seconds}_count', phase='total'):.1f} requests/s, p50 {p50}, p99 {p99}, "
        f"{now.sum('loraplex_sequences_waiting'):.0f} evaluations wait, "
        f"busy {min(1.0, now.per_second(before, 'loraplex_step_seconds_total')):.0%}, "
        f"{now.per_second(before, 'loraplex_tokens_total', kind='computed'):,.0f} tokens/s computed, "
        f"{now.per_second(before, 'loraplex_tokens_total', kind='cached'):,.0f} shared"
    )


def _shares(counts: dict[str, float]) -> str:
    """Return a bar of the first label's share, and the shares in words."""
    total = sum(counts.values())
    if not total:
        return ""
    shown = [f"{escape(label)} {value / total:.1%}" for label, value in [*counts.items()][:MOST_LABELS]]
    more = f", {len(counts) - MOST_LABELS} more" if len(counts) > MOST_LABELS else ""
    full, empty = ("█", "░") if stdout.encoding.startswith("utf") else ("#", ".")
    length = round(next(iter(counts.values())) / total * BAR)
    return f"{full * length}{empty * (BAR - length)} {', '.join(shown)}{more}"
