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
  /** The configuration does not tell the size of each of them. */
  unsized: boolean;
}

export function archivedConfig(text: string): Archived {
  const maps = [...text.matchAll(/^#qmdump#map:([^:]+):/gm)].map((m) => m[1] ?? "");
  const { values } = configOf(text.replace(/^#(?:qmdump|vzdump)#.*\n?/gm, ""));
  const sizes = maps.map((key) => bytesOf(/(?:^|,)size=([^,]+)/.exec(values[key] ?? "")?.[1] ?? ""));
  return {
    name: values.name,
    tags: values.tags,
    description: values.description,
    onboot: values.onboot === "1",
    template: values.template === "1",
    devices: hostDevices(values),
    virtualBytes: sizes.reduce((sum: number, size) => sum + (size ?? 0), 0),
    unsized: sizes.includes(undefined),
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

const UNPACK = `path=$(pvesm path "$1") || exit
unpacked() {
  case $path in
  *.zst) zstd -q -d -c "$path" ;;
  *.gz | *.tgz) gzip -d -c "$path" ;;
  *.lzo) lzop -d -c "$path" ;;
  *) cat "$path" ;;
  esac
}
`;

/** The whole size of the disks by the archive's own header; the rest of the archive is not read. */
export function deviceSizes(archive: string): Report<number> {
  return {
    why: `read the sizes of the disks in ${archive}`,
    argv: ["sh", "-c", `${UNPACK}unpacked 2>/dev/null | vma list -`, "vmbackup-sizes", archive],
    shown: ["vma", "list", archive],
    parse: (stdout) =>
      [...stdout.matchAll(/^DEV: dev_id=\d+ size: (\d+) /gm)].reduce((sum, [, size]) => sum + Number(size), 0),
    answer: z.number().min(1, "names no disk"),
  };
}

/** The data in a plain archive of that size, at least: each 59 clusters of 64 KiB have a head of 512 bytes, also those of holes. */
export function vmaData(size: number, virtualBytes: number): number {
  const heads = (Math.ceil(virtualBytes / (59 << 16)) + 256) * 512;
  return Math.max(0, size - heads - (64 << 10));
}

const ENDS = `path=$(pvesm path "$1") || exit
case $path in
*.zst) echo zst; od -An -v -tu1 -w18 -N18 "$path" ;;
*.gz | *.tgz) echo gz; tail -c 4 "$path" | od -An -v -tu1 ;;
esac`;

export interface Unpacked {
  bytes: number;
  /** False: it may be more, or nothing is told at all (vzdump compresses a stream, whose length zstd does not know before). */
  known: boolean;
}

/** What the head or the end of a compressed archive says of its size unpacked. */
export function unpackedSize(archive: string): Report<Unpacked> {
  return {
    why: `see how much data is in ${archive}`,
    argv: ["sh", "-c", ENDS, "vmbackup-ends", archive],
    shown: ["od", archive],
    parse: (stdout) => {
      const [kind, bytes = ""] = stdout.trim().split("\n");
      const numbers = Buffer.from(bytes.trim().split(/\s+/).map(Number));
      if (kind === "zst") return zstdContent(numbers);
      // Of gzip's last member, modulo 4 GiB.
      return { bytes: kind === "gz" && numbers.length === 4 ? numbers.readUInt32LE() : 0, known: false };
    },
    answer: z.object({ bytes: z.number(), known: z.boolean() }),
  };
}

/** The head of a zstd frame: RFC 8878, 3.1.1.1. */
export function zstdContent(head: Buffer): Unpacked {
  const unknown = { bytes: 0, known: false };
  if (head.length < 18 || head.readUInt32LE() !== 0xfd2fb528) return unknown;
  const descriptor = head.readUInt8(4);
  const single = (descriptor >> 5) & 1;
  const at = 5 + (single ? 0 : 1) + ([0, 1, 2, 4][descriptor & 3] ?? 0);
  switch (descriptor >> 6) {
    case 1:
      return { bytes: head.readUInt16LE(at) + 256, known: true };
    case 2:
      return { bytes: head.readUInt32LE(at), known: true };
    case 3:
      return at + 8 > head.length ? unknown : { bytes: Number(head.readBigUInt64LE(at)), known: true };
    default:
      return single ? { bytes: head.readUInt8(at), known: true } : unknown;
  }
}

const NAMES = `for v; do
  if text=$(pvesm extractconfig "$v" 2>/dev/null); then printf '%s\\t=%s\\n' "$v" "$(printf '%s\\n' "$text" | sed -n 's/^name: *//p' | head -n 1)"; fi
done`;

/** The guests' names in several archives; "" for a guest without one; an archive that cannot be read is not among them. */
export function archivedNames(archives: readonly string[]): Report<Map<string, string>> {
  return {
    why: "read the guests' names in the dumps",
    argv: ["sh", "-c", NAMES, "vmbackup-names", ...archives],
    shown: ["pvesm", "extractconfig", "ARCHIVE"],
    timeout: 60 + 30 * archives.length,
    parse: (stdout) =>
      new Map(
        stdout.split("\n").flatMap((line): [string, string][] => {
          const [volid, name] = line.split("\t=");
          return volid && name !== undefined ? [[volid, name.trim()]] : [];
        }),
      ),
    answer: z.map(z.string(), z.string()),
  };
}

const VERIFY = `set -o pipefail
${UNPACK}unpacked | vma verify -v -`;

/** Reads an archive from beginning to end and writes nothing. */
export function verifyArgv(archive: string): Argv {
  return ["bash", "-c", VERIFY, "vmbackup-verify", archive];
}
