// RestoredTemplate, the hands: the steps from what is there to what is wanted, and those that remove it. What is ours goes only when
// it is still what was restored: see `trouble`.
import type { Step } from "./engine.js";
import { Conflict, Refused, Unfinished } from "./errors.js";
import { argvHash } from "./host-job.js";
import type { Line } from "./host-ledger.js";
import { remember } from "./nfs-dump-storage.js";
import * as files from "./pve-guests.js";
import { restoreArgv, verifyArgv } from "./qmrestore.js";
import type { Want } from "./restored-template.js";
import { changedByHand, type Have, type Mine, type Pins } from "./restored-template-look.js";
import { changes } from "./restored-template-settings.js";

// ---------------------------------------------------------------- plan

export function plan(want: Want, have: Have, line: Line<Pins>): Step[] {
  const pins = line.pins ?? { vmId: Number(line.identity) };
  if (have.otherwise) throw otherwise(want, line, pins);
  if (have.job.state === "running" && have.mine === undefined) return [joined(want, line, pins)];
  if (have.stranger !== undefined) throw halfway(taken(have.stranger), pins);
  if (have.placeholder !== undefined || have.leftovers.length > 0) return clear(have);
  if (have.unseen.length > 0) throw halfway(unseen(have, pins), pins);
  if (have.refused !== undefined) throw halfway(have.refused, pins);
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
  // First of all: whatever becomes of the guest, its id is not given out again.
  const noted = noteId(have, line);
  if (noted.length > 0) return noted;
  const steps = changes(want, have.mine, line);
  if (steps.length > 0 || have.old === undefined) return steps;
  return destroy(have.old, "the guest before it");
}

const noteId = ({ mine, unremembered }: Have, { owner }: Line<Pins>): Step[] =>
  mine === undefined ? [] : unremembered.map((registry) => remember(mine.file.vmid, owner, registry));

function restore(want: Want, pins: Pins): Step {
  const argv = restoreArgv({
    archive: pins.archive ?? "",
    vmId: pins.vmId,
    storage: pins.storage ?? "",
    unique: want.unique ?? true,
    pool: want.pool,
    bwlimit: want.bwlimit,
  });
  const why = `restore ${pins.archive} as guest ${pins.vmId}`;
  if (pins.instead !== undefined) return { why, argv, job: true, halfway: true, next: wayBack(pins.instead) };
  return { why, argv, job: true, next: "Run `pulumi up` again: it clears up what this attempt left, and begins anew." };
}

const wayBack = (archive: string) =>
  `The guest that ${archive} had been restored to was removed for this. Run \`pulumi up\` again, or with \`from: { archive: ${JSON.stringify(archive)} }\` to have that one back.`;

/** What stops us when the guest before is gone already. */
function halfway(error: Error, { instead }: Pins): Error {
  return instead === undefined ? error : new Unfinished({ what: error.message, next: wayBack(instead) }, error);
}

const unseen = ({ unseen: storages }: Have, { vmId }: Pins) =>
  new Refused({
    what: `The storage ${storages.join(", ")} does not answer, so that it cannot be known whether volumes of guest ${vmId} are left on it.`,
    next: "Run pulumi again when it answers.",
  });

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
  refuseReplacing(want, old, `replace guest ${old.file.vmid}`);
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
  refuseReplacing(want, old, what);
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

/** What was adopted may be the only copy of what it holds: it goes only when the program says so. */
function refuseReplacing(want: Want, old: Mine, what: string): void {
  if (old.pinned.adopted && want.onDelete !== "destroy")
    throw new Refused({
      what: `Unable to ${what}: it was adopted, not restored by this resource, and may hold what no archive has.`,
      next: 'It was left as it is. Declare `onDelete: "destroy"` to let it go, or another `vmId` under a resource of its own.',
    });
  refuseTrouble(old, what);
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
const SAME = `verb=$1 id=$2 digest=$3 free=$4 conf=/etc/pve/qemu-server/$2.conf
[ "$(sha1sum <"$conf" | cut -c 1-40)" = "$digest" ] || { echo "the configuration of guest $id was changed since it was looked at" >&2; exit 1; }
[ -z "$free" ] || flock --nonblock "/var/lock/qemu-server/lock-$id.conf" true || { echo "something is at work on guest $id" >&2; exit 1; }
exec qm "$verb" "$id"`;

function sameGuest(verb: "destroy" | "unlock", file: files.GuestFile, why: string, placeholder: boolean): Step {
  const id = String(file.vmid);
  return {
    why,
    argv: ["sh", "-c", SAME, "vmbackup-guest", verb, id, files.digestOf(file), placeholder ? "free" : ""],
    shown: ["qm", verb, id],
    timeout: 1800,
    look: true,
    next: "Look at the guest on the node, then run pulumi again.",
  };
}

// The lock of the guest is held, so that nobody makes a guest of that id meanwhile, who would take the volume for his.
const FREE = `id=$1 volid=$2
exec 8>>"/var/lock/qemu-server/lock-$id.conf" && flock --nonblock 8 || { echo "something is at work on guest $id" >&2; exit 1; }
for conf in /etc/pve/nodes/*/*/"$id.conf"; do [ ! -e "$conf" ] || { echo "$conf is there, and the volume may be its guest's" >&2; exit 1; }; done
user=$(grep -lsF -e "\${volid##*[:/]}" /etc/pve/nodes/*/qemu-server/*.conf /etc/pve/nodes/*/lxc/*.conf)
[ -z "$user" ] || { echo "it is in use by" $user >&2; exit 1; }
pvesm free "$volid" 8>&-`;

function freeVolume(volid: string, vmId: number): Step {
  return {
    why: `remove the volume ${volid}, which no guest has`,
    argv: ["sh", "-c", FREE, "vmbackup-free", String(files.ownerOf(volid) ?? vmId), volid],
    shown: ["pvesm", "free", volid],
    timeout: 1800,
    look: true,
    next: "Look at the volume on the node, then run pulumi again.",
  };
}

function destroy(guest: Mine, what: string): Step[] {
  refuseTrouble(guest, `remove guest ${guest.file.vmid} (${what})`);
  return [sameGuest("destroy", guest.file, `remove guest ${guest.file.vmid}, ${what}`, false)];
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
      return [sameGuest("unlock", file, `unlock guest ${id}, which a restore left locked`, true)];
    return [sameGuest("destroy", file, `remove guest ${id}, which a restore left unfinished`, true)];
  }
  return have.leftovers.map((volid) => freeVolume(volid, have.pins?.vmId ?? 0));
}

export function remove(have: Have, line: Line<Pins>): Step[] {
  if (have.job.state === "running")
    throw new Refused({
      what: `${line.pins?.archive} is still being restored as guest ${line.pins?.vmId} (job ${line.job?.unit}).`,
      next: "Let it end, or stop it on the host with `systemctl stop`; then run `pulumi destroy` again.",
    });
  if (have.placeholder !== undefined || have.leftovers.length > 0) return clear(have);
  if (have.unseen.length > 0) throw unseen(have, line.pins ?? { vmId: Number(line.identity) });
  const guest = have.mine ?? have.old;
  if (guest !== undefined && !have.keep)
    return [...noteId(have, line), ...destroy(guest, guest === have.mine ? "which was restored" : "the one before")];
  return [];
}

/** Said at the end of a removal that leaves the guest. */
export function left(have: Have): string | undefined {
  const guest = have.mine ?? have.old;
  if (guest === undefined) return undefined;
  return `guest ${guest.file.vmid} is kept: \`onDelete\` is "keep", which is also the default with \`template: false\` and for what was adopted.`;
}
