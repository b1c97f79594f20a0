// RestoredTemplate, the eyes: what is there of ours, and whether something has to be restored.
//
// What is there is known by the token that Proxmox draws for each restored guest (vmgenid): another guest of the same id is not
// ours.
import { createHash } from "node:crypto";
import type { Observed, Purpose } from "./engine.js";
import { same } from "./engine-values.js";
import { CommandFailed, Conflict, Refused } from "./errors.js";
import type { Host } from "./host.js";
import { argvHash, type JobState, jobState } from "./host-job.js";
import { type Line, memory } from "./host-ledger.js";
import { contains, type Range } from "./id-range.js";
import * as pve from "./pve.js";
import * as files from "./pve-guests.js";
import { restoredBy, verifyArgv } from "./qmrestore.js";
import type { Want } from "./restored-template.js";
import { choose, refused, type Source } from "./restored-template-choice.js";
import { isSettled, unmarked } from "./restored-template-settings.js";
import { firstFree, idsTaken } from "./vm-id-range.js";

export const KIND = "RestoredTemplate";

// ---------------------------------------------------------------- what was chosen or seen once

/** One guest: what it was restored from, and by what it is known. */
export interface Pinned {
  vmId: number;
  /** The declared source that `archive` was chosen for. */
  asked?: Source | undefined;
  archive?: string | undefined;
  sourceTime?: string | undefined;
  storage?: string | undefined;
  /** What the archive's configuration says of what the program may leave out. */
  archived?: { name?: string | undefined; tags?: string | undefined; description?: string | undefined } | undefined;
  overcommitted?: { virtual: number; available: number } | undefined;
  /** Settings of the archive that the guest has otherwise, on purpose. */
  changed?: string[] | undefined;
  /** Drawn by Proxmox for this guest alone. Absent until it is there. */
  token?: string | undefined;
  volumes?: Record<string, string> | undefined;
  /** The configuration as it was when all was done, as short hashes: what differs later was changed by hand. */
  settings?: string | undefined;
  bytes?: number | undefined;
  seconds?: number | undefined;
  adopted?: true | undefined;
}

export interface Pins extends Pinned {
  /** The guest that this one takes the place of: it goes last, or first where the id is the same. */
  old?: Pinned | undefined;
  /** The archive of a guest that was removed for this one, which is not there yet. */
  instead?: string | undefined;
  /** The ledger's job when this was chosen: what it did is none of this guest's. */
  jobBefore?: string | undefined;
}

// ---------------------------------------------------------------- observe

/** One guest of ours that is there. */
export interface Mine {
  file: files.GuestFile;
  pinned: Pinned;
  clones: string[];
  /** Storages of its disks that do not answer: clones may be there that nobody can see. */
  unknown: string[];
  /** Disks that the configuration names and no storage has. */
  missing: string[];
}

export interface Have extends Observed<Pins> {
  job: JobState;
  /** The guest that is wanted, or what a restore left of it. */
  mine: Mine | undefined;
  placeholder: { file: files.GuestFile; free: boolean } | undefined;
  /** The guest that it replaces. */
  old: Mine | undefined;
  /** Volumes of ours that no guest of ours has. */
  leftovers: string[];
  /** Something else has the id. */
  stranger: files.GuestFile | undefined;
  /** Why nothing can be restored here. */
  refused: Error | undefined;
  /** A restore that runs is not the one that is wanted now. */
  otherwise: boolean;
  /** The archive that is wanted was read from beginning to end. */
  verified: boolean;
  keep: boolean;
}

export async function observe(want: Want, line: Line<Pins> | undefined, host: Host, purpose?: Purpose): Promise<Have> {
  const guests = await host.ask(files.guestFiles);
  const pins = line?.pins;
  const vmId = pins?.vmId ?? (typeof want.vmId === "number" ? want.vmId : Number(line?.identity));
  const atWork = line?.job !== undefined && pins?.token === undefined;
  const job = atWork ? await jobState(host, line) : ({ state: "none", log: "", rebooted: false } satisfies JobState);
  const done = restoredBy(job.log);
  // The job of the line may also be one that only reads the archive.
  const reading = pins?.archive !== undefined && line?.job?.argvHash === argvHash(verifyArgv(pins.archive));
  const restoring =
    job.state !== "none" && pins?.archive !== undefined && !reading && line?.job?.unit !== pins.jobBefore;
  const file = guests.byId.get(vmId);
  let next: Pins | undefined = pins === undefined ? undefined : { ...pins };
  let found: files.GuestFile | undefined;
  let placeholder: Have["placeholder"];

  if (file?.kind === "qemu" && file.node === guests.node) {
    if (pins === undefined) {
      found = file;
      next = adopted(want, file, vmId);
    } else if (pins.token !== undefined) {
      if (tokenOf(file) === pins.token) found = file;
    } else if (pins.old?.vmId === vmId && tokenOf(file) === pins.old.token) {
      // still the guest whose place the new one will take
    } else if (restoring && job.state === "ok" && isMadeOf(file, done.made)) {
      found = file;
      next = {
        ...pins,
        token: tokenOf(file),
        instead: undefined,
        jobBefore: undefined,
        bytes: done.bytes,
        seconds: job.seconds,
      };
    } else if (restoring && job.state === "failed" && done.began && isPlaceholder(file)) {
      placeholder = { file, free: await host.ask(files.guestLock(vmId)) };
    }
  }
  if (found !== undefined && next !== undefined) next = described(next, found, want, pins !== undefined);
  const oldFile = pins?.old === undefined ? undefined : guests.byId.get(pins.old.vmId);
  const oldIsThere = oldFile !== undefined && tokenOf(oldFile) === pins?.old?.token;

  const lost = job.state === "failed" && restoring ? done.made : [];
  const volumes = await volumesOf([next, next?.old], lost, host);
  const mine = found === undefined || next === undefined ? undefined : mineOf(found, next, volumes);
  const old =
    !oldIsThere || oldFile === undefined || next?.old === undefined ? undefined : mineOf(oldFile, next.old, volumes);
  // Whatever any guest has is none of them, also when it has the name of a volume that was ours.
  const inUse = new Set([...guests.byId.values()].flatMap((guest) => namesOf(guest)));
  const leftovers = job.state === "running" ? [] : volumes.ours.filter((volid) => !inUse.has(files.diskName(volid)));
  if (next?.old !== undefined && old === undefined && !leftovers.some((volid) => isOf(volid, next?.old))) {
    if (mine === undefined) next.instead = next.old.archive ?? next.instead;
    delete next.old;
  }

  const have: Have = {
    exists: mine !== undefined || placeholder !== undefined || old !== undefined || leftovers.length > 0,
    job,
    mine,
    placeholder,
    old,
    leftovers,
    stranger:
      mine === undefined && placeholder === undefined && job.state !== "running" && old?.file !== file
        ? file
        : undefined,
    refused: undefined,
    otherwise: false,
    verified: false,
    keep: (want.onDelete ?? (want.template === false || next?.adopted ? "keep" : "destroy")) === "keep",
    owner: mine === undefined ? undefined : unmarked(mine.file.values.description).owner,
    pins: next,
  };
  if (job.state === "running") have.exists = true;
  if (pins === undefined && file !== undefined) have.exists = true; // also what cannot be taken over: plan says why
  if (purpose === "plan" && want.from !== undefined && want.to !== undefined)
    await chooseNext(want, { from: want.from, to: want.to }, vmId, have, line?.job?.unit, guests, host);
  have.verified = reading && job.state === "ok" && have.pins?.archive === pins?.archive;
  return have;
}

/** Whether something has to be restored, and what. The result is in `have`: the new pins, or why not. */
async function chooseNext(
  want: Want,
  { from: source, to: places }: { from: Source; to: { storage: string }[] },
  vmId: number,
  have: Have,
  jobBefore: string | undefined,
  guests: files.Guests,
  host: Host,
): Promise<void> {
  const { pins, mine } = have;
  const asks = pins?.asked === undefined || !same(pins.asked, source);
  const fits = (id: number) => (typeof want.vmId === "number" ? want.vmId === id : contains(want.vmId, id));
  const isPlace = (storage: string | undefined) => places.some((place) => place.storage === storage);
  const elsewhere = pins?.storage !== undefined && !isPlace(pins.storage);
  const goal = pins?.archive !== undefined && !asks && !elsewhere && fits(vmId);
  if (mine !== undefined && (goal || (mine.pinned.adopted && !asks && fits(vmId)))) return;
  have.otherwise = have.job.state === "running" && !goal;
  if (have.job.state === "running") return;
  if (have.placeholder !== undefined || have.leftovers.length > 0) return; // cleared first, and looked at again then
  if (have.stranger !== undefined && want.vmId === vmId) return;
  // Another archive, place or id than those of the guest that is there, or of the one that it was to replace.
  const before: Pinned | undefined = mine?.pinned ?? have.old?.pinned;
  const goBack = () => {
    have.pins = { ...before, vmId: before?.vmId ?? vmId, asked: source };
    if (have.mine === undefined) Object.assign(have, { mine: have.old, old: undefined });
  };
  const canGoBack = before !== undefined && fits(before.vmId) && (before.adopted || isPlace(before.storage));
  if (canGoBack && mine === undefined && same(before.asked, source)) return goBack();
  try {
    const stays = mine === undefined && have.stranger === undefined && fits(vmId);
    const target = typeof want.vmId === "number" ? want.vmId : stays ? vmId : await freeId(want.vmId, host);
    const choice = await choose(
      {
        from: source,
        to: before?.storage !== undefined && isPlace(before.storage) ? [{ storage: before.storage }] : places,
        vmId: target,
        name: want.name,
        kept: asks ? undefined : pins?.archive,
        inPlace: before?.vmId === target ? freedBy(have) : undefined,
      },
      guests,
      host,
    );
    if (canGoBack && before.archive === choice.archive) return goBack(); // the same one, named in another way
    const { name, tags, description = "", onboot, devices, template } = choice.archived;
    if (template && want.template === false)
      throw refused(
        `template: ${choice.archive} is the backup of a template, and is restored as one.`,
        "Leave `template` out, and clone it.",
      );
    const { old: _, instead: __, jobBefore: ___, ...guestBefore }: Pins = before ?? { vmId: target };
    have.pins = {
      vmId: target,
      asked: source,
      archive: choice.archive,
      sourceTime: choice.sourceTime,
      storage: choice.storage,
      archived: { name, tags, description: description.length <= 300 ? description : undefined },
      overcommitted: choice.overcommitted,
      changed: [...(onboot ? ["onboot"] : []), ...devices],
      instead: pins?.instead,
      jobBefore,
      old: before === undefined ? undefined : guestBefore,
    };
    if (mine !== undefined) Object.assign(have, { old: mine, mine: undefined });
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Conflict || error instanceof CommandFailed)) throw error;
    have.refused = error;
  }
}

const freedBy = (have: Have): ReadonlyMap<string, number> => {
  const guest = have.mine ?? have.old;
  const freed = new Map<string, number>();
  if (guest?.pinned.storage !== undefined) freed.set(guest.pinned.storage, guest.pinned.bytes ?? 0);
  return freed;
};

/** Ids that restores of this host have, or are about to take. */
function claimed(lines: readonly Line[]): number[] {
  return (lines.filter(({ kind }) => kind === KIND) as Line<Pins>[])
    .flatMap(({ identity, pins }) => [Number(identity), pins?.vmId, pins?.old?.vmId])
    .filter((id) => id !== undefined);
}

export async function freeId(range: Range, host: Host): Promise<number> {
  const { lines } = await memory(host);
  const free = firstFree(range, await idsTaken(host, claimed(lines)));
  if (free !== undefined) return free;
  throw noneFree(range);
}

const noneFree = ({ lower, upper }: Range) =>
  new Refused({
    what: `Unable to restore. vmId: no id from ${lower} to ${upper} is free.`,
    next: "An id is free when no guest has it, no volume of it exists and no dump of it lies on a storage. Widen the range, or remove what is not needed. Nothing was changed.",
  });

/** A guest that was found as it is: nothing is known of its archive. */
function adopted(want: Want, file: files.GuestFile, vmId: number): Pins {
  return { vmId, asked: want.from, token: tokenOf(file), adopted: true };
}

/** What is seen of a guest of ours; its settings once, when all is as it shall be. */
function described(pins: Pins, file: files.GuestFile, want: Want, ours: boolean): Pins {
  const next: Pins = { ...pins };
  const disks = files.disksOf(file.values);
  const known = Object.values(pins.volumes ?? {}).map(files.diskName);
  const sealed = pins.settings !== undefined;
  next.volumes = Object.fromEntries(
    Object.entries(disks).filter(([, volid]) => !sealed || known.includes(files.diskName(volid))),
  );
  if (sealed) return next;
  if (file.firewall && ours && !next.changed?.includes("firewall"))
    next.changed = [...(next.changed ?? []), "firewall"];
  if (next.adopted || isSettled(want, next, file)) next.settings = settingsOf(file);
  return next;
}

/** Drawn anew by each restore and clone, and at no other time. */
function tokenOf({ values }: files.GuestFile): string {
  const own = values.vmgenid ?? /(?:^|,)uuid=([^,]+)/.exec(values.smbios1 ?? "")?.[1];
  // A guest without either (made before 2018) is known by its disks.
  return own ?? Object.values(files.disksOf(values)).map(files.diskName).sort().join(",");
}

/** Not what the program may declare, and not what refuses a delete in words of its own. */
const APART = ["name", "tags", "description", "template", "onboot", "lock", "protection", "parent"];

export function settingsOf({ values }: files.GuestFile): string {
  const disks = files.disksOf(values);
  return Object.entries(values)
    .filter(([key]) => !APART.includes(key))
    .map(([key, value]) => `${key}=${short(disks[key] === undefined ? value : files.diskName(disks[key]))}`)
    .sort()
    .join(" ");
}

const short = (text: string) => createHash("sha256").update(text).digest("hex").slice(0, 6);

/** Options that differ from what was there when all was done. */
export function changedByHand(pinned: Pinned, file: files.GuestFile): string[] {
  const split = (text: string) =>
    new Map(text.split(" ").map((pair): [string, string] => [pair.slice(0, -7), pair.slice(-6)]));
  if (pinned.settings === undefined) return [];
  const [then, now] = [split(pinned.settings), split(settingsOf(file))];
  return [...new Set([...then.keys(), ...now.keys()])].filter((key) => then.get(key) !== now.get(key)).sort();
}

/** What a restore leaves that did not come to its end. */
export function isPlaceholder({ raw }: files.GuestFile): boolean {
  return ["", "memory: 128", "lock: create"].includes(raw.trim());
}

const namesOf = (file: files.GuestFile) => Object.values(files.disksOf(file.values)).map(files.diskName);

/** Whether a guest is the one that a job made. */
function isMadeOf(file: files.GuestFile, volids: readonly string[]): boolean {
  const names = namesOf(file);
  return !isPlaceholder(file) && volids.every((volid) => names.includes(files.diskName(volid)));
}

const isOf = (volid: string, pinned: Pinned | undefined) =>
  Object.values(pinned?.volumes ?? {}).some((v) => files.diskName(v) === files.diskName(volid));

interface Volumes {
  /** Those of ours that exist, as they are called now. */
  ours: string[];
  clonesOf(volid: string): string[];
  unknown: string[];
}

async function volumesOf(guests: (Pinned | undefined)[], more: readonly string[], host: Host): Promise<Volumes> {
  const wanted = [...guests.flatMap((guest) => Object.values(guest?.volumes ?? {})), ...more];
  const storages = [...new Set(wanted.map(files.storageOf))];
  if (storages.length === 0) return { ours: [], clonesOf: () => [], unknown: [] };
  const unknown: string[] = [];
  const settings = await host.ask(pve.storages);
  const listed = await Promise.all(
    storages.map(async (storage) => {
      try {
        return await host.ask(pve.contentOf(storage, "images"));
      } catch (error) {
        if (!(error instanceof CommandFailed)) throw error;
        unknown.push(storage);
        return [];
      }
    }),
  );
  const rows = listed.flat();
  const thin = settings.filter(({ storage, type }) => storages.includes(storage) && type === "lvmthin");
  const origins = thin.length === 0 ? [] : await host.ask(files.thinOrigins);
  const names = new Set(wanted.map(files.diskName));
  return {
    ours: rows.map(({ volid }) => volid).filter((volid) => names.has(files.diskName(volid))),
    clonesOf(volid) {
      const [storage, name] = [files.storageOf(volid), volid.slice(volid.indexOf(":") + 1)];
      const group = thin.find((row) => row.storage === storage)?.vgname;
      const inThin = origins.filter((lv) => lv.vg_name === group && lv.origin === name).map((lv) => lv.lv_name);
      const linked = rows.filter((row) => row.volid.startsWith(`${volid}/`)).map((row) => row.volid);
      return [...inThin, ...linked];
    },
    unknown,
  };
}

function mineOf(file: files.GuestFile, pinned: Pinned, volumes: Volumes): Mine {
  const disks = Object.values(files.disksOf(file.values));
  const clones = disks.flatMap((volid) => volumes.clonesOf(volid));
  const ids = clones.map((name) => /(?:^|[/:])(?:vm|base|snap_vm)-(\d+)-[^/]*$/.exec(name)?.[1] ?? name);
  const there = new Set(volumes.ours.map(files.diskName));
  const known = Object.values(pinned.volumes ?? {}).filter(
    (volid) => !volumes.unknown.includes(files.storageOf(volid)),
  );
  return {
    file,
    pinned,
    clones: [...new Set(ids)].filter((id) => id !== String(file.vmid)).sort(),
    unknown: volumes.unknown.filter((storage) => disks.some((volid) => files.storageOf(volid) === storage)),
    missing: known.filter((volid) => !there.has(files.diskName(volid))),
  };
}
