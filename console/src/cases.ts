// Two classifiers over a set of conversations: reading the set, asking both, and counting.
import { ask, type BatchResult, type Verdict } from "./api";
import { fromLines, inputOf, rolesOf, turnsIn, type Input, type Turn } from "./turns";

export interface Case {
  input: Input; // as it was given
  turns: Turn[]; // the same, to be shown
  right: string | null; // the label that is known to be right
  first?: Verdict;
  second?: Verdict;
}

const AT_ONCE = 8;

/** Read JSON lines with `input` and `labels` or `label`, or conversations with blank lines between them. */
export function readCases(text: string, names: string[]): { cases: Case[]; unread: number } {
  const cases: Case[] = [];
  let unread = 0;
  const trimmed = text.trim();
  if (!trimmed) return { cases, unread };
  if (/^[[{"]/.test(trimmed)) {
    for (const line of trimmed.split("\n")) {
      if (!line.trim()) continue;
      try {
        const value = JSON.parse(line) as Record<string, unknown>;
        const turns = turnsIn(value);
        if (turns?.length)
          cases.push({ input: textIn(value) ?? inputOf(turns), turns, right: rightLabel(value, names) });
        else unread++;
      } catch {
        unread++;
      }
    }
    return { cases, unread };
  }
  for (const part of trimmed.split(/\n\s*\n/)) {
    const turns = fromLines(part);
    if (turns.length) cases.push({ input: part.trim(), turns, right: null });
  }
  return { cases, unread };
}

function textIn(value: unknown): string | null {
  const { input, text } = value as { input?: unknown; text?: unknown };
  return typeof value === "string" ? value : typeof input === "string" ? input : typeof text === "string" ? text : null;
}

function rightLabel(value: Record<string, unknown>, names: string[]): string | null {
  const labels = value.labels;
  if (labels && typeof labels === "object") {
    for (const name of names) {
      const found = (labels as Record<string, unknown>)[name];
      if (found !== undefined && found !== null) return written(found);
    }
  }
  return value.label === undefined || value.label === null ? null : written(value.label);
}

function written(label: unknown): string {
  return label === true ? "yes" : label === false ? "no" : String(label);
}

export async function askBoth(
  cases: Case[],
  first: string,
  second: string,
  signal: AbortSignal,
  onPart: (done: number) => void,
): Promise<void> {
  for (let start = 0; start < cases.length; start += AT_ONCE) {
    const part = cases.slice(start, start + AT_ONCE);
    const body: Record<string, unknown> = {
      inputs: part.map((one) => one.input),
      classifiers: [first, second],
      cascade: false,
    };
    const roles = rolesOf(part.flatMap((one) => (typeof one.input === "string" ? [] : one.turns)));
    if (roles) body.roles = roles;
    const { results } = await ask<BatchResult>("v1/classify", { body, signal });
    results.forEach((result, index) => {
      if ("error" in result) {
        const failed = { classifier: "", abstained: false, error: result.error };
        part[index].first = part[index].second = failed;
      } else [part[index].first, part[index].second] = result.verdicts;
    });
    onPart(start + part.length);
  }
}

export interface Counted {
  judged: number;
  agreed: number;
  known: number; // with a known right label
  right: [number, number]; // of the first, of the second
}

export function counted(cases: Case[]): Counted {
  const judged = cases.filter((one) => one.first?.label !== undefined && one.second?.label !== undefined);
  const known = judged.filter((one) => one.right !== null);
  return {
    judged: judged.length,
    agreed: judged.filter((one) => one.first?.label === one.second?.label).length,
    known: known.length,
    right: [
      known.filter((one) => one.first?.label === one.right).length,
      known.filter((one) => one.second?.label === one.right).length,
    ],
  };
}

/** Disagreements first, the surest first among them. */
export function ranked(cases: Case[]): Case[] {
  const weight = (one: Case): number => {
    if (one.first?.error || one.second?.error) return 3;
    if (!one.first || !one.second) return -1;
    const sure = Math.min(one.first.confidence ?? 0, one.second.confidence ?? 0);
    return one.first.label !== one.second.label ? 1 + sure : 0;
  };
  return [...cases].sort((a, b) => weight(b) - weight(a));
}
