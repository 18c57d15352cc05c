// The slider over the turns.
import type { Judge } from "./judge";
import { MOST_AUTOMATIC } from "./judge";
import { useStore } from "./store";
import { asText } from "./turns";
import { count } from "./verdicts";
import { milliseconds } from "./Work";

export function Timeline({ judge }: { judge: Judge }) {
  const state = useStore(judge);
  const turns = judge.all();
  const shown = judge.shown();
  const turn = turns[shown - 1];
  const isEmpty = turns.length === 0;
  const { answer, isCurrent } = judge.answerShown();
  const unknown = judge
    .keys()
    .slice(0, shown)
    .filter((key) => !state.answers.has(key)).length;
  return (
    <section class="timeline" aria-label="Turns">
      <label class="timeline-head">
        <span class="timeline-where">
          {isEmpty ? "No turns yet" : `After turn ${shown} of ${turns.length}`}
          {!isEmpty && turn === state.draft ? " (being typed)" : ""}
        </span>
        <span class="timeline-text">{turn ? asText([turn]) : ""}</span>
        <input
          type="range"
          min={1}
          max={Math.max(turns.length, 1)}
          value={Math.max(shown, 1)}
          disabled={turns.length < 2}
          aria-valuetext={turn ? `turn ${shown}, ${turn.speaker || "text"}` : "no turns"}
          onInput={(event) => judge.show(event.currentTarget.valueAsNumber)}
        />
      </label>
      <div class="timeline-foot">
        <span>
          {isEmpty
            ? "Move through the conversation: each turn has its own answers."
            : state.asking !== null
              ? `Judging… ${unknown} of ${shown} turns left`
              : unknown
                ? `${unknown} of ${shown} turns are not judged yet`
                : "Judged after every turn"}
        </span>
        {answer && isCurrent && (
          <span class="timeline-work">
            {count(answer.result.usage.computed_tokens)} of {count(answer.result.usage.prompt_tokens)} tokens computed,{" "}
            {milliseconds(answer.wallMs)}
          </span>
        )}
        {!isEmpty && state.asking === null && unknown > 0 && (
          <button
            type="button"
            class="quiet"
            onClick={() => {
              judge.set({ earlier: state.earlier + MOST_AUTOMATIC });
              judge.now();
            }}
          >
            Judge {Math.min(unknown, MOST_AUTOMATIC)} more
          </button>
        )}
      </div>
    </section>
  );
}
