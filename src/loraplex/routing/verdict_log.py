"""The newest verdicts: target, label, confidence, latency, and feedback. Holds no conversation; `KeptInputs` may."""

import json
import logging
import math
import sqlite3
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from loraplex.database import Database
from loraplex.errors import StateError, UnknownVerdictError, quoted
from loraplex.measuring.samples import wilson
from loraplex.routing.failures import Failures
from loraplex.routing.kept_inputs import KeptInputs
from loraplex.types import (
    Accuracy,
    Agreement,
    Example,
    Examples,
    Latency,
    Names,
    RouteStats,
    TargetStats,
    Verdict,
)

logger = logging.getLogger(__name__)

FORMAT = 3
MOST_LABEL_CHARS = 2000  # of a question's labels that are kept with its verdict; of longer ones, none are
SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS verdicts (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        route TEXT NOT NULL,
        target TEXT NOT NULL,
        version TEXT,
        is_shadow INTEGER NOT NULL,
        label TEXT,
        confidence REAL,
        latency_ms REAL,
        error TEXT,
        truth TEXT,
        request_id TEXT,
        key TEXT,
        labels TEXT
    ) STRICT
    """,
    "CREATE UNIQUE INDEX IF NOT EXISTS by_id ON verdicts (id, target)",
    "CREATE INDEX IF NOT EXISTS by_route ON verdicts (route, target, version, is_shadow)",
    "CREATE INDEX IF NOT EXISTS by_request ON verdicts (request_id) WHERE request_id IS NOT NULL",
)
UPGRADES = {
    1: (
        "ALTER TABLE verdicts ADD COLUMN request_id TEXT",
        "ALTER TABLE verdicts ADD COLUMN key TEXT",
        SCHEMA[-1],
    ),
    2: ("ALTER TABLE verdicts ADD COLUMN labels TEXT",),
}
# Answers to a request that was sent by one key; ?2 is NULL for all keys.
OF_REQUEST = "request_id = ?1 AND (?2 IS NULL OR key = ?2) AND NOT is_shadow AND error IS NULL"
# Answers to the request ?1. Their ids are its own, "-" and a number; "." comes behind "-".
OF_INPUT = """
    SELECT route, label, truth FROM verdicts
    WHERE id > ?1 || '-' AND id < ?1 || '.' AND NOT is_shadow AND coalesce(truth, label) IS NOT NULL ORDER BY number
"""
# One row for each target, version and role. A space before a label belongs to its token, not to its name.
COUNTS = """
    SELECT target, version, is_shadow, count(*), count(error), avg(confidence), avg(latency_ms), count(latency_ms),
        count(truth) FILTER (WHERE label IS NOT NULL), count(*) FILTER (WHERE trim(label) = trim(truth))
    FROM verdicts WHERE route = ? GROUP BY target, version, is_shadow ORDER BY is_shadow, min(number)
"""
LABELS = """
    SELECT label, count(*) FROM verdicts
    WHERE route = ? AND target = ? AND version IS ? AND is_shadow = ? AND label IS NOT NULL
    GROUP BY label ORDER BY count(*) DESC, label
"""
LATENCY = """
    SELECT latency_ms FROM verdicts
    WHERE route = ? AND target = ? AND version IS ? AND is_shadow = ? AND latency_ms IS NOT NULL
    ORDER BY latency_ms LIMIT 1 OFFSET ?
"""
AGREEMENT = """
    SELECT count(*), count(*) FILTER (WHERE trim(shadow.label) = trim(answered.label))
    FROM verdicts AS shadow JOIN verdicts AS answered ON answered.id = shadow.id AND NOT answered.is_shadow
    WHERE shadow.route = ? AND shadow.target = ? AND shadow.version IS ? AND shadow.is_shadow
        AND shadow.label IS NOT NULL AND answered.label IS NOT NULL
"""


Targets = Mapping[str, Seq[str]]  # adapter, or the base -> a question's labels; none where an adapter answered


class LoggedVerdict(NamedTuple):
    """One answer of a target.

    id:     id of the verdict. A shadow has the id of the verdict that was returned.
    route:  the name that was requested.
    labels: of a question to the bare base, as JSON.
    """

    id: str
    route: str
    target: str
    version: str | None
    is_shadow: bool
    label: str | None
    confidence: float | None
    latency_ms: float | None
    error: str | None
    request_id: str | None = None
    key: str | None = None
    labels: str | None = None

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        verdict_id: str,
        route: str,
        target: str,
        total_ms: float | None,
        *,
        is_shadow: bool = False,
        request_id: str | None = None,
        key: str | None = None,
    ) -> Self:
        return cls(
            id=verdict_id,
            route=route,
            target=target,
            version=None if verdict.adapter is None else verdict.adapter.version,
            is_shadow=is_shadow,
            label=verdict.label,
            confidence=verdict.confidence,
            latency_ms=total_ms if verdict.error is None else None,
            error=None if verdict.error is None else verdict.error.code,
            request_id=request_id,
            key=key,
            labels=_kept_labels(verdict),
        )


class VerdictLog:
    """Verdicts in a SQLite file. New verdicts wait in memory until `flush`; every reading method counts them. Any
    thread may call. Methods raise StateError if the file cannot be read or written."""

    def __init__(self, path: Path | None = None, *, max_verdicts: int, inputs: KeptInputs | None = None) -> None:
        """path: a SQLite file; None keeps the verdicts in memory, until the process ends. max_verdicts: beyond this
        number, the oldest are deleted. inputs: keeps the texts, too."""
        self.inputs = inputs
        self._database = Database(path, format=FORMAT, schema=SCHEMA, upgrades=UPGRADES)
        self._max_verdicts = max_verdicts
        # A deque: one thread may append while another pops.
        self._added: deque[LoggedVerdict] = deque(maxlen=max_verdicts)
        self._flushing = threading.Lock()
        self._failures = Failures(
            logger, "verdicts cannot be written, and wait in memory", "verdicts are written again"
        )

    def add(self, verdicts: Iterable[LoggedVerdict]) -> None:
        self._added.extend(verdicts)

    def flush(self) -> None:
        """Write the verdicts that wait. If the file cannot be written, raises StateError and keeps the newest for the
        next flush."""
        with self._flushing:
            added = [self._added.popleft() for _ in range(len(self._added))]
            if not added:
                self._database.check()  # reports a removed file before a verdict waits
                return
            try:
                self._write(added)
            except StateError:
                room = self._max_verdicts - len(self._added)
                self._added.extendleft(reversed(added[max(0, len(added) - room) :]))
                raise

    def try_to_flush(self) -> None:
        """Flush. A failure is only logged, because it must not cost an answer."""
        with self._failures.only_logged():
            self.flush()

    def close(self) -> None:
        """Flush for the last time, and say what is lost."""
        if self.inputs is not None:
            self.inputs.close()
        self.try_to_flush()
        if self._added:
            logger.error("%d verdicts could not be written, and are lost", len(self._added))

    def _write(self, added: Seq[LoggedVerdict]) -> None:
        with self._database.transaction() as database:
            self._insert(database, added)

    def _insert(self, database: sqlite3.Connection, added: Seq[LoggedVerdict]) -> None:
        # A shadow may answer after feedback came: its row takes the label of the verdict's other rows.
        database.executemany(
            "INSERT OR IGNORE INTO verdicts"
            " (id, route, target, version, is_shadow, label, confidence, latency_ms, error, request_id, key,"
            " labels, truth)"
            " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, (SELECT truth FROM verdicts WHERE id = ?1))",
            added,
        )
        database.execute(
            "DELETE FROM verdicts WHERE number <= (SELECT max(number) FROM verdicts) - ?", (self._max_verdicts,)
        )

    @contextmanager
    def _all(self) -> Iterator[sqlite3.Connection]:
        """Run the block with all verdicts: in the file, or where it cannot be written, in a copy in memory."""
        try:
            self.flush()
        except StateError:
            with self._flushing, self._database.copy() as database:
                self._insert(database, tuple(self._added.copy()))
                yield database
        else:
            with self._database.transaction() as database:
                yield database

    def knows(self, route: str) -> bool:
        """Return whether verdicts are kept that were requested by this name."""
        with self._all() as database:
            return database.execute("SELECT 1 FROM verdicts WHERE route = ? LIMIT 1", (route,)).fetchone() is not None

    def targets_of(self, verdict_id: str) -> Targets:
        """Return all targets that answered, the returned one first. Raises UnknownVerdictError for an unknown id."""
        with self._all() as database:
            found = database.execute(
                "SELECT target, labels FROM verdicts WHERE id = ? ORDER BY is_shadow", (verdict_id,)
            ).fetchall()
        if not found:
            raise UnknownVerdictError(quoted(verdict_id))
        return {target: json.loads(labels or "[]") for target, labels in found}

    def answers_to(self, request_id: str, key: str | None) -> dict[str, tuple[int, Targets]]:
        """Return what was answered to a request: requested name -> number of verdicts, and all targets, shadows
        included. More than one verdict: the request was sent again. key: only where this key asked; None: any."""
        with self._all() as database:
            counts = database.execute(
                f"SELECT route, count(*) FROM verdicts WHERE {OF_REQUEST} GROUP BY route", (request_id, key)
            ).fetchall()
            targets = database.execute(
                "SELECT DISTINCT route, target, labels FROM verdicts WHERE id IN"
                f" (SELECT id FROM verdicts WHERE {OF_REQUEST})",
                (request_id, key),
            ).fetchall()
        of: dict[str, dict[str, Seq[str]]] = {name: {} for name, _ in counts}
        for route, target, labels in targets:
            of.get(route, {})[target] = json.loads(labels or "[]")
        return {name: (count, of[name]) for name, count in counts}

    def set_truth_of_request(self, request_id: str, key: str | None, route: str, label: str) -> int:
        """Do as `set_truth` for all verdicts of a request that have this requested name."""
        self.flush()
        with self._database.transaction() as database:
            return database.execute(
                "UPDATE verdicts SET truth = ?4 WHERE id IN"
                f" (SELECT id FROM verdicts WHERE {OF_REQUEST} AND route = ?3)",
                (request_id, key, route, label),
            ).rowcount

    def set_truth(self, verdict_id: str, label: str) -> int:
        """Store the label that a verdict should have had; a later call replaces the label. Returns the number of
        answers that the label applies to. Raises UnknownVerdictError for an unknown id."""
        self.flush()
        with self._database.transaction() as database:
            updated = database.execute("UPDATE verdicts SET truth = ? WHERE id = ?", (label, verdict_id))
        if not updated.rowcount:
            raise UnknownVerdictError(quoted(verdict_id))
        return updated.rowcount

    def examples(self, names: Names, since_s: float | None, is_corrected: bool, after: str | None) -> Examples:
        """Return kept texts with the labels of their verdicts, a page at a time; see `Client.examples`. Texts without
        such a label are left out, so a page may be empty. Raises InvalidRequestError if `after` is no page's."""
        assert self.inputs is not None, "texts are kept"
        kept, after = self.inputs.read(since_s, after)
        examples = []
        with self._all() as database:
            for one in kept:
                labels, corrected = {}, []
                for route, label, truth in database.execute(OF_INPUT, (one.id,)):
                    if (names == "*" or route in names) and not (is_corrected and truth is None):
                        labels[route] = label if truth is None else truth
                        corrected += [] if truth is None else [route]
                if labels:
                    examples.append(
                        Example(
                            id=one.id,
                            input=one.input,
                            labels=labels,
                            corrected=tuple(corrected),
                            conversation_id=one.conversation_id,
                        )
                    )
        return Examples(examples=tuple(examples), after=after)

    def stats(self, route: str) -> RouteStats:
        """Return the statistics of a route, for each version of each target, over the verdicts that are kept."""
        with self._all() as database:
            rows = database.execute(COUNTS, (route,)).fetchall()
            return RouteStats(name=route, targets=tuple(_target_stats(database, route, *row) for row in rows))


def _kept_labels(verdict: Verdict) -> str | None:
    """Return the labels of a question to the bare base: no adapter knows them when feedback comes."""
    if verdict.adapter is not None or not verdict.scores:
        return None
    labels = json.dumps([*verdict.scores], ensure_ascii=False)
    return labels if len(labels) <= MOST_LABEL_CHARS else None


def _target_stats(
    database: sqlite3.Connection,
    route: str,
    target: str,
    version: str | None,
    is_shadow: bool,
    num_verdicts: int,
    num_errors: int,
    mean_confidence: float | None,
    mean_latency: float | None,
    num_latencies: int,
    num_labelled: int,
    num_right: int,
) -> TargetStats:
    which = (route, target, version, is_shadow)

    def percentile(share: float) -> float:
        rank = max(0, math.ceil(share * num_latencies) - 1)
        [(latency,)] = database.execute(LATENCY, (*which, rank))
        return float(latency)

    labels = dict(database.execute(LABELS, which).fetchall())
    [(num_compared, num_agreed)] = database.execute(AGREEMENT, which[:3])
    return TargetStats(
        target=target,
        version=version,
        role="shadow" if is_shadow else "primary",
        num_verdicts=num_verdicts,
        num_errors=num_errors,
        label_shares={label: count / sum(labels.values()) for label, count in labels.items()},
        mean_confidence=mean_confidence,
        latency_ms=None
        if mean_latency is None
        else Latency(mean=mean_latency, p50=percentile(0.5), p99=percentile(0.99)),
        agreement=Agreement(num_compared=num_compared, share=num_agreed / num_compared)
        if is_shadow and num_compared
        else None,
        accuracy=_accuracy(num_right, num_labelled) if num_labelled else None,
    )


def _accuracy(num_right: int, num: int) -> Accuracy:
    low, high = wilson(num_right, num)
    return Accuracy(num_labelled=num, share=num_right / num, low=low, high=high)
