// State that components watch. A component renders again when the state that it uses was replaced.
import { useEffect, useReducer } from "preact/hooks";

export class Store<State extends object> {
  private listeners = new Set<() => void>();

  constructor(public state: State) {}

  set(patch: Partial<State>): void {
    this.state = { ...this.state, ...patch };
    for (const listener of this.listeners) listener();
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

export function useStore<State extends object>(store: Store<State>): State {
  const [, again] = useReducer<number, void>((count) => count + 1, 0);
  const shown = store.state;
  useEffect(() => {
    if (store.state !== shown) again(); // it changed between rendering and watching
    return store.subscribe(() => again());
  }, [store]);
  return store.state;
}
