// Prometheus' text format, and what two readings of it say about the time between them.

export interface Sample {
  labels: Record<string, string>;
  value: number;
}
export type Reading = Map<string, Sample[]>;

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

export function readMetrics(text: string): Reading {
  const reading: Reading = new Map();
  for (const line of text.split("\n")) {
    if (!line || line[0] === "#") continue;
    const found = LINE.exec(line);
    if (!found) continue;
    const labels: Record<string, string> = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL))
      labels[name] = value.replace(/\\(.)/g, (_, one) => (one === "n" ? "\n" : one));
    const samples = reading.get(found[1]) ?? [];
    samples.push({ labels, value: Number(found[3]) });
    reading.set(found[1], samples);
  }
  return reading;
}

export function sum(reading: Reading, name: string, where: Record<string, string> = {}): number {
  const wanted = Object.entries(where);
  return (reading.get(name) ?? [])
    .filter((one) => wanted.every(([key, value]) => one.labels[key] === value))
    .reduce((total, one) => total + one.value, 0);
}

/** The increase of a counter between two readings, per second. */
export function rate(
  before: Reading,
  now: Reading,
  seconds: number,
  name: string,
  where: Record<string, string> = {},
): number {
  return Math.max(0, (sum(now, name, where) - sum(before, name, where)) / Math.max(seconds, 0.001));
}

/** A percentile of a histogram between two readings, in the histogram's unit; null where nothing happened. */
export function percentile(
  before: Reading,
  now: Reading,
  name: string,
  where: Record<string, string>,
  part: number,
): number | null {
  const buckets = (now.get(`${name}_bucket`) ?? [])
    .filter((one) => Object.entries(where).every(([key, value]) => one.labels[key] === value))
    .map((one) => ({
      below: one.labels.le === "+Inf" ? Infinity : Number(one.labels.le),
      count: one.value - sum(before, `${name}_bucket`, { ...where, le: one.labels.le }),
    }))
    .sort((a, b) => a.below - b.below);
  const total = buckets[buckets.length - 1]?.count ?? 0;
  if (total <= 0) return null;
  let [from, seen] = [0, 0];
  for (const { below, count } of buckets) {
    if (count >= total * part) {
      if (below === Infinity) return from;
      return from + (below - from) * (count > seen ? (total * part - seen) / (count - seen) : 1);
    }
    [from, seen] = [below, count];
  }
  return from;
}

export interface Share {
  classifier: string;
  adapter: string;
  total: number;
  labels: [string, number, number][]; // label, verdicts, number of its colour: 0 for the contract's first label
  lowMass: number; // verdicts whose labels were improbable
  errors: number;
}

/** Verdicts of each classifier since the server started. */
export function shares(reading: Reading): Share[] {
  const found = new Map<string, Share>();
  const of = ({ classifier, adapter }: Record<string, string>) => {
    const key = `${classifier}\u0000${adapter}`;
    const share = found.get(key) ?? { classifier, adapter, total: 0, labels: [], lowMass: 0, errors: 0 };
    found.set(key, share);
    return share;
  };
  for (const { labels, value } of reading.get("loraplex_classifications_total") ?? []) {
    if (!value) continue;
    const share = of(labels);
    if (["ok", "abstained", "skipped"].includes(labels.outcome)) share.total += value;
    else share.errors += value;
  }
  for (const { labels, value } of reading.get("loraplex_labels_total") ?? []) {
    const share = of(labels);
    if (labels.is_positive === "true") share.labels.unshift([labels.label, value, 0]);
    else share.labels.push([labels.label, value, 1 + share.labels.filter((one) => one[2] > 0).length]);
  }
  for (const { labels, value } of reading.get("loraplex_warnings_total") ?? []) {
    if (labels.code === "low_label_mass" && value) of(labels).lowMass += value;
  }
  return [...found.values()]
    .filter((one) => one.total || one.errors)
    .sort((a, b) => b.total - a.total || a.classifier.localeCompare(b.classifier));
}
