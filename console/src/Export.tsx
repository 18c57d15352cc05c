// Downloads what was corrected, as `loraplex routes export` writes it and `loraplex train --data` reads it.
import { useState } from "preact/hooks";
import { asApiError } from "./api";
import { keptExamples, type Example } from "./kept";
import { count } from "./verdicts";

/** One line for each conversation: a later label replaces an earlier one. By `ids`, training keeps the text out of contracts. */
function linesOf(found: Example[]): string[] {
  const rows = new Map<string, Record<string, unknown> & { labels: Record<string, string>; ids: string[] }>();
  for (const { id, input, labels, conversation_id } of found) {
    const key = JSON.stringify(input);
    const row = rows.get(key) ?? { [typeof input === "string" ? "text" : "messages"]: input, labels: {}, ids: [] };
    rows.set(key, row);
    row.ids.push(id);
    if (conversation_id) row.conversation_id ??= conversation_id;
    for (const [name, label] of Object.entries(labels)) row.labels[name] = label.trim();
  }
  return [...rows.values()].map((row) => JSON.stringify(row));
}

export function Export({ name }: { name: string }) {
  const [said, setSaid] = useState("");
  const download = async () => {
    setSaid("Loading…");
    try {
      const found = await keptExamples([name]);
      const lines = linesOf(found);
      if (lines.length) save(`${name}-corrected.jsonl`, `${lines.join("\n")}\n`);
      setSaid(
        lines.length
          ? `${count(lines.length)} conversations, as loraplex train --data reads them. They are texts of people: delete the file after the training.`
          : "Nothing was corrected yet.",
      );
    } catch (failure) {
      const error = asApiError(failure);
      setSaid(`Not possible: ${error.message}. To change that: ${error.remedy}.`);
    }
  };
  return (
    <div class="actions">
      <button type="button" class="quiet" onClick={() => void download()}>
        Download what was corrected
      </button>
      <span class="hint" role="status">
        {said}
      </span>
    </div>
  );
}

function save(name: string, text: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
