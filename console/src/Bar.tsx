// A verdict as a bar: how sure, where the answer changes (the tick), and where it is too unsure to count (the hatched band).
import type { Card, Verdict } from "./api";
import { abstainBand, isBinary, labelIndex, percent, shownScore, threshold } from "./verdicts";

const share = (part: number): string => `${(part * 100).toFixed(2)}%`;

export function Bar({ verdict, card }: { verdict: Verdict | undefined; card: Card | undefined }) {
  const binary = !verdict?.scores || isBinary(verdict);
  const score = verdict && !verdict.error && !verdict.skipped_by ? shownScore(verdict) : 0;
  const band = abstainBand(card, binary);
  const parts = verdict?.scores && !binary ? Object.entries(verdict.scores) : null;
  let start = 0;
  return (
    <div class="bar" aria-hidden="true">
      {parts ? (
        parts.map(([label, part], index) => {
          const left = start;
          start += part;
          return (
            <div
              key={label}
              class={`bar-part label-${index % 6} ${label === verdict?.label ? "is-answer" : ""}`}
              style={{ left: share(left), width: share(part) }}
              title={`${label}: ${percent(part)}`}
            />
          );
        })
      ) : (
        <div
          class={`bar-fill ${verdict && labelIndex(verdict) === 0 ? "is-first" : ""}`}
          style={{ transform: `scaleX(${score})` }}
        />
      )}
      {band && (
        <div
          class="bar-band"
          style={{ left: share(band[0]), width: share(band[1] - band[0]) }}
          title="too unsure to count"
        />
      )}
      {!parts && card?.labels !== null && <div class="bar-tick" style={{ left: share(threshold(card)) }} />}
    </div>
  );
}
