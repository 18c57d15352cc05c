// What can be said about a verdict: how sure, how near to another answer, and since which turn.
import type { Card, Verdict } from "./api";

export const percent = (share: number): string =>
  share === 0 || share === 1
    ? `${share * 100} %`
    : share > 0.9995
      ? ">99.9 %"
      : share < 0.0005
        ? "<0.1 %"
        : `${(share * 100).toFixed(share > 0.995 || share < 0.005 ? 1 : 0)} %`;

export const count = (number: number): string => Math.round(number).toLocaleString("en-US");

/** Two labels: the bar shows the first one's probability. More: the answered label's. */
export function isBinary(verdict: Verdict): boolean {
  return !!verdict.scores && Object.keys(verdict.scores).length === 2;
}

export function shownScore(verdict: Verdict): number {
  if (verdict.scores && isBinary(verdict)) return Object.values(verdict.scores)[0];
  return verdict.confidence ?? 0;
}

export function labelIndex(verdict: Verdict): number {
  return verdict.scores && verdict.label !== undefined ? Object.keys(verdict.scores).indexOf(verdict.label) : -1;
}

export function threshold(card: Card | undefined): number {
  return card?.threshold ?? 0.5;
}

/** The part of the bar in which the classifier abstains, or null. */
export function abstainBand(card: Card | undefined, binary: boolean): [number, number] | null {
  const below = card?.abstain_below ?? 0;
  if (!below) return null;
  if (!binary) return [0, below];
  const tick = threshold(card);
  const band: [number, number] = [Math.min(1 - below, tick), Math.max(below, tick)];
  return band[1] - band[0] > 0.001 ? band : null;
}

/** The number of the turn since which the label is what it is now (1 is the first), over consecutive known verdicts. */
export function flipTurn(history: (Verdict | undefined)[], position: number): number | null {
  const now = history[position - 1]?.label;
  if (now === undefined) return null;
  for (let turn = position - 1; turn >= 1; turn--) {
    const before = history[turn - 1];
    if (before === undefined) return null;
    if (before.label !== undefined && before.label !== now) return turn + 1;
  }
  return null;
}

/** Larger where a person should look first: errors, warnings, abstentions, recent changes, near calls. */
export function interest(
  verdict: Verdict | undefined,
  card: Card | undefined,
  flip: number | null,
  position: number,
): number {
  if (!verdict) return -1;
  if (verdict.error) return 100;
  if (verdict.skipped_by) return 0;
  let points = 0;
  if (verdict.warnings?.length) points += 30;
  if (verdict.abstained) points += 20;
  if (flip !== null) points += Math.max(0, 14 - 2 * (position - flip));
  if (labelIndex(verdict) === 0) points += 5;
  const distance = isBinary(verdict)
    ? Math.abs(shownScore(verdict) - threshold(card))
    : (verdict.confidence ?? 1) - 0.5;
  return points + Math.max(0, 1 - 2 * distance) * 8;
}

export function spoken(verdict: Verdict, card: Card | undefined): string {
  if (verdict.error) return `failed: ${verdict.error.message}`;
  if (verdict.skipped_by) return `not asked, because of ${verdict.skipped_by}`;
  const sure = percent(verdict.confidence ?? 0);
  const first =
    verdict.scores && isBinary(verdict)
      ? `, “${Object.keys(verdict.scores)[0]}” is answered from ${percent(threshold(card))} on`
      : "";
  return `${verdict.label}, ${sure} sure${verdict.abstained ? ", too unsure to count" : ""}${first}`;
}

/** The 95 % interval of a share (Wilson's). */
export function interval(right: number, total: number): [number, number] {
  if (!total) return [0, 1];
  const z = 1.96;
  const share = right / total;
  const middle = (share + (z * z) / (2 * total)) / (1 + (z * z) / total);
  const half = (z / (1 + (z * z) / total)) * Math.sqrt((share * (1 - share)) / total + (z * z) / (4 * total * total));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}
