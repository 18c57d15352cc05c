// Questions that no adapter was trained for, asked in words beside the classifiers.
import { useState } from "preact/hooks";
import type { Judge } from "./judge";
import { PRIVATE } from "./private";
import { useStore } from "./store";

export function Questions({ judge, isOffered }: { judge: Judge; isOffered: boolean }) {
  const { questions } = useStore(judge);
  const [words, setWords] = useState("");
  const [labels, setLabels] = useState("");
  const asked = Object.entries(questions);

  const add = () => {
    const instructions = words.trim();
    if (!instructions) return;
    const options = [
      ...new Set(
        labels
          .split(",")
          .map((one) => one.trim())
          .filter(Boolean),
      ),
    ];
    const name = nameOf(instructions, new Set([...judge.state.names, ...Object.keys(questions)]));
    judge.setQuestion(
      name,
      options.length > 1 ? { type: "choice", instructions, labels: options } : { type: "predicate", instructions },
    );
    setWords("");
    setLabels("");
  };

  return (
    <details class="panel questions" open={asked.length > 0}>
      <summary>
        <h2>Ask in your own words</h2>
      </summary>
      {isOffered ? (
        <form
          class="question-form"
          onSubmit={(event) => {
            event.preventDefault();
            add();
          }}
        >
          <input
            {...PRIVATE}
            aria-label="Your question"
            placeholder="Is the customer polite?"
            value={words}
            onInput={(event) => setWords(event.currentTarget.value)}
          />
          <input
            aria-label="Possible answers"
            placeholder="yes, no"
            value={labels}
            onInput={(event) => setLabels(event.currentTarget.value)}
          />
          <button type="submit" disabled={!words.trim()}>
            Ask
          </button>
          <p class="hint">The base answers without training for it: a first impression, not a measured classifier.</p>
        </form>
      ) : (
        <p class="hint">
          This server answers only what its classifiers were trained for. Start it with <code>--adhoc-questions</code>{" "}
          to ask anything.
        </p>
      )}
      <ul class="asked">
        {asked.map(([name, question]) => (
          <li key={name}>
            <span>
              <b>{name}</b> {question.instructions}
            </span>
            <button
              type="button"
              class="quiet"
              onClick={() => judge.setQuestion(name, null)}
              aria-label={`Remove the question ${name}`}
            >
              Remove
            </button>
          </li>
        ))}
      </ul>
    </details>
  );
}

/** A short name for a question, such as isTheCustomerPolite. */
function nameOf(words: string, taken: Set<string>): string {
  const parts = words
    .toLowerCase()
    .match(/[a-z0-9]+/g)
    ?.slice(0, 5) ?? ["question"];
  const base = parts.map((part, index) => (index ? part[0].toUpperCase() + part.slice(1) : part)).join("");
  let name = base;
  for (let number = 2; taken.has(name); number++) name = `${base}${number}`;
  return name;
}
