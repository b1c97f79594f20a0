// What the tests of LvSnapshot with the real engine share: programs, and a look at LVM and at processes past the provider.
import { readdir, readFile, readlink } from "node:fs/promises";
import { join } from "node:path";
import type { LabHost } from "../lab/lab.js";
import type { Project, ProjectOptions, Run } from "./project.js";

export const MiB = 1 << 20;

type Language = NonNullable<ProjectOptions["language"]>;

const imports =
  'import * as pulumi from "@pulumi/pulumi";\nimport { LvSnapshot, type LvSnapshotArgs } from "pulumi-vmbackup";\n';
const heads: Record<Language, string> = {
  typescript: imports,
  esm: imports.replace(", type LvSnapshotArgs", ""),
  cjs: 'const pulumi = require("@pulumi/pulumi");\nconst { LvSnapshot } = require("pulumi-vmbackup");\n',
};

/**
 * A program: `body` after the imports. Plain JavaScript with import, unless the language is what a test is about: to start
 * the TypeScript compiler costs each run seconds.
 */
export function program(body: string, language: Language = "esm"): string {
  return `${heads[language]}${body}\n`;
}

/** A value as a program writes it. */
export const literal = (value: unknown): string => JSON.stringify(value);

/**
 * Somebody else's resource, which keeps a text and does nothing: what feeds a snapshot, and what uses one. Its `made` is drawn anew
 * whenever it is created, so a test sees whether it was replaced.
 */
export const note = (() => {
  const provider = `exports.handler = () => ({
    diff: async (id, olds, news) => ({ changes: olds.text !== news.text }),
    create: async (inputs) => ({ id: "note", outs: { ...inputs, made: String(Math.random()) } }),
    update: async (id, olds, news) => ({ outs: { ...news, made: olds.made } }),
    delete: async () => {},
  })`;
  return `class Note extends pulumi.CustomResource {
  constructor(name, text, opts) {
    super("pulumi-nodejs:dynamic/test:Note", name, { text, made: undefined, __provider: ${JSON.stringify(provider)} }, opts);
  }
}
`;
})();

export interface Volume {
  uuid: string;
  origin: string;
  bytes: number;
  tags: string;
}

/** The volumes of a group by name, asked of LVM itself. */
export async function volumes(host: LabHost, vg: string): Promise<Record<string, Volume>> {
  const columns = "lv_name,lv_uuid,origin,lv_size,lv_tags";
  const argv = ["lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", "|", "-o", columns, vg];
  const { stdout } = await host.ssh(argv);
  const rows = stdout.split("\n").flatMap((line): [string, Volume][] => {
    const [name, uuid, origin, bytes, tags] = line.trim().split("|");
    if (!name || uuid === undefined || origin === undefined || tags === undefined) return [];
    return [[name, { uuid, origin, bytes: Number(bytes), tags }]];
  });
  return Object.fromEntries(rows);
}

/** Only the snapshots among them. */
export async function snapshots(host: LabHost, vg: string): Promise<Record<string, Volume>> {
  return Object.fromEntries(Object.entries(await volumes(host, vg)).filter(([, { origin }]) => origin !== ""));
}

/** Goes up with every change of anything in the group. */
export async function changes(host: LabHost, vg: string): Promise<number> {
  const { stdout } = await host.ssh(["vgs", "--noheadings", "-o", "vg_seqno", vg]);
  return Number(stdout);
}

/** The objects that the host's ledger has lines of, in this group. */
export async function ledger(host: LabHost, vg: string): Promise<string[]> {
  const { stdout } = await host.ssh("ls /var/lib/pulumi-vmbackup/LvSnapshot 2>/dev/null || true");
  return stdout
    .split("\n")
    .filter((file) => file.startsWith(`${vg}%2F`))
    .map((file) => decodeURIComponent(file.replace(/\.json$/, "")));
}

export async function remove(host: LabHost, vg: string, name: string): Promise<void> {
  await host.ssh(["lvremove", "-qq", "--yes", `${vg}/${name}`]);
}

/** What a person reads of a run's errors. */
export function errors(run: Run): string {
  return run.diagnostics
    .filter(({ severity }) => severity === "error")
    .map(({ message }) => message)
    .join("\n");
}

/** What was done to each resource that was not left alone: `{ before: "update" }`. */
export function done(run: Run): Record<string, string> {
  return Object.fromEntries(
    run.events.flatMap(({ resourcePreEvent }): [string, string][] => {
      if (resourcePreEvent === undefined) return [];
      const { op, urn, type } = resourcePreEvent.metadata;
      const name = urn.split("::").at(-1) ?? urn;
      return type.startsWith("pulumi:") || op === "same" || op === "read" || op === "refresh" ? [] : [[name, op]];
    }),
  );
}

export interface Process {
  pid: number;
  command: string;
}

/** The living processes that a project's runs started, also those whose parent is gone: by their environment. */
export async function processes(project: Project): Promise<Process[]> {
  const mark = `PULUMI_HOME=${project.env.PULUMI_HOME}`;
  const found: Process[] = [];
  for (const pid of await readdir("/proc")) {
    if (!/^\d+$/.test(pid) || Number(pid) === process.pid) continue;
    const environment = await readFile(join("/proc", pid, "environ"), "utf8").catch(() => "");
    if (!environment.split("\0").includes(mark)) continue;
    const command = (await readFile(join("/proc", pid, "cmdline"), "utf8").catch(() => "")).replaceAll("\0", " ");
    if (command !== "") found.push({ pid: Number(pid), command });
  }
  return found;
}

/** The server of dynamic providers: the process in which our code runs. */
export async function servers(project: Project): Promise<Process[]> {
  return (await processes(project)).filter(({ command }) => command.includes("dynamic-provider"));
}

export async function sshs(project: Project): Promise<Process[]> {
  const all = await processes(project);
  const programs = await Promise.all(all.map(({ pid }) => readlink(`/proc/${pid}/exe`).catch(() => "")));
  return all.filter((_, i) => programs[i]?.endsWith("/ssh"));
}

export function kill(...all: Process[]): void {
  for (const { pid } of all) {
    try {
      process.kill(pid, "SIGKILL");
    } catch {
      // gone already
    }
  }
}

/** Waits for something to become true; a test's own timeout is the limit. */
export async function until(what: string, look: () => Promise<boolean>, seconds = 240): Promise<void> {
  const end = Date.now() + seconds * 1000;
  while (!(await look())) {
    if (Date.now() > end) throw new Error(`waited ${seconds} s in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}
