// The inputs of NfsDumpStorage, and the same values as storage.cfg has them.
import { isIP, isIPv6 } from "node:net";
import * as z from "zod";
import { hostSchema } from "./host.js";
import { normalPath, normalServer } from "./nfs-export.js";
import {
  nodeNameSchema,
  properties,
  propertyString,
  pruneBackups,
  retentionOf,
  retentionSchema,
  type Section,
  setOf,
  storageIdSchema,
  vmIdsSchema,
} from "./pve.js";

/** Where each content type lies below the mount, unless content-dirs says otherwise (PVE/Storage/Plugin.pm: $vtype_subdirs). */
export const DIRS = {
  backup: "dump",
  iso: "template/iso",
  vztmpl: "template/cache",
  snippets: "snippets",
  import: "import",
  images: "images",
  rootdir: "private",
} as const;
export type StorageContent = keyof typeof DIRS;
const CONTENT = Object.keys(DIRS) as StorageContent[];

/** Guests' disks: safe on a store shared by unrelated nodes only when ids cannot collide. */
export const DISKS: readonly string[] = ["images", "rootdir"];

const oneLine = (what: string) =>
  z.string(`is ${what}`).regex(/^[^\s\u0000-\u001f]+$/, `is ${what}: without blanks and line breaks`);

const content = z.enum(CONTENT, { error: `is one of ${CONTENT.join(", ")}` });

const server = oneLine("the name or address of the NFS server")
  .transform((name) => (isIP(name.replace(/^\[(.*)\]$/, "$1")) > 0 ? normalServer(name) : name))
  .refine((name) => isIPv6(name) || /^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$/.test(name), {
    error: "is the name or address of the NFS server, without a path",
  });

// What these paths may hold is narrower than what Proxmox takes: they become words of scripts and patterns of `find`.
const absolute = (what: string) =>
  z
    .string({ error: (issue) => (issue.input === undefined ? "is required" : `is ${what}`) })
    .regex(/^\/[A-Za-z0-9_./+@:=~-]*$/, `is ${what}: absolute, of letters, digits and _ . / + @ : = ~ -`)
    .transform(normalPath)
    .refine((path) => !path.split("/").some((part) => part === "." || part === ".."), `is ${what}: without . and ..`);

const directory = z
  .string("is a directory below the mount")
  .regex(/^[A-Za-z0-9_+@~-][A-Za-z0-9_.+@~-]*(\/[A-Za-z0-9_+@~-][A-Za-z0-9_.+@~-]*)*\/?$/, {
    error: 'is a directory below the mount, e.g. "dump-n4": relative, no part of it starting with a dot',
  })
  .transform(normalPath);

const BWLIMITS = ["clone", "default", "migration", "move", "restore"];
const bwlimit = oneLine('a list of limits, e.g. "restore=102400"').transform((text, context) => {
  const limits = properties(text);
  const wrong = Object.entries(limits).find(([key, value]) => !BWLIMITS.includes(key) || !/^[0-9]+$/.test(value));
  if (wrong === undefined && Object.keys(limits).length > 0) return sorted(limits);
  context.addIssue(`is a list of ${BWLIMITS.join(", ")} with KiB/s each, e.g. "restore=102400"`);
  return z.NEVER;
});

function sorted(values: Record<string, string>): string {
  return propertyString(Object.fromEntries(Object.entries(values).sort(([a], [b]) => (a < b ? -1 : 1))));
}

const set = <T extends z.ZodType<string>>(item: T, none: string) =>
  z
    .array(item)
    .min(1, none)
    .transform((list) => [...new Set(list)].sort());

export const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean("is true or false").optional(),
  storageId: storageIdSchema,
  server,
  export: absolute("the exported path on the server"),
  path: absolute("the mount point on the node")
    .refine((path) => path !== "/", "is a mount point, not /")
    .optional(),
  content: set(content, "names at least one kind of content").optional(),
  vmIds: vmIdsSchema.optional(),
  retention: retentionSchema.optional(),
  maxProtectedBackups: z
    .number("is a whole number; -1 = unlimited")
    .int("is a whole number; -1 = unlimited")
    .min(-1, "is -1 (unlimited), 0 or more")
    .optional(),
  contentDirs: z
    .partialRecord(content, directory, "is an object: content type to directory")
    .refine((dirs) => Object.keys(dirs).length > 0, "names at least one directory, or is left out")
    .refine((dirs) => new Set(Object.values(dirs)).size === Object.keys(dirs).length, "names one directory twice")
    .optional(),
  options: oneLine("a list of NFS mount options").optional(),
  bwlimit: bwlimit.optional(),
  preallocation: z
    .enum(["off", "metadata", "falloc", "full"], { error: "is off, metadata, falloc or full" })
    .optional(),
  nodes: set(nodeNameSchema, "names at least one node, or is left out").optional(),
  disable: z.boolean("is true or false").optional(),
});
export type Want = z.output<typeof inputs>;

/** The fields that storage.cfg holds and `pvesm set` can change, and the options of pvesm that they are. */
export const OPTIONS = {
  content: "content",
  retention: "prune-backups",
  maxProtectedBackups: "max-protected-backups",
  contentDirs: "content-dirs",
  options: "options",
  bwlimit: "bwlimit",
  preallocation: "preallocation",
  nodes: "nodes",
  disable: "disable",
} as const;
export type Field = keyof typeof OPTIONS;
export const FIELDS = Object.keys(OPTIONS) as Field[];

/** The values of fields as pvesm takes them; undefined = the option is not set. */
export type Values = { [F in Field]?: string | undefined };

/** What is declared, as pvesm takes it. Not declared is not set, but for the content. */
export function declared(want: Want): Values {
  return {
    content: (want.content ?? ["backup"]).join(","),
    retention: want.retention && pruneBackups(want.retention),
    maxProtectedBackups: want.maxProtectedBackups?.toString(),
    contentDirs: want.contentDirs && sorted(want.contentDirs as Record<string, string>),
    options: want.options,
    bwlimit: want.bwlimit,
    preallocation: want.preallocation,
    nodes: want.nodes?.join(","),
    disable: want.disable === true ? "1" : undefined,
  };
}

/** What storage.cfg says, in the same normal form. */
export function found({ values }: Section): Values {
  const text = (key: string) => values[key];
  const keep = text("prune-backups");
  const dirs = text("content-dirs");
  const limits = text("bwlimit");
  return {
    content: setOf(text("content") ?? "images").join(","),
    retention: keep === undefined ? undefined : pruneBackups(retentionOf(keep)),
    maxProtectedBackups: text("max-protected-backups"),
    contentDirs: dirs === undefined ? undefined : sorted(properties(dirs)),
    options: text("options"),
    bwlimit: limits === undefined ? undefined : sorted(properties(limits, "default")),
    preallocation: text("preallocation"),
    nodes: setOf(text("nodes")).join(",") || undefined,
    disable: ["1", "yes", "on", "true", ""].includes(text("disable") ?? "0") ? "1" : undefined,
  };
}

/** The order of mount options does not count. */
export function sameValue(field: Field, a: string | undefined, b: string | undefined): boolean {
  if (field === "options") return setOf(a).join() === setOf(b).join();
  return a === b;
}

/** A value of storage.cfg as a program would declare it. */
export function asDeclared(values: Values): Partial<Want> {
  const { content: kinds, retention, maxProtectedBackups, contentDirs, nodes, disable, ...texts } = values;
  const out: Record<string, unknown> = { ...texts };
  if (kinds !== undefined) out.content = setOf(kinds);
  if (retention !== undefined) out.retention = retentionOf(retention);
  if (maxProtectedBackups !== undefined) out.maxProtectedBackups = Number(maxProtectedBackups);
  if (contentDirs !== undefined) out.contentDirs = properties(contentDirs);
  if (nodes !== undefined) out.nodes = setOf(nodes);
  if (disable !== undefined) out.disable = true;
  return Object.fromEntries(Object.entries(out).filter(([, value]) => value !== undefined));
}
