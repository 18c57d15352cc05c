// The adapters of the server: their state, memory and errors; load, replace, pin and unload.
import { useEffect, useState } from "preact/hooks";
import { ApiError, ask, asApiError, type Adapter } from "./api";
import { Confirm, type Confirmation } from "./Confirm";
import { Notice } from "./Notice";
import { Rows } from "./Rows";
import { count } from "./verdicts";

const POLL_MS = 3000;
const MOST_FAILURES = 5; // that are written out
const STATES: Record<Adapter["state"], string> = {
  registered: "not read yet",
  loading: "loading",
  ready: "ready",
  failed: "failed",
  draining: "unloading",
};

export function Adapters({ onChange }: { onChange: () => void }) {
  const [adapters, setAdapters] = useState<Adapter[] | null>(null);
  const [skipped, setSkipped] = useState<{ path: string; reason?: string }[]>([]);
  const [error, setError] = useState<ApiError | null>(null);
  const [failure, setFailure] = useState<ApiError | null>(null);
  const [said, setSaid] = useState("");
  const [filter, setFilter] = useState("");
  const [confirmation, setConfirmation] = useState<Confirmation | null>(null);

  const refresh = async () => {
    try {
      const listed = await ask<{ adapters: Adapter[]; skipped: { path: string; reason?: string }[] }>("v1/adapters");
      setAdapters(listed.adapters);
      setSkipped(listed.skipped);
      setError(null);
    } catch (found) {
      setError(asApiError(found));
    }
  };
  useEffect(() => {
    void refresh();
    const timer = window.setInterval(() => document.hidden || void refresh(), POLL_MS);
    return () => window.clearInterval(timer);
  }, []);

  const change = async (what: string, path: string, asked: { method: string; body?: unknown }) => {
    setFailure(null);
    setSaid(`${what}…`);
    try {
      await ask(path, asked);
      setSaid(`${what}: done`);
      onChange();
    } catch (found) {
      setSaid("");
      setFailure(asApiError(found));
    }
    await refresh();
  };

  const wanted = filter.trim().toLowerCase();
  const shown = (adapters ?? []).filter((one) => `${one.name} ${one.state} ${one.path}`.toLowerCase().includes(wanted));
  const onDevice = (adapters ?? []).filter((one) => one.on_device);
  const failed = (adapters ?? []).filter((one) => one.error);
  const bytes = onDevice.reduce((sum, one) => sum + (one.num_bytes ?? 0), 0);

  return (
    <main class="page" id="content">
      <Notice error={error} onRetry={() => void refresh()} />
      <LoadForm
        adapters={adapters ?? []}
        onLoad={(name, source, pinned) =>
          void change(`Load ${name}`, `v1/adapters/${encodeURIComponent(name)}`, {
            method: "PUT",
            body: { source, ...(pinned ? { pinned } : {}) },
          })
        }
      />
      <p class="hint" role="status">
        {said}
      </p>
      <Notice error={failure} />
      <section class="panel adapters" aria-labelledby="adapters-title">
        <header class="panel-head">
          <h2 id="adapters-title">
            Adapters <span class="count">{shown.length}</span>
          </h2>
          <input
            class="filter"
            type="search"
            placeholder="Find an adapter"
            aria-label="Find an adapter"
            value={filter}
            onInput={(event) => setFilter(event.currentTarget.value)}
          />
          <span class="hint">
            {onDevice.length} on the device, {megabytes(bytes)}
          </span>
        </header>
        {failed.length > 0 && (
          <div class="failures">
            {failed
              .slice(0, MOST_FAILURES)
              .map(
                (one) =>
                  one.error && (
                    <Notice
                      key={one.name}
                      error={
                        new ApiError(200, one.error.code, `“${one.name}”: ${one.error.message}`, one.error.remedy, null)
                      }
                    />
                  ),
              )}
            {failed.length > MOST_FAILURES && (
              <p class="hint">… and {count(failed.length - MOST_FAILURES)} more: find them with “failed”.</p>
            )}
          </div>
        )}
        {adapters === null && !error ? (
          <p class="empty">Loading…</p>
        ) : shown.length === 0 && adapters !== null ? (
          <p class="empty">
            {adapters.length
              ? "No adapter has this in its name."
              : "There are no adapters. Load one above: its name becomes the classifier’s."}
          </p>
        ) : (
          <Rows
            items={shown}
            label="Adapters"
            render={(one) => (
              <li key={one.name} class="row adapter-row" data-adapter={one.name}>
                <span class="row-name">
                  <b>{one.name}</b>
                  <small title={one.path}>{one.error?.message ?? one.question ?? one.path}</small>
                </span>
                <span class={`state is-${one.state}`} title={one.warnings?.join("\n")}>
                  {STATES[one.state]}
                  {one.warnings?.length ? <i class="mark is-warning" /> : null}
                </span>
                <span class="adapter-facts">
                  {[one.rank !== null ? `rank ${one.rank}` : "", one.num_bytes !== null ? megabytes(one.num_bytes) : ""]
                    .filter(Boolean)
                    .join(" · ")}
                  <small>
                    {one.on_device ? "on the device" : one.state === "ready" ? "in memory or on disk" : ""}
                    {one.pinned ? ", pinned" : ""}
                  </small>
                </span>
                <code class="version" title={one.version ?? ""}>
                  {one.version?.slice(0, 8)}
                </code>
                <span class="actions">
                  <button
                    type="button"
                    class="quiet"
                    onClick={() =>
                      void change(
                        one.pinned ? `Unpin ${one.name}` : `Pin ${one.name}`,
                        `v1/adapters/${encodeURIComponent(one.name)}/pin`,
                        { method: one.pinned ? "DELETE" : "PUT" },
                      )
                    }
                    title={
                      one.pinned
                        ? "It may leave the device again when room is needed."
                        : "It keeps its place on the device."
                    }
                  >
                    {one.pinned ? "Unpin" : "Pin"}
                  </button>
                  <button
                    type="button"
                    class="quiet"
                    onClick={() =>
                      setConfirmation({
                        title: `Unload ${one.name}?`,
                        what: `Requests that are running finish. After that nobody can ask ${one.name} until it is loaded again. Its files stay where they are: ${one.path}`,
                        action: "Unload",
                        run: () =>
                          change(`Unload ${one.name}`, `v1/adapters/${encodeURIComponent(one.name)}`, {
                            method: "DELETE",
                          }),
                      })
                    }
                  >
                    Unload
                  </button>
                </span>
              </li>
            )}
          />
        )}
        {skipped.length > 0 && (
          <details class="skipped">
            <summary>
              {skipped.length === 1
                ? "One folder of the bundle was left out"
                : `${count(skipped.length)} folders of the bundle were left out`}
            </summary>
            <ul>
              {skipped.map((one) => (
                <li key={one.path}>
                  <code>{one.path}</code> {one.reason}
                </li>
              ))}
            </ul>
          </details>
        )}
      </section>
      <Confirm asked={confirmation} onClose={() => setConfirmation(null)} />
    </main>
  );
}

function LoadForm({
  adapters,
  onLoad,
}: {
  adapters: Adapter[];
  onLoad: (name: string, source: string, pinned: boolean) => void;
}) {
  const [name, setName] = useState("");
  const [source, setSource] = useState("");
  const [pinned, setPinned] = useState(false);
  const replaces = adapters.some((one) => one.name === name.trim());
  return (
    <form
      class="panel load"
      onSubmit={(event) => {
        event.preventDefault();
        onLoad(name.trim(), source.trim(), pinned);
      }}
    >
      <h2>Load an adapter, or replace one</h2>
      <div class="load-fields">
        <label>
          Name
          <input required value={name} placeholder="isFraud" onInput={(event) => setName(event.currentTarget.value)} />
        </label>
        <label class="is-wide">
          Source
          <input
            required
            value={source}
            placeholder="a path on the server, hf://org/name@revision or s3://bucket/prefix"
            onInput={(event) => setSource(event.currentTarget.value)}
          />
        </label>
        <label class="is-check">
          <input type="checkbox" checked={pinned} onChange={(event) => setPinned(event.currentTarget.checked)} /> keep
          it on the device
        </label>
        <button type="submit" class="primary" disabled={!name.trim() || !source.trim()}>
          {replaces ? "Replace" : "Load"}
        </button>
      </div>
      <p class="hint">
        {replaces
          ? `${name.trim()} keeps answering with its present version until the new one has passed its checks.`
          : "The server reads and checks it first. It answers when the checks have passed."}
      </p>
    </form>
  );
}

export function megabytes(bytes: number): string {
  return bytes >= 2 ** 30
    ? `${(bytes / 2 ** 30).toFixed(1)} GiB`
    : bytes >= 2 ** 20
      ? `${(bytes / 2 ** 20).toFixed(1)} MiB`
      : `${count(bytes / 1024)} KiB`;
}
