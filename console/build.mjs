// Builds the console into a folder: node build.mjs FOLDER. The same source gives the same bytes on every machine.
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { build } from "esbuild";

const folder = process.argv[2];
if (!folder) throw new Error("name the folder to build into: node build.mjs FOLDER");
const here = import.meta.dirname;
const notice = "/*! Loraplex, Apache-2.0. Holds Preact, (c) Jason Miller and others, MIT licence. */";

await mkdir(folder, { recursive: true });
await build({
  absWorkingDir: here,
  entryPoints: { console: "src/main.tsx" },
  outdir: folder,
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "utf8",
  legalComments: "none",
  banner: { js: notice },
});
await build({
  absWorkingDir: here,
  entryPoints: { console: "src/style.css" },
  outdir: folder,
  minify: true,
  target: ["chrome123", "firefox120", "safari17.5"],
});
await copyFile(join(here, "src/index.html"), join(folder, "index.html"));
