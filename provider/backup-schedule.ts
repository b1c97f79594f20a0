// BackupSchedule on Proxmox VE: a vzdump job of the datacenter (/etc/pve/jobs.cfg), which pvescheduler runs.
//
// Proxmox checks little when a job is made: neither storage nor guests nor node, and a guest that is listed twice is backed up
// twice. So that is checked here. A change always sends the whole selection: `--exclude` alone turns a pool's job into one of all
// guests (PVE/API2/Backup.pm: update_job).
import { createHash } from "node:crypto";
import * as z from "zod";
import { askStatus, type Status } from "./backup-schedule-status.js";
import { clockChanges, nextOnTheWall, parseEvent, sameEvent, schedule, timeZone } from "./calendar-event.js";
import type { Definition, Observed, Purpose, Step } from "./engine.js";
import { same } from "./engine-values.js";
import { Refused } from "./errors.js";
import type { Host } from "./host.js";
import { hostSchema } from "./host.js";
import type { Line } from "./host-ledger.js";
import * as pve from "./pve.js";
import { notYet } from "./values.js";

// ---------------------------------------------------------------- inputs: the options of vzdump

/** How an option of vzdump stands in the program, on the command line and in the job as Proxmox prints it. */
interface Option {
  /** Proxmox's name. */
  key: string;
  input: z.ZodType;
  /** One word, or one for each time that the option is given. */
  words(value: unknown): string | string[];
  /** The input's value; undefined when the job says nothing. */
  found(raw: unknown): unknown;
}

const line = (most: number) =>
  z
    .string("is text")
    .min(1, "is empty: leave it out")
    .max(most, `has at most ${most} characters`)
    .refine((text) => !/[\r\n]/.test(text), "is one line");

const text = (key: string, input: z.ZodType): Option => ({ key, input, words: String, found: String });

const oneOf = (key: string, ...values: string[]): Option =>
  text(key, z.enum(values, `is one of ${values.map((value) => JSON.stringify(value)).join(", ")}`));

const whole = (key: string, most?: number): Option => {
  const range = most === undefined ? "0 or more" : `0 to ${most}`;
  const input = z.number(`is a whole number, ${range}`).int("is a whole number").min(0, `is ${range}`);
  return { key, input: most === undefined ? input : input.max(most, `is ${range}`), words: String, found: Number };
};

const yesNo = (key: string): Option => ({
  key,
  input: z.boolean("is true or false"),
  words: (value) => (value === true ? "1" : "0"),
  found: (raw) => pve.flag.parse(raw),
});

/** A property string with names of its own: fleecing, performance. Read back as an object, in older versions as text. */
function properties(key: string, input: z.ZodType, names: Readonly<Record<string, string>>, first: string): Option {
  return {
    key,
    input,
    words: (value) => {
      const fields = value as Record<string, string | number | boolean | undefined>;
      return pve.propertyString(
        Object.fromEntries(Object.entries(names).map(([name, property]) => [property, fields[name]])),
      );
    },
    found: (raw) => {
      const fields = typeof raw === "string" ? pve.properties(raw, first) : (raw as Record<string, unknown>);
      const read = (name: string, value: unknown) => (name === "enabled" ? pve.flag.parse(value) : value);
      return Object.fromEntries(
        Object.entries(names).flatMap(([name, property]) => {
          const value = fields[property];
          if (value === undefined) return [];
          return [
            [
              name,
              typeof value === "string" && /^[0-9]+$/.test(value) && name !== "enabled"
                ? Number(value)
                : read(name, value),
            ],
          ];
        }),
      );
    },
  };
}

const positive = z.number("is a whole number, 1 or more").int("is a whole number").min(1, "is 1 or more");

const VARIABLES = ["cluster", "guestname", "node", "vmid"];

const notes = line(1024)
  .refine((note) => /^(?:[^\\]|\\[n\\])*$/.test(note), "knows only the escapes \\n (a new line) and \\\\ (a backslash)")
  .refine((note) => [...note.matchAll(/\{\{([^\s{}]+)\}\}/g)].every(([, name]) => VARIABLES.includes(name ?? "")), {
    error: `knows only the variables ${VARIABLES.map((name) => `{{${name}}}`).join(", ")}`,
  });

const mailTo = z
  .array(
    z.string().regex(/^[^\s,;]+$/, "is a mail address or a user of Proxmox"),
    "is a list of mail addresses or users",
  )
  .min(1, "is empty: leave it out")
  .transform((list) => [...new Set(list)].sort());

/** Of vzdump(1), in camel case. */
const OPTIONS = {
  mode: oneOf("mode", "snapshot", "suspend", "stop"),
  compress: oneOf("compress", "0", "gzip", "lzo", "zstd"),
  zstd: whole("zstd"),
  bwlimit: whole("bwlimit"),
  ionice: whole("ionice", 8),
  lockwait: whole("lockwait"),
  stopwait: whole("stopwait"),
  notesTemplate: text("notes-template", notes),
  protected: yesNo("protected"),
  fleecing: properties(
    "fleecing",
    z
      .strictObject({ enabled: z.boolean("is true or false"), storage: pve.storageIdSchema.optional() })
      .refine(({ enabled, storage }) => !enabled || storage !== undefined, {
        path: ["storage"],
        error: "is required when fleecing is enabled: a fast local storage",
      }),
    { enabled: "enabled", storage: "storage" },
    "enabled",
  ),
  performance: properties(
    "performance",
    z.strictObject({ maxWorkers: positive.max(256, "is 1 to 256").optional(), pbsEntriesMax: positive.optional() }),
    { maxWorkers: "max-workers", pbsEntriesMax: "pbs-entries-max" },
    "",
  ),
  stdexcludes: yesNo("stdexcludes"),
  excludePath: {
    key: "exclude-path",
    input: z.array(line(4096), "is a list of paths").min(1, "is empty: leave it out"),
    words: (value) => value as string[],
    found: (raw) => (Array.isArray(raw) ? raw.map(String) : [String(raw)]),
  },
  script: text("script", line(4096).startsWith("/", "is an absolute path on the node")),
  node: text("node", pve.nodeNameSchema),
  notificationMode: oneOf("notification-mode", "auto", "legacy-sendmail", "notification-system"),
  mailTo: {
    key: "mailto",
    input: mailTo,
    words: (v) => (v as string[]).join(","),
    found: (raw) => pve.setOf(String(raw)),
  },
  pbsChangeDetectionMode: oneOf("pbs-change-detection-mode", "legacy", "data", "metadata"),
} satisfies Record<string, Option>;
type OptionName = keyof typeof OPTIONS;
const optionNames = Object.keys(OPTIONS) as OptionName[];

interface VzdumpOptions extends Partial<Record<OptionName, unknown>> {
  protected?: boolean;
  fleecing?: { enabled: boolean; storage?: string };
  node?: string;
  notificationMode?: string;
  mailTo?: string[];
}

const vzdump = z
  .strictObject(Object.fromEntries(Object.entries(OPTIONS).map(([name, { input }]) => [name, input.optional()])))
  .transform((options) => options as VzdumpOptions);

// ---------------------------------------------------------------- inputs: the rest

/** Each id once, sorted: Proxmox keeps a list as it was typed, and backs a guest up as often as it stands there. */
const ids = z.array(pve.vmidSchema, "is a list of guest ids").transform((list, context) => {
  const twice = list.findIndex((id, i) => list.indexOf(id) < i);
  if (twice < 0) return [...list].sort((a, b) => a - b);
  context.addIssue({ code: "custom", path: [twice], message: `${list[twice]} stands here twice` });
  return z.NEVER;
});

type Guests = "all" | number[] | { allExcept: number[] } | { pool: string };

const guests = z
  .union(
    [
      z.literal("all"),
      ids.refine((list) => list.length > 0, 'is empty: a job backs up something; give ids, "all" or a pool'),
      z.strictObject({ allExcept: ids }),
      z.strictObject({ pool: line(1024) }),
    ],
    { error: 'is "all", a list of guest ids, { allExcept: ids } or { pool }' },
  )
  .transform(
    (value): Guests =>
      typeof value === "object" && "allExcept" in value && value.allExcept.length === 0 ? "all" : value,
  );

/** Proxmox takes 512 characters; the owner's mark needs some. */
const comment = line(300);

const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean().optional(),
  // Longer ones can be created, and then neither read nor deleted (PVE/VZDump.pm: pve-backup-jobid).
  name: z
    .string()
    .regex(
      /^[A-Za-z][A-Za-z0-9_-]+$/,
      "is a job id: a letter, then letters, digits, _ and -, at least 2 characters (default: the resource's name)",
    )
    .max(50, "is a job id: at most 50 characters, since Proxmox never finds a longer one again"),
  schedule,
  enabled: z.boolean("is true or false").optional(),
  catchUp: z.boolean("is true or false").optional(),
  comment: comment.optional(),
  storage: pve.storageIdSchema,
  guests: guests.optional(),
  retention: pve.retentionSchema.optional(),
  vzdump: vzdump.optional(),
  directory: notYet("directory (a schedule on a libvirt host)").optional(),
  libvirt: notYet("libvirt (a schedule on a libvirt host)").optional(),
});
type Want = z.output<typeof inputs>;

// ---------------------------------------------------------------- the owner's mark: the end of the comment

const MARK = "[pulumi-vmbackup ";

function markOf(owner: string): string {
  const encoded = Array.from(Buffer.from(owner), (byte) => {
    const char = String.fromCharCode(byte);
    return /[A-Za-z0-9_+.\-/!:&#=@]/.test(char) ? char : `%${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  }).join("");
  const name = encoded.length <= 180 ? encoded : `sha256:${createHash("sha256").update(owner).digest("hex")}`;
  return `${MARK}${name}]`;
}

function unmarked(found: string | undefined): { comment: string | undefined; owner: string | undefined } {
  const [, said = found, name] = /^(?:(.*?) ?)\[pulumi-vmbackup ([^\]]*)\]$/.exec(found ?? "") ?? [];
  return { comment: said || undefined, owner: name === undefined ? undefined : pve.ownerIn(name) };
}

/** A long owner stands in its mark as a hash, so that marks are compared, not owners. */
const isMarked = (job: pve.BackupJob, owner: string) => job.comment?.endsWith(markOf(owner)) === true;

// ---------------------------------------------------------------- a job's settings, as we want them and as Proxmox prints them

/** By Proxmox's name; what is not there is left to Proxmox. */
type Settings = Record<string, unknown>;

/** What adoption left as it was, and the program still does not declare: an input, or one option of `vzdump`. */
function isKept(path: string, want: Want, line: Line | undefined): boolean {
  const [field, option] = path.split(".") as [keyof Want, OptionName?];
  if (want[field] === undefined && line?.kept.includes(field)) return true;
  return option !== undefined && want.vzdump?.[option] === undefined && line?.kept.includes(path) === true;
}

function declared(want: Want): Settings {
  const settings: Settings = {
    schedule: want.schedule,
    storage: want.storage,
    enabled: want.enabled ?? true,
    "repeat-missed": want.catchUp ?? false,
    guests: want.guests ?? "all",
    "prune-backups": want.retention,
  };
  for (const name of optionNames) settings[OPTIONS[name].key] = want.vzdump?.[name];
  return settings;
}

/** The input that a setting of Proxmox comes from. */
const PATHS: Record<string, string> = {
  schedule: "schedule",
  storage: "storage",
  enabled: "enabled",
  "repeat-missed": "catchUp",
  guests: "guests",
  "prune-backups": "retention",
  ...Object.fromEntries(optionNames.map((name) => [OPTIONS[name].key, `vzdump.${name}`])),
};
const pathOf = (key: string) => PATHS[key] ?? key;

function printed(job: pve.BackupJob): Settings {
  const settings: Settings = {
    schedule: job.schedule,
    storage: job.storage,
    enabled: job.enabled,
    "repeat-missed": job["repeat-missed"] ?? false,
    guests: selectionOf(job),
    "prune-backups": job["prune-backups"] === undefined ? undefined : pve.retentionOf(job["prune-backups"]),
  };
  for (const name of optionNames) {
    const { key, found } = OPTIONS[name];
    settings[key] = job[key] === undefined ? undefined : found(job[key]);
  }
  return settings;
}

/** A job with both `all` and `pool` (which Proxmox stores) is neither of ours. */
function selectionOf(job: pve.BackupJob): unknown {
  const idsOf = (list: string) =>
    list
      .split(/[,;\s]+/)
      .filter((id) => id !== "")
      .map(Number)
      .sort((a, b) => a - b);
  if (job.vmid !== undefined) return idsOf(job.vmid);
  if (job.pool !== undefined) return job.all ? { all: true, pool: job.pool } : { pool: job.pool };
  return job.exclude === undefined ? "all" : { allExcept: idsOf(job.exclude) };
}

function isSetting(key: string, wanted: unknown, found: unknown): boolean {
  if (key === "schedule" && typeof found === "string") return sameEvent(String(wanted), found);
  return same(wanted, found);
}

/** Free text stands in one word with its option, so that one that starts with a hyphen is no option. */
function words(key: string, value: unknown): string[] {
  if (key === "guests") return selection(value as Guests);
  if (key === "prune-backups") return ["--prune-backups", pve.pruneBackups(value as pve.Retention)];
  if (typeof value === "boolean") return [`--${key}`, value ? "1" : "0"];
  const option = optionNames.map((name) => OPTIONS[name]).find((o) => o.key === key);
  const given = option === undefined ? String(value) : option.words(value);
  if (Array.isArray(given)) return given.map((word) => `--${key}=${word}`);
  return ["comment", "notes-template", "script"].includes(key) ? [`--${key}=${given}`] : [`--${key}`, given];
}

function selection(value: Guests): string[] {
  if (value === "all") return ["--all", "1"];
  if (Array.isArray(value)) return ["--vmid", value.join(",")];
  if ("pool" in value) return ["--pool", value.pool];
  return ["--all", "1", "--exclude", value.allExcept.join(",")];
}

// ---------------------------------------------------------------- observe

interface Have extends Observed<never> {
  job: pve.BackupJob | undefined;
  comment: string | undefined;
  /** What a change is checked against; asked when there is one to make. */
  node?: NodeFacts;
  /** Asked when it is told: of what is settled, and by a read. */
  status?: Status;
  zone?: string;
}

interface NodeFacts {
  name: string;
  nodes: string[];
  storages: pve.Storage[];
  /** Asked for where the program names some. */
  guests: pve.Guest[];
  pools: string[];
  /** Asked at adoption only: the backups that the declared retention would remove at the job's next run. */
  pruned: string[];
}

async function observe(want: Want, line: Line | undefined, host: Host, purpose?: Purpose): Promise<Have> {
  const jobs = await host.ask(pve.backupJobs);
  const job = jobs.find(({ id }) => id === want.name);
  const { comment, owner } = unmarked(job?.comment);
  const isOurs = job !== undefined && line !== undefined && isMarked(job, line.owner);
  const have: Have = { exists: job !== undefined, job, comment, owner: isOurs ? line.owner : owner };
  const due = changes(want, have, line);
  const settled = job !== undefined && Object.keys(due).length === 0;
  if (purpose === "plan" && !settled) {
    have.node = await askNode(want, host);
    if (want.adopt && job !== undefined && !isOurs && due["prune-backups"] !== undefined)
      have.node.pruned = await askPruned(want, job, have.node, host);
  }
  if (job !== undefined && (purpose === "plan" ? settled : purpose === "tell"))
    [have.status, have.zone] = await Promise.all([
      askStatus(job, host),
      purpose === "plan" ? host.ask(timeZone) : undefined,
    ]);
  return have;
}

async function askNode(want: Want, host: Host): Promise<NodeFacts> {
  const selectsPool = typeof want.guests === "object" && "pool" in want.guests;
  const [{ node: name }, nodes, storages, guests, pools] = await Promise.all([
    host.ask(pve.datacenter),
    want.vzdump?.node === undefined ? [] : host.ask(pve.nodes),
    host.ask(pve.storages),
    Array.isArray(want.guests) ? host.ask(pve.guests) : [],
    selectsPool ? host.ask(pve.pools) : [],
  ]);
  return { name, nodes: nodes.length === 0 ? [name] : nodes, storages, guests, pools, pruned: [] };
}

/** Of the guests that the job is for: a run prunes no others. */
async function askPruned(want: Want, job: pve.BackupJob, node: NodeFacts, host: Host): Promise<string[]> {
  if (want.retention === undefined || storageTrouble(want.storage, "backup", node.storages, node.name) !== undefined)
    return [];
  const selected = (want.guests ?? selectionOf(job)) as Guests;
  const isFor = ({ vmid, pool }: pve.Guest) => {
    if (selected === "all") return true;
    if (Array.isArray(selected)) return selected.includes(vmid);
    return "pool" in selected ? pool === selected.pool : !selected.allExcept.includes(vmid);
  };
  const [guests, doomed] = await Promise.all([
    host.ask(pve.guests),
    host.ask(pve.wouldPrune(want.storage, pve.pruneBackups(want.retention))),
  ]);
  const ids = guests.filter(isFor).map(({ vmid }) => vmid);
  return doomed.filter(({ vmid }) => vmid === undefined || ids.includes(vmid)).map(({ volid }) => volid);
}

// ---------------------------------------------------------------- plan and remove

const WHAT_NEXT =
  "`Unknown option` means that this version of Proxmox VE does not have it: leave it out. Nothing was changed by this call.";

function plan(want: Want, have: Have, line: Line): Step[] {
  const due = changes(want, have, line);
  if (Object.keys(due).length === 0) return [];
  if (due.schedule !== undefined) checkSchedule(want.schedule);
  if (Object.keys(due).some((key) => key !== "comment")) checkNode(want, have); // a new owner's mark needs none of it
  const { job } = have;
  const given = (settings: Settings) =>
    Object.entries(settings).flatMap(([key, value]) => (value === undefined ? [] : words(key, value)));
  if (job === undefined)
    return [
      write(`create the backup job ${want.name}`, [
        "pvesh",
        "create",
        "/cluster/backup",
        "--id",
        want.name,
        ...given(due),
      ]),
    ];
  // The whole selection with every change, also when it stays; and the storage, without which a call with `notes-template` or
  // `protected` is refused, whatever the job has.
  const all = { storage: want.storage, ...due, guests: due.guests ?? printed(job).guests };
  const drop = [
    ...Object.entries(due).flatMap(([key, value]) => (value === undefined ? [key] : [])),
    ...(job.exclude !== undefined && all.guests === "all" ? ["exclude"] : []),
  ];
  return [
    write(`change the backup job ${want.name} (${Object.keys(due).join(", ")})`, [
      "pvesh",
      "set",
      `/cluster/backup/${want.name}`,
      ...given(all),
      ...(drop.length === 0 ? [] : ["--delete", drop.join(",")]),
    ]),
  ];
}

function write(why: string, argv: [string, ...string[]]): Step {
  return {
    why,
    argv: pve.writing("jobs.cfg", argv),
    shown: argv,
    timeout: pve.WRITE_SECONDS,
    next: WHAT_NEXT,
    look: true,
  };
}

/** Settings to be set, by Proxmox's name; undefined ones to be taken away. */
function changes(want: Want, have: Have, line: Line | undefined): Settings {
  const found: Settings = have.job === undefined ? { "repeat-missed": false } : printed(have.job);
  const due = Object.fromEntries(
    Object.entries(declared(want)).filter(
      ([key, value]) => !isKept(pathOf(key), want, line) && !isSetting(key, value, found[key]),
    ),
  );
  // Of a storage and a directory vzdump would take neither.
  if (have.job?.dumpdir !== undefined) due.dumpdir = undefined;
  if (line === undefined) return due;
  const said = isKept("comment", want, line) ? have.comment : want.comment;
  const marked = [said, markOf(line.owner)].filter(Boolean).join(" ");
  if (have.job?.comment !== marked) due.comment = marked;
  if (have.job === undefined) return Object.fromEntries(Object.entries(due).filter(([, value]) => value !== undefined));
  return due;
}

/** A date that has passed is no fault of the program's text, so it does not stop a preview; a job of it would never run. */
function checkSchedule(text: string): void {
  const yesterday = Date.now() / 1000 - 86_400; // somewhere on earth it is not over yet
  if (nextOnTheWall(parseEvent(text), yesterday) !== undefined) return;
  throw new Refused({
    what: `schedule: the last date of ${JSON.stringify(text)} has passed, and the job would never run.`,
    next: "Name a date to come, or none. Nothing was changed.",
  });
}

/** What Proxmox does not check, and what it says in words that nobody understands (a missing pool is a lack of permission). */
function checkNode(want: Want, { node }: Have): void {
  if (node === undefined) throw new Error("a change is planned that nobody looked for");
  const { name, nodes, storages, guests: there } = node;
  const runsOn = want.vzdump?.node ?? name;
  if (!nodes.includes(runsOn)) throw refused(`vzdump.node: there is no node ${runsOn}`, nodes);
  checkStorage("storage", want.storage, "backup", storages, runsOn);
  const fleecing = want.vzdump?.fleecing;
  if (fleecing?.enabled && fleecing.storage !== undefined)
    checkStorage("vzdump.fleecing.storage", fleecing.storage, "images", storages, runsOn);
  if (Array.isArray(want.guests)) {
    const missing = want.guests.filter((id) => !there.some((guest) => guest.vmid === id));
    if (missing.length > 0)
      throw refused(
        `guests: there is no guest ${missing.join(", ")} on ${name}, and every run of the job would fail`,
        there.map((guest) => String(guest.vmid)),
      );
  }
  if (typeof want.guests === "object" && "pool" in want.guests && !node.pools.includes(want.guests.pool))
    throw refused(`guests.pool: there is no pool ${want.guests.pool} on ${name}`, node.pools);
  if (node.pruned.length > 0)
    throw new Refused({
      what: `Unable to adopt the backup job ${want.name}. retention: its next run would remove ${shortened(node.pruned).join(", ")}.`,
      next: "Declare a retention that keeps them, or none (the job keeps its own); once the job is adopted, another one can be declared. Nothing was changed.",
    });
}

function checkStorage(property: string, id: string, content: string, storages: pve.Storage[], node: string): void {
  const trouble = storageTrouble(id, content, storages, node);
  const takes = storages.filter((s) => s.content?.includes(content)).map((s) => s.storage);
  if (trouble !== undefined) throw refused(`${property}: ${trouble}`, takes);
}

/** Why a storage cannot be used for something. */
function storageTrouble(id: string, content: string, storages: pve.Storage[], node: string): string | undefined {
  const storage = storages.find((s) => s.storage === id);
  if (storage === undefined) return `there is no storage ${id}`;
  if (!storage.content?.includes(content))
    return `the storage ${id} takes no ${content === "backup" ? "backups" : content} (it takes ${storage.content?.join(", ")})`;
  if (storage.disable) return `the storage ${id} is disabled`;
  if (storage.nodes !== undefined && !storage.nodes.includes(node))
    return `the storage ${id} is not for the node ${node} (only for ${storage.nodes.join(", ")})`;
  return undefined;
}

function refused(what: string, there: string[]): Refused {
  return new Refused({
    what: `${what}.`,
    next: `There ${there.length === 1 ? "is" : "are"} ${shortened(there).join(", ") || "none"}. Nothing was changed.`,
  });
}

const shortened = (list: string[]) => (list.length > 20 ? [...list.slice(0, 20), "..."] : list);

// Read back in the same command.
const DELETE = `id=$1; shift; "$@" || exit
! grep -qsx "vzdump: $id" /etc/pve/jobs.cfg || { echo "it ended without an error, and yet the job is there" >&2; exit 1; }`;

function remove(have: Have, line: Line): Step[] {
  // Somebody may have made another job of this name since.
  if (have.job === undefined || (have.owner !== undefined && !isMarked(have.job, line.owner))) return [];
  const { id } = have.job;
  const argv = ["pvesh", "delete", `/cluster/backup/${id}`] as const;
  return [
    {
      why: `delete the backup job ${id}`,
      argv: pve.writing("jobs.cfg", ["sh", "-c", DELETE, "delete", id, ...argv]),
      shown: argv,
      timeout: pve.WRITE_SECONDS,
      last: true,
    },
  ];
}

// ---------------------------------------------------------------- outputs

function facts(_want: Want, { job, status }: Have): Record<string, unknown> {
  return {
    status: { asOf: new Date().toISOString(), ...(status ?? { covered: 0, uncovered: [] }) },
    isEnabled: job?.enabled,
  };
}

/** Also fields that the program leaves to their default, when somebody changed them; not what adoption left alone. */
function asFound(want: Want, have: Have, line: Line): Want {
  const { job } = have;
  if (job === undefined) return want;
  const found = printed(job);
  const isDefault: Settings = { enabled: true, "repeat-missed": false, guests: "all" };
  const fields: Record<string, unknown> = { ...want };
  for (const [key, value] of Object.entries(declared(want))) {
    const path = pathOf(key);
    if (path.includes(".") || isKept(path, want, line) || isSetting(key, value, found[key])) continue;
    const field = path as keyof Want;
    fields[field] = same(found[key], isDefault[key]) && want[field] === undefined ? undefined : found[key];
  }
  const options = optionsFound(found, (name) => !isKept(`vzdump.${name}`, want, line));
  fields.vzdump = Object.keys({ ...options, ...want.vzdump }).length === 0 ? want.vzdump : options;
  if (!isKept("comment", want, line)) fields.comment = have.comment;
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as Want;
}

function optionsFound(found: Settings, which: (name: OptionName) => boolean): Record<string, unknown> {
  const there = optionNames.filter((name) => found[OPTIONS[name].key] !== undefined && which(name));
  return Object.fromEntries(there.map((name) => [name, found[OPTIONS[name].key]]));
}

/** Options of vzdump that an adopted job has: each is the program's only when it is declared. */
function keeps(_want: Want, { job }: Have): string[] {
  return job === undefined ? [] : Object.keys(optionsFound(printed(job), () => true)).map((name) => `vzdump.${name}`);
}

export const backupSchedule: Definition<Want, Have, never> = {
  kind: "BackupSchedule",
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["retention", "vzdump"],
      broken: ({ retention, vzdump: options }) =>
        options?.protected && retention !== undefined && retention.keepAll !== true
          ? {
              property: "retention",
              reason:
                "with `vzdump.protected` nothing is ever pruned, and the runs fail once the storage has its most protected backups: leave out one of the two",
            }
          : undefined,
    },
    {
      needs: ["vzdump"],
      broken: ({ vzdump: options }) =>
        options?.mailTo !== undefined && options.notificationMode === "notification-system"
          ? {
              property: "vzdump.mailTo",
              reason: 'is ignored with notificationMode "notification-system": use "legacy-sendmail"',
            }
          : undefined,
    },
  ],
  replaceOn: ["name"],
  fromId: (name) => ({ name }),
  identify: ({ name }) => name,
  observe,
  plan,
  remove,
  facts,
  asFound,
  keeps,
  warnings: (want, have) => {
    const hit = have.zone && have.job?.enabled && clockChanges(parseEvent(want.schedule), have.zone, Date.now() / 1000);
    return hit ? [hit] : [];
  },
};
