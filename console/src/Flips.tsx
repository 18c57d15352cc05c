// One classifier over the turns: a cell for each turn, coloured by its answer, and a mark where the answer changed last.
import { memo } from "./memo";
import type { Verdict } from "./api";
import { isBinary, labelIndex, shownScore } from "./verdicts";

interface Props {
  history: (Verdict | undefined)[];
  before: number; // turns before the first of the history
  shown: number;
  flip: number | null;
}

function FlipStrip({ history, before, shown, flip }: Props) {
  const width = Math.max(history.length, 1);
  return (
    <div class="flips">
      <svg viewBox={`0 0 ${width} 10`} preserveAspectRatio="none" aria-hidden="true">
        {history.map((verdict, index) => {
          const kind = !verdict
            ? "none"
            : verdict.error
              ? "bad"
              : verdict.skipped_by
                ? "none"
                : `label-${Math.max(labelIndex(verdict), 0) % 6}`;
          const strength = !verdict
            ? 1
            : isBinary(verdict)
              ? 0.35 + 0.65 * Math.abs(2 * shownScore(verdict) - 1)
              : 0.35 + 0.65 * (verdict.confidence ?? 0);
          const gap = width > 40 ? 0 : 0.06;
          return (
            <rect
              key={index}
              class={`cell ${kind}`}
              x={index + gap}
              y={1}
              width={1 - 2 * gap}
              height={8}
              opacity={strength}
            />
          );
        })}
        {shown > 0 && <rect class="cell-shown" x={shown - 1 - before} y={9.2} width={1} height={0.8} />}
      </svg>
      {flip !== null && (
        <div class="flip-mark" style={{ left: `${((flip - 1 - before) / width) * 100}%` }} aria-hidden="true" />
      )}
      <span class="visually-hidden">{flip === null ? `no change over ${width} turns` : `changed at turn ${flip}`}</span>
    </div>
  );
}

export const Flips = memo(
  FlipStrip,
  (a, b) =>
    a.shown === b.shown &&
    a.before === b.before &&
    a.flip === b.flip &&
    a.history.length === b.history.length &&
    a.history.every((one, index) => one === b.history[index]),
);
