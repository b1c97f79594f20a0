// What the benchmarks share: clocks, a count of what a host saw, a provider that does nothing, and the table at the end.
import { afterAll } from "vitest";
import type { Project, Run, StackResource, StackState } from "../test/engine/project.js";
import type { LabHost } from "../test/lab/lab.js";

interface Figure {
  what: string;
  value: string;
  goal?: string;
  note?: string;
}

/** Prints the file's figures as one table when its last benchmark has ended. */
export function useTable(): (figure: Figure) => void {
  const rows: Figure[] = [];
  afterAll(() => {
    console.log("\n| figure | value | goal | |\n|---|---|---|---|");
    for (const { what, value, goal = "", note = "" } of rows) console.log(`| ${what} | ${value} | ${goal} | ${note} |`);
  });
  return (figure) => {
    rows.push(figure);
    console.log(`${figure.what}: ${figure.value}${figure.goal === undefined ? "" : ` (goal ${figure.goal})`}`);
  };
}

export async function seconds<T>(work: () => Promise<T>): Promise<number> {
  const started = performance.now();
  await work();
  return (performance.now() - started) / 1000;
}

/** A failed run has no figure. */
export function good(run: Run): Run {
  if (run.exitCode !== 0) throw new Error(run.all);
  return run;
}

export const ratio = (a: number, b: number) => (a / b).toFixed(2);

/** Counts logins and commands in the log of the host's own sshd, which nobody can talk out of them. */
export async function counted(
  host: LabHost,
  work: () => Promise<unknown>,
): Promise<{ connections: number; commands: number }> {
  await host.ssh(
    "mkdir -p /etc/ssh/sshd_config.d && echo LogLevel VERBOSE > /etc/ssh/sshd_config.d/10-bench.conf && systemctl reload ssh; journalctl --sync",
  );
  const { stdout: cursor } = await host.ssh("journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p'");
  await work();
  await host.ssh("journalctl --sync");
  const { stdout } = await host.ssh([
    "journalctl",
    "--after-cursor",
    cursor.trim(),
    "-t",
    "sshd",
    "-t",
    "sshd-session",
    "-o",
    "cat",
  ]);
  const lines = stdout.split("\n");
  // The test's own connection is one that was open before; its commands are those on it.
  const ours = new Set(
    lines.flatMap((line) => /^Accepted publickey for \S+ from (\S+ port \d+)/.exec(line)?.[1] ?? []),
  );
  const from = (line: string) => /from (\S+ port \d+)/.exec(line)?.[1] ?? "";
  const commands = lines.filter((line) => line.startsWith("Starting session: command") && ours.has(from(line)));
  return { connections: ours.size, commands: commands.length };
}

const nothing = `exports.handler = () => ({
  check: async (olds, news) => ({ inputs: news, failures: [] }),
  diff: async () => ({ changes: false }),
  create: async (inputs) => ({ id: inputs.name, outs: inputs }),
  read: async (id, props) => ({ id, props }),
  update: async (id, olds, news) => ({ outs: news }),
  delete: async () => {},
})`;

/** A program of n resources of a provider that does nothing: what the engine alone costs. */
export const idle = (n: number) => `
import * as pulumi from "@pulumi/pulumi";
class Idle extends pulumi.CustomResource {
  constructor(name: string) {
    super("pulumi-nodejs:dynamic/bench:Idle", name, { name, one: "1", two: "2", three: "3", __provider: ${JSON.stringify(nothing)} });
  }
}
for (let i = 0; i < ${n}; i++) new Idle("idle" + i);
`;

/** A state like the one that is there, with its one resource of that type n times: `vary` makes each its own. */
export async function multiplied(
  project: Project,
  type: string,
  n: number,
  vary: (copy: StackResource, i: number) => void,
): Promise<StackState> {
  const state = await project.export();
  const resources = state.deployment.resources ?? [];
  const one = resources.find((resource) => resource.type === type);
  if (one === undefined) throw new Error(`no ${type} in the state`);
  const copies = Array.from({ length: n }, (_, i) => {
    const copy = structuredClone(one);
    vary(copy, i);
    return copy;
  });
  return {
    ...state,
    deployment: { ...state.deployment, resources: [...resources.filter((r) => r !== one), ...copies] },
  };
}
