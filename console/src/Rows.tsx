// A long list of rows of one height: only those near the screen exist. The others are blank space of the same size.
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

const MORE = 8; // rows beyond the screen's edges

interface Props<Item> {
  items: Item[];
  render: (item: Item, index: number) => ComponentChildren;
  label: string;
}

/** The height of a row is the custom property --row of the stylesheet, in pixels. */
export function Rows<Item>({ items, render, label }: Props<Item>) {
  const list = useRef<HTMLUListElement>(null);
  const [range, setRange] = useState({ first: 0, last: 40, height: 60 });
  const length = items.length;

  const measure = () => {
    if (!list.current) return;
    const height = parseFloat(getComputedStyle(list.current).getPropertyValue("--row")) || 60;
    const top = -list.current.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / height) - MORE);
    const last = Math.min(length, Math.ceil((top + window.innerHeight) / height) + MORE);
    setRange((before) =>
      before.first === first && before.last === last && before.height === height ? before : { first, last, height },
    );
  };

  useLayoutEffect(measure, [length]);
  useEffect(() => {
    document.addEventListener("scroll", measure, { capture: true, passive: true });
    window.addEventListener("resize", measure);
    return () => {
      document.removeEventListener("scroll", measure, { capture: true });
      window.removeEventListener("resize", measure);
    };
  });

  const shown = items.slice(range.first, Math.max(range.last, range.first));
  return (
    <ul
      ref={list}
      class="rows"
      aria-label={label}
      style={{
        paddingTop: `${range.first * range.height}px`,
        paddingBottom: `${Math.max(0, length - range.first - shown.length) * range.height}px`,
      }}
    >
      {shown.map((item, index) => render(item, range.first + index))}
    </ul>
  );
}
