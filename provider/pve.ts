// What several resources ask and tell a Proxmox VE node: the reports of pvesh, the forms of its values (booleans are 1 and 0,
// numbers are often text, lists are sets in random order), and writing under its locks.
import { createHash } from "node:crypto";
import * as z from "zod";
import { CommandFailed } from "./errors.js";
import type { Argv, Host, Report } from "./host.js";

// ---------------------------------------------------------------- values as Proxmox prints them

/** A boolean: 1 or 0, as a number or as text; a default is absent, and in a file the bare word means yes. */
export const flag = z
  .union([z.literal([0, 1]), z.literal(["", "0", "1"]), z.boolean()])
  .transform((value) => value === true || value === "" || Number(value) === 1);

/** A number, which Proxmox prints as text as often as not. */
export const numeral = z.union([z.number(), z.string().regex(/^-?[0-9]+(\.[0-9]+)?$/)]).transform(Number);

/** "b,a" or "b a;a" -> ["a", "b"]: lists come back in random order, and are compared as sets. */
export function setOf(text: string | undefined): string[] {
  return [...new Set((text ?? "").split(/[,;\s]+/).filter((word) => word !== ""))].sort();
}

const textSet = z.string().transform(setOf);

/** "keep-last=3,keep-daily=7" -> { "keep-last": "3", "keep-daily": "7" }. A first word without a key gets `defaultKey`. */
export function properties(text: string, defaultKey = ""): Record<string, string> {
  const pairs = text.split(",").flatMap((part) => {
    const word = part.trim();
    const at = word.indexOf("=");
    if (word === "") return [];
    return [at < 0 ? [defaultKey, word] : [word.slice(0, at), word.slice(at + 1)]];
  });
  return Object.fromEntries(pairs);
}

/** The other way round; keys in the order of the object, undefined ones left out. */
export function propertyString(values: Readonly<Record<string, string | number | boolean | undefined>>): string {
  return Object.entries(values)
    .flatMap(([key, value]) =>
      value === undefined ? [] : [`${key}=${typeof value === "boolean" ? Number(value) : value}`],
    )
    .join(",");
}

/** The owner in a mark of ours, as encodeURIComponent wrote it; what is no such text is no mark of ours, and stays as it is. */
export function ownerIn(mark: string): string {
  try {
    return decodeURIComponent(mark);
  } catch {
    return mark;
  }
}

// ---------------------------------------------------------------- inputs that several resources take

/** Decimal, 100 to 999999999 (pve-common, JSONSchema.pm: pve_verify_vmid). */
export const vmidSchema = z
  .number({ error: (issue) => (issue.input === undefined ? "is required" : "is a guest id: a whole number") })
  .int("is a guest id: a whole number")
  .min(100, "is a guest id: 100 to 999999999")
  .max(999999999, "is a guest id: 100 to 999999999");

/** A block of ids, both ends inclusive. */
export const vmIdsSchema = z
  .strictObject({ lower: vmidSchema, upper: vmidSchema })
  .refine(({ lower, upper }) => lower <= upper, { path: ["upper"], error: "is below `lower`" });
export type VmIds = z.output<typeof vmIdsSchema>;

/** pve-common, JSONSchema.pm: parse_id. */
export const storageIdSchema = z
  .string({ error: (issue) => (issue.input === undefined ? "is required" : "is a storage id: text") })
  .regex(
    /^[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]$/,
    "is a storage id: a letter, then letters, digits and - _ . , last a letter or digit, at least 2 characters",
  );

export const nodeNameSchema = z
  .string()
  .regex(/^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$/, "is a node's name: letters, digits and inner hyphens");

/** In the order in which Proxmox evaluates them. */
const KEEP = {
  keepLast: "keep-last",
  keepHourly: "keep-hourly",
  keepDaily: "keep-daily",
  keepWeekly: "keep-weekly",
  keepMonthly: "keep-monthly",
  keepYearly: "keep-yearly",
} as const;
type Keep = keyof typeof KEEP;
const KEEPS = Object.keys(KEEP) as Keep[];

const count = z.number("is a whole number, 0 or more").int("is a whole number").min(0, "is 0 or more").optional();

/**
 * Which backups stay. Normal form: `{ keepAll: true }`, or the numbers above zero. Nothing but zeros would keep everything (so
 * Proxmox takes it), which nobody means who writes it: refused.
 */
export const retentionSchema = z
  .strictObject({
    keepAll: z.literal(true, "is `true`, or left out").optional(),
    keepLast: count,
    keepHourly: count,
    keepDaily: count,
    keepWeekly: count,
    keepMonthly: count,
    keepYearly: count,
  })
  .transform((value, context): Retention => {
    const given = KEEPS.filter((keep) => value[keep] !== undefined);
    if (value.keepAll === true) {
      if (given.length === 0) return { keepAll: true };
      context.addIssue({
        code: "custom",
        path: ["keepAll"],
        message: `cannot stand together with ${given.join(", ")}`,
      });
      return z.NEVER;
    }
    const numbers = Object.fromEntries(given.flatMap((keep) => ((value[keep] ?? 0) > 0 ? [[keep, value[keep]]] : [])));
    if (Object.keys(numbers).length > 0) return numbers;
    context.addIssue(
      "names no number above 0, and Proxmox would keep everything: write `keepAll: true` if you mean it",
    );
    return z.NEVER;
  });
export type Retention = { keepAll: true } | ({ keepAll?: undefined } & { [K in Keep]?: number | undefined });

/** For --prune-backups. */
export function pruneBackups(retention: Retention): string {
  if (retention.keepAll === true) return "keep-all=1";
  return propertyString(Object.fromEntries(KEEPS.map((keep) => [KEEP[keep], retention[keep]])));
}

/** What `prune-backups` says: text on a storage, an object on a job. Nothing and only zeros mean that all stay. */
export function retentionOf(found: string | Readonly<Record<string, unknown>> | undefined): Retention {
  const values: Readonly<Record<string, unknown>> = typeof found === "string" ? properties(found) : (found ?? {});
  const numbers = KEEPS.flatMap((keep) => {
    const number = Number(values[KEEP[keep]] ?? 0);
    return number > 0 ? [[keep, number]] : [];
  });
  return numbers.length === 0 ? { keepAll: true } : Object.fromEntries(numbers);
}

// ---------------------------------------------------------------- the questions

/** Before a script reads the files of /etc/pve: an empty mount point is no answer. */
export const MOUNTED = `[ -d /etc/pve/local/. ] || { echo "/etc/pve is not mounted: no Proxmox VE node, or its pve-cluster service is down" >&2; exit 1; }
`;

/** `pvesh get PATH`, as JSON. The node in a path is `localhost`, which Proxmox takes for the node that is asked. */
export function pvesh<T>(why: string, path: string, answer: z.ZodType<T>, ...options: string[]): Report<T> {
  return { why, argv: ["pvesh", "get", path, ...options, "--output-format", "json"], answer };
}

const storageRow = z.object({
  storage: z.string(),
  type: z.string(),
  content: textSet.optional(),
  path: z.string().optional(),
  server: z.string().optional(),
  export: z.string().optional(),
  nodes: textSet.optional(),
  disable: flag.optional(),
  options: z.string().optional(),
  bwlimit: z.string().optional(),
  preallocation: z.string().optional(),
  "prune-backups": z.string().optional(),
  "max-protected-backups": numeral.optional(),
  "content-dirs": z.string().optional(),
  /** Of lvm, lvmthin, zfspool: where the volumes are. */
  vgname: z.string().optional(),
  thinpool: z.string().optional(),
  pool: z.string().optional(),
  /** Another storage's volume that this one needs. */
  base: z.string().optional(),
  /** Of zfspool: volumes reserve nothing. */
  sparse: flag.optional(),
});
export type Storage = z.output<typeof storageRow>;

// Proxmox has this one also where no file names it, or gives it another directory (PVE/Storage/Plugin.pm: parse_config).
const LOCAL = {
  storage: "local",
  type: "dir",
  path: "/var/lib/vz",
  content: "backup,images,iso,rootdir,snippets,vztmpl",
  "prune-backups": "keep-all=1",
};

/** Every storage that is defined, as storage.cfg has it: 20 ms, where pvesh wants 1.5 s. */
export const storages: Report<Storage[]> = {
  why: "list the storages",
  argv: ["sh", "-c", `${MOUNTED}[ ! -e /etc/pve/storage.cfg ] || cat /etc/pve/storage.cfg`, "vmbackup-storages"],
  shown: ["cat", "/etc/pve/storage.cfg"],
  parse: (stdout) => {
    const rows = sections(stdout).map(({ id, type, values }) => ({ ...values, storage: id, type }));
    const isLocal = (row: Record<string, string>) =>
      row.storage === "local" && row.type === "dir" && (row.path ?? LOCAL.path) === LOCAL.path;
    return [...(rows.some(isLocal) ? [] : [LOCAL]), ...rows.filter((row) => row.storage !== "local" || isLocal(row))];
  },
  answer: z.array(storageRow),
};

const storageState = z.object({
  storage: z.string(),
  type: z.string(),
  content: textSet,
  /** Not disabled, and not only for other nodes. */
  enabled: flag.default(false),
  /**
   * Mounted and answering. THE FIRST ANSWER AFTER A MOUNT SAYS NO: the call that mounts has read the mount table before
   * (PVE/Storage.pm: storage_info). Ask twice before you believe it.
   */
  active: flag.default(false),
  total: numeral.default(0),
  used: numeral.default(0),
  avail: numeral.default(0),
});
export type StorageState = z.output<typeof storageState>;

/** State and room of every storage of this node, in bytes. Activates (mounts) what is enabled. */
export const storageStates: Report<StorageState[]> = pvesh(
  "look at the state of the storages",
  "/nodes/localhost/storage",
  z.array(storageState),
);

/** The states, asked again when something that is enabled is not active: the first question mounts it and does not see it yet. */
export async function settledStates(host: Host): Promise<StorageState[]> {
  const states = await host.ask(storageStates);
  return states.some(({ enabled, active }) => enabled && !active) ? await host.ask(storageStates, "again") : states;
}

const volume = z.object({
  volid: z.string(),
  content: z.string(),
  format: z.string(),
  size: numeral,
  /** Of an image, where the storage tells it: what it takes now. */
  used: numeral.optional(),
  vmid: numeral.optional(),
  /** Of a backup: qemu or lxc. */
  subtype: z.string().optional(),
  /** Seconds since the epoch; from the archive's name where it has a date. */
  ctime: numeral.optional(),
  notes: z.string().optional(),
  protected: flag.optional(),
  /** Of an image: the volume that it is a linked clone of. */
  parent: z.string().nullish(),
});
export type Volume = z.output<typeof volume>;

/** What lies on a storage; fails when it is disabled or does not answer. No integrity check: empty archives are listed too. */
export function contentOf(storage: string, content?: string): Report<Volume[]> {
  const only = content === undefined ? [] : ["--content", content];
  return pvesh(
    `list what is on the storage ${storage}`,
    `/nodes/localhost/storage/${storage}/content`,
    z.array(volume),
    ...only,
  );
}

/** The same; undefined where the storage does not answer, so that nothing is known. */
export async function contentIfAny(host: Host, storage: string, content?: string): Promise<Volume[] | undefined> {
  try {
    return await host.ask(contentOf(storage, content));
  } catch (error) {
    if (error instanceof CommandFailed) return undefined;
    throw error;
  }
}

/** Which of a storage's backups a retention would remove now, whatever guest they are of. */
export function wouldPrune(storage: string, retention: string): Report<{ volid: string; vmid?: number | undefined }[]> {
  return pvesh(
    "see what the retention would remove",
    `/nodes/localhost/storage/${storage}/prunebackups`,
    z
      .array(z.object({ volid: z.string(), vmid: numeral.optional(), mark: z.string() }))
      .transform((rows) => rows.filter(({ mark }) => mark === "remove")),
    "--prune-backups",
    retention,
  );
}

const backupJob = z.looseObject({
  id: z.string(),
  enabled: flag.default(true),
  schedule: z.string().optional(),
  storage: z.string().optional(),
  comment: z.string().optional(),
  node: z.string().optional(),
  /** The selection: `vmid` (text as it was given), or `all` without `exclude`, or `pool`. */
  vmid: z.string().optional(),
  all: flag.optional(),
  exclude: z.string().optional(),
  pool: z.string().optional(),
  "next-run": numeral.optional(),
  "repeat-missed": flag.optional(),
  "prune-backups": z.union([z.string(), z.record(z.string(), z.unknown())]).optional(),
});
export type BackupJob = z.output<typeof backupJob>;

/** Every vzdump job; options of vzdump that are not named here are there as Proxmox prints them. */
export const backupJobs: Report<BackupJob[]> = pvesh("list the backup jobs", "/cluster/backup", z.array(backupJob));

export interface Datacenter {
  /** Name of the node that was asked. */
  node: string;
  /** Whether it is a member of a cluster. */
  clustered: boolean;
  /** The next-id range as Proxmox has it: lower inclusive, UPPER EXCLUSIVE. */
  nextId: { lower?: number | undefined; upper?: number | undefined } | undefined;
}

// Three facts in 20 ms, where pvesh wants 1.5 s for each.
const DATACENTER = `${MOUNTED}readlink /etc/pve/local; [ -e /etc/pve/corosync.conf ] && echo member || echo alone
[ ! -e /etc/pve/datacenter.cfg ] || cat /etc/pve/datacenter.cfg`;

const nextId = z.object({ lower: numeral.optional(), upper: numeral.optional() });

export const datacenter: Report<Datacenter> = {
  why: "read the node's name and the datacenter's options",
  argv: ["sh", "-c", DATACENTER, "vmbackup-datacenter"],
  shown: ["cat", "/etc/pve/datacenter.cfg"],
  parse: (stdout) => {
    const [local = "", member, ...options] = stdout.split("\n");
    const range = options.flatMap((line) => /^next-id:\s*(.*\S)\s*$/.exec(line)?.slice(1) ?? [])[0];
    return {
      node: local.replace(/^nodes\//, ""),
      clustered: member === "member",
      nextId: range === undefined ? undefined : properties(range),
    };
  },
  answer: z
    .object({ node: nodeNameSchema, clustered: z.boolean(), nextId: nextId.optional() })
    .transform(({ nextId, ...node }): Datacenter => ({ ...node, nextId })),
};

const guest = z.object({
  vmid: numeral,
  type: z.enum(["qemu", "lxc"]),
  node: z.string(),
  /** Absent until pvestatd has told it. */
  name: z.string().optional(),
  status: z.string().optional(),
  template: flag.optional(),
  pool: z.string().optional(),
});
export type Guest = z.output<typeof guest>;

/** Every guest and container, of all nodes of a cluster. */
export const guests: Report<Guest[]> = pvesh("list the guests", "/cluster/resources", z.array(guest), "--type", "vm");

/** Names of all nodes: one, unless it is a member of a cluster. */
export const nodes: Report<string[]> = pvesh(
  "list the nodes",
  "/nodes",
  z.array(z.object({ node: z.string() })).transform((rows) => rows.map(({ node }) => node)),
);

export const pools: Report<string[]> = pvesh(
  "list the pools",
  "/pools",
  z.array(z.object({ poolid: z.string() })).transform((rows) => rows.map(({ poolid }) => poolid)),
);

const included = z.object({
  id: numeral,
  name: z.string().optional(),
  /** unknown: the job names a guest that does not exist. */
  type: z.enum(["qemu", "lxc", "unknown"]),
  children: z
    .array(z.object({ id: z.string(), name: z.string().optional(), included: flag, reason: z.string().default("") }))
    .default([]),
});
export type Included = z.output<typeof included>;

/** The guests of a backup job with their volumes; one that is listed twice comes twice. */
export function includedVolumes(job: string): Report<Included[]> {
  return pvesh(
    `list what the backup job ${job} covers`,
    `/cluster/backup/${job}/included_volumes`,
    z.object({ children: z.array(included) }).transform(({ children }) => children),
  );
}

/** Version of Proxmox VE, e.g. { version: "9.2.11" }. */
export const version = pvesh("read the version of Proxmox VE", "/version", z.object({ version: z.string() }));

/** Whether a version ("8.2.5") is at least the given one. */
export function isAtLeast(found: string, wanted: string): boolean {
  return found.localeCompare(wanted, "en", { numeric: true }) >= 0;
}

const task = z.object({
  upid: z.string(),
  type: z.string(),
  id: z.string().nullish(),
  starttime: numeral,
  endtime: numeral.optional(),
  /** OK, or the error; absent while it runs. */
  status: z.string().optional(),
});
export type Task = z.output<typeof task>;

/** Tasks that run, and some that ended not long ago (those have a status). */
export const activeTasks: Report<Task[]> = pvesh(
  "list the running tasks",
  "/nodes/localhost/tasks",
  z.array(task),
  "--source",
  "active",
);

// ---------------------------------------------------------------- writing

/** The files of /etc/pve that Proxmox locks as a whole. Jobs take two locks, so they queue longest. */
export type Configuration = "storage.cfg" | "jobs.cfg" | "datacenter.cfg";

// Proxmox waits 10 s for the lock of a configuration file, and a killed holder keeps it for 120 s: so writers of ours queue on
// the node, and its lock messages are retried until a lock that was abandoned has certainly been broken. Nothing was changed by
// a call that did not get the lock. Descriptor 9 must not reach the command: a helper that it leaves running (rpc.statd) would
// hold the queue for ever.
/**
 * Functions of shell scripts. `writer FILE COMMAND ...` runs a writer; `guarded ID HASH COMMAND ...` runs one that changes a storage,
 * when its section of storage.cfg is still as it was seen, and with the digest: the digest alone is that of the whole file, which
 * changes whenever a writer of ours changes another storage.
 */
export const WRITER = `
writer() (
  file=$1; shift
  mkdir -p /run/lock/pulumi-vmbackup || exit
  exec 9>"/run/lock/pulumi-vmbackup/$file" 3>&1
  flock --wait 600 9 || { echo "the queue of writers of $file did not move for 600 s" >&2; exit 1; }
  end=$(($(date +%s) + 150))
  while :; do
    said=$("$@" 2>&1 >&3 3>&- 9>&-); code=$?
    if [ "$code" -ne 0 ] && [ "$(date +%s)" -lt "$end" ]; then
      case $said in *"got lock request timeout"*) sleep 1; continue ;; esac
    fi
    [ -z "$said" ] || printf '%s\\n' "$said" >&2
    exit "$code"
  done
)
guarded() {
  id=$1 hash=$2; shift 2
  for again in 1 2 3; do
    now=$(awk -v id="$id" '/^[a-z][a-z0-9]*:/ { on = $2 == id } on && !/^#/' /etc/pve/storage.cfg | tr -s ', \\t' '\\n' | grep . | LC_ALL=C sort | sha1sum)
    if [ "\${now%% *}" != "$hash" ]; then
      echo "the storage $id was changed since it was looked at; it was left as it is now" >&2; return 75
    fi
    digest=$(sha1sum </etc/pve/storage.cfg)
    case $2 in
      set) said=$("$@" --digest "\${digest%% *}" 2>&1); code=$? ;;
      *) said=$("$@" 2>&1); code=$? ;;
    esac
    case $code:$said in 0:*) break ;; *"detected modified configuration"*) ;; *) break ;; esac
  done
  [ -z "$said" ] || printf '%s\\n' "$said" >&2
  return "$code"
}
`;

/** Seconds that a writer may need: the queue before it, and the retries. For the `timeout` of a step. */
export const WRITE_SECONDS = 900;

/** A command that changes a configuration file of /etc/pve: one at a time per node, Proxmox's lock messages retried. */
export function writing(file: Configuration, argv: Argv): Argv {
  return ["sh", "-c", `${WRITER}writer "$@"`, "write", file, ...argv];
}

// ---------------------------------------------------------------- the configuration files themselves

/** One `type: id` of storage.cfg or jobs.cfg, with the lines below it. */
export interface Section {
  type: string;
  id: string;
  values: Record<string, string>;
  /** All of its words in order, for a hash: lists are written in random order at every change. */
  words: string[];
}

/**
 * The sections of storage.cfg or jobs.cfg: tens of milliseconds where pvesh takes seconds, and the one way to see every option.
 * A flag without a value has the value "".
 */
export function sections(text: string): Section[] {
  const all: Section[] = [];
  for (const line of text.split("\n")) {
    const head = /^([a-z][a-z0-9]*): *(\S+)\s*$/.exec(line);
    if (head !== null) all.push({ type: head[1] ?? "", id: head[2] ?? "", values: {}, words: [] });
    const section = all.at(-1);
    if (section === undefined || line.startsWith("#")) continue;
    section.words.push(...line.split(/[,\s]+/).filter((word) => word !== ""));
    const [, key, value = ""] = /^\s+(\S+)(?:\s+(.*?))?\s*$/.exec(line) ?? [];
    if (key !== undefined) section.values[key] = value;
  }
  for (const section of all) section.words.sort();
  return all;
}

/** What a section says, whatever the order of its lists; `guarded` of WRITER finds the same. */
export function sectionHash(section: Section): string {
  return createHash("sha1")
    .update(section.words.map((word) => `${word}\n`).join(""))
    .digest("hex");
}
