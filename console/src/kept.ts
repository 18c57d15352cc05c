// Texts that the server keeps (--keep-inputs), with the labels that feedback gave.
import { ask } from "./api";

export interface Example {
  id: string;
  input: unknown;
  labels: Record<string, string>;
  conversation_id?: string | null;
}

/** All corrected conversations of some routes or classifiers, oldest first. */
export async function keptExamples(classifiers: string[]): Promise<Example[]> {
  const found: Example[] = [];
  let after: string | null = null;
  do {
    const page: { examples: Example[]; after: string | null } = await ask("v1/examples", {
      body: { classifiers, ...(after ? { after } : {}) },
    });
    found.push(...page.examples);
    after = page.after;
  } while (after);
  return found;
}
