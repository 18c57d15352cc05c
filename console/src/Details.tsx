// One classifier's answer in full: probabilities, version, warnings, the right answer, why, and the call as code.
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, ask, asApiError, storedKey, type Accuracy, type Card, type TargetStats, type Verdict } from "./api";
import { Export } from "./Export";
import { codeOf, LANGUAGES, type Language } from "./code";
import type { Judge } from "./judge";
import { Notice } from "./Notice";
import { useStore } from "./store";
import { count, isBinary, percent, spoken, threshold } from "./verdicts";
import { Why } from "./Why";
import type { Moves } from "./leave";

interface Props {
  judge: Judge;
  name: string;
  moves: Moves | null;
  onMoves: (moves: Moves | null) => void;
  onClose: () => void;
}

type Tab = "answer" | "why" | "code";
const TABS: [Tab, string][] = [
  ["answer", "Answer"],
  ["why", "Why"],
  ["code", "Code"],
];

export function Details({ judge, name, moves, onMoves, onClose }: Props) {
  const state = useStore(judge);
  const [tab, setTab] = useState<Tab>("answer");
  const panel = useRef<HTMLElement>(null);
  const card = judge.card(name);
  const verdict = judge.answerShown().answer?.byName.get(name);
  const question = card?.question ?? state.questions[name]?.instructions;

  useEffect(() => panel.current?.querySelector<HTMLElement>("h2")?.focus(), [name]);

  return (
    <aside
      class="details"
      ref={panel}
      aria-labelledby="details-title"
      onKeyDown={(event) => {
        if (event.key === "Escape") onClose();
      }}
    >
      <header class="panel-head">
        <h2 id="details-title" tabIndex={-1}>
          {name}
        </h2>
        <button type="button" class="quiet" onClick={onClose} aria-label="Close the details">
          Close
        </button>
      </header>
      {question && <p class="details-question">{question}</p>}
      <div class="tabs" role="tablist" aria-label="Details">
        {TABS.map(([one, title]) => (
          <button
            key={one}
            type="button"
            role="tab"
            id={`tab-${one}`}
            aria-selected={tab === one}
            aria-controls="tab-panel"
            tabIndex={tab === one ? 0 : -1}
            onClick={() => setTab(one)}
            onKeyDown={(event) => {
              const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
              if (!step) return;
              const next = TABS[(TABS.findIndex(([each]) => each === one) + step + TABS.length) % TABS.length][0];
              setTab(next);
              document.getElementById(`tab-${next}`)?.focus();
            }}
          >
            {title}
          </button>
        ))}
      </div>
      <div id="tab-panel" role="tabpanel" aria-labelledby={`tab-${tab}`} class="tab-panel">
        {!verdict ? (
          <p class="empty">There is no answer yet. Judge a conversation first.</p>
        ) : tab === "answer" ? (
          <Answer judge={judge} name={name} card={card} verdict={verdict} />
        ) : tab === "why" ? (
          <Why judge={judge} name={name} verdict={verdict} moves={moves} onMoves={onMoves} />
        ) : (
          <Code
            judge={judge}
            name={name}
            question={question ?? ""}
            labels={card?.labels ?? Object.keys(verdict.scores ?? {})}
          />
        )}
      </div>
    </aside>
  );
}

function Answer({
  judge,
  name,
  card,
  verdict,
}: {
  judge: Judge;
  name: string;
  card: Card | undefined;
  verdict: Verdict;
}) {
  const shown = judge.shown();
  const flip = judge.flip(name);
  return (
    <>
      {verdict.error && (
        <Notice error={new ApiError(0, verdict.error.code, verdict.error.message, verdict.error.remedy, null)} />
      )}
      {verdict.skipped_by && (
        <p>This classifier was not asked: the answer of {verdict.skipped_by} made it unnecessary.</p>
      )}
      {verdict.scores && (
        <table class="scores">
          <caption class="visually-hidden">{spoken(verdict, card)}</caption>
          <tbody>
            {Object.entries(verdict.scores).map(([label, score], index) => (
              <tr key={label} class={label === verdict.label ? "is-answer" : ""}>
                <th scope="row" title={card?.descriptions?.[label]}>
                  {label}
                </th>
                <td class="score-bar">
                  <div class={`label-${index % 6}`} style={{ width: `${score * 100}%` }} />
                </td>
                <td class="number">{percent(score)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {!verdict.scores && verdict.label !== undefined && (
        <p>
          The likeliest next token is <b>{verdict.label}</b>, with a probability of {percent(verdict.confidence ?? 0)}.
          This adapter has no labels: add a classifier.yaml.
        </p>
      )}
      <dl class="facts">
        {verdict.scores && isBinary(verdict) && (
          <div>
            <dt>“{Object.keys(verdict.scores)[0]}” is answered from</dt>
            <dd>{percent(threshold(card))}</dd>
          </div>
        )}
        {card && card.abstain_below > 0 && (
          <div>
            <dt>Too unsure to count below</dt>
            <dd>
              {percent(card.abstain_below)}
              {verdict.abstained ? " – this answer is" : ""}
            </dd>
          </div>
        )}
        {verdict.value !== undefined && (
          <div>
            <dt>Expected value</dt>
            <dd>{verdict.value.toFixed(3)}</dd>
          </div>
        )}
        {verdict.score !== undefined && (
          <div>
            <dt>Expected level</dt>
            <dd>{verdict.score.toFixed(2)}</dd>
          </div>
        )}
        {verdict.label_mass !== undefined && (
          <div>
            <dt title="How probable all labels together are, among everything the model could write. Low: the probabilities say little.">
              Label mass
            </dt>
            <dd>{percent(verdict.label_mass)}</dd>
          </div>
        )}
        {verdict.label !== undefined && (
          <div>
            <dt>This answer</dt>
            <dd>{flip === null ? `has not changed up to turn ${shown}` : `began at turn ${flip}`}</dd>
          </div>
        )}
        <div>
          <dt>Answered by</dt>
          <dd>
            {verdict.adapter ? (
              <>
                {verdict.adapter.name} <code>{verdict.adapter.version}</code>
              </>
            ) : (
              "the bare base, without an adapter"
            )}
          </dd>
        </div>
      </dl>
      {verdict.warnings?.map((one) => {
        const [code, ...words] = one.split(": ");
        return (
          <p key={one} class="warning">
            <b>{code.replace(/_/g, " ")}</b> {words.join(": ")}
          </p>
        );
      })}
      {verdict.id && verdict.label !== undefined && (
        <Correct
          judge={judge}
          name={name}
          verdict={verdict}
          labels={card?.labels ?? Object.keys(verdict.scores ?? {})}
        />
      )}
    </>
  );
}

let mayReadStats = true; // until the server says that this key may not

function Correct({ judge, name, verdict, labels }: { judge: Judge; name: string; verdict: Verdict; labels: string[] }) {
  const [stats, setStats] = useState<TargetStats[] | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const [isBusy, setBusy] = useState(false);
  const id = verdict.id ?? "";
  const given = judge.state.corrected[id];

  const loadStats = async () => {
    if (!mayReadStats || !verdict.adapter) return; // an own question has no statistics
    try {
      setStats((await ask<{ targets: TargetStats[] }>(`v1/routes/${encodeURIComponent(name)}/stats`)).targets);
    } catch (failure) {
      mayReadStats = asApiError(failure).status !== 403;
      setStats(null);
    }
  };
  useEffect(() => {
    setStats(null);
    void loadStats();
  }, [name]);

  const send = async (label: string) => {
    setBusy(true);
    setError(null);
    try {
      await ask("v1/feedback", { body: { verdict_id: id, label } });
      judge.correct(id, label);
      await loadStats();
    } catch (failure) {
      setError(asApiError(failure));
    }
    setBusy(false);
  };

  return (
    <section class="detail-part">
      <h3>What is the right answer?</h3>
      <div class="actions" role="group" aria-label="The right answer">
        {labels.map((label) => (
          <button
            key={label}
            type="button"
            disabled={isBusy}
            aria-pressed={given === label}
            onClick={() => void send(label)}
          >
            {label}
          </button>
        ))}
      </div>
      <p class="hint" role="status">
        {given === undefined
          ? "The server records it with this answer (POST /v1/feedback), and counts how often each version is right."
          : given === verdict.label
            ? `Recorded: “${given}” is right.`
            : `Recorded: “${given}” would have been right, not “${verdict.label}”.`}
      </p>
      <Notice error={error} />
      {stats?.map(
        (one) =>
          one.accuracy && (
            <AccuracyBar
              key={`${one.target} ${one.version} ${one.role}`}
              title={`${one.target}${one.role === "shadow" ? " (shadow)" : ""}`}
              version={one.version}
              accuracy={one.accuracy}
            />
          ),
      )}
      <Export name={name} />
    </section>
  );
}

export function AccuracyBar({
  title,
  version,
  accuracy,
}: {
  title: string;
  version: string | null;
  accuracy: Accuracy;
}) {
  const { share, low, high, num_labelled } = accuracy;
  return (
    <div class="accuracy">
      <div class="accuracy-head">
        <span>
          {title} <code>{version?.slice(0, 8)}</code>
        </span>
        <b>{percent(share)} right</b>
      </div>
      <div class="accuracy-bar" aria-hidden="true">
        <div class="accuracy-range" style={{ left: `${low * 100}%`, width: `${(high - low) * 100}%` }} />
        <div class="accuracy-point" style={{ left: `${share * 100}%` }} />
      </div>
      <small>
        of {count(num_labelled)} whose right answer is known; with 95 % certainty between {percent(low)} and{" "}
        {percent(high)}
      </small>
    </div>
  );
}

function Code({ judge, name, question, labels }: { judge: Judge; name: string; question: string; labels: string[] }) {
  const [language, setLanguage] = useState<Language>("curl");
  const [said, setSaid] = useState("Copy");
  const code = codeOf(language, {
    body: judge.body(judge.shown()),
    name,
    question,
    labels,
    hasKey: storedKey() !== "",
  });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code);
      setSaid("Copied");
    } catch {
      setSaid("Select and copy by hand");
    }
    window.setTimeout(() => setSaid("Copy"), 1500);
  };
  return (
    <section class="detail-part">
      <div class="detail-row">
        <div class="segmented" role="group" aria-label="Language">
          {LANGUAGES.map((one) => (
            <button key={one} type="button" aria-pressed={language === one} onClick={() => setLanguage(one)}>
              {one}
            </button>
          ))}
        </div>
        <button type="button" class="quiet" onClick={() => void copy()}>
          {said}
        </button>
      </div>
      <p class="hint">The same question about the first {judge.shown()} turns, from a program.</p>
      <pre class="code" tabIndex={0}>
        {code}
      </pre>
    </section>
  );
}
