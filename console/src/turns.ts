// A conversation as turns: read from text or JSON, written as text, and as the messages of a request.

export interface Turn {
  speaker: string; // empty: a text without speakers, which is sent as it is
  text: string;
}

export const SPEAKERS = ["Customer", "Agent"];
const ROLES: Record<string, string> = { user: "Customer", assistant: "Agent", customer: "Customer", agent: "Agent" };
// "Name: text", where the name is short and has no sentence in it.
const LINE = /^\s*([\p{L}_][\p{L}\p{N}_ .'-]{0,30}?)\s*:\s+(.*)$/u;

export function speakerOf(role: string): string {
  return ROLES[role.toLowerCase()] ?? role;
}

/** Read pasted text: JSON with messages, lines `Name: text`, or a text, which becomes one turn. */
export function readConversation(pasted: string): Turn[] {
  const text = pasted.trim();
  if (!text) return [];
  if (/^[[{]/.test(text)) {
    const turns = fromJson(text);
    if (turns) return turns;
  }
  return fromLines(text);
}

function fromJson(text: string): Turn[] | null {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    try {
      value = JSON.parse(text.split("\n")[0]); // the first of several JSON lines
    } catch {
      return null;
    }
  }
  return turnsIn(value);
}

/** Find the turns in a value: a list of messages, or an object with such a list. */
export function turnsIn(value: unknown): Turn[] | null {
  if (typeof value === "string") return fromLines(value);
  if (Array.isArray(value)) {
    const turns = value.map(turnOf);
    return turns.length && turns.every((one) => one !== null) ? (turns as Turn[]) : null;
  }
  if (value && typeof value === "object") {
    for (const name of ["messages", "input", "conversation", "turns", "dialogue", "text"]) {
      const found = (value as Record<string, unknown>)[name];
      if (found !== undefined) return turnsIn(found);
    }
  }
  return null;
}

function turnOf(value: unknown): Turn | null {
  if (!value || typeof value !== "object") return null;
  const message = value as Record<string, unknown>;
  const speaker = message.role ?? message.speaker ?? message.name ?? message.from;
  const content = message.content ?? message.text ?? message.value ?? message.utterance;
  if (typeof speaker !== "string") return null;
  const text = Array.isArray(content)
    ? content
        .map((part) =>
          part && typeof part === "object" ? String((part as { text?: string }).text ?? "") : String(part),
        )
        .join("\n")
    : String(content ?? "");
  return { speaker: speakerOf(speaker), text };
}

export function fromLines(text: string): Turn[] {
  const turns: Turn[] = [];
  for (const line of text.trim().split(/\r?\n/)) {
    const found = LINE.exec(line);
    if (found) turns.push({ speaker: speakerOf(found[1]), text: found[2] });
    else if (turns.length) turns[turns.length - 1].text += `\n${line}`;
    else turns.push({ speaker: "", text: line });
  }
  if (turns.length > 1 && turns[0].speaker === "") turns[0].speaker = SPEAKERS[0];
  return turns.map((one) => ({ ...one, text: one.text.trimEnd() })).filter((one) => one.text);
}

export function asText(turns: Turn[]): string {
  return turns.map((one) => (one.speaker ? `${one.speaker}: ${one.text}` : one.text)).join("\n");
}

export interface Message {
  role: string;
  content: string;
}

export type Input = string | Message[];

/** What a request holds: messages, or a text as it is. */
export function inputOf(turns: Turn[]): Input {
  return turns.length === 1 && turns[0].speaker === "" ? turns[0].text : asMessages(turns);
}

export function asMessages(turns: Turn[]): Message[] {
  const roles: Record<string, string> = { "": "user", Customer: "user", Agent: "assistant" };
  return turns.map((one) => ({ role: roles[one.speaker] ?? one.speaker, content: one.text }));
}

/** Speakers that no contract knows write their own name before their turns. */
export function rolesOf(turns: Turn[]): Record<string, string> | undefined {
  const others = [...new Set(turns.map((one) => one.speaker))].filter((one) => one && !SPEAKERS.includes(one));
  return others.length ? Object.fromEntries(others.map((one) => [one, one])) : undefined;
}

/** A key for each beginning of a conversation, so that a verdict is found again however the conversation was made. */
export function prefixKeys(turns: Turn[], seed: string): string[] {
  let [high, low] = mix(0xdeadbeef, 0x41c6ce57, seed);
  return turns.map((one, index) => {
    [high, low] = mix(high, low, `\u0000${one.speaker}\u0001${one.text}`);
    return `${index + 1}.${(high >>> 0).toString(36)}.${(low >>> 0).toString(36)}`;
  });
}

function mix(high: number, low: number, text: string): [number, number] {
  for (let index = 0; index < text.length; index++) {
    const code = text.charCodeAt(index);
    high = Math.imul(high ^ code, 2654435761);
    low = Math.imul(low ^ code, 1597334677);
  }
  return [high ^ Math.imul(low ^ (low >>> 15), 2246822507), low ^ Math.imul(high ^ (high >>> 13), 3266489909)];
}
