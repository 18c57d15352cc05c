// What the whole page knows: whether the server is ready, whether a key is wanted, and the theme.
import { ApiError, ask, asApiError, storedKey, storeKey, type Card, type Readiness } from "./api";
import { Store } from "./store";

export type Theme = "auto" | "light" | "dark";

interface State {
  phase: "starting" | "ready" | "waiting" | "locked";
  error: ApiError | null;
  retryAt: number | null;
  keepsInputs: string | undefined;
  numFailed: number;
  isOffered: boolean; // questions in one's own words
  wrongKey: boolean;
  hasKey: boolean;
  theme: Theme;
}

const POLL_MS = 10_000;

export class Session extends Store<State> {
  private timer: number | undefined;

  constructor(private onCards: (cards: Card[]) => void) {
    super({
      phase: "starting",
      error: null,
      retryAt: null,
      keepsInputs: undefined,
      numFailed: 0,
      isOffered: false,
      wrongKey: false,
      hasKey: storedKey() !== "",
      theme: "auto",
    });
  }

  /** Ask whether the server is ready and what it can be asked, now and from time to time. */
  async refresh(): Promise<void> {
    window.clearTimeout(this.timer);
    let waitMs = POLL_MS;
    try {
      const ready = await ask<Readiness>("ready");
      const listed = await ask<{ classifiers: Card[]; answers_questions: boolean }>("v1/classifiers");
      this.onCards(listed.classifiers);
      this.set({
        phase: "ready",
        error: null,
        retryAt: null,
        keepsInputs: ready.keeps_inputs,
        numFailed: ready.num_failed,
        isOffered: listed.answers_questions,
        wrongKey: false,
      });
    } catch (failure) {
      const error = asApiError(failure);
      if (error.status === 401) this.lock();
      else {
        waitMs = (error.retryAfterS ?? 5) * 1000;
        this.set({ phase: "waiting", error, retryAt: Date.now() + waitMs });
      }
    }
    if (this.state.phase !== "locked") this.timer = window.setTimeout(() => this.refreshIfSeen(), waitMs);
  }

  /** A tab in the background asks nothing until somebody looks at it again. */
  private refreshIfSeen(): void {
    if (!document.hidden) void this.refresh();
    else document.addEventListener("visibilitychange", () => void this.refresh(), { once: true });
  }

  lock(): void {
    this.set({ phase: "locked", wrongKey: storedKey() !== "", error: null });
  }

  async unlock(key: string): Promise<void> {
    storeKey(key.trim());
    this.set({ hasKey: storedKey() !== "" });
    await this.refresh();
  }

  forgetKey(): void {
    storeKey("");
    this.set({ hasKey: false });
    void this.refresh();
  }

  setTheme(theme: Theme): void {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    this.set({ theme });
  }
}
