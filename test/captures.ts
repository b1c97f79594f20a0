// The recordings of the real tools, in test/captures: never edited, never invented.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type * as z from "zod";
import type { Report } from "../provider/host.js";

export interface Recorded {
  cmd: readonly string[];
  stdout: string;
  stderr: string;
  exit: number;
}

/** The calls of one recording, e.g. `pve/pvesm`. */
export function recording(name: string): Recorded[] {
  return JSON.parse(readFileSync(join(__dirname, "captures", `${name}.json`), "utf8"));
}

/** The recorded answers to a question, read as the provider reads them. */
export function answers<T>(name: string, { argv, answer, parse = JSON.parse }: Report<T>): T[] {
  const asked = argv.map((word) => word.replace("/nodes/localhost/", "/nodes/NODE/")).join(" ");
  return recording(name)
    .filter(({ cmd, exit }) => exit === 0 && cmd.join(" ").replace(/\/nodes\/[^/]+\//, "/nodes/NODE/") === asked)
    .map(({ stdout }) => (answer as z.ZodType<T>).parse(parse(stdout)));
}
