// The recordings of the real tools. They lie beside the repository, in shared/captures; a worktree may be some levels deeper.
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import type * as z from "zod";
import type { Report } from "../provider/host.js";

export interface Recorded {
  cmd: readonly string[];
  stdout: string;
  stderr: string;
  exit: number;
}

function folder(): string {
  for (let at = dirname(__dirname); at !== dirname(at); at = dirname(at)) {
    const found = join(at, "shared", "captures");
    if (existsSync(found)) return found;
  }
  throw new Error("the recordings are not there: shared/captures belongs beside the repository");
}

/** The calls of one recording, e.g. `pve/pvesm`. */
export function recording(name: string): Recorded[] {
  return JSON.parse(readFileSync(join(folder(), `${name}.json`), "utf8"));
}

/** The recorded answers to a question, read as the provider reads them. */
export function answers<T>(name: string, { argv, answer, parse = JSON.parse }: Report<T>): T[] {
  const asked = argv.map((word) => word.replace("/nodes/localhost/", "/nodes/NODE/")).join(" ");
  return recording(name)
    .filter(({ cmd, exit }) => exit === 0 && cmd.join(" ").replace(/\/nodes\/[^/]+\//, "/nodes/NODE/") === asked)
    .map(({ stdout }) => (answer as z.ZodType<T>).parse(parse(stdout)));
}
