// All classifiers with their verdicts on the shown turn. Rows keep their place and height while verdicts arrive.
import type { Judge } from "./judge";
import { useStore } from "./store";
import { Bar } from "./Bar";
import { Flips } from "./Flips";
import { Rows } from "./Rows";
import { percent } from "./verdicts";

interface Props {
  judge: Judge;
  selected: string | null;
  onSelect: (name: string) => void;
}

export function VerdictList({ judge, selected, onSelect }: Props) {
  const state = useStore(judge);
  const names = judge.visibleNames();
  const { answer, isCurrent } = judge.answerShown();
  const shown = judge.shown();
  const window = judge.window();
  const firsts = new Set(state.cards.map((one) => (one.labels?.length === 2 ? one.labels[0] : null)));
  const [first] = firsts;
  const hasShortLabels = state.cards.every((one) => one.labels?.every((label) => label.length <= 4));
  const hasQuestions = state.cards.some((one) => one.question) || Object.keys(state.questions).length > 0;
  return (
    <section
      class={`panel verdicts ${hasQuestions ? "" : "is-plain"} ${hasShortLabels ? "has-short-labels" : ""}`}
      aria-labelledby="verdicts-title"
      aria-busy={state.asking !== null}
    >
      <header class="panel-head">
        <h2 id="verdicts-title">
          Answers <span class="count">{names.length}</span>
        </h2>
        <input
          class="filter"
          type="search"
          placeholder="Find a classifier"
          aria-label="Find a classifier"
          value={state.filter}
          onInput={(event) => judge.set({ filter: event.currentTarget.value })}
        />
        <label class="sort">
          <span>Sort by</span>
          <select
            value=""
            onChange={(event) => {
              judge.sort(event.currentTarget.value as Parameters<Judge["sort"]>[0]);
              event.currentTarget.value = "";
            }}
          >
            <option value="" disabled hidden>
              choose…
            </option>
            <option value="interest">what needs a look</option>
            <option value="probability">how sure</option>
            <option value="name">name</option>
            <option value="server">the server's order</option>
          </select>
        </label>
      </header>
      <div class="columns" aria-hidden="true">
        <span>Classifier</span>
        <span>Answer</span>
        <span>{firsts.size === 1 && first ? `How probable “${first}” is` : "How probable"}</span>
        <span>Over the turns</span>
        <span class="is-extra" title="How probable all labels together are. Low: the probabilities say little.">
          Label mass
        </span>
        <span class="is-extra">Version</span>
      </div>
      {names.length === 0 ? (
        <p class="empty">
          {state.cards.length
            ? "No classifier has this in its name or question."
            : "This server has no classifiers yet. Load one under Adapters."}
        </p>
      ) : (
        <Rows
          items={names}
          label="Classifiers and their answers"
          render={(name) => {
            const card = judge.card(name);
            const verdict = answer?.byName.get(name);
            const flip = judge.flip(name, window);
            const question = card?.question ?? state.questions[name]?.instructions ?? "";
            const warned = verdict?.warnings?.length || verdict?.error;
            const corrected = verdict?.id ? state.corrected[verdict.id] : undefined;
            return (
              <li
                key={name}
                class={`row ${selected === name ? "is-selected" : ""} ${verdict && !isCurrent ? "is-old" : ""}`}
                data-classifier={name}
              >
                <button
                  type="button"
                  class="row-button"
                  aria-pressed={selected === name}
                  onClick={() => onSelect(name)}
                >
                  <span class="row-name">
                    <b>{name}</b>
                    {(question || card?.is_route) && <small title={question}>{question || "a route"}</small>}
                  </span>
                  <span class="row-answer">
                    {!verdict ? (
                      <span class="label is-none">
                        <span aria-hidden="true">–</span>
                        <span class="visually-hidden">not judged yet</span>
                      </span>
                    ) : verdict.error ? (
                      <span class="label is-bad" title={verdict.error.message}>
                        error
                      </span>
                    ) : verdict.skipped_by ? (
                      <span class="label is-none" title={`not asked, because of ${verdict.skipped_by}`}>
                        not asked
                      </span>
                    ) : (
                      <span
                        class={`label ${verdict.abstained ? "is-unsure" : ""}`}
                        title={verdict.abstained ? "too unsure to count" : undefined}
                      >
                        {verdict.label}
                      </span>
                    )}
                    {verdict?.abstained && <span class="visually-hidden">too unsure to count</span>}
                    <span class="probability">
                      {verdict?.confidence === undefined ? "" : percent(verdict.confidence)}
                    </span>
                    <span class="marks">
                      {warned ? (
                        <i
                          class="mark is-warning"
                          role="img"
                          aria-label="warning"
                          title={verdict?.error?.message ?? verdict?.warnings?.join("\n")}
                        />
                      ) : null}
                      {corrected !== undefined ? (
                        <i
                          class="mark is-corrected"
                          role="img"
                          aria-label="corrected"
                          title={`right answer: ${corrected}`}
                        />
                      ) : null}
                    </span>
                  </span>
                  <Bar verdict={verdict} card={card} />
                  <Flips
                    history={window.answers.map((one) => one?.byName.get(name))}
                    before={window.before}
                    shown={shown}
                    flip={flip}
                  />
                  <span class="is-extra number">
                    {verdict?.label_mass === undefined ? "" : percent(verdict.label_mass)}
                  </span>
                  <code class="is-extra" title={verdict?.adapter?.version}>
                    {verdict?.adapter?.version.slice(0, 8)}
                  </code>
                </button>
              </li>
            );
          }}
        />
      )}
      <p class="visually-hidden" role="status" aria-live="polite">
        {state.asking !== null ? "" : answer && isCurrent ? `${answer.byName.size} answers after turn ${shown}` : ""}
      </p>
    </section>
  );
}
