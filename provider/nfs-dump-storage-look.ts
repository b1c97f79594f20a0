// What there is of an NFS storage: the node's files and mount table, the state of the storage, what lies on the export.
import * as z from "zod";
import type { Observed } from "./engine.js";
import type { Host, Report } from "./host.js";
import type { Line } from "./host-ledger.js";
import {
  DIRS,
  declared,
  FIELDS,
  type Field,
  found,
  OPTIONS,
  type Values,
  type Want,
} from "./nfs-dump-storage-inputs.js";
import {
  addressesOf,
  type Claim,
  IDENTITY_FILES,
  normalServer,
  type OnExport,
  parsedSource,
  probe,
  sourceOf,
} from "./nfs-export.js";
import {
  properties,
  type Section,
  type StorageState,
  sections,
  settledStates,
  storageStates,
  type VmIds,
  wouldPrune,
} from "./pve.js";

/** What was seen once, or must survive a removal and re-adding in between. */
export interface Pins {
  /** What was last seen mounted for it: after a removal by hand it tells whose the mount is that is left. */
  source?: string;
  /** The mount that was there, active and writable when the work was last finished: source and mount options. */
  proven?: string;
  /** The claim of that time. */
  claim?: string;
  /** Options that we do not declare (kept at adoption, or not ours to know): a moved storage is added again with them. */
  carried?: Record<string, string>;
}

// ---------------------------------------------------------------- the questions

/**
 * All that the node itself tells without asking a server: one cheap command for all storages. The files of /etc/pve have their real
 * format for good, and reading them costs a hundredth of pvesh.
 */
const LOOK = `
[ -d /etc/pve/nodes ] || { echo "/etc/pve is empty: the cluster file system (pve-cluster) does not run" >&2; exit 1; }
part() { printf '\\036%s\\n' "$1"; }
part node; uname -n | cut -d. -f1
part machine; cat ${IDENTITY_FILES[0]}
part ledger; cat ${IDENTITY_FILES[1]} 2>/dev/null
part storage; [ ! -e /etc/pve/storage.cfg ] || cat /etc/pve/storage.cfg || exit 1
part jobs; [ ! -e /etc/pve/jobs.cfg ] || cat /etc/pve/jobs.cfg || exit 1
part cron; cat /etc/pve/vzdump.cron 2>/dev/null
part guests; for file in /etc/pve/nodes/*/qemu-server/*.conf /etc/pve/nodes/*/lxc/*.conf; do [ ! -e "$file" ] || echo "$file"; done
part disks; grep -HsE '^(ide|sata|scsi|virtio|efidisk|tpmstate|unused|rootfs|mp|vmstate)[0-9]*: ' /etc/pve/nodes/*/qemu-server/*.conf /etc/pve/nodes/*/lxc/*.conf
part mounts; findmnt --json --list --output TARGET,SOURCE,FSTYPE || exit 1
part proven; grep -Hs '' /run/pulumi-vmbackup/nfs/*
part tasks
while read -r upid saved ended rest; do
  [ -z "$ended" ] || continue
  pid=$(printf '%d' "0x$(echo "$upid" | cut -d: -f3)") start=$(printf '%d' "0x$(echo "$upid" | cut -d: -f4)")
  # The same process, and not another that got its number since.
  [ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d' ' -f20)" = "$start" ] || continue
  printf '\\035%s\\n' "$upid"
  cat /var/log/pve/tasks/?/"$upid" 2>/dev/null | head -n 40
done 2>/dev/null </var/log/pve/tasks/active
exit 0`;

interface Look {
  node: string;
  machine: string;
  ledger: string;
  storages: Section[];
  jobs: { id: string; storages: string[] }[];
  guestIds: number[];
  /** Volumes in guests' configurations, snapshots of them too. */
  disks: { guest: string; container: boolean; volume: string }[];
  mounts: { target: string; source: string; fstype: string }[];
  proven: Record<string, string>;
  /** What runs and has not ended: type, guest, and the beginning of its log. */
  tasks: { what: string; log: string }[];
}

const look: Report<Look> = {
  why: "look at the node's storages, jobs, guests and mounts",
  argv: ["sh", "-c", LOOK, "look"],
  shown: ["cat", "/etc/pve/storage.cfg", "/etc/pve/jobs.cfg", "/etc/pve/nodes/*/*/*.conf"],
  parse: (stdout) => {
    const parts = new Map(
      stdout.split("\u001e").map((part) => [part.slice(0, part.indexOf("\n")), part.slice(part.indexOf("\n") + 1)]),
    );
    return parsedLook((name) => parts.get(name) ?? "");
  },
  answer: z.custom<Look>(),
};

const mountTable = z.object({
  filesystems: z.array(z.object({ target: z.string(), source: z.string().nullable(), fstype: z.string().nullable() })),
});

function parsedLook(part: (name: string) => string): Look {
  const lines = (name: string) =>
    part(name)
      .split("\n")
      .filter((line) => line !== "");
  return {
    node: part("node").trim(),
    machine: part("machine").trim(),
    ledger: part("ledger").trim(),
    storages: sections(part("storage")),
    jobs: [
      ...sections(part("jobs")).map(({ id, values }) => ({
        id,
        storages: [values.storage, fleecing(values.fleecing)],
      })),
      ...lines("cron").map((line) => ({
        id: `vzdump.cron: ${line}`,
        storages: [/--storage[= ]+(\S+)/.exec(line)?.[1]],
      })),
    ].map(({ id, storages }) => ({ id, storages: storages.filter((storage) => storage !== undefined) })),
    guestIds: lines("guests").map((file) => Number(/(\d+)\.conf$/.exec(file)?.[1])),
    disks: lines("disks").flatMap((line) => {
      const match = /^.*\/(qemu-server|lxc)\/(\d+)\.conf:[a-z]+\d*: ([^,\s]+)/.exec(line);
      return match === null
        ? []
        : [
            {
              guest: match[2] ?? "",
              container: match[1] === "lxc",
              volume: (match[3] ?? "").replace(/^(file|volume)=/, ""),
            },
          ];
    }),
    mounts: mountTable
      .parse(JSON.parse(part("mounts")))
      .filesystems.map(({ target, source, fstype }) => ({ target, source: source ?? "", fstype: fstype ?? "" })),
    proven: Object.fromEntries(
      lines("proven").map((line) => {
        const [file = "", ...key] = line.split(":");
        return [file.slice(file.lastIndexOf("/") + 1), key.join(":")];
      }),
    ),
    tasks: part("tasks")
      .split("\u001d")
      .slice(1)
      .map((text) => {
        const [upid = "", ...log] = text.split("\n");
        const [, , , , , type, id] = upid.split(":");
        return { what: `${type}${id ? ` of ${id}` : ""}`, log: log.join("\n") };
      }),
  };
}

function fleecing(text: string | undefined): string | undefined {
  return text === undefined ? undefined : properties(text, "enabled").storage;
}

// ---------------------------------------------------------------- observe

export interface Have extends Observed<Pins> {
  node: string;
  /** The NFS storage of this id. */
  row?: Section;
  /** The type of a storage of another kind that has this id. */
  stranger?: string;
  values: Values;
  state?: StorageState;
  path: string;
  /** What is mounted at the path; the last one is on top. */
  mounted: string[];
  /** The source that belongs there: the row's, and after its removal the one that we had. */
  source: string;
  /** Whether the row's server and export are the declared ones, by name or by address. */
  isDeclared: boolean;
  on: OnExport | undefined;
  claim: Claim | undefined;
  /** What finds its way into the registry: ids of this node's guests, and of dumps. */
  usedIds: number[];
  /** What the write probe has seen: source and options of the mount. */
  proven: string | undefined;
  users: Users;
  /** Asked at adoption only: the backups that the declared retention would remove at its next run. */
  pruned: string[];
}

interface Users {
  jobs: string[];
  /** "guest 101 (nfs:101/vm-101-disk-0.raw)" */
  disks: { who: string; content: string }[];
  tasks: string[];
  storages: string[];
}

export const defaultPath = (storageId: string) => `/mnt/pve/${storageId}`;
export const provenKey = (source: string, options: string | undefined) => `${source} ${options ?? "-"}`;

export async function observe(want: Want, line: Line<Pins> | undefined, host: Host): Promise<Have> {
  const id = want.storageId;
  let seen = await host.ask(look);
  const section = seen.storages.find((storage) => storage.id === id);
  const row = section?.type === "nfs" ? section : undefined;
  // The question of the state takes pvesh seconds, and says nothing of what storage.cfg has not.
  let states = row === undefined ? [] : await host.ask(storageStates);
  const stateOf = () => states.find(({ storage }) => storage === id);
  // The first answer after a mount says inactive.
  if (stateOf()?.enabled && !stateOf()?.active) states = await host.ask(storageStates, "again");
  const state = stateOf();
  // It has mounted what was not.
  if (state?.active && !seen.mounts.some(({ target }) => target === row?.values.path))
    seen = await host.ask(look, "again");

  const path = row?.values.path ?? want.path ?? defaultPath(id);
  const pins: Pins = { ...line?.pins };
  const mounted = seen.mounts.filter(({ target }) => target === path).map((mount) => mount.source);
  const rowSource = row && sourceOf(row.values.server ?? "", row.values.export ?? "");
  // After `pvesm remove` the mount is still there; what we had tells whose it is.
  const before = pins.source ?? (want.server === undefined ? "" : sourceOf(want.server, want.export));
  const source = await asMounted(rowSource ?? before, mounted.at(-1), host);
  const isThere = state?.active && mounted.at(-1) === source;
  const looked = isThere ? (await mountsLookedAt(states, seen, host)).get(id) : undefined;
  const values: Values = row === undefined ? {} : found(row);

  if (row !== undefined) {
    // In the middle of our own work it may be disabled by us: then what counts is what it was before.
    const wasDisabled = line?.finished || pins.source === undefined ? values.disable : pins.carried?.disable;
    pins.source = source;
    if (line?.finished) pins.proven = provenKey(source, values.options);
    const carried = carry(row, line?.kept ?? [], wasDisabled);
    if (carried === undefined) delete pins.carried;
    else pins.carried = carried;
  }
  const claim = looked?.claims.find(
    ({ machine, ledger, storage }) => storage === id && machine === seen.machine && ledger === seen.ledger,
  );
  if (claim !== undefined && line?.finished) pins.claim = `${claim.lower}-${claim.upper}`;
  const adopting = want.adopt === true && row !== undefined && pins.proven === undefined;
  return {
    exists: row !== undefined,
    pins: row === undefined && line?.pins === undefined ? undefined : pins,
    node: seen.node,
    ...(row === undefined ? {} : { row }),
    ...(section !== undefined && row === undefined ? { stranger: section.type } : {}),
    values,
    ...(state === undefined ? {} : { state }),
    path,
    mounted,
    source,
    isDeclared: row !== undefined && (await isDeclared(want, row, host)),
    on: looked,
    claim,
    usedIds: usedIds([want.vmIds, claim], seen, looked),
    proven: seen.proven[id],
    users: usersOf(id, path, seen),
    pruned:
      adopting && state?.active && want.retention !== undefined
        ? (await host.ask(wouldPrune(id, declared(want).retention ?? ""))).map(({ volid }) => volid)
        : [],
  };
}

/** The mount that is there, when it is ours in another spelling (brackets, slashes, a name for an address). */
async function asMounted(source: string, top: string | undefined, host: Host): Promise<string> {
  if (top === undefined || top === source) return source;
  const [a, b] = [parsedSource(source), parsedSource(top)];
  if (a === undefined || b === undefined || a.export !== b.export) return source;
  return (await sameServer(a.server, b.server, host)) ? top : source;
}

async function isDeclared(want: Want, row: Section, host: Host): Promise<boolean> {
  if (want.server === undefined) return true; // `.get` declares nothing
  const mine = parsedSource(sourceOf(row.values.server ?? "", row.values.export ?? ""));
  if (mine === undefined || mine.export !== want.export) return false;
  return await sameServer(mine.server, normalServer(want.server), host);
}

async function sameServer(a: string, b: string, host: Host): Promise<boolean> {
  if (a === b) return true;
  const { [a]: mine = [], [b]: other = [] } = await host.ask(addressesOf(...[a, b].sort()));
  return mine.some((address) => other.includes(address));
}

/** Looks at all mounts of the node's NFS storages at once: the same question for every resource, so that it is asked once. */
async function mountsLookedAt(states: StorageState[], seen: Look, host: Host): Promise<Map<string, Mounted>> {
  const shown = seen.storages
    .flatMap((storage) => {
      const { path = "", server = "", export: exported = "" } = storage.values;
      const top = seen.mounts.filter(({ target }) => target === path).at(-1);
      const isActive = states.some((state) => state.storage === storage.id && state.active);
      if (storage.type !== "nfs" || top === undefined || !isActive || /\s/.test(`${path}${top.source}`)) return [];
      // Only what Proxmox itself takes as this storage's mount, and ours in another spelling.
      const mine = parsedSource(sourceOf(server, exported));
      if (parsedSource(top.source)?.export !== mine?.export) return [];
      return [{ id: storage.id, path, source: top.source, dirs: dirsOf(storage) }];
    })
    .sort((a, b) => (a.path < b.path ? -1 : 1));
  if (shown.length === 0) return new Map();
  const found = await host.ask(probe(shown));
  return new Map(
    shown.flatMap(({ id, path, source }, i) => {
      const one = found[i];
      return one?.answers ? [[id, { ...one, path, source }]] : [];
    }),
  );
}

/** An export that answers, and where it is mounted. */
type Mounted = OnExport & { path: string; source: string };

/**
 * Where it has to be written down that a guest had this id: the registries in which it is claimed. `unseen`: an export cannot be asked
 * now (it does not answer, its storage is disabled).
 */
export async function idUnremembered(vmId: number, host: Host): Promise<{ at: Mounted[]; unseen: boolean }> {
  const seen = await host.ask(look);
  const nfs = seen.storages.filter(({ type }) => type === "nfs");
  const on =
    nfs.length === 0 ? new Map<string, Mounted>() : await mountsLookedAt(await host.ask(storageStates), seen, host);
  const claimed = [...on.values()].filter(({ claims }) => claims.some((c) => c.lower <= vmId && vmId <= c.upper));
  const todo = claimed.filter(({ used }) => !used.includes(vmId));
  return {
    at: todo.filter(({ registryId }, i) => todo.findIndex((other) => other.registryId === registryId) === i),
    unseen: nfs.some(({ id }) => !on.has(id)),
  };
}

/** The ids that the registries on the node's exports know as used: whoever gives one away again hands on a dead guest's dumps. */
export async function idsUsed(host: Host): Promise<number[]> {
  const states = await settledStates(host);
  const on = await mountsLookedAt(states, await host.ask(look), host);
  return [...new Set([...on.values()].flatMap(({ used }) => used))];
}

function dirsOf({ values }: Section): Record<string, string> {
  return { ...DIRS, ...properties(values["content-dirs"] ?? "") };
}

/** Options that removing and adding again would lose: those that adoption left alone, and those that we do not know. */
function carry(
  { values }: Section,
  kept: readonly string[],
  wasDisabled: string | undefined,
): Record<string, string> | undefined {
  const ours: Record<string, Field> = Object.fromEntries(FIELDS.map((field) => [OPTIONS[field], field]));
  const fixed = ["server", "export", "path", "digest", "disable"];
  const lost = Object.entries(values).filter(([key]) => {
    const field = ours[key];
    return !fixed.includes(key) && (field === undefined || kept.includes(field));
  });
  if (wasDisabled !== undefined) lost.push(["disable", wasDisabled]);
  return lost.length === 0 ? undefined : Object.fromEntries(lost);
}

/** Of the ids that are declared or claimed, those that a guest or a dump has and the registry does not know. */
function usedIds(ours: readonly (VmIds | undefined)[], seen: Look, on: OnExport | undefined): number[] {
  const isOurs = (id: number) => ours.some((ids) => ids !== undefined && id >= ids.lower && id <= ids.upper);
  const known = new Set(on?.used ?? []);
  const ids = new Set([...seen.guestIds, ...(on?.dumpedIds ?? [])]);
  return [...ids].filter((id) => isOurs(id) && !known.has(id)).sort((a, b) => a - b);
}

function usersOf(id: string, path: string, seen: Look): Users {
  const within = (other: string) => other === path || other.startsWith(`${path}/`);
  const word = new RegExp(`(^|[\\s'"=,])${id.replaceAll(".", "\\.")}([:\\s'",]|$)`, "m");
  return {
    jobs: seen.jobs.filter((job) => job.storages.includes(id)).map((job) => job.id),
    disks: seen.disks
      .filter(({ volume }) => volume.startsWith(`${id}:`))
      .map(({ guest, container, volume }) => ({
        who: `guest ${guest} (${volume})`,
        content: /^[^:]*:(iso|vztmpl|snippets|import|backup)\//.exec(volume)?.[1] ?? (container ? "rootdir" : "images"),
      })),
    tasks: seen.tasks.filter(({ log }) => log.includes(`${path}/`) || word.test(log)).map(({ what }) => what),
    storages: seen.storages
      .filter((storage) => storage.id !== id && within(storage.values.path ?? ""))
      .map((s) => s.id),
  };
}
