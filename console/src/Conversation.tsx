// The conversation: turns as bubbles, the next turn typed live, or the whole as text.
import { useEffect, useRef, useState } from "preact/hooks";
import { asText, readConversation, SPEAKERS, type Turn } from "./turns";
import { EXAMPLES } from "./examples";
import type { Judge } from "./judge";
import { memo } from "./memo";
import { PRIVATE } from "./private";
import { useStore } from "./store";

const MOST_SHOWN = 150; // turns at once

interface BubbleProps {
  turn: Turn;
  number: number;
  isShown: boolean;
  isAfter: boolean;
  shade: number | null; // -1 to 1: how far the turn moves the selected answer
  onShow: (number: number) => void;
}

const Bubble = memo(({ turn, number, isShown, isAfter, shade, onShow }: BubbleProps) => {
  const side = /^(agent|assistant|bot|system)/i.test(turn.speaker) ? "is-right" : "is-left";
  const moved =
    shade === null || Math.abs(shade) < 0.005
      ? ""
      : `${shade >= 0 ? "+" : "−"}${Math.abs(shade * 100).toFixed(0)} points`;
  return (
    <li class={`turn ${side} ${isShown ? "is-shown" : ""} ${isAfter ? "is-after" : ""}`}>
      <button type="button" class="bubble" aria-pressed={isShown} onClick={() => onShow(number)}>
        {shade !== null && (
          <i
            class={`shade ${shade >= 0 ? "is-for" : "is-against"}`}
            style={{ opacity: Math.min(1, Math.abs(shade) * 1.2 + (Math.abs(shade) > 0.005 ? 0.08 : 0)) }}
          />
        )}
        <span class="bubble-head">
          <span>{turn.speaker || "Text"}</span>
          <span class="bubble-number">
            {moved && <span class="moved">{moved} · </span>}
            {number}
          </span>
        </span>
        <span class="bubble-text">{turn.text}</span>
      </button>
    </li>
  );
});

interface Props {
  judge: Judge;
  shades: Map<number, number> | null;
  keepsInputs: string | undefined;
}

export function Conversation({ judge, shades, keepsInputs }: Props) {
  const state = useStore(judge);
  const [mode, setMode] = useState<"turns" | "text">("turns");
  const [text, setText] = useState("");
  const shown = judge.shown();
  const length = state.turns.length;
  const onShow = useRef((number: number) => judge.show(number)).current;

  const center = Math.min(Math.max(shown, 1), length);
  const first =
    length <= MOST_SHOWN ? 0 : Math.max(0, Math.min(length - MOST_SHOWN, center - 1 - Math.floor(MOST_SHOWN / 2)));
  const last = Math.min(length, first + MOST_SHOWN);

  const openText = () => {
    setText(asText(state.turns));
    setMode("text");
  };
  const closeText = () => setMode("turns");

  return (
    <section class="panel conversation" aria-labelledby="conversation-title">
      <header class="panel-head">
        <h2 id="conversation-title">Conversation</h2>
        <div class="segmented" role="group" aria-label="How to edit">
          <button type="button" aria-pressed={mode === "turns"} onClick={closeText}>
            Turns
          </button>
          <button type="button" aria-pressed={mode === "text"} onClick={openText}>
            Text
          </button>
        </div>
        <label class="sort examples">
          <span class="visually-hidden">Load an example</span>
          <select
            value=""
            onChange={(event) => {
              const found = EXAMPLES[Number(event.currentTarget.value)];
              judge.load(found.turns);
              setText(asText(found.turns));
              event.currentTarget.value = "";
            }}
          >
            <option value="" disabled hidden>
              Examples…
            </option>
            {EXAMPLES.map((one, index) => (
              <option key={one.title} value={index}>
                {one.title}
              </option>
            ))}
          </select>
        </label>
        <button
          type="button"
          class="quiet"
          disabled={!length && !state.draft?.text}
          onClick={() => (judge.load([]), setText(""))}
        >
          Clear
        </button>
      </header>

      {mode === "text" ? (
        <label class="text-editor">
          <span class="hint">
            Paste lines such as “Customer: hello”, JSON with messages, or any text. Answers follow as you type.
          </span>
          <textarea
            autofocus
            {...PRIVATE}
            value={text}
            aria-label="The conversation as text"
            onInput={(event) => {
              setText(event.currentTarget.value);
              judge.edit(readConversation(event.currentTarget.value));
            }}
          />
        </label>
      ) : (
        <>
          {length === 0 && <Empty judge={judge} onPaste={openText} />}
          {first > 0 && (
            <button
              type="button"
              class="more"
              onClick={() => judge.show(Math.max(1, first - Math.floor(MOST_SHOWN / 2)))}
            >
              {first} earlier turns
            </button>
          )}
          <Turns key={first} isLast={last === length} shown={shown}>
            {state.turns.slice(first, last).map((turn, index) => {
              const number = first + index + 1;
              return (
                <Bubble
                  key={number}
                  turn={turn}
                  number={number}
                  isShown={number === shown}
                  isAfter={number > shown}
                  shade={shades?.get(number) ?? null}
                  onShow={onShow}
                />
              );
            })}
          </Turns>
          {last < length && (
            <button
              type="button"
              class="more"
              onClick={() => judge.show(Math.min(length, last + Math.floor(MOST_SHOWN / 2)))}
            >
              {length - last} later turns
            </button>
          )}
          <Composer judge={judge} />
        </>
      )}
      <p class="privacy">
        {keepsInputs
          ? `This server stores the texts that it judges for ${keepsInputs} (--keep-inputs). The page stores none.`
          : "Texts go to this server and nowhere else. The page stores none, and the server’s --keep-inputs is off. Answers count in its statistics like all others."}
      </p>
    </section>
  );
}

function Turns({ children, isLast, shown }: { children: preact.ComponentChildren; isLast: boolean; shown: number }) {
  const list = useRef<HTMLOListElement>(null);
  useEffect(() => {
    const bubble = list.current?.querySelector<HTMLElement>(".is-shown");
    const box = list.current;
    if (!box || !bubble) {
      if (box && isLast) box.scrollTop = box.scrollHeight;
      return;
    }
    const top = bubble.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top + bubble.offsetHeight > box.scrollTop + box.clientHeight) {
      box.scrollTop = top - box.clientHeight + bubble.offsetHeight + 8;
    }
  }, [shown, isLast]);
  return (
    <ol class="turns" ref={list} aria-label="Turns of the conversation" tabIndex={0}>
      {children}
    </ol>
  );
}

function Empty({ judge, onPaste }: { judge: Judge; onPaste: () => void }) {
  return (
    <div class="empty">
      <p>
        <b>Paste a conversation, or type its first turn below.</b> Every classifier of this server answers its own
        question about it, after each turn.
      </p>
      <div class="empty-actions">
        <button type="button" class="primary" onClick={() => judge.load(EXAMPLES[0].turns)}>
          Try an example
        </button>
        <button type="button" onClick={onPaste}>
          Paste text or JSON
        </button>
      </div>
    </div>
  );
}

function Composer({ judge }: { judge: Judge }) {
  const state = useStore(judge);
  const draft = state.draft ?? { speaker: SPEAKERS[state.turns.length % 2], text: "" };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        judge.addDraft();
      }}
    >
      <select
        aria-label="Who speaks next"
        value={draft.speaker}
        onChange={(event) => judge.type({ ...draft, speaker: event.currentTarget.value })}
      >
        {[...new Set([...SPEAKERS, ...state.turns.slice(-50).map((one) => one.speaker), draft.speaker])]
          .filter(Boolean)
          .map((one) => (
            <option key={one}>{one}</option>
          ))}
      </select>
      <textarea
        rows={2}
        {...PRIVATE}
        placeholder="Type the next turn. Answers follow as you type."
        aria-label="The next turn"
        value={draft.text}
        onInput={(event) => judge.type({ ...draft, text: event.currentTarget.value })}
        onPaste={(event) => {
          const pasted = event.clipboardData?.getData("text") ?? "";
          const turns = readConversation(pasted);
          if (turns.length > 1 && !draft.text) {
            event.preventDefault();
            judge.load([...state.turns, ...turns]);
          }
        }}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            judge.addDraft();
          }
        }}
      />
      <button type="submit" disabled={!draft.text.trim()}>
        Add
      </button>
    </form>
  );
}
