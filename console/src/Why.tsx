// Why a classifier answered what it did: the exact prompt with its tokens, and which turns move the answer.
import { useEffect, useState } from "preact/hooks";
import { ApiError, ask, asApiError, type Verdict } from "./api";
import { asMessages, rolesOf } from "./turns";
import type { Judge } from "./judge";
import { Notice } from "./Notice";
import { count, isBinary, percent } from "./verdicts";
import { leaveOneOut, MOST_LEFT_OUT, type Moves } from "./leave";

interface Props {
  judge: Judge;
  name: string;
  verdict: Verdict;
  moves: Moves | null;
  onMoves: (moves: Moves | null) => void;
}

export function Why(props: Props) {
  return (
    <>
      <Turns {...props} />
      <Prompt {...props} />
    </>
  );
}

function Turns({ judge, name, verdict, moves, onMoves }: Props) {
  const [progress, setProgress] = useState("");
  const [error, setError] = useState<ApiError | null>(null);
  const [abort, setAbort] = useState<AbortController | null>(null);
  useEffect(() => () => abort?.abort(), [abort]);
  const turns = judge.all().slice(0, judge.shown());
  const label = verdict.scores ? (isBinary(verdict) ? Object.keys(verdict.scores)[0] : verdict.label) : undefined;

  const start = async () => {
    if (label === undefined || !verdict.scores) return;
    const next = new AbortController();
    setAbort(next);
    setError(null);
    setProgress("asking…");
    try {
      await leaveOneOut(name, turns, label, verdict.scores[label], next.signal, (found, done, total) => {
        onMoves(found);
        setProgress(`${done} of ${total} turns`);
      });
      setProgress("");
    } catch (failure) {
      if (!next.signal.aborted) setError(asApiError(failure));
      setProgress("");
    }
  };

  const strongest = moves ? [...moves.byTurn].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 5) : [];
  return (
    <section class="detail-part">
      <h3>Which turns move this answer?</h3>
      <p class="hint">
        The conversation is judged again without each turn
        {turns.length > MOST_LEFT_OUT ? `, for the last ${MOST_LEFT_OUT}` : ""}. The difference is shown on its bubble.
      </p>
      <div class="actions">
        <button
          type="button"
          disabled={label === undefined || turns.length < 2 || progress !== ""}
          onClick={() => void start()}
        >
          {progress || "Find out"}
        </button>
        {moves && (
          <button type="button" class="quiet" onClick={() => onMoves(null)}>
            Remove the shading
          </button>
        )}
      </div>
      {turns.length < 2 && <p class="hint">This needs two turns or more.</p>}
      <Notice error={error} onRetry={() => void start()} />
      {moves && (
        <ol class="movers" aria-label="The turns that move the answer most">
          {strongest.map(([turn, move]) => (
            <li key={turn}>
              <button
                type="button"
                class="mover"
                onClick={() => judge.show(judge.shown())}
                title={turns[turn - 1]?.text}
              >
                <span class={`moved ${Math.abs(move) < 0.0005 ? "" : move >= 0 ? "is-for" : "is-against"}`}>
                  {Math.abs(move) < 0.0005 ? "0.0" : `${move >= 0 ? "+" : "−"}${Math.abs(move * 100).toFixed(1)}`}
                </span>
                <span class="mover-text">
                  {turn}. {turns[turn - 1]?.speaker}: {turns[turn - 1]?.text}
                </span>
              </button>
            </li>
          ))}
        </ol>
      )}
      {moves && (
        <p class="hint">
          In points of the probability of “{moves.label}”, which is {percent(moves.before)}. A turn with + speaks for
          it.
        </p>
      )}
    </section>
  );
}

interface Tokens {
  count: number;
  max_model_len: number;
  tokens: number[];
  token_strs: string[] | null;
}

const MOST_TOKENS = 600;

function Prompt({ judge, name, verdict }: Props) {
  const [found, setFound] = useState<{ tokens: Tokens; text: string } | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const [asTokens, setAsTokens] = useState(false);
  const shown = judge.shown();
  const key = judge.keys()[shown - 1];
  const isQuestion = !verdict.adapter;
  const isText = judge.all()[0]?.speaker === "" && shown === 1;

  useEffect(() => {
    setFound(null);
    setError(null);
    if (isQuestion || isText || !key) return undefined;
    const abort = new AbortController();
    const turns = judge.all().slice(0, shown);
    const load = async () => {
      const body = {
        model: verdict.adapter?.name ?? name,
        messages: asMessages(turns),
        roles: rolesOf(turns),
        return_token_strs: true,
      };
      const tokens = await ask<Tokens>("tokenize", { body, signal: abort.signal });
      const { prompt } = await ask<{ prompt: string }>("detokenize", {
        body: { model: body.model, tokens: tokens.tokens },
        signal: abort.signal,
      });
      setFound({ tokens, text: prompt });
    };
    load().catch((failure) => abort.signal.aborted || setError(asApiError(failure)));
    return () => abort.abort();
  }, [key, name, verdict.adapter?.version]);

  if (isText)
    return (
      <p class="hint">
        The prompt is shown for conversations with speakers. A text without them stands in it as it is.
      </p>
    );
  if (isQuestion) return <p class="hint">The bare base answered this question; its prompt is not shown here.</p>;
  return (
    <section class="detail-part">
      <div class="detail-row">
        <h3>The prompt</h3>
        {found && (
          <div class="segmented" role="group" aria-label="Show the prompt as">
            <button type="button" aria-pressed={!asTokens} onClick={() => setAsTokens(false)}>
              text
            </button>
            <button type="button" aria-pressed={asTokens} onClick={() => setAsTokens(true)}>
              tokens
            </button>
          </div>
        )}
      </div>
      <Notice error={error} />
      {!found && !error && <p class="hint">Loading…</p>}
      {found && (
        <>
          <p class="hint">
            {count(found.tokens.count)} tokens, as the model reads them
            {verdict.adapter ? ` for ${verdict.adapter.name}` : ""}; it takes {count(found.tokens.max_model_len)} at
            most.
            {found.tokens.count > MOST_TOKENS && asTokens ? ` The last ${MOST_TOKENS} are shown.` : ""}
          </p>
          {asTokens ? (
            <div class="tokens" tabIndex={0} role="region" aria-label="Tokens">
              {found.tokens.tokens.slice(-MOST_TOKENS).map((id, index, all) => (
                <span key={index} class="token" title={`token ${id}`}>
                  {readable(found.tokens.token_strs?.[found.tokens.tokens.length - all.length + index] ?? String(id))}
                </span>
              ))}
            </div>
          ) : (
            <pre class="code" tabIndex={0}>
              {found.text}
            </pre>
          )}
        </>
      )}
    </section>
  );
}

/** Vocabularies write a space as Ġ or ▁, and a line end as Ċ. */
function readable(piece: string): string {
  return piece.replace(/[Ġ▁]/g, "·").replace(/Ċ/g, "↵") || "∅";
}
