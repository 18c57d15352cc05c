// The page: its head, its four views, and what is shown before the server is ready or a key is given.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Adapters } from "./Adapters";
import { Compare } from "./Compare";
import { Conversation } from "./Conversation";
import { Details } from "./Details";
import { Judge } from "./judge";
import { Key } from "./Key";
import { Notice } from "./Notice";
import { Questions } from "./Questions";
import { Session, type Theme } from "./session";
import { useStore } from "./store";
import { Timeline } from "./Timeline";
import { Traffic } from "./Traffic";
import { VerdictList } from "./VerdictList";
import { Work } from "./Work";
import type { Moves } from "./leave";

const VIEWS = ["Judge", "Compare", "Adapters", "Traffic"] as const;
type View = (typeof VIEWS)[number];

const judge = new Judge();
const session = new Session((cards) => judge.setCards(cards));

function Page() {
  const { phase, error, retryAt, hasKey, theme, numFailed } = useStore(session);
  const [view, setView] = useState<View>(
    () => VIEWS.find((one) => `#${one.toLowerCase()}` === location.hash) ?? "Judge",
  );
  useEffect(() => {
    const follow = () => setView(VIEWS.find((one) => `#${one.toLowerCase()}` === location.hash) ?? "Judge");
    window.addEventListener("hashchange", follow);
    return () => window.removeEventListener("hashchange", follow);
  }, []);

  return (
    <>
      <a class="skip" href="#content">
        Skip to the content
      </a>
      <header class="head">
        <h1>
          <svg viewBox="0 0 16 16" aria-hidden="true">
            <path class="logo-base" d="M1 2h14v3H1z" />
            <path class="logo-leaf" d="M1 7h2v7H1zm4 0h2v5H5zm4 0h2v7H9zm4 0h2v4h-2z" />
          </svg>
          Loraplex
        </h1>
        {phase !== "locked" && (
          <nav aria-label="Views">
            {VIEWS.map((one) => (
              <a key={one} href={`#${one.toLowerCase()}`} aria-current={view === one ? "page" : undefined}>
                {one}
              </a>
            ))}
          </nav>
        )}
        <div class="head-end">
          <span class={`status is-${phase}`}>
            <i aria-hidden="true" />
            <span>
              {phase === "ready"
                ? numFailed
                  ? `ready, ${numFailed === 1 ? "1 adapter" : `${numFailed} adapters`} failed`
                  : "ready"
                : phase === "locked"
                  ? "locked"
                  : phase === "starting"
                    ? "connecting"
                    : "waiting"}
            </span>
          </span>
          {hasKey && phase !== "locked" && (
            <button type="button" class="quiet" onClick={() => session.forgetKey()}>
              Forget the key
            </button>
          )}
          <label class="theme">
            <span class="visually-hidden">Colours</span>
            <select value={theme} onChange={(event) => session.setTheme(event.currentTarget.value as Theme)}>
              <option value="auto">auto</option>
              <option value="light">light</option>
              <option value="dark">dark</option>
            </select>
          </label>
        </div>
      </header>
      {phase === "locked" ? (
        <Key session={session} />
      ) : (
        <>
          {phase === "waiting" && <Notice error={error} retryAt={retryAt} onRetry={() => void session.refresh()} />}
          {view === "Judge" && <JudgeView />}
          {view === "Compare" && <CompareView />}
          {view === "Adapters" && <Adapters onChange={changed} />}
          {view === "Traffic" && <Traffic />}
        </>
      )}
    </>
  );
}

/** A version was replaced: what it answered before is asked again. */
function changed() {
  judge.forget();
  void session.refresh();
}

function CompareView() {
  const { cards } = useStore(judge);
  return <Compare cards={cards} onChange={changed} />;
}

function JudgeView() {
  const state = useStore(judge);
  const { keepsInputs, isOffered } = useStore(session);
  const [selected, setSelected] = useState<string | null>(null);
  const [moves, setMoves] = useState<Moves | null>(null);
  const key = judge.keys()[judge.shown() - 1];

  useEffect(() => setMoves(null), [selected, key]);
  useEffect(() => {
    if (state.error?.status === 401) session.lock();
  }, [state.error]);
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        judge.now();
      }
    };
    window.addEventListener("keydown", onKey);
    return () => window.removeEventListener("keydown", onKey);
  }, []);

  const close = () => {
    const row = document.querySelector<HTMLElement>(`[data-classifier="${CSS.escape(selected ?? "")}"] button`);
    setSelected(null);
    row?.focus();
  };
  return (
    <main id="content" class={`judge ${selected ? "has-details" : ""}`}>
      <div class="left">
        <Conversation judge={judge} shades={moves?.byTurn ?? null} keepsInputs={keepsInputs} />
        <Questions judge={judge} isOffered={isOffered} />
      </div>
      <div class="right">
        <div class="panel control">
          <div class="control-row">
            <button type="button" class="primary" disabled={!judge.all().length} onClick={() => judge.now()}>
              Judge <kbd>Ctrl ↵</kbd>
            </button>
            <label class="is-check">
              <input
                type="checkbox"
                checked={state.automatic}
                onChange={(event) => {
                  judge.set({ automatic: event.currentTarget.checked });
                  judge.soon();
                }}
              />{" "}
              as I type
            </label>
          </div>
          <Timeline judge={judge} />
        </div>
        <Notice error={state.error} retryAt={state.retryAt} onRetry={() => judge.now()} />
        <VerdictList
          judge={judge}
          selected={selected}
          onSelect={(name) => setSelected(name === selected ? null : name)}
        />
        <Work judge={judge} />
      </div>
      {selected && (
        <Details key={selected} judge={judge} name={selected} moves={moves} onMoves={setMoves} onClose={close} />
      )}
    </main>
  );
}

const page = document.getElementById("page");
if (page) {
  page.textContent = "";
  render(<Page />, page);
  void session.refresh();
}
