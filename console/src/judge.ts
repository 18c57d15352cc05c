// Judges the conversation and each of its beginnings: one request at a time, the shown one first. A verdict that is known
// is not asked again. What is no longer wanted is cancelled.
import { ApiError, ask, asApiError, type Card, type ClassifyResult, type Question, type Verdict } from "./api";
import { inputOf, prefixKeys, rolesOf, type Turn } from "./turns";
import { Store } from "./store";
import { flipTurn, interest } from "./verdicts";

const WAIT_MS = 350; // after the last key, before the server is asked
const MOST_KEPT = 2000; // answers
export const MOST_AUTOMATIC = 40; // earlier turns that are judged without being asked for
const LONG = 500; // turns of a conversation, each of whose beginnings is large
const MOST_CELLS = 120; // turns of a classifier that are shown at once

export interface Answer {
  result: ClassifyResult;
  byName: Map<string, Verdict>;
  wallMs: number;
}

export type Order = "server" | "interest" | "name" | "probability";

export interface Judged {
  turns: Turn[];
  draft: Turn | null;
  position: number; // of the turn whose verdicts are shown, from 1; 0 follows the last one
  cards: Card[];
  names: string[]; // of the rows, in the order shown
  questions: Record<string, Question>;
  filter: string;
  answers: Map<string, Answer>;
  asking: string | null; // the key of the beginning that is being judged
  error: ApiError | null;
  retryAt: number | null;
  automatic: boolean;
  earlier: number; // how many earlier turns to judge
  corrected: Record<string, string>; // id of a verdict -> its right label
}

export class Judge extends Store<Judged> {
  private timer: number | undefined;
  private abort: AbortController | null = null;
  private conversationId = newId();
  private keysFor: { turns: Turn[]; draft: Turn | null; seed: string; keys: string[] } | null = null;

  constructor() {
    super({
      turns: [],
      draft: null,
      position: 0,
      cards: [],
      names: [],
      questions: {},
      filter: "",
      answers: new Map(),
      asking: null,
      error: null,
      retryAt: null,
      automatic: true,
      earlier: MOST_AUTOMATIC,
      corrected: {},
    });
  }

  // ------------------------------------------------------------------------------------ what is shown

  all(): Turn[] {
    const { turns, draft } = this.state;
    return draft && draft.text.trim() ? [...turns, draft] : turns;
  }

  keys(): string[] {
    const { turns, draft } = this.state;
    const seed = JSON.stringify(this.state.questions);
    const known = this.keysFor;
    if (known && known.turns === turns && known.draft === draft && known.seed === seed) return known.keys;
    const keys = prefixKeys(this.all(), seed);
    this.keysFor = { turns, draft, seed, keys };
    return keys;
  }

  /** The number of the turn whose verdicts are shown; 0 if there is no turn. */
  shown(): number {
    const length = this.all().length;
    return this.state.position === 0 ? length : Math.min(this.state.position, length);
  }

  answerAt(position: number): Answer | undefined {
    return this.state.answers.get(this.keys()[position - 1] ?? "");
  }

  /** The shown turn's answer, or the latest known one before it, so that rows do not empty while a new one is asked. */
  answerShown(): { answer: Answer | undefined; isCurrent: boolean } {
    const now = this.answerAt(this.shown());
    if (now) return { answer: now, isCurrent: true };
    for (let position = this.shown() - 1; position >= 1; position--) {
      const before = this.answerAt(position);
      if (before) return { answer: before, isCurrent: false };
    }
    return { answer: undefined, isCurrent: false };
  }

  /** The answers of the turns around the shown one, and how many turns come before them. */
  window(): { before: number; answers: (Answer | undefined)[] } {
    const before = Math.max(0, this.shown() - MOST_CELLS);
    const keys = this.keys().slice(before, before + MOST_CELLS);
    return { before, answers: keys.map((key) => this.state.answers.get(key)) };
  }

  /** The turn since which a classifier has the answer that it has on the shown turn; null if not known. */
  flip(name: string, { before, answers } = this.window()): number | null {
    const found = flipTurn(
      answers.map((one) => one?.byName.get(name)),
      this.shown() - before,
    );
    return found === null ? null : found + before;
  }

  card(name: string): Card | undefined {
    return this.state.cards.find((one) => one.name === name);
  }

  visibleNames(): string[] {
    const wanted = this.state.filter.trim().toLowerCase();
    if (!wanted) return this.state.names;
    return this.state.names.filter((name) =>
      `${name} ${this.card(name)?.question ?? ""}`.toLowerCase().includes(wanted),
    );
  }

  // ------------------------------------------------------------------------------------ what changes it

  setCards(cards: Card[]): void {
    const known = new Set(this.state.names);
    const names = [...cards.map((one) => one.name), ...Object.keys(this.state.questions)];
    const isSame = names.length === known.size && names.every((one) => known.has(one));
    const versions = new Map(this.state.cards.map((one) => [one.name, one.version]));
    const isReplaced = cards.some(
      (one) => versions.get(one.name) && one.version && versions.get(one.name) !== one.version,
    );
    this.set({ cards, names: isSame ? this.state.names : names });
    if (isReplaced || (!isSame && known.size)) this.forget(); // what other versions answered says nothing any more
  }

  load(turns: Turn[]): void {
    this.conversationId = newId();
    this.set({ turns, draft: null, position: 0, earlier: automaticFor(turns), error: null });
    this.soon();
  }

  edit(turns: Turn[]): void {
    this.set({ turns, position: 0, earlier: automaticFor(turns) });
    this.soon();
  }

  type(draft: Turn | null): void {
    this.set({ draft, position: 0 });
    this.soon();
  }

  addDraft(): void {
    const { turns, draft } = this.state;
    if (!draft || !draft.text.trim()) return;
    const other = draft.speaker === "Agent" ? "Customer" : "Agent";
    this.set({
      turns: [...turns, { ...draft, text: draft.text.trim() }],
      draft: { speaker: other, text: "" },
      position: 0,
    });
    this.soon(0);
  }

  show(position: number): void {
    this.set({ position: position >= this.all().length ? 0 : position });
    this.soon(80);
  }

  setQuestion(name: string, question: Question | null): void {
    const questions = { ...this.state.questions };
    if (question) questions[name] = question;
    else delete questions[name];
    const names = this.state.names.filter((one) => one !== name);
    this.set({ questions, names: question ? [name, ...names] : names, error: null });
    this.soon(0);
  }

  sort(order: Order): void {
    const { cards, questions } = this.state;
    const names = [...Object.keys(questions), ...cards.map((one) => one.name)];
    const position = this.shown();
    const { answer } = this.answerShown();
    const weight = new Map(
      names.map((name) => {
        const verdict = answer?.byName.get(name);
        if (order === "probability") return [name, verdict?.confidence ?? -1];
        if (order === "interest") return [name, interest(verdict, this.card(name), this.flip(name), position)];
        return [name, 0];
      }),
    );
    if (order === "name") names.sort((a, b) => a.localeCompare(b));
    else names.sort((a, b) => weight.get(b)! - weight.get(a)!);
    this.set({ names });
  }

  correct(id: string, label: string): void {
    this.set({ corrected: { ...this.state.corrected, [id]: label } });
  }

  /** Forget what was answered, for example because a version was replaced. */
  forget(): void {
    this.set({ answers: new Map() });
    this.soon(0);
  }

  // ------------------------------------------------------------------------------------ asking

  /** The body of a request for the first `position` turns. */
  body(position: number): Record<string, unknown> {
    const turns = this.all().slice(0, position);
    const body: Record<string, unknown> = {
      input: inputOf(turns),
      classifiers: "*",
      conversation_id: this.conversationId,
    };
    const roles = rolesOf(turns);
    if (roles) body.roles = roles;
    if (Object.keys(this.state.questions).length) body.questions = this.state.questions;
    return body;
  }

  /** Ask soon, if the page asks by itself. */
  soon(afterMs = WAIT_MS): void {
    window.clearTimeout(this.timer);
    if (!this.state.automatic) return;
    this.timer = window.setTimeout(() => this.now(), afterMs);
  }

  /** Ask for what is shown, then for what came before. */
  now(): void {
    window.clearTimeout(this.timer);
    const [wanted] = this.wanted();
    if (this.state.asking !== null) {
      if (wanted && wanted.key !== this.state.asking && (wanted.isShown || !this.keys().includes(this.state.asking)))
        this.abort?.abort();
      else return;
    }
    if (wanted) void this.request(wanted.position, wanted.key);
  }

  private wanted(): { position: number; key: string; isShown: boolean }[] {
    const keys = this.keys();
    if (!keys.length) return [];
    const shown = this.shown();
    const first = Math.max(1, shown - this.state.earlier);
    const positions = [shown, ...Array.from({ length: shown - first }, (_, index) => first + index)];
    return positions
      .filter((position) => !this.state.answers.has(keys[position - 1]))
      .map((position) => ({ position, key: keys[position - 1], isShown: position === shown }));
  }

  private async request(position: number, key: string): Promise<void> {
    const abort = new AbortController();
    this.abort = abort;
    this.set({ asking: key });
    const started = performance.now();
    try {
      const result = await ask<ClassifyResult>("v1/classify", { body: this.body(position), signal: abort.signal });
      this.keep(key, {
        result,
        byName: new Map(result.verdicts.map((one) => [one.classifier, one])),
        wallMs: performance.now() - started,
      });
      this.set({ error: null, retryAt: null });
    } catch (error) {
      if (!abort.signal.aborted) return this.fail(asApiError(error));
    }
    this.abort = null;
    this.set({ asking: null });
    if (this.state.automatic || this.keys().includes(key)) this.now();
  }

  private fail(error: ApiError): void {
    this.abort = null;
    const waitS = error.retryAfterS;
    this.set({ asking: null, error, retryAt: waitS === null ? null : Date.now() + waitS * 1000 });
    if (waitS !== null) this.timer = window.setTimeout(() => this.now(), waitS * 1000);
  }

  private keep(key: string, answer: Answer): void {
    const answers = new Map(this.state.answers);
    answers.set(key, answer);
    for (const oldest of answers.keys()) {
      if (answers.size <= MOST_KEPT) break;
      answers.delete(oldest);
    }
    this.set({ answers });
  }
}

function automaticFor(turns: Turn[]): number {
  return turns.length > LONG ? MOST_AUTOMATIC / 5 : MOST_AUTOMATIC;
}

function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return `console-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
