// What went wrong, in words, and what to do.
import { useEffect, useState } from "preact/hooks";
import type { ApiError } from "./api";

const TITLES: Record<string, string> = {
  unauthorized: "This server asks for a key",
  forbidden: "This key may not do that",
  not_ready: "The server is not ready yet",
  queue_full: "The server is busy",
  key_busy: "This key has too many requests running",
  too_many_connections: "The server has too many connections",
  unreachable: "The server does not answer",
  body_too_large: "The conversation is too large",
  input_too_long: "The conversation is too long",
  adapter_error: "The adapter cannot be used",
  contract_error: "The adapter’s classifier.yaml cannot be used",
};

export function Notice({
  error,
  retryAt,
  onRetry,
}: {
  error: ApiError | null;
  retryAt?: number | null;
  onRetry?: () => void;
}) {
  const left = useSeconds(retryAt ?? null);
  if (!error) return null;
  return (
    <div class={`notice ${error.isOverload || error.status === 0 ? "is-waiting" : "is-bad"}`} role="alert">
      <div>
        <b>{TITLES[error.code] ?? "That did not work"}</b>
        <p>
          {sentence(error.message)} {sentence(error.remedy)}
        </p>
        <small>
          {error.code}
          {error.status >= 400 ? ` · HTTP ${error.status}` : ""}
        </small>
      </div>
      {onRetry && (
        <button type="button" onClick={onRetry}>
          {left > 0 ? `Trying again in ${left} s` : "Try again"}
        </button>
      )}
    </div>
  );
}

function sentence(text: string): string {
  const trimmed = text.trim();
  return trimmed ? `${trimmed[0].toUpperCase()}${trimmed.slice(1)}${/[.!?]$/.test(trimmed) ? "" : "."}` : "";
}

function useSeconds(until: number | null): number {
  const [, tick] = useState(0);
  useEffect(() => {
    if (until === null) return undefined;
    const timer = window.setInterval(() => tick((count) => count + 1), 500);
    return () => window.clearInterval(timer);
  }, [until]);
  return until === null ? 0 : Math.max(0, Math.ceil((until - Date.now()) / 1000));
}
