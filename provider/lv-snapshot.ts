// LvSnapshot: a point in time of a logical volume (lvcreate -s), on any Linux host with LVM. The exemplar: read top to bottom.
//
// A point in time cannot be made again. When the snapshot overflowed, vanished or was merged, it is lost, not gone: read keeps it
// with status.valid false, and only `pulumi up --replace`, `replacementTrigger` or a new name take a new one.
import { createHash } from "node:crypto";
import * as z from "zod";
import type { Definition, Observed, Step } from "./engine.js";
import { Conflict, Refused } from "./errors.js";
import type { Argv, Host, Report } from "./host.js";
import { hostSchema } from "./host.js";
import type { Line } from "./host-ledger.js";
import { lvmName, newLvName, notYet, sizeOrShare } from "./values.js";

// ---------------------------------------------------------------- inputs

const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean().optional(),
  volumeGroup: lvmName,
  origin: lvmName,
  name: newLvName,
  size: sizeOrShare.optional(),
  minFreePoolPercent: z
    .number({ error: "is a percentage from 0 to 100" })
    .min(0, "is a percentage from 0 to 100")
    .max(100, "is a percentage from 0 to 100")
    .optional(),
  autoExtend: notYet("autoExtend").optional(),
  freeze: notYet("freeze").optional(),
  nbd: notYet("nbd").optional(),
});
type Want = z.output<typeof inputs>;

/** What was seen or chosen once. */
interface Pins {
  uuid?: string;
  originUuid?: string;
  takenAt?: string;
  /** The declared size, and the bytes that it meant then: "20%ORIGIN" is resolved once. */
  asked?: number | string;
  bytes?: number;
}

// ---------------------------------------------------------------- the questions

const number = z.string().transform((s) => (s === "" ? undefined : Number(s))); // all numbers of LVM's JSON are strings
export const lvRow = z.object({
  lv_name: z.string(),
  vg_name: z.string(),
  lv_uuid: z.string(),
  lv_attr: z.string(),
  lv_size: number,
  origin: z.string(),
  origin_uuid: z.string(),
  pool_lv: z.string(),
  data_percent: number,
  metadata_percent: number,
  lv_snapshot_invalid: z.string(), // "snapshot invalid", "" while valid, "unknown" for what is no snapshot
  lv_merging: z.string(),
  lv_tags: z.string(),
  lv_time: z.string(),
  vg_free: number,
  vg_extent_size: number,
});
type Row = z.output<typeof lvRow>;

const JSON_BYTES = ["--reportformat", "json", "--units", "b", "--nosuffix"] as const;

/** Every logical volume of the host, hidden ones too: one question for all snapshots. */
const lvs: Report<Row[]> = {
  why: "list the logical volumes",
  // Explicit columns: "-o +x" repeats keys in one JSON object. The time as seconds, whatever lvm.conf's time_format is.
  argv: [
    "lvs",
    "--all",
    ...JSON_BYTES,
    "--config",
    'report/time_format="%s"',
    "--options",
    Object.keys(lvRow.shape).join(","),
  ],
  answer: z.object({ report: z.tuple([z.object({ lv: z.array(lvRow) })]) }).transform((a) => a.report[0].lv),
};

/** Volume groups by name; asked only to explain (lvs shows no group that is empty). */
export const vgs: Report<string[]> = {
  why: "list the volume groups",
  argv: ["vgs", ...JSON_BYTES, "--options", "vg_name"],
  answer: z
    .object({ report: z.tuple([z.object({ vg: z.array(z.object({ vg_name: z.string() })) })]) })
    .transform((a) => a.report[0].vg.map((row) => row.vg_name)),
};

// ---------------------------------------------------------------- the owner's mark: a tag

const TAG = "pulumi-vmbackup=";

/** A tag holds letters, digits and _ + . - / = ! : & # (lvm(8)): everything else, and "=", becomes =XX. */
export function tagOf(owner: string): string {
  const encoded = Array.from(Buffer.from(owner), (byte) => {
    const char = String.fromCharCode(byte);
    return /[A-Za-z0-9_+.\-/!:&#]/.test(char) ? char : `=${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  }).join("");
  // A tag has at most 1024 characters.
  return TAG + (encoded.length <= 900 ? encoded : `sha256:${createHash("sha256").update(owner).digest("hex")}`);
}

function ownerOf(tags: readonly string[]): string | undefined {
  const tag = tags.find((t) => t.startsWith(TAG))?.slice(TAG.length);
  if (tag === undefined) return undefined;
  return Buffer.from(
    tag.replace(/=([0-9A-F]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16))),
    "latin1",
  ).toString();
}

// ---------------------------------------------------------------- observe

interface Have extends Observed<Pins> {
  /** The snapshot: by its uuid once that is known, before that by name. */
  lv?: Row & { bytes: number; tags: string[]; path: string };
  origin?: Row;
  pool?: Row;
  /** Another logical volume that has the snapshot's name. */
  stranger?: Row;
  originIsMerging: boolean;
  /** Its uuid was known before this look. */
  isPinned: boolean;
  /** What the volume group has, for an error that names it. */
  volumes: string[];
  groups: string[] | undefined;
}

const bare = (row: Row) => row.lv_name.replace(/^\[(.*)\]$/, "$1"); // a merging snapshot is shown as [snap]
export const isThin = (row: Row) => row.lv_attr.startsWith("V");
export const isThickSnapshot = (row: Row) => /^s/i.test(row.lv_attr);
export const isOverflowed = (row: Row) =>
  row.lv_snapshot_invalid === "snapshot invalid" || row.lv_attr[4] === "I" || row.lv_attr[4] === "S";

async function observe(want: Want, line: Line<Pins> | undefined, host: Host): Promise<Have> {
  const all = await host.ask(lvs);
  const inGroup = all.filter((row) => row.vg_name === want.volumeGroup);
  // A cloned volume group (vgimportclone) has volumes of the same uuids: those of the declared one come first.
  const rows = [...inGroup, ...all.filter((row) => row.vg_name !== want.volumeGroup)];
  const pins = line?.pins ?? {};
  const named = inGroup.find((row) => bare(row) === want.name);
  const mine = pins.uuid === undefined ? named : rows.find((row) => row.lv_uuid === pins.uuid);
  const originUuid = mine?.origin_uuid ?? pins.originUuid; // a renamed origin is followed
  const origin =
    originUuid === undefined
      ? inGroup.find((row) => bare(row) === want.origin)
      : rows.find((row) => row.lv_uuid === originUuid);
  const pool = origin && inGroup.find((row) => bare(row) === origin.pool_lv && origin.pool_lv !== "");
  const have: Have = {
    exists: mine !== undefined,
    isPinned: pins.uuid !== undefined,
    originIsMerging:
      origin !== undefined && inGroup.some((row) => row.origin_uuid === origin.lv_uuid && row.lv_merging === "merging"),
    volumes: inGroup.filter((row) => !row.lv_name.startsWith("[")).map((row) => row.lv_name),
    groups: inGroup.length > 0 ? undefined : await host.ask(vgs),
    pins: pinsOf(want, pins, mine, origin),
  };
  if (origin !== undefined) have.origin = origin;
  if (pool !== undefined) have.pool = pool;
  if (named !== undefined && named !== mine) have.stranger = named;
  if (mine !== undefined) {
    const tags = mine.lv_tags === "" ? [] : mine.lv_tags.split(",");
    have.lv = { ...mine, bytes: mine.lv_size ?? 0, tags, path: `${mine.vg_name}/${bare(mine)}` };
    const owner = ownerOf(tags);
    if (owner !== undefined) have.owner = owner;
  }
  if (pins.uuid !== undefined) {
    if (mine === undefined) have.lost = "it has vanished: removed, or merged into its origin";
    else if (isOverflowed(mine))
      have.lost = "it overflowed: more blocks of the origin changed than its size has room for";
    else if (mine.lv_merging === "merging") have.lost = "it is being merged into its origin";
  }
  return have;
}

function pinsOf(want: Want, before: Pins, mine: Row | undefined, origin: Row | undefined): Pins {
  const pins: Pins = { ...before };
  if (mine !== undefined && before.uuid === undefined) {
    pins.uuid = mine.lv_uuid;
    pins.originUuid = mine.origin_uuid;
    pins.takenAt = new Date(Number(mine.lv_time) * 1000).toISOString();
  }
  if (want.size !== undefined && want.size !== before.asked) {
    const bytes = bytesAsked(want.size, origin);
    // A smaller one is not taken over: plan refuses it in words.
    if (bytes !== undefined && bytes >= (before.bytes ?? 0)) Object.assign(pins, { asked: want.size, bytes });
  }
  return pins;
}

function bytesAsked(size: number | string, origin: Row | undefined): number | undefined {
  if (typeof size === "number") return size;
  return origin?.lv_size === undefined ? undefined : Math.ceil((origin.lv_size * Number.parseInt(size, 10)) / 100);
}

/**
 * The room that a snapshot of so many bytes really gets: whole extents, and no more than it can ever use. That is one chunk for
 * each chunk of the origin, one chunk of exceptions for each 256 of them, and a header (LVM: lib/metadata/snapshot_manip.c).
 */
export function roomFor(bytes: number, origin: number, extent: number): number {
  const chunk = 4096;
  const chunks = Math.ceil(origin / chunk);
  const most = (chunks + Math.ceil((chunks + 1) / 255) + 1) * chunk;
  return Math.ceil(Math.min(bytes, most) / extent) * extent;
}

// ---------------------------------------------------------------- plan

// Flushes the origin's own file system and device, never all of them (one dead mount would hang that for minutes), and then takes
// the snapshot. LVM freezes a mounted file system itself, but what is written only then already fills the snapshot.
const FLUSH = `device=$1; shift
if [ -b "$device" ]; then
  findmnt --noheadings --list --output TARGET --first-only --source "$device" | while IFS= read -r target; do sync --file-system -- "$target"; done
  blockdev --flushbufs "$device"
fi
exec "$@"`;

function plan(want: Want, have: Have, line: Line<Pins>): Step[] {
  const { lv } = have;
  const what = `${want.volumeGroup}/${want.name}`;
  if (have.lost !== undefined) throw lost(what, have.lost, line.pins ?? {});
  if (lv === undefined) {
    if (have.stranger !== undefined) throw taken(what);
    return [take(want, have, line)];
  }
  // A thin one outlives its origin, and is then the last copy.
  const outlived = have.isPinned && isThin(lv) && lv.origin_uuid === "";
  if (!outlived && (lv.origin === "" || have.origin === undefined || !sameOrigin(want, have, line)))
    throw new Conflict({
      what: `${what} exists, but it is ${lv.origin === "" ? "no snapshot" : `a snapshot of ${lv.origin}, not of ${want.origin}`}. It was left as it is.`,
      next: "Choose another `name`, or name the volume that it is a snapshot of as `origin`.",
    });
  return [...rename(want, have), ...mark(lv, line), ...extend(want, have, line)];
}

/** Renamed by hand: it is known by its uuid, and gets its name back. A replacement would lose the point in time. */
function rename(want: Want, { lv, stranger }: Have): Step[] {
  if (lv === undefined || lv.path === `${want.volumeGroup}/${want.name}`) return [];
  if (lv.vg_name !== want.volumeGroup)
    throw new Conflict({
      what: `The snapshot ${want.volumeGroup}/${want.name} is ${lv.path} now (uuid ${lv.lv_uuid}). It was left as it is.`,
      next: `If its volume group was renamed, declare \`volumeGroup: "${lv.vg_name}"\` after a \`pulumi refresh\`, or rename it back with \`vgrename\`.`,
    });
  if (stranger !== undefined)
    throw new Conflict({
      what: `The snapshot ${want.volumeGroup}/${want.name} was renamed to ${bare(lv)}, and another volume has its name. Both were left as they are.`,
      next: `Rename the other one, or declare \`name: "${bare(lv)}"\` after a \`pulumi refresh\`.`,
    });
  return [
    {
      why: `give ${lv.path} its name ${want.name} back`,
      argv: ["lvrename", "--", want.volumeGroup, bare(lv), want.name],
      look: true,
    },
  ];
}

/** By name when a snapshot is taken or taken over. Later by uuid (see observe): a renamed origin is no drift. */
function sameOrigin(want: Want, have: Have, line: Line<Pins>): boolean {
  if (have.origin === undefined) return false;
  if (line.finished || bare(have.origin) === want.origin) return true;
  return have.isPinned && !have.volumes.includes(want.origin);
}

function lost(what: string, why: string, pins: Pins): Refused {
  return new Refused({
    what: `Snapshot ${what}: the state of ${pins.takenAt ?? "its time"} is lost: ${why}.`,
    next: "A point in time cannot be made again. To take a new one: `pulumi up --replace URN`, or change `replacementTrigger` or `name`.",
  });
}

function taken(what: string): Conflict {
  return new Conflict({
    what: `${what} exists already and is not this snapshot. It was left as it is.`,
    next: "Choose another `name`, or remove it by hand.",
  });
}

function take(want: Want, have: Have, line: Line<Pins>): Step {
  const what = `${want.volumeGroup}/${want.name}`;
  const { origin } = have;
  if (origin === undefined) throw noOrigin(want, have);
  if (isThickSnapshot(origin) && origin.origin !== "")
    throw refused(
      `${want.volumeGroup}/${want.origin} is itself a snapshot (of ${origin.origin}), and LVM takes no snapshot of a snapshot.`,
      `Name ${origin.origin} as \`origin\`, or use a thin volume.`,
    );
  if (/^[tTedDiIl]/.test(origin.lv_attr))
    throw refused(
      `${want.volumeGroup}/${want.origin} is a pool or an internal volume (${origin.lv_attr}), not something with a guest's data in it.`,
      `Name a logical volume as \`origin\`: there are ${have.volumes.join(", ")}.`,
    );
  if (have.originIsMerging)
    throw refused(
      `${want.volumeGroup}/${want.origin} has a snapshot that is being merged into it, and LVM takes no other one until then.`,
      "Let the merge finish: it goes on when the origin is next activated.",
    );
  const device = `/dev/${want.volumeGroup}/${bare(origin)}`;
  const name = ["--name", want.name, "--addtag", tagOf(line.owner)];
  const of = ["--", `${want.volumeGroup}/${bare(origin)}`];
  const step = (lvcreate: Argv): Step => ({
    why: `take the snapshot ${what} of ${want.origin}`,
    argv: ["sh", "-c", FLUSH, "take", device, ...lvcreate],
    shown: lvcreate,
    look: true,
    next: "Look at the volume group with `vgs` and `lvs`, then run `pulumi up` again.",
  });
  if (isThin(origin)) {
    if (want.size !== undefined)
      throw refused(
        `size: ${want.volumeGroup}/${want.origin} is a thin volume, and a thin snapshot takes its room from the pool.`,
        "Leave `size` out.",
      );
    checkPool(want, have);
    return step(["lvcreate", "--yes", "--snapshot", "--setactivationskip", "n", ...name, ...of]);
  }
  if (want.size === undefined)
    throw refused(
      `size: ${want.volumeGroup}/${want.origin} is no thin volume, and its snapshot needs room of its own for changed blocks.`,
      'Give `size`, e.g. "20%ORIGIN": more than what changes on the origin while the snapshot exists.',
    );
  const need = needed(line, origin);
  if (need > (origin.vg_free ?? 0)) throw noRoom(want, need, origin);
  return step(["lvcreate", "--yes", "--snapshot", "--size", `${need}b`, ...name, ...of]);
}

function refused(what: string, next: string): Refused {
  return new Refused({ what: `Unable to take the snapshot. ${what}`, next: `${next} Nothing was changed.` });
}

function noOrigin(want: Want, have: Have): Refused {
  if (have.groups !== undefined && !have.groups.includes(want.volumeGroup))
    return refused(
      `volumeGroup: there is no volume group ${want.volumeGroup} on this host.`,
      `There ${listed(have.groups)}.`,
    );
  return refused(
    `origin: the volume group ${want.volumeGroup} has no logical volume ${want.origin}.`,
    `There ${listed(have.volumes)}.`,
  );
}

const listed = (names: string[]) =>
  names.length === 0 ? "is none" : `${names.length === 1 ? "is" : "are"} ${names.join(", ")}`;

function needed(line: Line<Pins>, origin: Row): number {
  return roomFor(line.pins?.bytes ?? 0, origin.lv_size ?? 0, origin.vg_extent_size ?? 1);
}

function noRoom(want: Want, need: number, origin: Row): Refused {
  return new Refused({
    what: `size: the snapshot ${want.volumeGroup}/${want.name} needs ${need} bytes${typeof want.size === "string" ? ` (${want.size})` : ""}, and the volume group has ${origin.vg_free ?? 0} free.`,
    next: `Free space in ${want.volumeGroup}, or lower \`size\`. Nothing was changed.`,
  });
}

function checkPool(want: Want, have: Have): void {
  const least = want.minFreePoolPercent ?? 10;
  const used = Math.max(have.pool?.data_percent ?? 0, have.pool?.metadata_percent ?? 0);
  if (100 - used >= least) return;
  throw refused(
    `minFreePoolPercent: the thin pool ${want.volumeGroup}/${have.origin?.pool_lv} is ${used} % full (data or metadata), and ${least} % shall stay free.`,
    "Extend the pool, or lower `minFreePoolPercent`: a full pool makes every volume in it fail.",
  );
}

/** A renamed stack or an alias stamps its name; what another tool tagged stays. */
function mark(lv: NonNullable<Have["lv"]>, line: Line<Pins>): Step[] {
  const wanted = tagOf(line.owner);
  const old = lv.tags.filter((tag) => tag.startsWith(TAG) && tag !== wanted);
  if (lv.tags.includes(wanted) && old.length === 0) return [];
  const drop = old.flatMap((tag) => ["--deltag", tag]);
  return [{ why: `mark ${lv.path} as ours`, argv: ["lvchange", "--addtag", wanted, ...drop, "--", lv.path] }];
}

/** `size` is a floor: what LVM rounded, capped or extended by itself is settled. */
function extend(want: Want, have: Have, line: Line<Pins>): Step[] {
  const { lv, origin } = have;
  if (lv === undefined || origin === undefined) return [];
  if (isThin(lv)) {
    if (want.size === undefined) return [];
    throw refused(`size: ${lv.path} is a thin snapshot, which takes its room from the pool.`, "Leave `size` out.");
  }
  if (want.size === undefined) return [];
  if (want.size !== line.pins?.asked)
    throw new Refused({
      what: `size: ${lv.path} was asked to have room for ${line.pins?.bytes} bytes (${line.pins?.asked}), and a snapshot is never made smaller (now ${want.size}).`,
      next: "Declare the size it has, or take a new snapshot with `pulumi up --replace URN`. Nothing was changed.",
    });
  const need = needed(line, origin);
  if (lv.bytes >= need) return [];
  if (need - lv.bytes > (origin.vg_free ?? 0)) throw noRoom(want, need - lv.bytes, origin);
  return [
    { why: `extend ${lv.path} to ${need} bytes`, argv: ["lvextend", "--size", `${need}b`, "--", lv.path], look: true },
  ];
}

// ---------------------------------------------------------------- remove

// Reads back, so that nothing needs to look again before it is forgotten.
const REMOVE = `lvremove --yes --select "lv_uuid=$1" -- "$2" || exit
left=$(lvs --noheadings --options lv_uuid --select "lv_uuid=$1" -- "\${2%%/*}") || exit
[ -z "$left" ] || { echo "lvremove ended without an error, and yet it is there" >&2; exit 1; }`;

function remove(have: Have, line: Line<Pins>): Step[] {
  const { lv } = have;
  // A create that was cut short wrote no uuid down; what it made is known by its mark.
  const ours = line.pins?.uuid === undefined ? have.owner === line.owner : lv?.lv_uuid === line.pins.uuid;
  if (lv === undefined || !ours) return [];
  if (lv.lv_merging === "merging")
    throw new Refused({
      what: `${lv.path} is being merged into its origin; removing it now would stop that.`,
      next: "Let the merge finish (it goes on when the origin is next activated), then run `pulumi destroy` again.",
    });
  if (isThin(lv) && lv.origin_uuid === "")
    throw new Refused({
      what: `${lv.path} is the last copy: the volume that it is a snapshot of is gone.`,
      next: "It was left. If you mean it, remove it by hand with `lvremove`, and run `pulumi destroy` again: what has vanished is destroyed without a question.",
    });
  // By uuid as well: between our look and the command somebody may have put another volume under this name.
  return [
    {
      why: `remove the snapshot ${lv.path}`,
      argv: ["sh", "-c", REMOVE, "remove", lv.lv_uuid, lv.path],
      shown: ["lvremove", "--yes", "--select", `lv_uuid=${lv.lv_uuid}`, "--", lv.path],
      last: true,
      next: "If it is in use: unmount it or end what has it open (`lsof`, `fuser -v`), then run `pulumi destroy` again.",
    },
  ];
}

// ---------------------------------------------------------------- outputs

function facts(_want: Want, have: Have, line: Line<Pins>): Record<string, unknown> {
  const { lv } = have;
  const pins = line.pins ?? {};
  return {
    uuid: pins.uuid,
    takenAt: pins.takenAt,
    status: {
      asOf: new Date().toISOString(),
      valid: have.lost === undefined && lv !== undefined,
      thin: lv !== undefined ? isThin(lv) : (have.origin && isThin(have.origin)) === true,
      sizeBytes: lv?.bytes ?? 0,
      usedPercent: lv?.data_percent ?? (have.lost === undefined ? 0 : 100),
      consistency: "crash",
    },
  };
}

function asFound(want: Want, have: Have, line: Line<Pins>): Want {
  const { lv, origin } = have;
  if (lv === undefined) return want;
  const found: Want = { ...want };
  found.origin ??= bare(origin ?? lv);
  found.volumeGroup = lv.vg_name;
  found.name = bare(lv);
  if (origin !== undefined && want.size !== undefined && !isThin(lv) && lv.bytes < needed(line, origin))
    found.size = lv.bytes;
  return found;
}

export const lvSnapshot: Definition<Want, Have, Pins> = {
  kind: "LvSnapshot",
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["origin", "name"],
      broken: ({ origin, name }) =>
        origin === name
          ? { property: "name", reason: "is the origin's own name: give the snapshot another one" }
          : undefined,
    },
  ],
  replaceOn: ["volumeGroup", "origin", "name"],
  fromId: (id) => {
    const [volumeGroup, name] = id.split("/");
    if (!volumeGroup || !name)
      throw new Refused({ what: `${JSON.stringify(id)} is no id of an LvSnapshot.`, next: "Give `vg/snapshot`." });
    return { volumeGroup, name };
  },
  identify: ({ volumeGroup, name }) => `${volumeGroup}/${name}`,
  observe,
  plan,
  remove,
  facts,
  asFound,
};
