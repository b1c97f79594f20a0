// What to restore, where to and as which guest: chosen once, before anything is made, and then kept. Everything that can be known to
// go wrong is refused here.
import { timeZone } from "./calendar-event.js";
import { CommandFailed, Conflict, Refused } from "./errors.js";
import type { Host } from "./host.js";
import * as pve from "./pve.js";
import type { Guests } from "./pve-guests.js";
import { type Archived, archivedNames, deviceSizes, extractConfig, unpackedSize, vmaData } from "./qmrestore.js";
import { idsTaken, type Taken, USED } from "./vm-id-range.js";

export type Source =
  | { archive: string }
  | { storage: string; vmId: number; guest?: string | undefined; at?: string | undefined };

export interface Choice {
  archive: string;
  /** When it was made, by the stamp in its name. */
  sourceTime: string | undefined;
  storage: string;
  archived: Archived;
  /** The disks' whole size has no room, and the data has; `data` is what is known of it, `known` whether that is all of it. */
  overcommitted: Overcommitted | undefined;
}

export interface Overcommitted {
  virtual: number;
  available: number;
  data?: number | undefined;
  known?: boolean | undefined;
}

export const refused = (what: string, next: string): Refused =>
  new Refused({ what: `Unable to restore. ${what}`, next: `${next} Nothing was changed.` });

const most = 20;
const listed = (names: readonly string[]) =>
  names.length === 0
    ? "none"
    : names.slice(0, most).join(", ") + (names.length > most ? ` and ${names.length - most} more` : "");

// ---------------------------------------------------------------- the archive

const nameOf = (volid: string) => volid.slice(volid.lastIndexOf("/") + 1);

/** `2023_07_26-02_23_55` of an archive's name: local time of the node. */
export function stampOf(volid: string): string | undefined {
  return /^vzdump-qemu-\d+-(\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d)\./.exec(nameOf(volid))?.[1];
}

/** The rows of the storage that holds an archive; an unknown storage is told with those there are. */
async function dumpsOn(storage: string, property: string, host: Host): Promise<pve.Volume[]> {
  const states = await host.ask(pve.storageStates);
  const state = states.find((row) => row.storage === storage);
  if (state === undefined)
    throw refused(
      `${property}: there is no storage ${storage} on this node.`,
      `There are: ${listed(states.map((row) => row.storage))}.`,
    );
  if (!state.enabled)
    throw refused(`${property}: the storage ${storage} is disabled, or not for this node.`, "Enable it.");
  return await host.ask(pve.contentOf(storage, "backup"));
}

/** Of the source that the program names; `kept` is what was chosen for the same source before. */
export async function chooseArchive(from: Source, kept: string | undefined, host: Host): Promise<pve.Volume> {
  if ("archive" in from) return await named(from.archive, host);
  const rows = await dumpsOn(from.storage, "from.storage", host);
  const before = rows.find((row) => row.volid === kept);
  if (before !== undefined) return usable(before);
  const group = rows.filter((row) => row.vmid === from.vmId);
  const dumps = group.filter((row) => row.subtype === "qemu");
  const where = `guest ${from.vmId} on ${from.storage}`;
  if (dumps.length === 0) {
    const others = [...new Set(rows.flatMap((row) => (row.vmid === undefined ? [] : [String(row.vmid)])))].sort();
    throw refused(
      group.length > 0
        ? `from: the backups of ${where} are a container's, and qmrestore restores virtual machines.`
        : `from: there is no backup of ${where}.`,
      `There are backups of: ${listed(others)}.`,
    );
  }
  const ofGuest = await onlyGuest(dumps, from, where, host);
  return usable(await atTime(ofGuest, from.at, where, host));
}

async function named(volid: string, host: Host): Promise<pve.Volume> {
  const storage = volid.slice(0, volid.indexOf(":"));
  const rows = await dumpsOn(storage, "from.archive", host);
  const row = rows.find((r) => r.volid === volid);
  if (row !== undefined) return usable(row);
  const group = /^vzdump-\w+-\d+-/.exec(nameOf(volid))?.[0] ?? "";
  const near = rows.map((r) => r.volid).filter((v) => nameOf(v).startsWith(group));
  throw refused(
    `from.archive: ${volid} does not exist.`,
    `Of its guest there are: ${listed(near.sort().reverse())}. Retention may have removed it.`,
  );
}

function usable(row: pve.Volume): pve.Volume {
  if (row.subtype !== "qemu")
    throw refused(
      `from: ${row.volid} is a backup of a container, and qmrestore restores virtual machines.`,
      "Name a backup of a virtual machine (vzdump-qemu-...).",
    );
  if (row.size === 0)
    throw refused(
      `from: ${row.volid} is empty: the backup that made it failed.`,
      "Remove it, or name another one as `from.archive`.",
    );
  return row;
}

/** An id that was used by one guest after the other has dumps of both in one group. */
async function onlyGuest(
  dumps: pve.Volume[],
  { guest }: { guest?: string | undefined },
  where: string,
  host: Host,
): Promise<pve.Volume[]> {
  if (dumps.length === 1 && guest === undefined) return dumps;
  const names = await host.ask(archivedNames(dumps.map((row) => row.volid)));
  // Guests without a name are others than those with one.
  const known = [...new Set([...names.values()].map((name) => name || "one without a name"))].sort();
  if (guest !== undefined) {
    const its = dumps.filter((row) => names.get(row.volid) === guest);
    if (its.length > 0) return its;
    throw refused(`from.guest: no backup of ${where} is of a guest named ${guest}.`, `There are: ${listed(known)}.`);
  }
  if (known.length <= 1) return dumps;
  throw refused(
    `from: the backups of ${where} are of several guests: ${listed(known)}.`,
    "Say with `from.guest` which one is meant.",
  );
}

async function atTime(dumps: pve.Volume[], at: string | undefined, where: string, host: Host): Promise<pve.Volume> {
  const zone = await host.ask(timeZone);
  const timed = dumps.map((row) => ({ row, times: timesOf(row, zone) }));
  const choices = () =>
    listed(
      dumps
        .map((row) => row.volid)
        .sort()
        .reverse(),
    );
  const only = (found: typeof timed, why: string): pve.Volume => {
    const [first] = found;
    if (first === undefined)
      throw refused(`from.at: there is no backup of ${where} made at ${at}.`, `There are: ${choices()}.`);
    if (found.length === 1) return first.row;
    throw refused(
      `from: ${why}: ${listed(found.map(({ row }) => row.volid))}.`,
      "Name the one that is meant as `from.archive`.",
    );
  };
  if (at === undefined) {
    // Whatever may be the newest: in an hour that the clock repeated, a stamp does not tell which came first.
    const surely = Math.max(...timed.map(({ times }) => times[0] ?? 0));
    const newest = timed.filter(({ times }) => (times.at(-1) ?? 0) >= surely);
    return only(
      newest,
      `which of these backups of ${where} is the newest cannot be told, as the clock went back an hour`,
    );
  }
  const several = `several backups of ${where} fit ${at}`;
  if (at.includes("_"))
    return only(
      timed.filter(({ row }) => stampOf(row.volid) === at),
      several,
    );
  const wanted = Date.parse(at) / 1000;
  return only(
    timed.filter(({ times }) => times.includes(wanted)),
    several,
  );
}

/** Every moment that a dump's local stamp can mean, earliest first: two in the hour that comes twice in autumn. */
export function timesOf({ ctime = 0, volid }: Pick<pve.Volume, "ctime" | "volid">, zone: string): number[] {
  if (stampOf(volid) === undefined || zone === "") return [ctime];
  let wall: Intl.DateTimeFormat;
  try {
    wall = new Intl.DateTimeFormat("en-GB", { timeZone: zone, dateStyle: "short", timeStyle: "medium" });
  } catch {
    return [ctime]; // a zone that this machine does not know
  }
  const shown = wall.format(ctime * 1000);
  const candidates = [-3600, -1800, 0, 1800, 3600].map((shift) => ctime + shift);
  return candidates.filter((time) => wall.format(time * 1000) === shown);
}

// ---------------------------------------------------------------- the place

/** Whether a storage reserves the whole size of a disk when it is made. */
export function isThick({ type, preallocation, sparse }: pve.Storage): boolean {
  if (type === "zfspool") return sparse !== true;
  return ["lvm", "iscsi", "iscsidirect"].includes(type) || ["falloc", "full"].includes(preallocation ?? "");
}

/** What is known of the data in an archive without reading it all: `least` bytes, and whether it can be more. */
export interface Data {
  least: number;
  known: boolean;
}

interface Place {
  storage: string;
  available: number;
  overcommitted: Choice["overcommitted"];
}

/**
 * Of several the one with most room. Thick ones need the whole size of the disks, thin and sparse ones the data. `freed` is what a
 * guest that goes first gives back, by storage.
 */
export function choosePlace(
  to: readonly { storage: string }[],
  rows: { states: readonly pve.StorageState[]; storages: readonly pve.Storage[] },
  need: { virtual: number; data: Data; freed?: ReadonlyMap<string, number> | undefined },
): Place {
  const reasons: string[] = [];
  const fit = to.flatMap(({ storage }): Place[] => {
    const state = rows.states.find((row) => row.storage === storage);
    const settings = rows.storages.find((row) => row.storage === storage);
    const why = (reason: string): Place[] => {
      reasons.push(`${storage} ${reason}`);
      return [];
    };
    if (state === undefined || settings === undefined)
      return why(`does not exist (there are: ${listed(rows.states.map((row) => row.storage))})`);
    if (!state.content.includes("images")) return why("takes no disk images");
    if (!state.enabled) return why("is disabled, or not for this node");
    if (!state.active) return why("is not active");
    const available = state.avail + (need.freed?.get(storage) ?? 0);
    const wanted = isThick(settings) ? need.virtual : Math.min(need.data.least, need.virtual);
    if (available < wanted)
      return why(
        isThick(settings)
          ? `has ${available} bytes free, and reserves the whole ${wanted} bytes of the disks`
          : `has ${available} bytes free, and the data is ${wanted} bytes${need.data.known ? "" : " at least"}`,
      );
    const { least, known } = need.data;
    const overcommitted =
      available < need.virtual ? { virtual: need.virtual, available, data: least, known } : undefined;
    return [{ storage, available, overcommitted }];
  });
  const [best] = fit.sort((a, b) => b.available - a.available || a.storage.localeCompare(b.storage));
  if (best !== undefined) return best;
  throw refused(`to: ${reasons.join("; ")}.`, "Name a storage that takes disk images and has room.");
}

// ---------------------------------------------------------------- the id

/** Free in the meaning of VmIdRange. Dumps of an earlier guest of the same name may lie there: they are this one's past. */
async function checkId(
  vmId: number,
  name: string | undefined,
  guests: Guests,
  taken: Taken,
  host: Host,
): Promise<void> {
  const there = guests.byId.get(vmId);
  if (there !== undefined)
    throw new Conflict({
      what: `Unable to restore. vmId: ${there.kind === "lxc" ? "a container" : "a guest"} on ${there.node} has the id ${vmId}${there.values.name === undefined ? "" : ` (${there.values.name})`}. It was left as it is.`,
      next: "Choose another id, or a range, of which a free one is taken.",
    });
  const why = taken.ids.get(vmId);
  // An id that is only remembered is passed over where one of a range is chosen. Here it is chosen: given as a number, or the one that
  // this resource had before; and what could be inherited would be seen.
  if (why === undefined || why === USED) return;
  const dumps = await dumpsOf(vmId, host);
  if (why.startsWith("the dump")) {
    const names = await host.ask(archivedNames(dumps));
    if (name !== undefined && dumps.every((volid) => names.get(volid) === name)) return;
  }
  throw refused(
    `vmId: ${vmId} is not free: ${why}, and would count as the new guest's.`,
    "Choose another id, or a range; or remove what is left of the id's earlier guest.",
  );
}

async function dumpsOf(vmId: number, host: Host): Promise<string[]> {
  const states = await host.ask(pve.storageStates);
  const asked = states.filter(({ enabled, active, content }) => enabled && active && content.includes("backup"));
  const rows = await Promise.all(asked.map(({ storage }) => host.ask(pve.contentOf(storage))));
  return rows.flat().flatMap(({ vmid, volid, content }) => (vmid === vmId && content === "backup" ? [volid] : []));
}

// ---------------------------------------------------------------- all of it

export interface Asked {
  from: Source;
  to: readonly { storage: string }[];
  vmId: number;
  name?: string | undefined;
  /** What an earlier look chose for the same source. */
  kept?: string | undefined;
  /** The guest that is there is ours and goes first: what its disks give back, by storage. */
  inPlace?: ReadonlyMap<string, number> | undefined;
  /** Bytes of data, where the archive has been read to its end. */
  data?: number | undefined;
}

/** Throws Refused or Conflict. Changes nothing. */
export async function choose(asked: Asked, guests: Guests, host: Host): Promise<Choice> {
  // Side by side: each of these wants a second or two of the node.
  const [row, taken] = await Promise.all([
    chooseArchive(asked.from, asked.kept, host),
    asked.inPlace === undefined ? idsTaken(host) : undefined,
  ]);
  const [archived, states, storages] = await Promise.all([
    configIn(row.volid, host),
    host.ask(pve.storageStates),
    host.ask(pve.storages),
  ]);
  const name = asked.name ?? archived.name;
  if (taken !== undefined) await checkId(asked.vmId, name, guests, taken, host);
  const virtual = archived.unsized ? await host.ask(deviceSizes(row.volid)) : archived.virtualBytes;
  const isTight = asked.to.some(({ storage }) =>
    states.some((state) => state.storage === storage && state.avail + (asked.inPlace?.get(storage) ?? 0) < virtual),
  );
  const data =
    asked.data !== undefined
      ? { least: asked.data, known: true }
      : isTight
        ? await dataIn(row, virtual, host)
        : { least: 0, known: false }; // whatever it is, it fits
  const place = choosePlace(asked.to, { states, storages }, { virtual, data, freed: asked.inPlace });
  return {
    archive: row.volid,
    sourceTime: row.ctime === undefined ? undefined : new Date(row.ctime * 1000).toISOString(),
    storage: place.storage,
    archived,
    overcommitted: place.overcommitted,
  };
}

/** Of a plain archive its size tells; of a compressed one its head or end may, and otherwise its size is the least. */
async function dataIn(row: pve.Volume, virtual: number, host: Host): Promise<Data> {
  if (row.volid.endsWith(".vma")) return { least: vmaData(row.size, virtual), known: true };
  const unpacked = await host.ask(unpackedSize(row.volid));
  return { least: vmaData(Math.max(row.size, unpacked.bytes), virtual), known: unpacked.known };
}

async function configIn(archive: string, host: Host): Promise<Archived> {
  try {
    return await host.ask(extractConfig(archive));
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    throw new Refused(
      {
        what: `Unable to restore. from: the configuration in ${archive} cannot be read.`,
        stderr: error.stderr,
        next: "The archive is damaged or incomplete: choose another one. Nothing was changed.",
      },
      error,
    );
  }
}
