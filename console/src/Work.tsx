// What was computed for the shown answers: tokens asked and computed, where the time went, and what a month would cost.
import { useState } from "preact/hooks";
import type { Judge } from "./judge";
import { useStore } from "./store";
import { count, percent } from "./verdicts";

export function Work({ judge }: { judge: Judge }) {
  useStore(judge);
  const { answer } = judge.answerShown();
  return (
    <section class="panel work" aria-labelledby="work-title">
      <header class="panel-head">
        <h2 id="work-title">What was computed</h2>
      </header>
      {answer ? (
        <Picture answer={answer} />
      ) : (
        <p class="empty">The first answers bring a picture of the work behind them.</p>
      )}
      <Month computeMs={answer?.result.timings.compute_ms ?? null} />
    </section>
  );
}

function Picture({ answer }: { answer: NonNullable<ReturnType<Judge["answerAt"]>> }) {
  const { usage, timings, verdicts } = answer.result;
  const asked = verdicts.filter((one) => !one.skipped_by && !one.error).length;
  const prompt = Math.max(usage.prompt_tokens, 1);
  const computed = Math.min(usage.computed_tokens / prompt, 1);
  const saved = 1 - computed;
  const gap = 0.4;
  return (
    <>
      <p class="work-sentence">
        {asked} {asked === 1 ? "classifier" : "classifiers"} read {count(usage.prompt_tokens)} tokens. The server
        computed <b>{count(usage.computed_tokens)}</b>
        {saved > 0.005
          ? `; the other ${percent(saved)} were shared between classifiers, or known from an earlier turn.`
          : "; nothing was shared."}
        {usage.skipped_tokens
          ? ` About ${count(usage.skipped_tokens)} more were saved by classifiers that did not have to run.`
          : ""}
      </p>
      <div
        class="pass"
        role="img"
        aria-label={`${count(usage.prompt_tokens)} tokens asked, ${count(usage.computed_tokens)} computed`}
      >
        <div class="pass-row">
          <span>one by one</span>
          <div class="pass-bar">
            {asked <= 64 ? (
              <svg viewBox="0 0 100 10" preserveAspectRatio="none">
                {Array.from({ length: asked }, (_, index) => (
                  <rect
                    key={index}
                    class="pass-asked"
                    x={(index * 100) / asked}
                    y={0}
                    width={Math.max(100 / asked - gap, 0.2)}
                    height={10}
                  />
                ))}
              </svg>
            ) : (
              <div class="pass-fill is-asked" />
            )}
          </div>
          <b>{count(usage.prompt_tokens)}</b>
        </div>
        <div class="pass-row">
          <span>here</span>
          <div class="pass-bar">
            <div class="pass-fill is-computed" style={{ transform: `scaleX(${computed})` }} />
          </div>
          <b>{count(usage.computed_tokens)}</b>
        </div>
      </div>
      <p class="hint">
        {saved > 0.5
          ? `Without sharing, this call would take ${(1 / computed).toFixed(1)} times the tokens.`
          : "Plain LoRA adapters each read the whole conversation with their own weights. Activated LoRA adapters share it: docs/training.md."}{" "}
        Tokens known from earlier turns are kept in blocks of 16.
      </p>
      <Time timings={timings} wallMs={answer.wallMs} />
    </>
  );
}

function Time({
  timings,
  wallMs,
}: {
  timings: { tokenize_ms: number; queue_ms: number; compute_ms: number; total_ms: number };
  wallMs: number;
}) {
  const whole = Math.max(wallMs, timings.total_ms);
  const parts: [string, number, string][] = [
    ["tokenize", timings.tokenize_ms, "time-0"],
    ["wait for a step", timings.queue_ms, "time-1"],
    ["compute", timings.compute_ms, "time-2"],
    ["HTTP and the rest", Math.max(0, whole - timings.tokenize_ms - timings.queue_ms - timings.compute_ms), "time-3"],
  ];
  return (
    <div class="time">
      <div class="time-bar" aria-hidden="true">
        {parts.map(([name, ms, kind]) => (
          <div key={name} class={kind} style={{ width: `${(ms / whole) * 100}%` }} />
        ))}
      </div>
      <dl class="time-legend">
        {parts.map(([name, ms, kind]) => (
          <div key={name}>
            <dt>
              <i class={kind} />
              {name}
            </dt>
            <dd>{milliseconds(ms)}</dd>
          </div>
        ))}
      </dl>
    </div>
  );
}

export function milliseconds(ms: number): string {
  return ms >= 10_000 ? `${(ms / 1000).toFixed(1)} s` : ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

function Month({ computeMs }: { computeMs: number | null }) {
  const [calls, setCalls] = useState(10_000);
  const [price, setPrice] = useState(0.2);
  const busyHours = computeMs === null ? null : (computeMs / 1000 / 3600) * calls * 30;
  const machines = busyHours === null ? null : Math.max(1, Math.ceil(busyHours / (720 * 0.7)));
  return (
    <details class="month">
      <summary>What would a month of this cost?</summary>
      <div class="month-form">
        <label>
          calls a day
          <input
            type="number"
            min={1}
            step={1000}
            value={calls}
            onInput={(event) => setCalls(Math.max(0, event.currentTarget.valueAsNumber || 0))}
          />
        </label>
        <label>
          price of a machine-hour like this one
          <input
            type="number"
            min={0}
            step={0.05}
            value={price}
            onInput={(event) => setPrice(Math.max(0, event.currentTarget.valueAsNumber || 0))}
          />
        </label>
      </div>
      <p>
        {busyHours === null || machines === null
          ? "Judge a conversation first: the estimate uses its time."
          : `This call computed for ${milliseconds(computeMs ?? 0)}. ${count(calls)} such calls a day are ${busyHours.toFixed(1)} machine-hours a month: ${money(busyHours * price)} while it computes, or ${money(machines * 720 * price)} for ${machines === 1 ? "one machine" : `${machines} machines`} that never ${machines === 1 ? "stops" : "stop"}, at most 70 % busy.`}
      </p>
      <p class="hint">
        An estimate from one call, one after the other. `loraplex cost` and `loraplex plan` calculate with measured
        loads and the prices of instances.
      </p>
    </details>
  );
}

function money(amount: number): string {
  return amount.toLocaleString("en-US", { maximumFractionDigits: amount < 100 ? 2 : 0 });
}
