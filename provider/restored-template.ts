// RestoredTemplate on Proxmox VE: a guest or template made from a vzdump archive (qmrestore, as a job), and kept.
//
// What is there is known by the token that Proxmox draws for each restored guest (vmgenid): another guest of the same id is not
// ours. What is ours goes only when it is still what was restored: see `trouble`.
import { createHash } from "node:crypto";
import * as z from "zod";
import type { Definition, Observed, Step } from "./engine.js";
import { same } from "./engine-values.js";
import { CommandFailed, Conflict, Refused, Unfinished } from "./errors.js";
import type { Host } from "./host.js";
import { hostSchema } from "./host.js";
import { argvHash, type JobState, jobState } from "./host-job.js";
import { type Line, type Memory, memory } from "./host-ledger.js";
import { contains, type Range } from "./id-range.js";
import * as pve from "./pve.js";
import * as files from "./pve-guests.js";
import { restoreArgv, restoredBy, verifyArgv } from "./qmrestore.js";
import { choose, refused, type Source } from "./restore-choice.js";
import { changes, isSettled, unmarked } from "./restored-settings.js";
import { notYet } from "./values.js";
import { firstFree, idsTaken } from "./vm-id-range.js";

const KIND = "RestoredTemplate";

// ---------------------------------------------------------------- inputs

const LIBVIRT = "is for libvirt, which is not there yet in this version";

/** Which of the forms is meant shows by presence; one message says what is missing or too much. */
const from = z
  .strictObject({
    archive: z
      .string()
      .regex(/^[A-Za-z][\w.-]*:backup\/[^\s/]+$/, 'is the volume id of an archive: "storage:backup/vzdump-qemu-..."')
      .optional(),
    storage: pve.storageIdSchema.optional(),
    vmId: pve.vmidSchema.optional(),
    guest: z.string().min(1, "is a guest's name").optional(),
    at: z
      .string()
      .regex(
        /^(?:latest|\d{4}-\d\d-\d\dT\d\d:\d\d(?::\d\d(?:\.0+)?)?Z|\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d)$/,
        'is "latest", a time in UTC as 2023-07-26T02:23:55Z, or the stamp of an archive\'s name as 2023_07_26-02_23_55',
      )
      .optional(),
    directory: notYet("directory (a backup set of a libvirt host)").optional(),
    nbd: notYet("nbd (volumes offered over the network)").optional(),
    domainXml: z.undefined({ error: LIBVIRT }).optional(),
  })
  .transform(({ archive, storage, vmId, guest, at }, context): Source => {
    const rest = Object.entries({ storage, vmId, guest, at }).filter(([, value]) => value !== undefined);
    const issue = (path: string[], message: string): never => {
      context.addIssue({ code: "custom", path, message });
      return z.NEVER;
    };
    if (archive !== undefined)
      return rest.length === 0
        ? { archive }
        : issue([rest[0]?.[0] ?? ""], "cannot stand together with `archive`: the source is named by one of the two");
    if (storage === undefined)
      return issue([], "names no source: give `archive`, or `storage` and `vmId` of the guest that was backed up");
    if (vmId === undefined) return issue(["vmId"], "is required: the id of the guest that was backed up");
    return {
      storage,
      vmId,
      ...(guest === undefined ? {} : { guest }),
      ...(at === undefined || at === "latest" ? {} : { at }),
    };
  });

const place = z.strictObject({
  storage: pve.storageIdSchema,
  pool: z.undefined({ error: LIBVIRT }).optional(),
  volumeGroup: z.undefined({ error: LIBVIRT }).optional(),
});

const to = z
  .union([place, z.array(place).min(1, "names no storage")])
  .transform((value) => (Array.isArray(value) ? value : [value]).map(({ storage }) => ({ storage })));

const tag = z
  .string()
  .regex(/^[A-Za-z0-9_][A-Za-z0-9_+.-]*$/, "is a tag: letters, digits and _ + . -, not starting with + . -")
  .transform((text) => text.toLowerCase()); // as Proxmox stores it

const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean().optional(),
  from,
  to,
  vmId: z.union([pve.vmidSchema, pve.vmIdsSchema], {
    error: (issue) =>
      issue.input === undefined
        ? "is required on Proxmox VE (a restore without it is for libvirt, which is not there yet in this version)"
        : "is a guest id, or a range: { lower, upper }",
  }),
  name: z
    .string()
    .max(253, "has at most 253 characters")
    .regex(
      /^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$/,
      "is a guest's name as Proxmox takes it: letters, digits, inner hyphens, dots between",
    )
    .optional(),
  template: z.boolean().optional(),
  verify: z.boolean().optional(),
  onDelete: z.enum(["destroy", "keep"], { error: 'is "destroy" or "keep"' }).optional(),
  unique: z.boolean().optional(),
  pool: z
    .string()
    .regex(/^[A-Za-z0-9.\-_]+(\/[A-Za-z0-9.\-_]+){0,2}$/, "is a pool's name")
    .optional(),
  tags: z
    .array(tag)
    .transform((list) => [...new Set(list)].sort())
    .optional(),
  description: z.string().max(8000, "has at most 8000 characters").optional(),
  bwlimit: z
    .number("is KiB/s: a whole number")
    .int("is KiB/s: a whole number")
    .min(0, "is 0 (unlimited) or more")
    .optional(),
  disks: z.undefined({ error: LIBVIRT }).optional(),
  networks: z.undefined({ error: LIBVIRT }).optional(),
});
/** `.get` knows no source. */
export type Want = Omit<z.output<typeof inputs>, "from" | "to"> & {
  from?: Source | undefined;
  to?: { storage: string }[] | undefined;
};

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

async function observe(want: Want, line: Line<Pins> | undefined, host: Host, planning: boolean): Promise<Have> {
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
  if (planning && want.from !== undefined && want.to !== undefined)
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

async function freeId(range: Range, host: Host): Promise<number> {
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

// ---------------------------------------------------------------- plan

function plan(want: Want, have: Have, line: Line<Pins>): Step[] {
  const pins = line.pins ?? { vmId: Number(line.identity) };
  if (have.otherwise) throw otherwise(want, line, pins);
  if (have.job.state === "running" && have.mine === undefined) return [joined(want, line, pins)];
  if (have.stranger !== undefined) throw taken(have.stranger);
  if (have.placeholder !== undefined || have.leftovers.length > 0) return clear(have);
  if (have.refused !== undefined) throw have.refused;
  if (have.mine === undefined) {
    if (have.old === undefined) return [restore(want, pins)];
    return pins.vmId === have.old.file.vmid ? inPlace(want, have, have.old, pins) : beside(want, have.old, pins);
  }
  const { missing, pinned } = have.mine;
  if (want.verify !== false && missing.length > 0 && pinned.settings === undefined)
    throw new Unfinished({
      what: `Guest ${pins.vmId} was restored from ${pins.archive}, and no storage has its disks ${missing.join(", ")}.`,
      next: "Look at the storage and at the restore's task log on the node. Then remove the guest by hand and run `pulumi up` again.",
    });
  const steps = changes(want, have.mine, line);
  if (steps.length > 0 || have.old === undefined) return steps;
  return destroy(have.old, "the guest before it");
}

function restore(want: Want, pins: Pins): Step {
  const argv = restoreArgv({
    archive: pins.archive ?? "",
    vmId: pins.vmId,
    storage: pins.storage ?? "",
    unique: want.unique ?? true,
    pool: want.pool,
    bwlimit: want.bwlimit,
  });
  const back =
    pins.instead === undefined
      ? "Run `pulumi up` again: it clears up what this attempt left, and begins anew."
      : `The guest that ${pins.instead} had been restored to was removed for this. Run \`pulumi up\` again, or with \`from: { archive: ${JSON.stringify(pins.instead)} }\` to have that one back.`;
  return { why: `restore ${pins.archive} as guest ${pins.vmId}`, argv, job: true, next: back };
}

/** The job that runs: the restore, or the reading of the archive before it. */
function joined(want: Want, line: Line<Pins>, pins: Pins): Step {
  const read = verify(pins);
  return line.job?.argvHash === argvHash(read.argv) ? read : restore(want, pins);
}

function otherwise(want: Want, line: Line<Pins>, pins: Pins): Conflict {
  const now = JSON.stringify({ from: want.from, to: want.to, vmId: want.vmId });
  return new Conflict({
    what: `${pins.archive} is still being restored as guest ${pins.vmId} (job ${line.job?.unit}, begun at ${line.job?.startedAt}), and the program now wants ${now}.`,
    next: "Let it end, then run `pulumi up` again: it changes over then. To give it up: `systemctl stop` the unit on the host; the next run clears up after it.",
  });
}

function taken(file: files.GuestFile): Conflict {
  const name = file.values.name === undefined ? "" : ` (${file.values.name})`;
  return new Conflict({
    what: `${file.kind === "lxc" ? "Container" : "Guest"} ${file.vmid}${name} on ${file.node} is not the one that was restored. It was left as it is.`,
    next: "Choose another `vmId`. When the restored one was removed by hand, `pulumi refresh` first.",
  });
}

/** Another id: the new guest comes first. */
function beside(want: Want, old: Mine, pins: Pins): Step[] {
  refuseTrouble(old, `replace guest ${old.file.vmid}`);
  return [restore(want, pins)];
}

/** The same id: what is there goes first, when the new archive is known to be whole. */
function inPlace(want: Want, have: Have, old: Mine, pins: Pins): Step[] {
  const what = `restore ${pins.archive} over guest ${old.file.vmid}`;
  if (!files.isTemplate(old.file))
    throw new Refused({
      what: `Unable to ${what}: it is no template, and may hold data that nothing else has.`,
      next: "Choose a range as `vmId`, so that the new guest comes first; or replace it on purpose with `pulumi up --replace URN`. Nothing was changed.",
    });
  refuseTrouble(old, what);
  if (want.verify !== false && !have.verified) return [verify(pins)];
  return destroy(old, `the template that ${pins.archive} takes the place of`);
}

function verify(pins: Pins): Step {
  return {
    why: `read ${pins.archive} from beginning to end`,
    argv: verifyArgv(pins.archive ?? ""),
    shown: ["vma", "verify", pins.archive ?? ""],
    job: true,
    next: "The archive is damaged: name another one. The guest that is there was left as it is.",
  };
}

/** Why a guest of ours must not be removed now. */
export function trouble({ file, pinned, clones, unknown }: Mine): string | undefined {
  const byHand = changedByHand(pinned, file);
  if (unknown.length > 0)
    return `the storage ${unknown.join(", ")} does not answer, so that it cannot be known whether it has linked clones`;
  if (clones.length > 0) return `it has linked clones, which would lose their disks: ${clones.slice(0, 20).join(", ")}`;
  if (file.running) return "it runs";
  if (file.values.lock !== undefined) return `it is locked (${file.values.lock})`;
  if (file.values.protection === "1") return "it is protected (option `protection`)";
  if (file.ha) return "it is managed by HA";
  if (file.snapshots.length > 0) return `it has snapshots: ${file.snapshots.join(", ")}`;
  if (byHand.length > 0 || file.pending)
    return `it is no longer what was restored: ${[...byHand, ...(file.pending ? ["pending changes"] : [])].join(", ")} ${byHand.length === 1 && !file.pending ? "was" : "were"} changed by hand`;
  if (!files.isTemplate(file) && file.starts.length > 0)
    return "it was started since, and may hold data that nothing else has";
  return undefined;
}

function refuseTrouble(guest: Mine, what: string): void {
  const why = trouble(guest);
  if (why === undefined) return;
  throw new Refused({
    what: `Unable to ${what}: ${why}.`,
    next: 'It was left as it is. Remove what stands in the way, or the guest itself by hand (`qm destroy`), and run pulumi again; with `onDelete: "keep"` (run `pulumi up` for it) destroy leaves it.',
  });
}

// ---------------------------------------------------------------- remove

// Between our look and the command somebody may have changed the guest, or put another one in its place.
const DESTROY = `conf=/etc/pve/qemu-server/$1.conf
[ "$(sha1sum <"$conf" | cut -c 1-40)" = "$2" ] || { echo "the configuration of guest $1 was changed since it was looked at" >&2; exit 1; }
[ -z "$3" ] || flock --nonblock "/var/lock/qemu-server/lock-$1.conf" true || { echo "something is at work on guest $1" >&2; exit 1; }
exec qm destroy "$1"`;

function destroyStep(file: files.GuestFile, why: string, placeholder: boolean): Step {
  const id = String(file.vmid);
  return {
    why,
    argv: ["sh", "-c", DESTROY, "vmbackup-destroy", id, files.digestOf(file), placeholder ? "free" : ""],
    shown: ["qm", "destroy", id],
    timeout: 1800,
    look: true,
    next: "Look at the guest on the node, then run pulumi again.",
  };
}

function destroy(guest: Mine, what: string): Step[] {
  refuseTrouble(guest, `remove guest ${guest.file.vmid} (${what})`);
  return [destroyStep(guest.file, `remove guest ${guest.file.vmid}, ${what}`, false)];
}

/** Exactly what a job of ours reported as made, and what was recorded as ours. */
function clear(have: Have): Step[] {
  if (have.placeholder !== undefined) {
    const { file, free } = have.placeholder;
    if (!free)
      throw new Conflict({
        what: `Guest ${file.vmid} is what a failed restore left, and something is at work on it.`,
        next: "Wait until it has ended (see the node's tasks), then run pulumi again.",
      });
    const id = String(file.vmid);
    if (file.values.lock === "create")
      return [{ why: `unlock guest ${id}, which a restore left locked`, argv: ["qm", "unlock", id], look: true }];
    return [destroyStep(file, `remove guest ${id}, which a restore left unfinished`, true)];
  }
  return have.leftovers.map((volid) => ({
    why: `remove the volume ${volid}, which no guest has`,
    argv: ["pvesm", "free", volid],
    look: true,
  }));
}

function remove(have: Have, line: Line<Pins>): Step[] {
  if (have.job.state === "running")
    throw new Refused({
      what: `${line.pins?.archive} is still being restored as guest ${line.pins?.vmId} (job ${line.job?.unit}).`,
      next: "Let it end, or stop it on the host with `systemctl stop`; then run `pulumi destroy` again.",
    });
  if (have.placeholder !== undefined) return clear(have);
  const guest = have.mine ?? have.old;
  if (guest !== undefined && !have.keep)
    return destroy(guest, guest === have.mine ? "which was restored" : "the one before");
  return clear(have);
}

// ---------------------------------------------------------------- outputs

function facts(_want: Want, have: Have, line: Line<Pins>): Record<string, unknown> {
  const pins = line.pins ?? { vmId: Number(line.identity) };
  const file = have.mine?.file;
  return {
    guestId: pins.vmId,
    guestName: file?.values.name ?? pins.archived?.name,
    place: { storage: pins.storage ?? placeOf(pins) },
    volumes: pins.volumes ?? {},
    source: pins.archive ?? (pins.asked !== undefined && "archive" in pins.asked ? pins.asked.archive : ""),
    sourceTime: pins.sourceTime,
    status: {
      asOf: new Date().toISOString(),
      isTemplate: file !== undefined && files.isTemplate(file),
      running: file?.running ?? false,
      clones: have.mine?.clones.slice(0, 20) ?? [],
      bytes: pins.bytes ?? 0,
      seconds: pins.seconds ?? 0,
      changed: pins.changed ?? [],
    },
  };
}

const placeOf = ({ volumes = {} }: Pins) => {
  const [first] = Object.values(volumes);
  return first === undefined ? undefined : files.storageOf(first);
};

function asFound(want: Want, have: Have, line: Line<Pins>): Want {
  const file = have.mine?.file;
  if (file === undefined) return want;
  const { values } = file;
  const pins = line.pins ?? { vmId: file.vmid };
  const found: Want = { ...want, ...(want.vmId === undefined ? { vmId: file.vmid } : {}) };
  const drifted = (field: keyof Want & string, wanted: unknown, is: unknown) =>
    !same(wanted, is) &&
    (want[field] !== undefined || !(line.kept.includes(field) || pins.adopted || want.from === undefined));
  if (drifted("name", want.name ?? pins.archived?.name, values.name)) found.name = values.name ?? "";
  if (drifted("tags", want.tags ?? pve.setOf(pins.archived?.tags), pve.setOf(values.tags)))
    found.tags = pve.setOf(values.tags);
  const { text } = unmarked(values.description);
  const described = want.description ?? pins.archived?.description;
  if (described !== undefined && drifted("description", described.trimEnd(), text)) found.description = text;
  if (drifted("template", want.template ?? true, files.isTemplate(file))) found.template = files.isTemplate(file);
  if (drifted("pool", want.pool, file.pool)) found.pool = file.pool;
  return found;
}

function warnings(_want: Want, have: Have): string[] {
  const { overcommitted, storage, vmId } = have.pins ?? {};
  if (overcommitted === undefined) return [];
  return [
    `guest ${vmId}: its disks may grow to ${overcommitted.virtual} bytes, and ${storage} had ${overcommitted.available} free when it was chosen. The data fits; when they fill up, writes to them fail.`,
  ];
}

// ---------------------------------------------------------------- which id

/** Of a range: the one that an earlier run of ours has, or the lowest free one that no other run is about to take. */
async function chooseId(want: Want, host: Host, found: Memory, owner: string): Promise<string | undefined> {
  const range = want.vmId;
  if (typeof range === "number") return undefined;
  const lines = found.lines.filter(({ kind }) => kind === KIND) as Line<Pins>[];
  const ours = lines.find((line) => line.owner === owner && contains(range, line.pins?.vmId ?? Number(line.identity)));
  if (ours !== undefined) return ours.identity;
  return String(await freeId(range, host));
}

export const restoredTemplate: Definition<Want, Have, Pins> = {
  kind: KIND,
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["adopt", "vmId"],
      broken: ({ adopt, vmId }) =>
        adopt && typeof vmId !== "number"
          ? { property: "vmId", reason: "is a range, and `adopt` takes over one guest: give its id" }
          : undefined,
    },
  ],
  replaceOn: [], // a change is an update that acts or refuses: see `inPlace` and `beside`
  fromId: (id) => {
    if (/^[1-9]\d{2,8}$/.test(id)) return { vmId: Number(id) };
    throw new Refused({
      what: `${JSON.stringify(id)} is no id of a RestoredTemplate.`,
      next: "Give a guest's id: `14001`.",
    });
  },
  identify: ({ vmId }) => (typeof vmId === "number" ? String(vmId) : ""),
  choose: chooseId,
  observe,
  plan,
  remove,
  facts,
  asFound,
  warnings,
};
