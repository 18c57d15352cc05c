// The same call as programs write it.
import { urlOf } from "./api";

export const LANGUAGES = ["curl", "Python", "OpenAI", "TypeSafe", "JavaScript"] as const;
export type Language = (typeof LANGUAGES)[number];

interface Call {
  body: Record<string, unknown>;
  name: string; // the classifier that is looked at
  question: string;
  labels: string[];
  hasKey: boolean;
}

export function codeOf(language: Language, { body, name, question, labels, hasKey }: Call): string {
  const asked: Record<string, unknown> = { input: body.input, classifiers: [name] };
  if (body.roles) asked.roles = body.roles;
  const root = urlOf("").replace(/\/$/, "");
  const json = JSON.stringify(asked, null, 2);
  const isChoice = labels.length > 2;
  const typed: Record<string, unknown> = {
    type: isChoice ? "choice" : "predicate",
    name,
    instructions: question || name,
  };
  if (isChoice) typed.choices = labels.map((value) => ({ value }));
  switch (language) {
    case "curl":
      return [
        `curl -s ${root}/v1/classify \\`,
        ...(hasKey ? [`  -H "X-API-Key: $LORAPLEX_API_KEY" \\`] : []),
        `  -H 'Content-Type: application/json' \\`,
        `  -d '${json.replace(/'/g, "'\\''")}'`,
      ].join("\n");
    case "Python":
      return [
        "from loraplex import Client",
        "",
        `with Client(${python(root)}) as client:${hasKey ? "  # LORAPLEX_API_KEY sets the key" : ""}`,
        "    result = client.classify(",
        `        ${python(asked.input, 8)},`,
        `        classifiers=[${python(name)}],`,
        ...(asked.roles ? [`        roles=${python(asked.roles, 8)},`] : []),
        "    )",
        `verdict = result[${python(name)}]`,
        "print(verdict.label, verdict.confidence, verdict.adapter)",
      ].join("\n");
    case "OpenAI":
      return [
        ...(hasKey ? ["import os", ""] : []),
        "from openai import OpenAI",
        "",
        `client = OpenAI(base_url=${python(`${root}/v1`)}, api_key=${hasKey ? 'os.environ["LORAPLEX_API_KEY"]' : '"none"'})`,
        "decision = client.decisions.create(",
        `    model="*",`,
        `    input=${python(asked.input, 4)},`,
        `    questions=[${python(typed)}],`,
        ")",
        `print(decision.answers[0].${isChoice ? "probabilities" : "probability"})`,
      ].join("\n");
    case "TypeSafe":
      return [
        ...(hasKey ? ["import os", ""] : []),
        `from typesafe_sdk import ${isChoice ? "Choice" : "Noul"}, TypeSafeClient`,
        "",
        `with TypeSafeClient(base_url=${python(root)}, api_key=${hasKey ? 'os.environ["LORAPLEX_API_KEY"]' : '"any"'}) as client:`,
        "    result = client.system_one(",
        `        ${python(asked.input, 8)},`,
        `        {${python(name)}: ${isChoice ? "Choice" : "Noul"}(instructions=${python(question || name)}${isChoice ? `, criteria=dict.fromkeys(${python(labels)})` : ""})},`,
        "    )",
        `print(result.answers[${python(name)}].${isChoice ? "probabilities" : "noul"})`,
      ].join("\n");
    case "JavaScript":
      return [
        `const response = await fetch(${JSON.stringify(`${root}/v1/classify`)}, {`,
        `  method: "POST",`,
        `  headers: { "Content-Type": "application/json"${hasKey ? ', "X-API-Key": process.env.LORAPLEX_API_KEY' : ""} },`,
        `  body: JSON.stringify(${json.replace(/\n/g, "\n  ")}),`,
        "});",
        "const { verdicts, error } = await response.json();",
        "if (error) throw new Error(`${error.message} ${error.remedy}`);",
        "console.log(verdicts[0].label, verdicts[0].confidence);",
      ].join("\n");
  }
}

/** JSON is Python, but for three words and long lists. */
function python(value: unknown, indent = 0): string {
  if (Array.isArray(value) && indent === 0) return `[${value.map((one) => python(one)).join(", ")}]`;
  if (Array.isArray(value) && value.length) {
    const pad = " ".repeat(indent);
    return `[\n${value.map((one) => `${pad}    ${python(one)},`).join("\n")}\n${pad}]`;
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return `{${Object.entries(value)
      .map(([key, one]) => `${JSON.stringify(key)}: ${python(one)}`)
      .join(", ")}}`;
  }
  return value === null ? "None" : value === true ? "True" : value === false ? "False" : JSON.stringify(value);
}
