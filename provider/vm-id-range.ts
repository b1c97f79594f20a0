// VmIdRange: a block of guest ids for one Proxmox VE node. `enforce` makes it the datacenter's next-id range, which the GUI and
// `pvesh get /cluster/nextid` follow. What was there before is put back when the range goes.
//
// Also here: what counts as a free id, for whoever takes one.
import * as z from "zod";
import type { Definition, Observed, Purpose, Step } from "./engine.js";
import { Conflict, Refused } from "./errors.js";
import type { Host } from "./host.js";
import { hostSchema } from "./host.js";
import { type Line, memory } from "./host-ledger.js";
import { contains, overlap, type Range, rangeTrouble } from "./id-range.js";
import { idsUsed } from "./nfs-dump-storage-look.js";
import * as pve from "./pve.js";
import { type GuestFile, guestFiles } from "./pve-guests.js";

// ---------------------------------------------------------------- inputs

const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean().optional(),
  lower: pve.vmidSchema,
  upper: pve.vmidSchema,
  enforce: z.boolean().optional(),
});
type Want = z.output<typeof inputs>;

const text = ({ lower, upper }: Range) => `${lower}-${upper}`;

interface Pins extends Range {
  enforced: boolean;
  /** What we set, also after the declared range has changed: only that is put back. */
  set?: Range;
  /** The datacenter's range before ours, as Proxmox has it; null = none. Absent until ours was set. */
  before?: NextId | null;
}

// ---------------------------------------------------------------- Proxmox's range: lower inclusive, UPPER EXCLUSIVE

interface NextId {
  lower?: number | undefined;
  upper?: number | undefined;
}

const toProxmox = ({ lower, upper }: Range): Required<NextId> => ({ lower, upper: upper + 1 });
const isRange = (found: NextId | undefined, range: Range) =>
  found?.lower === range.lower && found.upper === range.upper + 1;

// Proxmox replaces the range whatever it is by now, and two runs may have planned at once: of those the second is told of the first.
const SET = `${pve.WRITER}
range() { sed -n 's/^next-id: *//p' /etc/pve/datacenter.cfg 2>/dev/null | tr -s ', ' '\\n\\n' | LC_ALL=C sort | tr '\\n' ' '; }
unchanged() {
  seen=$1 wanted=$2; shift 2
  [ "$(range)" = "$seen" ] || {
    echo "the next-id range was changed since it was looked at, and was left as it is now: $(range)" >&2
    sed -n 's/.*"identity":"\\([^"]*\\)","owner":"\\([^"]*\\)".*/\\1 is declared by \\2/p' /var/lib/pulumi-vmbackup/VmIdRange/*.json >&2
    return 75
  }
  "$@" || return
  [ "$(range)" = "$wanted" ] || { echo "pvesh ended without an error, and yet the next-id range is: $(range)" >&2; return 1; }
}
writer datacenter.cfg unchanged "$@"`;

const words = ({ lower, upper }: NextId) => pve.propertyString({ lower, upper });

function setNextId(why: string, value: NextId | null, found: NextId | undefined): Step {
  const change = value === null ? ["--delete", "next-id"] : ["--next-id", words(value)];
  const argv = ["pvesh", "set", "/cluster/options", ...change] as const;
  // As `range` prints it.
  const printed = (range: NextId | null | undefined) =>
    range?.lower === undefined && range?.upper === undefined ? "" : `${words(range).replace(",", " ")} `;
  return {
    why,
    argv: ["sh", "-c", SET, "set-next-id", printed(found), printed(value), ...argv],
    shown: argv,
    timeout: pve.WRITE_SECONDS,
    next: "Run pulumi again: it looks first.",
    look: true,
    last: true, // when it is a removal
  };
}

// ---------------------------------------------------------------- observe

interface Have extends Observed<Pins> {
  /** The datacenter's range as it is now. */
  nextId: NextId | undefined;
  node: string;
  clustered: boolean;
  /** Other VmIdRanges of this node, by their owner. */
  others: (Pins & { owner: string })[];
  /** Asked when it is told: of what is settled, and by a read. */
  status?: { guests: Pick<GuestFile, "vmid" | "node">[]; taken: Taken };
}

async function observe(want: Want, line: Line<Pins> | undefined, host: Host, purpose?: Purpose): Promise<Have> {
  const [{ node, clustered, nextId }, { lines }] = await Promise.all([host.ask(pve.datacenter), memory(host)]);
  const identity = line?.identity ?? text(want);
  const others = lines.filter((l) => l.kind === "VmIdRange" && l.identity !== identity && l.pins !== undefined);
  const have: Have = {
    exists: isThere(want, line, nextId),
    nextId,
    node,
    clustered,
    others: others.map((l) => ({ ...(l.pins as Pins), owner: l.owner })),
    pins: pinsOf(want, line, nextId),
  };
  if (purpose === "plan" ? changes(want, have, have.pins).length === 0 : purpose === "tell") {
    const [guests, taken] = await Promise.all([host.ask(guestFiles), idsTaken(host)]);
    have.status = { guests: [...guests.byId.values()], taken };
  }
  return have;
}

/**
 * A range that is not enforced is only in the ledger. An enforced one that was finished is gone with the setting; another setting
 * is drift. One that was not finished may have found another setting: that is not it.
 */
function isThere(want: Want, line: Line<Pins> | undefined, nextId: NextId | undefined): boolean {
  if (line === undefined || isRange(nextId, want)) return isRange(nextId, want);
  if (!isEnforced(want)) return true;
  return line.finished && line.pins?.enforced === true && nextId !== undefined;
}

const isEnforced = (want: Want) => want.enforce !== false;

function pinsOf(want: Want, line: Line<Pins> | undefined, nextId: NextId | undefined): Pins {
  const enforced = isEnforced(want);
  const { set, before } = line?.pins ?? {};
  const pins: Pins = { lower: want.lower, upper: want.upper, enforced };
  if (isRange(nextId, want) && enforced) pins.set = { lower: want.lower, upper: want.upper };
  else if (set !== undefined && (enforced || isRange(nextId, set))) pins.set = set;
  if (before !== undefined && (enforced || pins.set !== undefined)) pins.before = before;
  // Found as declared: adopted, so that nothing is known of the time before.
  else if (enforced) pins.before = nextId === undefined || isRange(nextId, want) ? null : nextId;
  return pins;
}

// ---------------------------------------------------------------- plan and remove

function plan(want: Want, have: Have, line: Line<Pins>): Step[] {
  refuseOthers(want, have);
  const steps = changes(want, have, line.pins);
  if (steps.length > 0 && isEnforced(want) && have.clustered)
    throw new Refused({
      what: `enforce: ${have.node} is a member of a cluster, and the next-id range is one for the whole cluster.`,
      next: "Declare `enforce: false`: the range still serves `vmId` and `vmIds`. Nothing was changed.",
    });
  return steps;
}

function changes(want: Want, have: Have, pins: Pins | undefined): Step[] {
  if (!isEnforced(want)) return putBack(have, pins);
  if (isRange(have.nextId, want)) return [];
  return [setNextId(`set the next-id range of ${have.node} to ${text(want)}`, toProxmox(want), have.nextId)];
}

function refuseOthers(want: Want, have: Have): void {
  const other =
    have.others.find((o) => overlap(o, want)) ??
    // The one that is in force stays: of two that came at once it is the later, and the earlier is told so.
    (isEnforced(want) && !isRange(have.nextId, want) ? have.others.find((o) => o.enforced) : undefined);
  if (other === undefined) return;
  throw new Conflict({
    what: overlap(other, want)
      ? `The range ${text(want)} overlaps ${text(other)}, which is on ${have.node} already and belongs to ${other.owner}.`
      : `The range ${text(want)} cannot be enforced on ${have.node}, where ${text(other)} of ${other.owner} is: a node has one next-id range.`,
    next: "Choose other ids, declare `enforce: false` on one of two blocks of a node, or destroy the other one first (when its stack is gone: remove its line below /var/lib/pulumi-vmbackup/VmIdRange). Nothing was changed.",
  });
}

/** Only while the setting is ours: what somebody set since then stays. */
function putBack(have: Have, pins: Pins | undefined): Step[] {
  const ours = pins?.set;
  if (ours === undefined || !isRange(have.nextId, ours)) return [];
  const before = pins?.before ?? null;
  const why =
    before === null
      ? `take the next-id range ${text(ours)} off ${have.node}`
      : `put back the next-id range of ${have.node} that was there before ${text(ours)}`;
  return [setNextId(why, before, have.nextId)];
}

function remove(have: Have, { pins }: Line<Pins>): Step[] {
  if (pins === undefined) return [];
  // A run may have stopped between setting the range and seeing it set.
  const unseen = pins.set === undefined && pins.enforced && isRange(have.nextId, pins);
  return putBack(have, unseen ? { ...pins, set: { lower: pins.lower, upper: pins.upper } } : pins);
}

// ---------------------------------------------------------------- outputs

const MOST = 20;

function facts(want: Want, { node, status }: Have): Record<string, unknown> {
  const { guests, taken } = status ?? { guests: [], taken: { ids: new Map<number, string>(), unknown: [] } };
  const outside = guests.filter((guest) => guest.node === node && !contains(want, guest.vmid));
  const inside = [...taken.ids.keys()].filter((id) => contains(want, id)).length;
  return {
    status: {
      asOf: new Date().toISOString(),
      used: guests.filter((guest) => contains(want, guest.vmid)).length,
      free: want.upper - want.lower + 1 - inside,
      // Proxmox's own answer to "none free" is an error; here 0 says it.
      next: firstFree(want, taken) ?? 0,
      outside: outside
        .map((guest) => guest.vmid)
        .sort((a, b) => a - b)
        .slice(0, MOST),
    },
  };
}

/** Of an enforced range: somebody set another one. */
function asFound(want: Want, have: Have): Want {
  return isEnforced(want) && !isRange(have.nextId, want) ? { ...want, enforce: false } : want;
}

export const vmIdRange: Definition<Want, Have, Pins> = {
  kind: "VmIdRange",
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["lower", "upper"],
      broken: ({ lower, upper }) => rangeTrouble(lower, upper),
    },
  ],
  replaceOn: [], // the ids feed other resources
  fromId: (id) => {
    const match = /^([0-9]+)-([0-9]+)$/.exec(id);
    const range = { lower: Number(match?.[1]), upper: Number(match?.[2]) };
    if (match === null || rangeTrouble(range.lower, range.upper) !== undefined)
      throw new Refused({
        what: `${JSON.stringify(id)} is no id of a VmIdRange.`,
        next: "Give first and last id: `14001-14999`.",
      });
    return range;
  },
  identify: text,
  observe,
  plan,
  remove,
  facts,
  asFound,
};

// ---------------------------------------------------------------- what is a free id

/** Ids that no new guest may take, and why. */
export interface Taken {
  ids: ReadonlyMap<number, string>;
  /** Storages that could not be asked: volumes or dumps of any id may lie there. */
  unknown: readonly string[];
}

/** Why an id is not given out again that nobody has now. */
export const USED = "was used before";

/**
 * Every id that is not free: a guest or container has it; or a volume of it exists on a storage of the node (it would become the
 * new guest's); or a dump of it lies on a reachable backup storage (the new guest's retention would prune it); or `recorded` has
 * it, the ids that were used before (the claim on the shared store remembers them).
 */
export async function idsTaken(host: Host, recorded: Iterable<number> = []): Promise<Taken> {
  const [guests, used, states] = await Promise.all([host.ask(guestFiles), idsUsed(host), pve.settledStates(host)]);
  const asked = states.filter(
    ({ enabled, content }) => enabled && content.some((c) => ["images", "rootdir", "backup"].includes(c)),
  );
  const unknown = asked.filter(({ active }) => !active).map(({ storage }) => storage);
  const volumes = await Promise.all(
    asked
      .filter(({ active }) => active)
      .map(async ({ storage }) => {
        const found = await pve.contentIfAny(host, storage);
        if (found === undefined) unknown.push(storage); // it went away since it was active
        return found ?? [];
      }),
  );
  const ids = new Map<number, string>();
  for (const id of [...recorded, ...used]) ids.set(id, USED);
  // A volume after the dumps: it is the heavier reason, and whoever may live with an earlier guest's dumps must not live with its disk.
  const found = volumes.flat();
  const isDump = ({ content }: pve.Volume) => content === "backup";
  for (const { vmid, volid } of found.filter(isDump)) if (vmid !== undefined) ids.set(vmid, `the dump ${volid} exists`);
  for (const { vmid, volid } of found.filter((row) => !isDump(row)))
    if (vmid !== undefined) ids.set(vmid, `the volume ${volid} exists`);
  for (const { vmid, kind, node } of guests.byId.values())
    ids.set(vmid, `${kind === "lxc" ? "a container" : "a guest"} on ${node} has it`);
  return { ids, unknown };
}

/** The lowest free id of a range. */
export function firstFree({ lower, upper }: Range, { ids }: Taken): number | undefined {
  for (let id = lower; id <= upper; id++) if (!ids.has(id)) return id;
  return undefined;
}
