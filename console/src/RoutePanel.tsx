// A route: who answers with which weight, how each version does, and the changes, each confirmed.
import { useState } from "preact/hooks";
import { ApiError, ask, asApiError, type Route, type TargetStats } from "./api";
import { Confirm, type Confirmation } from "./Confirm";
import { AccuracyBar } from "./Details";
import { Notice } from "./Notice";
import { count, percent } from "./verdicts";
import { milliseconds } from "./Work";

interface Props {
  route: Route;
  stats: TargetStats[];
  names: string[];
  onCompare: (first: string, second: string) => void;
  onChange: () => void;
}

export function RoutePanel({ route, stats, names, onCompare, onChange }: Props) {
  const [weights, setWeights] = useState<Record<string, number> | null>(null);
  const [added, setAdded] = useState("");
  const [confirmation, setConfirmation] = useState<Confirmation | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const [said, setSaid] = useState("");
  const shown = weights ?? route.targets;
  const total = Object.values(shown).reduce((sum, one) => sum + one, 0) || 1;
  const path = `v1/routes/${encodeURIComponent(route.name)}`;

  const change = async (what: string, asked: { method: string; body?: unknown }, at = path) => {
    setError(null);
    try {
      await ask(at, asked);
      setSaid(what);
      setWeights(null);
      onChange();
    } catch (failure) {
      setError(asApiError(failure));
    }
  };
  const words = (targets: Record<string, number>) => {
    const sum = Object.values(targets).reduce((total, one) => total + one, 0) || 1;
    return Object.entries(targets)
      .map(([name, weight]) => `${name} ${percent(weight / sum)}`)
      .join(", ");
  };
  const promote = (name: string) =>
    setConfirmation({
      title: `Let ${name} answer everything?`,
      what: `From now on every request for ${route.name} is answered by ${name}. Now it is ${words(route.targets)}. Running requests finish as they began, shadows stay, and “Roll back” undoes it.`,
      action: "Promote",
      run: () =>
        change(`${name} now answers for ${route.name}.`, {
          method: "PUT",
          body: { targets: { [name]: 1 }, shadows: route.shadows.filter((one) => one !== name) },
        }),
    });

  const [heaviest] = Object.entries(route.targets).sort((a, b) => b[1] - a[1])[0];
  const rows = [
    ...Object.keys(shown).map((name) => ({ name, isShadow: false })),
    ...route.shadows.map((name) => ({ name, isShadow: true })),
  ];
  return (
    <section class="panel route" aria-label={`Route ${route.name}`}>
      <header class="panel-head">
        <h2>
          {route.name} <span class="count">route, revision {route.revision}</span>
        </h2>
        <button
          type="button"
          class="quiet"
          onClick={() =>
            setConfirmation({
              title: `Roll back ${route.name}?`,
              what: `The route becomes what it was before its last change. Now it is ${words(route.targets)}${route.shadows.length ? `, shadows: ${route.shadows.join(", ")}` : ""}.`,
              action: "Roll back",
              run: () => change(`${route.name} is what it was before.`, { method: "POST" }, `${path}/rollback`),
            })
          }
        >
          Roll back
        </button>
      </header>
      <Notice error={error} />
      <div class="scrolls" tabIndex={0} role="group" aria-label={`Versions of ${route.name}`}>
        <table class="targets">
          <thead>
            <tr>
              <th scope="col">Version</th>
              <th scope="col">Weight</th>
              <th scope="col">Answers</th>
              <th scope="col">Median time</th>
              <th scope="col">Agrees with the answer given</th>
              <th scope="col">
                <span class="visually-hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {rows.map(({ name, isShadow }) => {
              const found = stats.find((one) => one.target === name && (one.role === "shadow") === isShadow);
              return (
                <tr key={`${name} ${isShadow}`}>
                  <th scope="row">
                    {name}
                    {isShadow && <small> shadow: judges, too, and is never returned</small>}
                  </th>
                  <td class="number">
                    {isShadow ? (
                      "–"
                    ) : (
                      <>
                        <input
                          type="number"
                          min={0}
                          step={1}
                          aria-label={`Weight of ${name}`}
                          value={shown[name]}
                          onInput={(event) =>
                            setWeights({ ...shown, [name]: Math.max(0, event.currentTarget.valueAsNumber || 0) })
                          }
                        />{" "}
                        {percent(shown[name] / total)}
                      </>
                    )}
                  </td>
                  <td class="number">{found ? count(found.num_verdicts) : "–"}</td>
                  <td class="number">{found?.latency_ms ? milliseconds(found.latency_ms.p50) : "–"}</td>
                  <td class="number">
                    {found?.agreement
                      ? `${percent(found.agreement.share)} of ${count(found.agreement.num_compared)}`
                      : "–"}
                  </td>
                  <td class="number">
                    <button
                      type="button"
                      class="quiet"
                      disabled={name === heaviest}
                      onClick={() => onCompare(heaviest, name)}
                    >
                      Compare
                    </button>
                    <button
                      type="button"
                      class="quiet"
                      disabled={!isShadow && Object.keys(route.targets).length === 1}
                      onClick={() => promote(name)}
                    >
                      Promote
                    </button>
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <div class="actions">
        <label>
          Add a version
          <select
            value={added}
            onChange={(event) => {
              const name = event.currentTarget.value;
              if (name) setWeights({ ...shown, [name]: 0 });
              setAdded("");
            }}
          >
            <option value="">choose…</option>
            {names
              .filter((one) => !(one in shown) && one !== route.name)
              .map((one) => (
                <option key={one}>{one}</option>
              ))}
          </select>
        </label>
        {weights && (
          <>
            <button
              type="button"
              class="primary"
              onClick={() =>
                setConfirmation({
                  title: `Change the weights of ${route.name}?`,
                  what: `New conversations are divided like this: ${words(weights)}. A conversation keeps its version as far as the new weights allow. “Roll back” undoes it.`,
                  action: "Set the weights",
                  run: () =>
                    change(`${route.name} has new weights.`, {
                      method: "PUT",
                      body: { targets: weights, shadows: route.shadows },
                    }),
                })
              }
            >
              Set the weights
            </button>
            <button type="button" onClick={() => setWeights(null)}>
              Discard
            </button>
          </>
        )}
        <span class="hint" role="status">
          {said}
        </span>
      </div>
      {stats.map(
        (one) =>
          one.accuracy && (
            <AccuracyBar
              key={`${one.target} ${one.version} ${one.role}`}
              title={`${one.target}${one.role === "shadow" ? " (shadow)" : ""}`}
              version={one.version}
              accuracy={one.accuracy}
            />
          ),
      )}
      <Confirm asked={confirmation} onClose={() => setConfirmation(null)} />
    </section>
  );
}
