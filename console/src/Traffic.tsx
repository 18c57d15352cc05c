// Live charts from the server's metrics, read every two seconds while this view is open.
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, askText, asApiError } from "./api";
import { percentile, rate, readMetrics, shares, sum, type Reading } from "./metrics";
import { milliseconds } from "./Work";
import { Notice } from "./Notice";
import { Rows } from "./Rows";
import { count, percent } from "./verdicts";
import { megabytes } from "./Adapters";

const EVERY_MS = 2000;
const MOST_POINTS = 90;
const MASS_ALARM = 0.02; // share of verdicts with improbable labels from which a classifier is flagged

interface Point {
  requests: number;
  verdicts: number;
  p50: number | null;
  p99: number | null;
  waiting: number;
  busy: number;
  tokens: number;
  cached: number;
}

export function Traffic() {
  const [points, setPoints] = useState<Point[]>([]);
  const [now, setNow] = useState<Reading | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const before = useRef<{ reading: Reading; at: number } | null>(null);

  const read = async () => {
    try {
      const reading = readMetrics(await askText("metrics"));
      const at = performance.now();
      const last = before.current;
      before.current = { reading, at };
      setNow(reading);
      setError(null);
      if (last) {
        const seconds = (at - last.at) / 1000;
        const total = { phase: "total" };
        const per = (name: string, where?: Record<string, string>) => rate(last.reading, reading, seconds, name, where);
        setPoints((known) => [
          ...known.slice(1 - MOST_POINTS),
          {
            requests: per("loraplex_request_seconds_count", total),
            verdicts: per("loraplex_classifications_total"),
            p50: percentile(last.reading, reading, "loraplex_request_seconds", total, 0.5),
            p99: percentile(last.reading, reading, "loraplex_request_seconds", total, 0.99),
            waiting: sum(reading, "loraplex_sequences_waiting"),
            busy: Math.min(1, per("loraplex_step_seconds_total")),
            tokens: per("loraplex_tokens_total", { kind: "computed" }),
            cached: per("loraplex_tokens_total", { kind: "cached" }),
          },
        ]);
      }
    } catch (found) {
      setError(asApiError(found));
    }
  };
  useEffect(() => {
    void read();
    const timer = window.setInterval(() => document.hidden || void read(), EVERY_MS);
    return () => window.clearInterval(timer);
  }, []);

  const last = points[points.length - 1];
  const rows = now ? shares(now) : [];
  return (
    <main class="page" id="content">
      <Notice error={error} onRetry={() => void read()} />
      <div class="charts">
        <Chart
          title="Requests a second"
          values={points.map((one) => one.requests)}
          shown={last ? last.requests.toFixed(1) : "–"}
        />
        <Chart
          title="Verdicts a second"
          values={points.map((one) => one.verdicts)}
          shown={last ? last.verdicts.toFixed(1) : "–"}
        />
        <Chart
          title="Request time, median"
          values={points.map((one) => one.p50)}
          shown={last?.p50 == null ? "–" : milliseconds(last.p50 * 1000)}
        />
        <Chart
          title="Request time, 99th percentile"
          values={points.map((one) => one.p99)}
          shown={last?.p99 == null ? "–" : milliseconds(last.p99 * 1000)}
        />
        <Chart
          title="Evaluations that wait"
          values={points.map((one) => one.waiting)}
          shown={last ? count(last.waiting) : "–"}
        />
        <Chart
          title="Busy computing"
          values={points.map((one) => one.busy)}
          most={1}
          shown={last ? percent(last.busy) : "–"}
        />
        <Chart
          title="Tokens computed a second"
          values={points.map((one) => one.tokens)}
          shown={last ? count(last.tokens) : "–"}
        />
        <Chart
          title="Tokens shared a second"
          values={points.map((one) => one.cached)}
          shown={last ? count(last.cached) : "–"}
        />
      </div>
      {now && (
        <p class="hint">
          {count(sum(now, "loraplex_adapters_on_device"))} adapters on the device (
          {megabytes(sum(now, "loraplex_adapter_device_bytes"))}), {megabytes(sum(now, "loraplex_adapter_host_bytes"))}{" "}
          in host memory; {count(sum(now, "loraplex_kv_blocks_free"))} of {count(sum(now, "loraplex_kv_blocks"))} K/V
          blocks free; {count(sum(now, "loraplex_request_failures_total"))} requests answered with an error since the
          start.
        </p>
      )}
      <section class="panel shares" aria-labelledby="shares-title">
        <header class="panel-head">
          <h2 id="shares-title">
            Answers since the start <span class="count">{rows.length}</span>
          </h2>
        </header>
        {rows.length === 0 ? (
          <p class="empty">{now ? "Nothing was asked yet." : "Loading…"}</p>
        ) : (
          <Rows
            items={rows}
            label="Answers of each classifier"
            render={(one) => {
              const labelled = one.labels.reduce((total, [, number]) => total + number, 0);
              const isLow = one.lowMass / Math.max(one.total, 1) >= MASS_ALARM;
              return (
                <li key={`${one.classifier} ${one.adapter}`} class="row share-row">
                  <span class="row-name">
                    <b>{one.classifier}</b>
                    <small>
                      {one.adapter && one.adapter !== one.classifier
                        ? `by ${one.adapter}`
                        : `${count(one.total)} answers`}
                    </small>
                  </span>
                  <span class="share-words">
                    {one.labels
                      .slice(0, 3)
                      .map(([label, number]) => `${label} ${percent(number / Math.max(labelled, 1))}`)
                      .join(", ")}
                    {isLow && (
                      <small
                        class="is-bad"
                        title="In these answers all labels together were improbable: the text or the prompt is not what the adapter was trained for."
                      >
                        label mass low in {percent(one.lowMass / one.total)}
                      </small>
                    )}
                    {one.errors > 0 && <small class="is-bad">{count(one.errors)} errors</small>}
                  </span>
                  <div class="bar" aria-hidden="true">
                    {one.labels.map(([label, number, colour], index) => {
                      const start = one.labels.slice(0, index).reduce((total, [, each]) => total + each, 0);
                      return (
                        <div
                          key={label}
                          class={`bar-part label-${colour % 6} is-answer`}
                          style={{
                            left: `${(start / Math.max(labelled, 1)) * 100}%`,
                            width: `${(number / Math.max(labelled, 1)) * 100}%`,
                          }}
                        />
                      );
                    })}
                  </div>
                </li>
              );
            }}
          />
        )}
      </section>
    </main>
  );
}

function Chart({
  title,
  values,
  shown,
  most,
}: {
  title: string;
  values: (number | null)[];
  shown: string;
  most?: number;
}) {
  const known = values.map((one) => one ?? 0);
  const top = most ?? Math.max(...known, 1e-9);
  const start = MOST_POINTS - known.length;
  const points = known.map((one, index) => `${start + index},${(39 - (one / top) * 36).toFixed(2)}`);
  return (
    <figure class="panel chart">
      <figcaption>{title}</figcaption>
      <b>{shown}</b>
      <svg
        viewBox={`0 0 ${MOST_POINTS - 1} 40`}
        preserveAspectRatio="none"
        role="img"
        aria-label={`${title}: ${shown} now`}
      >
        {points.length > 1 && (
          <>
            <polygon class="chart-area" points={`${start},40 ${points.join(" ")} ${MOST_POINTS - 1},40`} />
            <polyline class="chart-line" points={points.join(" ")} />
          </>
        )}
      </svg>
    </figure>
  );
}
