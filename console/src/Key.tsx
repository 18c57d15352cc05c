// Asks for the API key. It stays in this tab: closing the tab forgets it.
import { useState } from "preact/hooks";
import type { Session } from "./session";
import { useStore } from "./store";

export function Key({ session }: { session: Session }) {
  const { wrongKey } = useStore(session);
  const [key, setKey] = useState("");
  const [isBusy, setBusy] = useState(false);
  return (
    <main class="key" id="content">
      <form
        class="panel"
        onSubmit={(event) => {
          event.preventDefault();
          setBusy(true);
          void session.unlock(key).finally(() => setBusy(false));
        }}
      >
        <h2>This server asks for a key</h2>
        <p>
          A key of the scope <b>infer</b> can judge and correct. A key of the scope <b>admin</b> also sees adapters and
          changes them. <code>loraplex keys new</code> makes one.
        </p>
        <label>
          API key
          <input
            type="password"
            autocomplete="off"
            autofocus
            required
            value={key}
            aria-invalid={wrongKey}
            aria-describedby="key-said"
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        <p id="key-said" class={wrongKey ? "is-bad" : "hint"} role={wrongKey ? "alert" : undefined}>
          {wrongKey
            ? "The server does not know this key. Check it, or ask whoever runs the server."
            : "The key stays in this tab and is sent to this server only. Closing the tab forgets it."}
        </p>
        <button type="submit" class="primary" disabled={isBusy || !key.trim()}>
          Open the console
        </button>
      </form>
    </main>
  );
}
