// Compare: two versions over a set of conversations, and what a route then does.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { ApiError, ask, asApiError, type Card, type Route, type TargetStats } from "./api";
import { asText } from "./turns";
import { askBoth, counted, ranked, readCases, type Case } from "./cases";
import { keptExamples } from "./kept";
import { Notice } from "./Notice";
import { PRIVATE } from "./private";
import { RoutePanel } from "./RoutePanel";
import { Rows } from "./Rows";
import { count, interval, percent } from "./verdicts";

export function Compare({ cards, onChange }: { cards: Card[]; onChange: () => void }) {
  const [names, setNames] = useState<string[]>([]);
  const [routes, setRoutes] = useState<Route[]>([]);
  const [stats, setStats] = useState<Record<string, TargetStats[]>>({});
  const [first, setFirst] = useState("");
  const [second, setSecond] = useState("");
  const [text, setText] = useState("");
  const [cases, setCases] = useState<Case[]>([]);
  const [progress, setProgress] = useState<number | null>(null);
  const [said, setSaid] = useState("");
  const [error, setError] = useState<ApiError | null>(null);
  const abort = useRef<AbortController | null>(null);

  const refresh = async () => {
    try {
      const listed = (await ask<{ routes: Route[] }>("v1/routes")).routes;
      setRoutes(listed);
      const found = await Promise.all(
        listed.map(
          async (one) =>
            [
              one.name,
              (await ask<{ targets: TargetStats[] }>(`v1/routes/${encodeURIComponent(one.name)}/stats`)).targets,
            ] as const,
        ),
      );
      setStats(Object.fromEntries(found));
    } catch {
      setRoutes([]); // an infer key may not see routes
    }
  };
  useEffect(() => void refresh(), []);
  useEffect(() => {
    setNames([
      ...new Set([
        ...cards.map((one) => one.name),
        ...routes.flatMap((one) => [...Object.keys(one.targets), ...one.shadows]),
      ]),
    ]);
  }, [cards, routes]);
  useEffect(() => () => abort.current?.abort(), []);

  const { cases: read, unread } = useMemo(() => {
    const asked = routes.filter((one) => first in one.targets || second in one.targets).map((one) => one.name);
    return readCases(text, [first, second, ...asked]); // labels may have the name of the route that asks for both
  }, [text, first, second, routes]);
  const run = async () => {
    const controller = new AbortController();
    abort.current = controller;
    setError(null);
    setCases(read);
    setProgress(0);
    try {
      await askBoth(read, first, second, controller.signal, (done) => {
        setProgress(done);
        setCases(ranked(read));
      });
    } catch (failure) {
      if (!controller.signal.aborted) setError(asApiError(failure));
    }
    setProgress(null);
  };
  const loadKept = async () => {
    setError(null);
    const route = routes.find((one) =>
      [first, second].every((name) => name in one.targets || one.shadows.includes(name)),
    );
    try {
      const found = await keptExamples([route?.name ?? first]);
      setText(found.map(({ input, labels }) => JSON.stringify({ input, labels })).join("\n"));
      setSaid(found.length ? "" : "Nothing of these was corrected yet.");
    } catch (failure) {
      setError(asApiError(failure));
    }
  };
  const result = counted(cases);

  return (
    <main class="page" id="content">
      <section class="panel compare" aria-labelledby="compare-title">
        <header class="panel-head">
          <h2 id="compare-title">Compare two versions</h2>
        </header>
        <div class="compare-form">
          <label>
            First
            <select value={first} onChange={(event) => setFirst(event.currentTarget.value)}>
              <option value="">choose…</option>
              {names.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </label>
          <label>
            Second
            <select value={second} onChange={(event) => setSecond(event.currentTarget.value)}>
              <option value="">choose…</option>
              {names.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </label>
          <label class="file">
            or open a file
            <input
              type="file"
              accept=".jsonl,.json,.txt"
              onChange={(event) => void event.currentTarget.files?.[0]?.text().then(setText)}
            />
          </label>
        </div>
        <label class="compare-text">
          <span class="hint">
            Conversations: JSON lines such as {'{"input": "Customer: …", "labels": {"name": "yes"}}'}, or plain text
            with a blank line between them. Known right answers give each version’s accuracy.
          </span>
          <textarea
            rows={6}
            {...PRIVATE}
            aria-label="Conversations to compare on"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
          />
        </label>
        <div class="actions">
          <button
            type="button"
            class="primary"
            disabled={!first || !second || first === second || !read.length || progress !== null}
            onClick={() => void run()}
          >
            {progress === null
              ? read.length
                ? `Compare on ${count(read.length)} conversations`
                : "Compare"
              : `${count(progress)} of ${count(read.length)}…`}
          </button>
          {progress !== null && (
            <button type="button" onClick={() => abort.current?.abort()}>
              Stop
            </button>
          )}
          <button
            type="button"
            disabled={!first || !second}
            onClick={() => void loadKept()}
            title="The texts that the server keeps with --keep-inputs, with the labels that feedback gave"
          >
            Use what was corrected here
          </button>
          <span class="hint" role="status">
            {said}
          </span>
          {unread > 0 && <span class="is-bad">{count(unread)} lines could not be read</span>}
        </div>
        <Notice error={error} onRetry={() => void run()} />
        {result.judged > 0 && (
          <div class="figures" role="status">
            <Figure title="same answer" right={result.agreed} total={result.judged} />
            {result.known > 0 && <Figure title={`${first} right`} right={result.right[0]} total={result.known} />}
            {result.known > 0 && <Figure title={`${second} right`} right={result.right[1]} total={result.known} />}
          </div>
        )}
        {result.judged > 0 && (
          <div class="case-head" aria-hidden="true">
            <span>Last turn, disagreements first</span>
            <span>{first}</span>
            <span>{second}</span>
          </div>
        )}
        {result.judged > 0 && (
          <Rows
            items={cases.filter((one) => one.first)}
            label="Conversations, disagreements first"
            render={(one, index) => (
              <li key={index} class={`row case-row ${one.first?.label !== one.second?.label ? "is-different" : ""}`}>
                <span class="case-text" title={asText(one.turns)}>
                  {asText(one.turns.slice(-1))}
                </span>
                <Label verdictLabel={one.first?.label ?? "error"} sure={one.first?.confidence} right={one.right} />
                <Label verdictLabel={one.second?.label ?? "error"} sure={one.second?.confidence} right={one.right} />
              </li>
            )}
          />
        )}
      </section>
      {routes.map((one) => (
        <RoutePanel
          key={one.name}
          route={one}
          stats={stats[one.name] ?? []}
          names={names}
          onCompare={(one, other) => {
            setFirst(one);
            setSecond(other);
            document.getElementById("compare-title")?.scrollIntoView({ block: "center" });
          }}
          onChange={() => {
            void refresh();
            onChange();
          }}
        />
      ))}
      {routes.length === 0 && (
        <p class="hint">
          There are no routes, or this key may not see them. A route gives one name to several versions:{" "}
          <code>loraplex routes set done issueResolved=90 done-v2=10 --shadow done-v3</code>
        </p>
      )}
    </main>
  );
}

function Label({
  verdictLabel,
  sure,
  right,
}: {
  verdictLabel: string;
  sure: number | undefined;
  right: string | null;
}) {
  return (
    <span class="row-answer">
      <span
        class={`label ${right === null ? "" : right === verdictLabel ? "is-good" : "is-bad"}`}
        title={right === null ? undefined : `right: ${right}`}
      >
        {verdictLabel}
      </span>
      <span class="probability">{sure === undefined ? "" : percent(sure)}</span>
    </span>
  );
}

function Figure({ title, right, total }: { title: string; right: number; total: number }) {
  const [low, high] = interval(right, total);
  return (
    <div class="figure">
      <b>{percent(right / total)}</b>
      <span>{title}</span>
      <small>
        {count(right)} of {count(total)}; with 95 % certainty {percent(low)} to {percent(high)}
      </small>
    </div>
  );
}
