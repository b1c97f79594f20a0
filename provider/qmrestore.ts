// qmrestore(1): its words, what its log tells, and what an archive's configuration tells before it.
import * as z from "zod";
import type { Argv, Report } from "./host.js";
import { configOf, hostDevices } from "./pve-guests.js";
import { bytesOf } from "./values.js";

export interface Restore {
  archive: string;
  vmId: number;
  storage: string;
  unique: boolean;
  pool?: string | undefined;
  bwlimit?: number | undefined;
}

/** Nothing that forces: an id that is taken, or was taken since we looked, makes it fail. */
export function restoreArgv({ archive, vmId, storage, unique, pool, bwlimit }: Restore): Argv {
  const options = ["--storage", storage, "--unique", unique ? "1" : "0"];
  if (pool !== undefined) options.push("--pool", pool);
  if (bwlimit !== undefined) options.push("--bwlimit", String(bwlimit));
  return ["qmrestore", archive, String(vmId), ...options];
}

/** What a restore did, by its own words. */
export interface Restored {
  /** False: it was refused before anything was made, because the id was taken or its lock was held. */
  began: boolean;
  /** Volumes that it made and did not remove again. */
  made: string[];
  /** Data that was read, without the holes. */
  bytes: number | undefined;
}

export function restoredBy(log: string): Restored {
  const removed = new Set([...log.matchAll(/^temporary volume '([^']+)' successfully removed$/gm)].map((m) => m[1]));
  const made = [...log.matchAll(/^new volume ID is '([^']+)'$/gm)].map((m) => m[1] ?? "");
  const total = /^total bytes read (\d+), sparse bytes (\d+)/m.exec(log);
  return {
    began: /^restore vma archive: /m.test(log) || !/already exists|can't lock file/.test(log),
    made: made.filter((volid) => !removed.has(volid)),
    bytes: total === null ? undefined : Number(total[1]) - Number(total[2]),
  };
}

/** What the configuration in an archive says. */
export interface Archived {
  name: string | undefined;
  tags: string | undefined;
  description: string | undefined;
  onboot: boolean;
  /** It was a template already: qmrestore makes it one again. */
  template: boolean;
  /** Options that name devices of the host it came from. */
  devices: string[];
  /** Of the disks that the archive holds, in bytes. */
  virtualBytes: number;
}

export function archivedConfig(text: string): Archived {
  const maps = [...text.matchAll(/^#qmdump#map:([^:]+):/gm)].map((m) => m[1] ?? "");
  const { values } = configOf(text.replace(/^#(?:qmdump|vzdump)#.*\n?/gm, ""));
  const sizes = maps.map((key) => bytesOf(/(?:^|,)size=([^,]+)/.exec(values[key] ?? "")?.[1] ?? "") ?? 0);
  return {
    name: values.name,
    tags: values.tags,
    description: values.description,
    onboot: values.onboot === "1",
    template: values.template === "1",
    devices: hostDevices(values),
    virtualBytes: sizes.reduce((sum, size) => sum + size, 0),
  };
}

/** The configuration in an archive. Fails at once for garbage, where a restore hangs for a minute. */
export function extractConfig(archive: string): Report<Archived> {
  return {
    why: `read the configuration in ${archive}`,
    argv: ["pvesm", "extractconfig", archive],
    parse: archivedConfig,
    answer: z.custom<Archived>((value) => value !== undefined),
    next: "The archive is damaged, incomplete or no backup of a virtual machine: choose another one. Nothing was changed.",
  };
}

const NAMES = `for v; do printf '%s\\t' "$v"; pvesm extractconfig "$v" 2>/dev/null | sed -n 's/^name: *//p' | head -n 1 | grep . || echo; done`;

/** The guests' names in several archives; "" where it cannot be read or has none. */
export function archivedNames(archives: readonly string[]): Report<Map<string, string>> {
  return {
    why: "read the guests' names in the dumps",
    argv: ["sh", "-c", NAMES, "vmbackup-names", ...archives],
    shown: ["pvesm", "extractconfig", "ARCHIVE"],
    timeout: 60 + 30 * archives.length,
    parse: (stdout) =>
      new Map(
        stdout.split("\n").flatMap((line): [string, string][] => {
          const [volid, name] = line.split("\t");
          return volid && name !== undefined ? [[volid, name.trim()]] : [];
        }),
      ),
    answer: z.map(z.string(), z.string()),
  };
}

const VERIFY = `set -eo pipefail
path=$(pvesm path "$1")
case $path in
*.zst) zstd -q -d -c "$path" ;;
*.gz | *.tgz) gzip -d -c "$path" ;;
*.lzo) lzop -d -c "$path" ;;
*) cat "$path" ;;
esac | vma verify -v -`;

/** Reads an archive from beginning to end and writes nothing. */
export function verifyArgv(archive: string): Argv {
  return ["bash", "-c", VERIFY, "vmbackup-verify", archive];
}
