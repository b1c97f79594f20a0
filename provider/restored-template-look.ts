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
import { idUnremembered } from "./nfs-dump-storage-look.js";
import * as pve from "./pve.js";
import * as files from "./pve-guests.js";
import { restoredBy, verifyArgv } from "./qmrestore.js";
import type { Want } from "./restored-template.js";
import { choose, isThick, type Overcommitted, refused, type Source } from "./restored-template-choice.js";
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
  overcommitted?: Overcommitted | undefined;
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
  /** Of an id out of a range: every registry that claims it knows that it is used. */
  remembered?: true | undefined;
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
  /** Disks of a template that were not made a template's. */
  unconverted: string[];
  /** What its disks give back, by storage. */
  frees: ReadonlyMap<string, number>;
}

export interface Have extends Observed<Pins> {
  job: JobState;
  /** The guest that is wanted, or what a restore left of it. */
  mine: Mine | undefined;
  placeholder: { file: files.GuestFile; free: boolean } | undefined;
  /** The guest that it replaces. */
  old: Mine | undefined;
  /** Volumes of ours that are nobody's: their guest is gone, or is the placeholder. */
  leftovers: string[];
  /** Storages that do not answer, and may have such volumes. */
  unseen: string[];
  /** Registries of ids that have to learn of the guest's. */
  unremembered: { path: string; source: string }[];
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
  if (found !== undefined && next !== undefined) next = described(next, found, pins !== undefined);
  const oldFile = pins?.old === undefined ? undefined : guests.byId.get(pins.old.vmId);
  const oldIsThere = oldFile !== undefined && tokenOf(oldFile) === pins?.old?.token;

  const lost = job.state === "failed" && restoring ? done.made : [];
  const volumes = await volumesOf([next, next?.old], lost, host);
  const mine = found === undefined || next === undefined ? undefined : mineOf(found, next, volumes);
  // Once, when all is as it shall be.
  if (
    mine !== undefined &&
    next !== undefined &&
    next.settings === undefined &&
    (next.adopted || isSettled(want, mine))
  )
    next.settings = settingsOf(mine.file);
  const old =
    !oldIsThere || oldFile === undefined || next?.old === undefined ? undefined : mineOf(oldFile, next.old, volumes);
  // Whoever has the id of a volume now has the volume, also one that his configuration does not name: a restore of his that is still at
  // work, a snapshot, a disk that was taken off by hand. And whatever any guest names is none of them.
  const inUse = new Set([...guests.byId.values()].flatMap((guest) => namesOf(guest)));
  const isNobodys = (volid: string) => {
    const owner = guests.byId.get(files.ownerOf(volid) ?? vmId);
    return (owner === undefined || owner === placeholder?.file) && !inUse.has(files.diskName(volid));
  };
  const leftovers = job.state === "running" ? [] : volumes.ours.filter(isNobodys);
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
    unremembered: [],
    unseen: mine === undefined && old === undefined && job.state !== "running" ? volumes.unseen : [],
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
  if (mine !== undefined && next !== undefined && typeof want.vmId !== "number" && !next.adopted && !next.remembered) {
    const { at, unseen } = await idUnremembered(vmId, host);
    have.unremembered = at;
    if (at.length === 0 && !unseen) next.remembered = true;
  }
  if (purpose === "plan" && want.from !== undefined && want.to !== undefined)
    await chooseNext(
      want,
      { from: want.from, to: want.to },
      vmId,
      have,
      line,
      reading ? done.bytes : undefined,
      guests,
      host,
    );
  have.verified = reading && job.state === "ok" && have.pins?.archive === pins?.archive && isFresh(line);
  return have;
}

/** An archive that was read long ago may have been damaged since. */
const isFresh = (line: Line<Pins>) => Date.now() - Date.parse(line.job?.startedAt ?? "") < 24 * 3600_000;

/** Whether something has to be restored, and what. The result is in `have`: the new pins, or why not. */
async function chooseNext(
  want: Want,
  { from: source, to: places }: { from: Source; to: { storage: string }[] },
  vmId: number,
  have: Have,
  line: Line<Pins> | undefined,
  data: number | undefined,
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
        inPlace: before?.vmId === target ? (have.mine ?? have.old)?.frees : undefined,
        data: asks ? undefined : data,
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
      jobBefore: line?.job?.unit,
      old: before === undefined ? undefined : guestBefore,
    };
    if (mine !== undefined) Object.assign(have, { old: mine, mine: undefined });
    if (target !== vmId) have.stranger = undefined; // another id: whoever has that one may keep it
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Conflict || error instanceof CommandFailed)) throw error;
    have.refused = error;
  }
}

/** Ids that restores of this host have, or are about to take. */
function claimed(lines: readonly Line[]): number[] {
  return (lines.filter(({ kind }) => kind === KIND) as Line<Pins>[])
    .flatMap(({ identity, pins }) => [Number(identity), pins?.vmId, pins?.old?.vmId])
    .filter((id) => id !== undefined);
}

export async function freeId(range: Range, host: Host): Promise<number> {
  const { lines } = await memory(host);
  const taken = await idsTaken(host, claimed(lines));
  if (taken.unknown.length > 0)
    throw new Refused({
      what: `Unable to restore. vmId: which ids from ${range.lower} to ${range.upper} are free cannot be known, as the storage ${taken.unknown.join(", ")} does not answer, and may hold disks and dumps of earlier guests.`,
      next: "Run pulumi again when it answers; disable a storage that will not come back; or give the id as a number. Nothing was changed.",
    });
  const free = firstFree(range, taken);
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

/** What is seen of a guest of ours. */
function described(pins: Pins, file: files.GuestFile, ours: boolean): Pins {
  const next: Pins = { ...pins };
  const disks = files.disksOf(file.values);
  const known = Object.values(pins.volumes ?? {}).map(files.diskName);
  const sealed = pins.settings !== undefined;
  next.volumes = Object.fromEntries(
    Object.entries(disks).filter(([, volid]) => !sealed || known.includes(files.diskName(volid))),
  );
  if (!sealed && file.firewall && ours && !next.changed?.includes("firewall"))
    next.changed = [...(next.changed ?? []), "firewall"];
  return next;
}

/** Drawn anew by each restore and clone, and at no other time. */
function tokenOf({ values }: files.GuestFile): string {
  const { vmgenid } = values;
  // "0" switches it off: any number of guests may have that.
  const own = vmgenid === "0" ? undefined : vmgenid;
  const uuid = /(?:^|,)uuid=([^,]+)/.exec(values.smbios1 ?? "")?.[1];
  // A guest without either (made before 2018) is known by its disks.
  return own ?? uuid ?? Object.values(files.disksOf(values)).map(files.diskName).sort().join(",");
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

/** Whether a guest is the one that a job made: one without disks has none of anybody's. */
function isMadeOf(file: files.GuestFile, volids: readonly string[]): boolean {
  const names = namesOf(file);
  if (isPlaceholder(file) || (volids.length === 0 && names.length > 0)) return false;
  return volids.every((volid) => names.includes(files.diskName(volid)));
}

const isOf = (volid: string, pinned: Pinned | undefined) =>
  Object.values(pinned?.volumes ?? {}).some((v) => files.diskName(v) === files.diskName(volid));

const BASES = ["dir", "nfs", "cifs", "btrfs", "lvmthin", "zfspool", "rbd"];

interface Volumes {
  /** Those of ours that exist, as they are called now. */
  ours: string[];
  clonesOf(volid: string): string[];
  /** Whether the storage tells a template's disk from a guest's: one that makes linked clones of it. */
  hasBases(volid: string): boolean;
  /** What these give back when they go; of a thin storage that does not tell, `bytes`. */
  freedBy(volids: readonly string[], bytes: number): ReadonlyMap<string, number>;
  /** Storages that do not answer. */
  unknown: string[];
  /** Those of them that are defined: what is on another one is out of reach for ever. */
  unseen: string[];
}

async function volumesOf(guests: (Pinned | undefined)[], more: readonly string[], host: Host): Promise<Volumes> {
  const wanted = [...guests.flatMap((guest) => Object.values(guest?.volumes ?? {})), ...more];
  const storages = [...new Set(wanted.map(files.storageOf))];
  if (storages.length === 0)
    return { ours: [], clonesOf: () => [], hasBases: () => false, freedBy: () => new Map(), unknown: [], unseen: [] };
  const unknown: string[] = [];
  const settings = await host.ask(pve.storages);
  const listed = await Promise.all(
    storages.map(async (storage) => {
      const found = await pve.contentIfAny(host, storage, "images");
      if (found === undefined) unknown.push(storage);
      return found ?? [];
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
    hasBases: (volid) =>
      settings.some(({ storage, type }) => storage === files.storageOf(volid) && BASES.includes(type)),
    freedBy: (volids, bytes) =>
      new Map(
        settings
          .filter(({ storage }) => volids.some((volid) => files.storageOf(volid) === storage))
          .map((storage) => {
            const its = rows.filter(
              ({ volid }) => files.storageOf(volid) === storage.storage && volids.includes(volid),
            );
            const sum = (of: (row: pve.Volume) => number) => its.reduce((all, row) => all + of(row), 0);
            if (isThick(storage)) return [storage.storage, sum(({ size }) => size)];
            return [storage.storage, its.every(({ used }) => used !== undefined) ? sum(({ used = 0 }) => used) : bytes];
          }),
      ),
    unknown,
    unseen: unknown.filter((name) => settings.some(({ storage }) => storage === name)),
  };
}

const isBase = (volid: string) => /(?:^|[:/])base-\d+-[^/]*$/.test(volid);

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
    unconverted: Object.entries(files.disksOf(file.values))
      .filter(
        ([key, volid]) => files.isTemplate(file) && !/^unused/.test(key) && !isBase(volid) && volumes.hasBases(volid),
      )
      .map(([key]) => key),
    frees: volumes.freedBy(disks, pinned.bytes ?? 0),
  };
}
