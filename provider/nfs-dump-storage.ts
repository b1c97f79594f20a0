// NfsDumpStorage: an NFS storage of a Proxmox VE node (pvesm add nfs). Inputs: nfs-dump-storage-inputs.ts; what there is of it:
// nfs-dump-storage-look.ts; what lives on the export and at its mount: nfs-export.ts.
//
// The definition (storage.cfg) and the mount are two things: `pvesm set` never mounts or remounts, `pvesm remove` never unmounts,
// and a new definition over an old mount goes on with the old server. So whatever changes the mount is: disable (or pvestatd mounts
// it again within seconds), unmount, and only then the change.
import type { Definition, Step } from "./engine.js";
import { Conflict, Refused } from "./errors.js";
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
import { defaultPath, type Have, observe, type Pins, provenKey } from "./nfs-dump-storage-look.js";
import { encodedOwner, IDENTITY_FILES, normalServer, ON_MOUNT, sourceOf } from "./nfs-export.js";
import { properties, sectionHash, setOf, WRITE_SECONDS } from "./pve.js";

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
  const learnt = want.vmIds !== undefined && have.on !== undefined && have.usedIds.length > 0;
  if (isClaimPending(want, have, line) || learnt) return [claim(want, have, line)];
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
  if (have.row !== undefined && field !== "disable") return have.values[field];
  return found({ type: "nfs", id: "", values: line.pins?.carried ?? {}, words: [] })[field];
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

/** Also writes down which ids were used by now. */
function claim(want: Want, have: Have, line: Line<Pins>): Step {
  const { lower, upper } = want.vmIds ?? { lower: 0, upper: 0 };
  const used = have.usedIds.length === 0 ? "" : ` (used: ${listed(have.usedIds.map(String))})`;
  const why = `claim the ids ${lower} to ${upper} on ${have.source}${used}`;
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
