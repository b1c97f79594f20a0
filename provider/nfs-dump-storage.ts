// NfsDumpStorage: an NFS storage of a Proxmox VE node (pvesm add nfs). Inputs: nfs-dump-storage-inputs.ts; what lives on the
// export and at its mount: nfs-export.ts.
//
// The definition (storage.cfg) and the mount are two things: `pvesm set` never mounts or remounts, `pvesm remove` never unmounts,
// and a new definition over an old mount goes on with the old server. So whatever changes the mount is: disable (or pvestatd mounts
// it again within seconds), unmount, and only then the change.
import * as z from "zod";
import type { Definition, Observed, Step } from "./engine.js";
import { Conflict, Refused } from "./errors.js";
import type { Host, Report } from "./host.js";
import type { Line } from "./host-ledger.js";
import {
  asDeclared,
  DIRS,
  DISKS,
  declared,
  FIELDS,
  type Field,
  found,
  inputs,
  OPTIONS,
  sameValue,
  type Values,
  type Want,
} from "./nfs-dump-storage-inputs.js";
import {
  addressesOf,
  type Claim,
  encodedOwner,
  IDENTITY_FILES,
  normalServer,
  ON_MOUNT,
  type OnExport,
  parsedSource,
  probe,
  sourceOf,
} from "./nfs-export.js";
import {
  properties,
  type Section,
  type StorageState,
  sectionHash,
  sections,
  setOf,
  settledStates,
  storageStates,
  WRITE_SECONDS,
  wouldPrune,
} from "./pve.js";

/** What was seen once, or must survive a removal and re-adding in between. */
interface Pins {
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

interface Have extends Observed<Pins> {
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

const defaultPath = (storageId: string) => `/mnt/pve/${storageId}`;
const provenKey = (source: string, options: string | undefined) => `${source} ${options ?? "-"}`;

async function observe(want: Want, line: Line<Pins> | undefined, host: Host): Promise<Have> {
  const id = want.storageId;
  let states = await host.ask(storageStates);
  const seen = await host.ask(look);
  const section = seen.storages.find((storage) => storage.id === id);
  const row = section?.type === "nfs" ? section : undefined;
  const stateOf = () => states.find(({ storage }) => storage === id);
  // The first answer after a mount says inactive.
  if (row !== undefined && stateOf()?.enabled && !stateOf()?.active) states = await host.ask(storageStates);
  const state = stateOf();

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
    pins.source = source;
    if (line?.finished) pins.proven = provenKey(source, values.options);
    const carried = carry(row, line?.kept ?? []);
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
    usedIds: usedIds(want, seen, looked),
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

/** Writes it down there. A reused id would hand on a dead guest's dumps. */
export function remember(vmId: number, owner: string, { path, source }: { path: string; source: string }): Step {
  return {
    why: `note on ${source} that the id ${vmId} is used`,
    argv: ["sh", "-c", `${ON_MOUNT}remember "$@"`, "remember", path, source, encodedOwner(owner), String(vmId)],
    shown: ["remember", path, String(vmId)],
    look: true,
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
function carry({ values }: Section, kept: readonly string[]): Record<string, string> | undefined {
  const ours: Record<string, Field> = Object.fromEntries(FIELDS.map((field) => [OPTIONS[field], field]));
  const fixed = ["server", "export", "path", "digest"];
  const lost = Object.entries(values).filter(([key]) => {
    const field = ours[key];
    return !fixed.includes(key) && (field === undefined || kept.includes(field));
  });
  return lost.length === 0 ? undefined : Object.fromEntries(lost);
}

function usedIds(want: Want, seen: Look, on: OnExport | undefined): number[] {
  const { vmIds } = want;
  if (vmIds === undefined) return [];
  const ids = new Set([...seen.guestIds, ...(on?.dumpedIds ?? [])]);
  const known = new Set(on?.used ?? []);
  return [...ids].filter((id) => id >= vmIds.lower && id <= vmIds.upper && !known.has(id)).sort((a, b) => a - b);
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

// ---------------------------------------------------------------- plan

function plan(want: Want, have: Have, line: Line<Pins>): Step[] {
  const id = want.storageId;
  if (have.stranger !== undefined)
    throw new Conflict({
      what: `The storage ${id} is taken by a storage of type ${have.stranger}. It was left as it is.`,
      next: "Choose another `storageId`, or remove that storage by hand.",
    });
  if (have.row === undefined) return [add(want, have, line)];
  if (have.row.values.path !== undefined && have.path !== (want.path ?? defaultPath(id)))
    throw new Conflict({
      what: `path: the storage ${id} is mounted at ${have.path}, and the mount point of a storage cannot be changed.`,
      next: `Declare \`path: ${JSON.stringify(have.path)}\`, or choose another \`storageId\`.`,
    });
  if (adopting(want, line)) checkAdoption(want, have, line);
  const top = have.mounted.at(-1);
  if (isEnabled(have) && top !== undefined && top !== have.source && !have.state?.active)
    throw new Refused({
      what: `At ${have.path}, where the storage ${id} belongs, ${top} is mounted and not ${have.source}.`,
      next: `Unmount it by hand (\`umount ${have.path}\`), then run \`pulumi up\` again. Nothing was changed.`,
    });
  const wanted = wishes(want, have, line);
  const changed = FIELDS.filter((field) => !sameValue(field, wanted[field], have.values[field]));
  if (!have.isDeclared || changed.includes("options")) return move(want, have, line, wanted);
  checkContent(have, wanted);
  const settle = unproven(want, have, line);
  // Disks are allowed only when their ids are claimed.
  const waits = isClaimPending(want, have, line) ? withoutDisks(wanted, have.values) : wanted;
  const now = FIELDS.filter((field) => !sameValue(field, waits[field], have.values[field]));
  if (now.length > 0) return [set(id, have, waits, now)];
  if (settle !== undefined) return [settle];
  if (isClaimPending(want, have, line)) return [claim(want, have, line)];
  if (want.vmIds === undefined && have.claim !== undefined && !line.kept.includes("vmIds"))
    return [release(id, have, line)];
  return [];
}

/** Adoption ends when the work was finished for the first time: from then on the object is ours like any other. */
function adopting(want: Want, line: Line<Pins>): boolean {
  return want.adopt === true && line.pins?.proven === undefined;
}

const isEnabled = (have: Have) => have.values.disable === undefined && isHere(have.values, have.node);
const isHere = (values: Values, node: string) => values.nodes === undefined || setOf(values.nodes).includes(node);

/** What each option shall be: as declared, else as adoption found it, else not set. */
function wishes(want: Want, have: Have, line: Line<Pins>): Values {
  const mine = declared(want);
  return Object.fromEntries(
    FIELDS.map((field) => {
      const isKept = want[field] === undefined && line.kept.includes(field);
      return [field, isKept ? keptValue(field, have, line) : mine[field]];
    }),
  );
}

/** In the middle of a move the storage is disabled or gone, by us: then what counts is what was carried. */
function keptValue(field: Field, have: Have, line: Line<Pins>): string | undefined {
  if (have.row !== undefined && (field !== "disable" || have.isDeclared)) return have.values[field];
  const carried = line.pins?.carried ?? {};
  return field === "disable" ? undefined : found({ type: "nfs", id: "", values: carried, words: [] })[field];
}

function checkAdoption(want: Want, have: Have, line: Line<Pins>): void {
  const id = want.storageId;
  const refuse = (what: string, next: string) =>
    new Refused({ what: `Unable to adopt the storage ${id}. ${what}`, next: `${next} Nothing was changed.` });
  if (line.kept.length === 0) return; // it was not there before us
  if (!have.isDeclared)
    throw refuse(
      `It is ${sourceOf(have.row?.values.server ?? "", have.row?.values.export ?? "")}, and declared is ${sourceOf(want.server, want.export)}.`,
      "Declare `server` and `export` as they are; once adopted, the storage can be moved by changing them.",
    );
  const dumps = properties(have.values.contentDirs ?? "").backup;
  if (want.contentDirs === undefined && dumps !== undefined)
    throw refuse(
      `contentDirs: it keeps its dumps in ${dumps}.`,
      `Declare \`contentDirs: { backup: ${JSON.stringify(dumps)} }\`, so that \`dumpPath\` is right.`,
    );
  const dropped = want.content === undefined ? [] : setOf(have.values.content).filter((c) => !isIn(want.content, c));
  const lost = dropped.filter((c) => have.on === undefined || have.on.holds.includes(c));
  if (lost.length > 0)
    throw refuse(
      `content: it holds ${lost.join(", ")}, which the declared content leaves out${have.on === undefined ? " (it does not answer, so that this cannot be looked up)" : ""}.`,
      "Declare these as well, or remove what is there first.",
    );
  if (have.pruned.length > 0)
    throw refuse(
      `retention: the declared one would remove ${listed(have.pruned)}.`,
      "Declare a retention that keeps them, or remove them first.",
    );
}

const isIn = (list: readonly string[] | undefined, word: string) => list?.includes(word) === true;

function listed(names: readonly string[], most = 10): string {
  const more = names.length - most;
  return `${names.slice(0, most).join(", ")}${more > 0 ? ` and ${more} more` : ""}`;
}

/** What guests have in use stays allowed, and a directory stays as long as it holds something. */
function checkContent(have: Have, wanted: Values): void {
  const dropped = setOf(have.values.content).filter((c) => !setOf(wanted.content).includes(c));
  const users = have.users.disks.filter((disk) => dropped.includes(disk.content));
  if (users.length > 0)
    throw new Refused({
      what: `content: ${dropped.join(", ")} cannot be dropped: in use by ${listed(users.map((user) => user.who))}.`,
      next: "Move these volumes to another storage first. Nothing was changed.",
    });
  const before: Record<string, string> = { ...DIRS, ...properties(have.values.contentDirs ?? "") };
  const after: Record<string, string> = { ...DIRS, ...properties(wanted.contentDirs ?? "") };
  const moved = Object.keys(DIRS).filter((c) => before[c] !== after[c]);
  const full = moved.filter((c) => have.on === undefined || have.on.holds.includes(c));
  if (full.length > 0)
    throw new Refused({
      what: `contentDirs: ${full.map((c) => `${c} cannot move from ${before[c]} to ${after[c]}`).join(", ")}: ${have.on === undefined ? "the storage does not answer, so that nobody can tell what the old directory holds" : "the old directory still holds something"}.`,
      next: "Empty the old directory first (what is in it would not be seen any more). Nothing was changed.",
    });
}

// ---------------------------------------------------------------- the steps

const CHECK_EXPORT =
  "Check `server` and `export`, that the export is writable for root (no_root_squash), and that the server answers this node.";

// What Proxmox says of a failed mount names no alternatives: the server's own list does.
const EXPLAIN = `
explain() {
  if list=$(timeout -s KILL 30 pvesm scan nfs "$1" 2>&1); then
    if [ -n "$list" ]; then say "$1 exports:"; say "$list"; else say "$1 answers, and exports nothing."; fi
  else
    say "$1 does not list its exports: $list"
    say 'A server that speaks only NFSv4 has no list: then declare options: "vers=4.2".'
  fi
}

# Waits until the storage is active and writable, and writes down that it was: settle ID PATH SOURCE KEY.
settle() {
  word= tries=0
  # The first status after a mount lies, so one "active" right after a "no" is what counts.
  while [ "$word" != active ] && [ "$tries" -lt 20 ]; do
    [ "$tries" -eq 0 ] || sleep 1
    tries=$((tries + 1))
    word=$(pvesm status --storage "$1" | awk -v id="$1" '$1 == id { print $3 }')
  done
  if [ "$word" != active ]; then say "the storage $1 is \${word:-not there} after $tries looks"; return 1; fi
  writable "$2" "$3" || return 1
  mkdir -p /run/pulumi-vmbackup/nfs && printf '%s\\n' "$4" >"/run/pulumi-vmbackup/nfs/$1"
}
`;

// Adds and proves in one go, so that what the export refuses leaves nothing behind: the mount that Proxmox makes before it finds
// that it cannot write there, its directory, and a storage whose ids are not ours.
const ADD = `${ON_MOUNT}${EXPLAIN}
id=$1 path=$2 source=$3 before=$4 server=$5 key=$6 claim=$7; shift 7
if [ "$claim" = claim ]; then owner=$1 lower=$2 upper=$3 adopt=$4 used=$5; shift 5; fi
[ -d "$path" ] && had=1 || had=
top=$(source_at "$path")
# A mount that an earlier storage left would be taken over, with its old options.
if [ -n "$top" ]; then unmount "$path" "$before" || exit 1; fi
undo() {
  [ -z "$1" ] || writer storage.cfg pvesm remove "$id"
  [ "$(source_at "$path")" != "$source" ] || unmount "$path" "$source"
  [ -n "$had" ] || rmdir "$path" 2>/dev/null
}
writer storage.cfg "$@" || {
  code=$?
  grep -qsE "^[a-z0-9]+: +$id\\$" /etc/pve/storage.cfg || undo ""
  [ "$key" = - ] || explain "$server"
  exit "$code"
}
[ "$key" != - ] || exit 0
settle "$id" "$path" "$source" "$key" || { undo 1; exit 1; }
[ "$claim" != claim ] || claim "$path" "$source" ${IDENTITY_FILES.join(" ")} "$id" "$owner" "$lower" "$upper" "$adopt" "$used" || { code=$?; undo 1; exit "$code"; }`;

function add(want: Want, have: Have, line: Line<Pins>): Step {
  const id = want.storageId;
  const path = want.path ?? defaultPath(id);
  if (have.users.storages.length > 0)
    throw new Refused({
      what: `path: ${path} belongs to the storage ${have.users.storages.join(", ")} already.`,
      next: "Declare another `path`. Nothing was changed.",
    });
  const source = sourceOf(want.server, want.export);
  const top = have.mounted.at(-1);
  if (top !== undefined && top !== have.source)
    throw new Refused({
      what: `At ${path}, where the storage ${id} shall be mounted, ${top} is mounted already.`,
      next: `Unmount it by hand (\`umount ${path}\`), or declare another \`path\`. Nothing was changed.`,
    });
  const wanted = wishes(want, have, line);
  const isMounted = wanted.disable === undefined && isHere(wanted, have.node);
  const claims = isMounted && want.vmIds !== undefined;
  const values = claims ? withoutDisks(wanted, {}) : wanted;
  const carried = Object.entries(line.pins?.carried ?? {}).filter(([key]) => !isIn(Object.values(OPTIONS), key));
  const pvesm = [
    ...["pvesm", "add", "nfs", id, "--server", want.server, "--export", want.export],
    ...(path === defaultPath(id) ? [] : ["--path", path]),
    ...FIELDS.flatMap((field) => option(field, values[field])),
    ...carried.flatMap(([key, value]) => [`--${key}`, value || "1"]),
  ] as const;
  const words = claims ? ["claim", ...claimWords(want, have, line)] : ["-"];
  const key = isMounted ? provenKey(source, values.options) : "-";
  return {
    why: `add the storage ${id} (${source})`,
    argv: ["sh", "-c", ADD, "add", id, path, source, have.source, want.server, key, ...words, ...pvesm],
    shown: pvesm as unknown as Step["argv"],
    timeout: WRITE_SECONDS,
    look: true,
    next: CHECK_EXPORT,
  };
}

const option = (field: Field, value: string | undefined) => (value === undefined ? [] : [`--${OPTIONS[field]}`, value]);

/** The content without guests' disks, as long as their ids are not claimed; nothing is taken from what is there. */
function withoutDisks(wanted: Values, now: Values): Values {
  const kinds = setOf(wanted.content).filter((c) => !DISKS.includes(c) || setOf(now.content).includes(c));
  return { ...wanted, content: kinds.join(",") || "backup" };
}

function unproven(want: Want, have: Have, line: Line<Pins>): Step | undefined {
  const key = provenKey(have.source, have.values.options);
  if (!isEnabled(have) || key === line.pins?.proven || key === have.proven) return undefined;
  return {
    why: `wait until the storage ${want.storageId} is active, and write to it once`,
    argv: ["sh", "-c", `${ON_MOUNT}${EXPLAIN}settle "$@"`, "settle", want.storageId, have.path, have.source, key],
    shown: ["pvesm", "status", "--storage", want.storageId],
    look: true,
    next: CHECK_EXPORT,
  };
}

/** One `pvesm set` with what changed, when the storage is still as it was seen. */
function set(id: string, have: Have, wanted: Values, changed: readonly Field[]): Step {
  const gone = changed.filter((field) => wanted[field] === undefined).map((field) => OPTIONS[field]);
  const pvesm = [
    ...["pvesm", "set", id],
    ...changed.flatMap((field) => option(field, wanted[field])),
    ...(gone.length === 0 ? [] : ["--delete", gone.join(",")]),
  ] as const;
  return {
    why: `change the storage ${id} (${changed.join(", ")})`,
    argv: ["sh", "-c", `${ON_MOUNT}writer storage.cfg guarded "$@"`, "set", id, hashOf(have), ...pvesm],
    shown: pvesm as unknown as Step["argv"],
    timeout: WRITE_SECONDS,
    look: true,
    next: "Nothing was changed by this command. Run `pulumi up` again: it looks first.",
  };
}

const hashOf = (have: Have) => (have.row === undefined ? "-" : sectionHash(have.row));

// ---------------------------------------------------------------- the claim

function isClaimPending(want: Want, have: Have, line: Line<Pins>): boolean {
  const { vmIds } = want;
  if (vmIds === undefined || !isEnabled(have)) return false;
  // A server that does not answer must not stop what has nothing to do with the claim.
  if (have.on === undefined) return line.pins?.claim !== `${vmIds.lower}-${vmIds.upper}`;
  const { claim: mine } = have;
  return mine === undefined || mine.lower !== vmIds.lower || mine.upper !== vmIds.upper || mine.owner !== line.owner;
}

/** OWNER LOWER UPPER ADOPT USED, as `claim` of nfs-export.ts takes them after the storage. */
function claimWords(want: Want, have: Have, line: Line<Pins>): string[] {
  const { lower = 0, upper = 0 } = want.vmIds ?? {};
  const adopts = adopting(want, line) ? "1" : "0";
  return [encodedOwner(line.owner), String(lower), String(upper), adopts, have.usedIds.join(",")];
}

function claimStep(id: string, have: Have, words: string[], why: string): Step {
  const place = [have.path, have.source, ...IDENTITY_FILES, id];
  return {
    why,
    argv: ["sh", "-c", `${ON_MOUNT}claim "$@"`, "claim", ...place, ...words],
    shown: ["claim", have.path, words[1] === "0" ? "nothing" : `${words[1]}-${words[2]}`],
    look: true,
    next: "Give each node ids of its own; `adopt: true` breaks a claim whose node is gone.",
  };
}

function claim(want: Want, have: Have, line: Line<Pins>): Step {
  const { lower, upper } = want.vmIds ?? { lower: 0, upper: 0 };
  const why = `claim the ids ${lower} to ${upper} on ${have.source}`;
  return claimStep(want.storageId, have, claimWords(want, have, line), why);
}

function release(id: string, have: Have, line: Line<Pins>): Step {
  const words = [encodedOwner(line.owner), "0", "0", "0", have.usedIds.join(",")];
  return claimStep(id, have, words, `give back the ids that ${id} had claimed on ${have.source}`);
}

// ---------------------------------------------------------------- moving and removing

const DETACH = `${ON_MOUNT}
id=$1 hash=$2 path=$3 source=$4 was=$5
idle "$path" || exit 1
writer storage.cfg guarded "$id" "$hash" pvesm set "$id" --disable 1 || exit
unmount "$path" "$source" || { code=$?; [ "$was" = disabled ] || writer storage.cfg pvesm set "$id" --delete disable; exit "$code"; }`;

/** Another server, export or mount option under the same id, so that jobs keep pointing at it. */
function move(want: Want, have: Have, line: Line<Pins>, wanted: Values): Step[] {
  const id = want.storageId;
  const { disks, tasks, storages } = have.users;
  const users = [...disks.map((disk) => disk.who), ...tasks.map((task) => `a running ${task}`)];
  users.push(...storages.map((storage) => `the storage ${storage}`));
  if (users.length > 0)
    throw new Refused({
      what: `The storage ${id} cannot be ${have.isDeclared ? "mounted with other options" : `moved to ${sourceOf(want.server, want.export)}`}: it is in use by ${listed(users)}.`,
      next: "Run `pulumi up` again when it is not. Nothing was changed.",
    });
  const isAttached = have.values.disable === undefined || have.mounted.length > 0;
  if (isAttached) {
    const detach: Step = {
      why: `disable the storage ${id} and unmount ${have.path}`,
      argv: [
        ...(["sh", "-c", DETACH, "detach", id, hashOf(have), have.path, have.source] as const),
        have.values.disable === undefined ? "enabled" : "disabled",
      ],
      shown: ["umount", have.path],
      timeout: WRITE_SECONDS,
      look: true,
      next: "End what has it open, then run `pulumi up` again.",
    };
    // What we had claimed on the old export is given back as long as it can be reached.
    return have.claim !== undefined && !have.isDeclared ? [release(id, have, line), detach] : [detach];
  }
  if (have.isDeclared) {
    const changed = FIELDS.filter((field) => !sameValue(field, wanted[field], have.values[field]));
    return [set(id, have, wanted, changed)];
  }
  return [
    {
      why: `remove the old definition of the storage ${id} (${have.source})`,
      argv: [
        "sh",
        "-c",
        `${ON_MOUNT}writer storage.cfg guarded "$@"`,
        "remove",
        id,
        hashOf(have),
        "pvesm",
        "remove",
        id,
      ],
      shown: ["pvesm", "remove", id],
      timeout: WRITE_SECONDS,
      look: true,
    },
  ];
}

const REMOVE = `${ON_MOUNT}
id=$1 hash=$2 path=$3 source=$4 default=$5
idle "$path" || exit 1
if [ "$hash" != - ]; then writer storage.cfg guarded "$id" "$hash" pvesm remove "$id" || exit; fi
rm -f "/run/pulumi-vmbackup/nfs/$id"
if [ "$(source_at "$path")" = "$source" ]; then unmount "$path" "$source" || exit; fi
# The directory that Proxmox made for the mount, when it is empty.
[ "$path" != "$default" ] || [ -n "$(source_at "$path")" ] || rmdir "$path" 2>/dev/null
exit 0`;

function remove(have: Have, line: Line<Pins>): Step[] {
  const id = line.identity;
  const isLeft = have.mounted.at(-1) === have.source;
  if (have.stranger !== undefined || (have.row === undefined && !isLeft)) return [];
  const { jobs, disks, tasks, storages } = have.users;
  // Only the mount is left of it: nothing but another storage can be using that in Proxmox's eyes.
  const users = [
    ...(have.row === undefined
      ? []
      : [
          ...jobs.map((job) => `the backup job ${job}`),
          ...disks.map((d) => d.who),
          ...tasks.map((t) => `a running ${t}`),
        ]),
    ...storages.map((storage) => `the storage ${storage}`),
  ];
  if (users.length > 0)
    throw new Refused({
      what: `The storage ${id} was left: it is in use by ${listed(users)}.`,
      next: "Point these at another storage or remove them first, then run `pulumi destroy` again.",
    });
  const step: Step = {
    why: have.row === undefined ? `unmount ${have.path}` : `remove the storage ${id} and unmount ${have.path}`,
    argv: ["sh", "-c", REMOVE, "remove", id, hashOf(have), have.path, have.source, defaultPath(id)],
    shown: have.row === undefined ? ["umount", have.path] : ["pvesm", "remove", id],
    timeout: WRITE_SECONDS,
    look: true,
    next: "What lies on the export stays in any case. End what has it open, then run `pulumi destroy` again.",
  };
  if (have.claim !== undefined) return [release(id, have, line), step];
  if (line.pins?.claim !== undefined && have.on === undefined && have.row !== undefined)
    console.log(
      `NfsDumpStorage ${id}: ${have.source} does not answer, so its claim of the ids ${line.pins.claim} stays there; \`adopt: true\` of another storage breaks it.`,
    );
  return [step];
}

// ---------------------------------------------------------------- outputs

const time = (seconds: number) => new Date(seconds * 1000).toISOString();

function facts(_want: Want, have: Have): Record<string, unknown> {
  const { state, on } = have;
  return {
    status: {
      asOf: new Date().toISOString(),
      active: state?.active === true,
      totalBytes: state?.total ?? 0,
      usedBytes: state?.used ?? 0,
      availableBytes: state?.avail ?? 0,
      dumps: on?.dumps ?? 0,
      newestDump: on?.newestDump === undefined ? undefined : time(on.newestDump),
    },
  };
}

function asFound(want: Want, have: Have, line: Line<Pins>): Want {
  const { row } = have;
  if (row === undefined) return want;
  const isGet = want.server === undefined;
  const out: Record<string, unknown> = { ...want };
  const wanted = wishes(want, have, line);
  const differs = (field: Field) => isGet || !sameValue(field, wanted[field], have.values[field]);
  const there = asDeclared(Object.fromEntries(FIELDS.filter(differs).map((field) => [field, have.values[field]])));
  for (const field of FIELDS) {
    if (!differs(field)) continue;
    delete out[field];
    if (there[field] !== undefined) out[field] = there[field];
  }
  if (!have.isDeclared || isGet) {
    out.server = normalServer(row.values.server ?? "");
    out.export = row.values.export;
  }
  if (isGet || have.path !== (want.path ?? defaultPath(want.storageId))) out.path = have.path;
  if (have.claim !== undefined && isGet) out.vmIds = { lower: have.claim.lower, upper: have.claim.upper };
  // A claim that somebody broke or that was never made is drift; where the export does not answer, nobody can tell.
  if (want.vmIds !== undefined && have.on !== undefined && isClaimPending(want, have, line)) delete out.vmIds;
  return out as Want;
}

export const nfsDumpStorage: Definition<Want, Have, Pins> = {
  kind: "NfsDumpStorage",
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["content", "vmIds"],
      broken: ({ content, vmIds }) => {
        const disks = content?.filter((kind) => DISKS.includes(kind)) ?? [];
        if (disks.length === 0 || vmIds !== undefined) return undefined;
        return {
          property: "content",
          reason: `${disks.join(" and ")} needs \`vmIds\` (a VmIdRange fits): on a store that several nodes share, two guests of one id would overwrite each other's disks`,
        };
      },
    },
  ],
  replaceOn: ["storageId", "path"],
  fromId: (storageId) => ({ storageId }),
  identify: ({ storageId }) => storageId,
  observe,
  plan,
  remove,
  facts,
  asFound,
};
