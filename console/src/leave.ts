// Which turns move an answer: the conversation is judged again without each of them. These requests share what they have
// in common, and go out a few at a time.
import { ask, type BatchResult } from "./api";
import { inputOf, rolesOf, type Turn } from "./turns";

export const MOST_LEFT_OUT = 60; // of the last turns
const AT_ONCE = 6;

export interface Moves {
  label: string; // whose probability is compared
  before: number; // the probability with all turns
  byTurn: Map<number, number>; // turn -> how far its presence moves the probability
}

/** Find the moves of one classifier; `onPart` is called as they come. */
export async function leaveOneOut(
  classifier: string,
  turns: Turn[],
  label: string,
  before: number,
  signal: AbortSignal,
  onPart: (moves: Moves, done: number, total: number) => void,
): Promise<void> {
  const byTurn = new Map<number, number>();
  const first = Math.max(0, turns.length - MOST_LEFT_OUT);
  const left = turns.map((_, index) => index).slice(first);
  for (let start = 0; start < left.length; start += AT_ONCE) {
    const part = left.slice(start, start + AT_ONCE);
    const rest = part.map((index) => [...turns.slice(0, index), ...turns.slice(index + 1)]);
    const result = await ask<BatchResult>("v1/classify", {
      body: { inputs: rest.map(inputOf), classifiers: [classifier], cascade: false, roles: rolesOf(turns) },
      signal,
    });
    result.results.forEach((one, place) => {
      if ("error" in one) return;
      const score = one.verdicts[0]?.scores?.[label];
      if (score !== undefined) byTurn.set(part[place] + 1, before - score);
    });
    onPart({ label, before, byTurn: new Map(byTurn) }, Math.min(start + AT_ONCE, left.length), left.length);
  }
}
