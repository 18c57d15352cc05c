// Asks the server. The key is kept in this tab's session storage, and nothing else is kept anywhere.

export interface Verdict {
  id?: string;
  classifier: string;
  label?: string;
  confidence?: number;
  scores?: Record<string, number>;
  value?: number;
  score?: number;
  label_mass?: number;
  abstained: boolean;
  adapter?: { name: string; version: string };
  warnings?: string[];
  error?: ErrorInfo;
  skipped_by?: string;
}

export interface ErrorInfo {
  code: string;
  message: string;
  remedy: string;
}

export interface Usage {
  prompt_tokens: number;
  computed_tokens: number;
  cached_tokens: number;
  skipped_tokens?: number;
}

export interface Timings {
  tokenize_ms: number;
  queue_ms: number;
  compute_ms: number;
  total_ms: number;
}

export interface ClassifyResult {
  id: string;
  verdicts: Verdict[];
  usage: Usage;
  timings: Timings;
}

export interface BatchResult {
  results: (ClassifyResult | { error: ErrorInfo })[];
  usage: Usage;
  timings: Timings;
}

/** What a classifier asks, and from which probability on it answers what. */
export interface Card {
  name: string;
  is_route: boolean;
  version: string | null;
  question: string | null;
  type: "predicate" | "choice" | "score" | null;
  labels: string[] | null;
  descriptions: Record<string, string> | null;
  threshold: number | null;
  abstain_below: number;
  min_label_mass: number;
  max_length: number | null;
  roles: Record<string, string | null> | null;
}

export interface Question {
  type: "predicate" | "choice";
  instructions: string;
  labels?: string[];
}

export interface Adapter {
  name: string;
  state: "registered" | "loading" | "ready" | "failed" | "draining";
  version: string | null;
  rank: number | null;
  num_bytes: number | null;
  labels: string[] | null;
  question: string | null;
  path: string;
  pinned: boolean;
  on_device: boolean;
  error: ErrorInfo | null;
  warnings: string[] | null;
}

export interface Route {
  name: string;
  targets: Record<string, number>;
  shadows: string[];
  revision: number;
}

export interface Accuracy {
  num_labelled: number;
  share: number;
  low: number;
  high: number;
}

export interface TargetStats {
  target: string;
  version: string | null;
  role: "primary" | "shadow";
  num_verdicts: number;
  num_errors: number;
  label_shares: Record<string, number>;
  latency_ms: { mean: number; p50: number; p99: number } | null;
  agreement: { num_compared: number; share: number } | null;
  accuracy: Accuracy | null;
}

export interface Readiness {
  status: string;
  num_failed: number;
  keeps_inputs?: string;
}

/** An answer that is no success, or no answer at all (status 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly remedy: string,
    readonly retryAfterS: number | null,
  ) {
    super(message);
  }

  get isOverload(): boolean {
    return this.status === 429 || this.status === 503;
  }
}

const KEY = "loraplex.key";
const ROOT = new URL(".", location.href);

export function storedKey(): string {
  return sessionStorage.getItem(KEY) ?? "";
}

export function storeKey(key: string): void {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function urlOf(path: string): string {
  return new URL(path.replace(/^\//, ""), ROOT).href;
}

interface Asked {
  method?: string;
  body?: unknown;
  signal?: AbortSignal;
}

async function answerOf(path: string, { method, body, signal }: Asked): Promise<Response> {
  const headers: Record<string, string> = {};
  const key = storedKey();
  if (key) headers["X-API-Key"] = key;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(urlOf(path), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(
      0,
      "unreachable",
      "The server does not answer.",
      "Is it still running? This page tries again.",
      2,
    );
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response: Response): Promise<ApiError> {
  const retry = Number(response.headers.get("Retry-After"));
  let info: ErrorInfo = {
    code: `http_${response.status}`,
    message: `The server answered ${response.status}.`,
    remedy: "Something between this page and the server may have answered in its place.",
  };
  try {
    info = ((await response.json()) as { error: ErrorInfo }).error ?? info;
  } catch {
    // not the server's own JSON: keep what is said above
  }
  return new ApiError(response.status, info.code, info.message, info.remedy, retry > 0 ? retry : null);
}

export async function ask<T>(path: string, asked: Asked = {}): Promise<T> {
  return (await (await answerOf(path, asked)).json()) as T;
}

export async function askText(path: string, asked: Asked = {}): Promise<string> {
  return await (await answerOf(path, asked)).text();
}

export function asApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error;
  return new ApiError(0, "page_error", String(error), "Reload the page.", null);
}
