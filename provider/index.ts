// The public surface: the classes and their argument types, nothing else. The work is done by another process
// (dynamic.ts -> engine.ts -> the resource's own file -> host.ts).

import type { Input, Output } from "@pulumi/pulumi";
import * as pulumi from "@pulumi/pulumi";
import { HostResource, perRun } from "./door.js";
import { overlap, rangeTrouble } from "./id-range.js";

// ---------------------------------------------------------------- shared by all

/**
 * Where the commands run: a name for ssh (`"skyserver4"`, `"root@skyserver4:22"`, `"root@[2001:db8::1]"`), `"local"` for the
 * machine that runs pulumi, or a connection object (an object made for `@pulumi/command` fits).
 */
export type Host = string | Connection;

/** An ssh connection. What is left out comes from stack config `vmbackup:connection`, then from ssh_config, then the default named here. */
export interface Connection {
  /** Name or address, as one would type it after `ssh`; aliases of ssh_config work. */
  host: Input<string>;
  /** Login name. Default: what ssh_config says, else `root`. */
  user?: Input<string> | undefined;
  /** Default: what ssh_config says, else 22. */
  port?: Input<number> | undefined;
  /** The text of a private key; always a secret, whatever is passed. Default: agent and identity files of ssh. */
  privateKey?: Input<string> | undefined;
  /** Passphrase of `privateKey`; always a secret. */
  privateKeyPassword?: Input<string> | undefined;
  /** Socket of the ssh agent. Default: `SSH_AUTH_SOCK`. */
  agentSocketPath?: Input<string> | undefined;
  /** The server's public host key, `ssh-ed25519 AAAA…`. Default: known_hosts. An unknown key is always refused. */
  hostKey?: Input<string> | undefined;
  /** Bastion in front of the host, same fields. */
  proxy?: Input<Omit<Connection, "proxy" | "sudo" | "configFile">> | undefined;
  /** Attempts to connect. Default 3. */
  dialErrorLimit?: Input<number> | undefined;
  /** Seconds per attempt. Default 15. */
  perDialTimeout?: Input<number> | undefined;
  /** Run commands through `sudo -n`. Default false; wanted where `user` is not root. */
  sudo?: Input<boolean> | undefined;
  /** ssh_config file to use instead of `~/.ssh/config`; relative to the project. For repositories that carry one. */
  configFile?: Input<string> | undefined;
}

/** Bytes as a number, or text with a binary unit: `"512M"`, `"20G"`, `"1T"`. */
export type Size = number | string;

/** A block of guest ids, both ends inclusive. A `VmIdRange` is one. */
export interface VmIds {
  lower: Input<number>;
  upper: Input<number>;
}

/** How many backups of each guest stay. Absent = all of them. Evaluated in this order, in local time of the host. */
export type Retention =
  | { keepAll: true }
  | {
      keepAll?: undefined;
      keepLast?: Input<number> | undefined;
      keepHourly?: Input<number> | undefined;
      keepDaily?: Input<number> | undefined;
      keepWeekly?: Input<number> | undefined;
      keepMonthly?: Input<number> | undefined;
      keepYearly?: Input<number> | undefined;
    };

interface OnHost {
  /** The host on which the object lives. Another address of the same machine is an update without commands; another machine is refused. */
  host: Input<Host>;
  /** Take over an object that exists and is not ours. Fields not declared here keep their value. Read at creation only. Default false. */
  adopt?: Input<boolean> | undefined;
}

/** What `.get` needs besides name and id. */
export interface Lookup {
  host: Input<Host>;
}

/** UTC, ISO 8601. */
export type Time = string;

// ---------------------------------------------------------------- NfsDumpStorage

export type StorageContent = "backup" | "iso" | "vztmpl" | "snippets" | "import" | "images" | "rootdir";

/** An NFS storage of a Proxmox VE node. Names are those of storage.cfg in camel case. */
export interface NfsDumpStorageArgs extends OnHost {
  /** Storage id on the node, e.g. `nfs-fast-dump`. Fixed: a change replaces. */
  storageId: Input<string>;
  /** NFS server. A change moves the storage under the same id, so that jobs keep pointing at it; refused while something uses it. */
  server: Input<string>;
  /** Exported path on the server. A change moves the storage, like `server`. */
  export: Input<string>;
  /** Mount point on the node. Fixed: a change replaces. Default `/mnt/pve/<storageId>`. */
  path?: Input<string> | undefined;
  /** What may be stored. Default `["backup"]`. `images` and `rootdir` need `vmIds`. */
  content?: Input<Input<StorageContent>[]> | undefined;
  /** The ids this node uses on the export, usually its VmIdRange. Claimed on the export: a store with an overlapping claim is refused. */
  vmIds?: Input<VmIds> | undefined;
  /** Which dumps stay when a job says nothing else. */
  retention?: Input<Retention> | undefined;
  /** Protected dumps per guest; -1 = unlimited. Default: Proxmox's. */
  maxProtectedBackups?: Input<number> | undefined;
  /**
   * Sub-directory per content type, e.g. `{ backup: "dump-n4" }`, so that one node's retention cannot reach another's dumps. Not
   * changed while the old one holds something.
   */
  contentDirs?: Input<Partial<Record<StorageContent, Input<string>>>> | undefined;
  /** NFS mount options, e.g. `vers=4.2,soft`. A change remounts when nothing uses the mount. */
  options?: Input<string> | undefined;
  /** Limits in KiB/s as in storage.cfg, e.g. `restore=102400`. */
  bwlimit?: Input<string> | undefined;
  preallocation?: Input<"off" | "metadata" | "falloc" | "full"> | undefined;
  /** Cluster nodes that use the storage. Default: all. */
  nodes?: Input<Input<string>[]> | undefined;
  /** Keep the definition but do not use it. Default false. */
  disable?: Input<boolean> | undefined;
}

/**
 * An NFS export as a storage of a Proxmox VE node (`pvesm add nfs`), by default for dumps only.
 *
 * ```ts
 * const dumps = new NfsDumpStorage("dumps", { host: "node4", storageId: "nfs-dump", server: "nas", export: "/mnt/dump", retention: { keepLast: 3 } });
 * export const where = dumps.dumpPath;
 * ```
 *
 * - Done means: defined, mounted from the declared source, active, and root could write to it once.
 * - With `vmIds` the ids are claimed in a registry at the root of the export (`.pulumi-vmbackup`), so that unrelated nodes that
 *   share it cannot overwrite each other's disks and dumps. The claim is given back on delete; only `adopt` breaks a foreign one.
 * - Whatever was set by hand and is not declared here is drift, and goes with the next `up`; after `adopt`, what was not declared stays.
 * - Refused: a storage id that is taken, a move or remount while guests' disks, ISOs, a backup or a restore use it, a changed
 *   `contentDirs` while the old directory holds something, a delete while backup jobs or guests use it (they are named).
 * - Dumps are never deleted, also not by destroy; existing ones, copied there by hand, are seen and can be restored.
 */
export class NfsDumpStorage extends HostResource {
  declare readonly storageId: Output<string>;
  declare readonly server: Output<string>;
  declare readonly export: Output<string>;
  /** Mount point on the node. Known in preview. */
  declare readonly path: Output<string>;
  /** As seen by the last up or refresh. */
  declare readonly status: Output<{
    asOf: Time;
    active: boolean;
    totalBytes: number;
    usedBytes: number;
    availableBytes: number;
    dumps: number;
    newestDump?: Time;
  }>;
  /** Echoed input: where the dumps lie follows from it. */
  declare private readonly contentDirs: Output<Partial<Record<StorageContent, string>> | undefined>;
  /** Not declared, the echo would be unknown in a preview: what is not sent does not come back before it is made. */
  readonly #hasContentDirs: boolean;

  constructor(name: string, args: NfsDumpStorageArgs, opts?: pulumi.CustomResourceOptions) {
    const path = args.path ?? pulumi.interpolate`/mnt/pve/${args.storageId}`;
    const read = ["storageId", "server", "export", "path", "content", "contentDirs", "retention", "options", "nodes"];
    super(
      "NfsDumpStorage",
      name,
      { ...args, path, ...(args.vmIds === undefined ? {} : { vmIds: bounds(args.vmIds) }) },
      { outputs: ["status"], read, identity: [args.storageId] },
      opts,
    );
    this.#hasContentDirs = opts?.id !== undefined || args.contentDirs !== undefined;
  }

  /** Reads an existing storage, also one that is not ours. id: the storage id. Throws when there is none. */
  static get(name: string, id: Input<pulumi.ID>, lookup: Lookup, opts?: pulumi.CustomResourceOptions): NfsDumpStorage {
    return new NfsDumpStorage(name, lookup as NfsDumpStorageArgs, { ...opts, id });
  }

  /** Directory of the dumps. Known in preview. */
  get dumpPath(): Output<string> {
    if (!this.#hasContentDirs) return pulumi.interpolate`${this.path}/dump`;
    return pulumi.interpolate`${this.path}/${this.contentDirs.apply((dirs) => dirs?.backup ?? "dump")}`;
  }
}

/** The two numbers of a block of ids: a VmIdRange as such would travel as a reference to a resource. */
function bounds(ids: Input<VmIds>): Output<{ lower: number; upper: number }> {
  return pulumi.output(ids).apply(({ lower, upper }) => pulumi.output({ lower, upper }));
}

// ---------------------------------------------------------------- VmIdRange

/** A block of guest ids for one node: the node's next-id range, and the numbers for `vmId` and `vmIds`. */
export interface VmIdRangeArgs extends OnHost {
  /** First id. A plain number, so that overlaps and `nth` fail on their own line, before anything runs. */
  lower: number;
  /** Last id, inclusive. */
  upper: number;
  /** Set the node's next-id range, which the GUI and `pvesh get /cluster/nextid` follow. Default true. */
  enforce?: Input<boolean> | undefined;
}

/**
 * A block of guest ids for one node, so that unrelated nodes can share a store. Both ends are inclusive.
 *
 * ```ts
 * const ids = new VmIdRange("node4-ids", { host: "node4", lower: 14001, upper: 14999 });
 * export const first = ids.nth(1); // 14001
 * ```
 *
 * - The node's next-id range (datacenter options) is set to it, and put back to what it was when the resource goes.
 * - Refused: ranges of one program that overlap (here, with both names), a second enforced range on a node, and `enforce` on a
 *   member of a cluster, whose next-id range is one for all (`enforce: false` is possible there).
 * - Guests that already exist outside the range stay: `status.outside` names them.
 */
export class VmIdRange extends HostResource {
  declare readonly lower: Output<number>;
  declare readonly upper: Output<number>;
  /**
   * As seen by the last up or refresh. `used`: guests in the range. `free`: ids without a guest, a volume or a dump; `next`: the
   * lowest of them (0: none). `outside`: guests of this node outside the range (at most 20 ids).
   */
  declare readonly status: Output<{ asOf: Time; used: number; free: number; next: number; outside: number[] }>;

  constructor(name: string, args: VmIdRangeArgs, opts?: pulumi.CustomResourceOptions) {
    const isGet = opts?.id !== undefined;
    if (!isGet) checkRange(name, args);
    const identity = [`${args.lower}-${args.upper}`];
    super("VmIdRange", name, { ...args }, { outputs: ["status"], read: ["lower", "upper"], identity }, opts);
    if (!isGet) plainly.set(this, { name, lower: args.lower, upper: args.upper });
  }

  /** Reads the next-id range of a node, also one that is not ours. id: `14001-14999`. Throws when the node has another one. */
  static get(name: string, id: Input<pulumi.ID>, lookup: Lookup, opts?: pulumi.CustomResourceOptions): VmIdRange {
    return new VmIdRange(name, lookup as VmIdRangeArgs, { ...opts, id });
  }

  /** The n-th id of the range, from 1: `nth(1)` is `lower`. Known in preview; n outside the range throws here. */
  nth(n: number): Output<number> {
    const range = plainly.get(this);
    if (range === undefined)
      return pulumi.all([this.lower, this.upper]).apply(([lower, upper]) => nthOf({ name: "it", lower, upper }, n));
    const id = nthOf(range, n);
    return this.lower.apply(() => id); // of this output, so that its users wait for the range
  }
}

interface NamedRange {
  name: string;
  lower: number;
  upper: number;
}

/** What the program says of each range. */
const plainly = new WeakMap<VmIdRange, NamedRange>();
/** The ranges of each run. */
const ranges = new WeakMap<object, NamedRange[]>();

function nthOf({ name, lower, upper }: NamedRange, n: number): number {
  const count = upper - lower + 1;
  if (Number.isInteger(n) && n >= 1 && n <= count) return lower + n - 1;
  throw new Error(`nth(${n}): ids count from 1, and ${name} has ${count} of them, ${lower} to ${upper}.`);
}

/** Nodes that share nothing today share a store tomorrow: ranges are disjoint over all hosts of a program. */
function checkRange(name: string, { lower, upper }: VmIdRangeArgs): void {
  const trouble = rangeTrouble(lower, upper);
  if (trouble !== undefined) throw new Error(`VmIdRange "${name}": ${trouble.property}: ${trouble.reason}.`);
  const others = perRun(ranges, () => []);
  const other = others?.find((o) => overlap(o, { lower, upper }));
  if (other !== undefined)
    throw new Error(
      `VmIdRange "${name}": its ids ${lower} to ${upper} overlap those of "${other.name}", ${other.lower} to ${other.upper}. Give each node ids of its own.`,
    );
  others?.push({ name, lower, upper });
}

// ---------------------------------------------------------------- BackupSchedule

interface BackupScheduleCommon extends OnHost {
  /** Job id (Proxmox) or timer name (libvirt). Fixed. Default: the resource's name. */
  name?: Input<string> | undefined;
  /** Calendar event in local time of the host, the same grammar for both kinds: `"02:30"`, `"sat 03:00"`, `"mon..fri 22:00 UTC"`. Checked in preview. */
  schedule: Input<string>;
  /** False keeps the schedule but runs nothing. Default true. */
  enabled?: Input<boolean> | undefined;
  /** Run once after boot when a run was missed. Default false. */
  catchUp?: Input<boolean> | undefined;
  comment?: Input<string> | undefined;
}

/** Options of vzdump(1) for the job, own names in camel case, own units. */
export interface VzdumpOptions {
  mode?: Input<"snapshot" | "suspend" | "stop"> | undefined;
  compress?: Input<"0" | "gzip" | "lzo" | "zstd"> | undefined;
  /** Threads; 0 = half of the cores. */
  zstd?: Input<number> | undefined;
  /** KiB/s; 0 = unlimited. */
  bwlimit?: Input<number> | undefined;
  /** 0 to 8. */
  ionice?: Input<number> | undefined;
  /** Minutes. */
  lockwait?: Input<number> | undefined;
  /** Minutes. */
  stopwait?: Input<number> | undefined;
  /** One line; `{{guestname}}`, `{{vmid}}`, `{{node}}`, `{{cluster}}`. */
  notesTemplate?: Input<string> | undefined;
  protected?: Input<boolean> | undefined;
  fleecing?: Input<{ enabled: Input<boolean>; storage?: Input<string> | undefined }> | undefined;
  performance?:
    | Input<{ maxWorkers?: Input<number> | undefined; pbsEntriesMax?: Input<number> | undefined }>
    | undefined;
  stdexcludes?: Input<boolean> | undefined;
  excludePath?: Input<Input<string>[]> | undefined;
  /** Hook script on the node. */
  script?: Input<string> | undefined;
  /** Cluster node that runs the job. Default: every node its own guests. */
  node?: Input<string> | undefined;
  notificationMode?: Input<"auto" | "legacy-sendmail" | "notification-system"> | undefined;
  /** With `legacy-sendmail`. */
  mailTo?: Input<Input<string>[]> | undefined;
  pbsChangeDetectionMode?: Input<"legacy" | "data" | "metadata"> | undefined;
}

/** Proxmox VE: a vzdump job to one of the node's storages. */
export interface ProxmoxBackupArgs extends BackupScheduleCommon {
  /** Storage id, usually `dumps.storageId`. */
  storage: Input<string>;
  /** Default `"all"`. Also ids, `{ allExcept: ids }` or `{ pool }`. */
  guests?: Input<"all" | Input<number>[] | { allExcept: Input<Input<number>[]> } | { pool: Input<string> }> | undefined;
  /** Default: the storage's. */
  retention?: Input<Retention> | undefined;
  vzdump?: Input<VzdumpOptions> | undefined;
  directory?: undefined;
  libvirt?: undefined;
}

export interface LibvirtBackupOptions {
  /** `auto` (default): per disk, `lvm-snapshot` for logical volumes, `external-snapshot` for image files. */
  method?: Input<"auto" | "external-snapshot" | "lvm-snapshot"> | undefined;
  /** Freeze file systems through the guest agent: fail without it, try (default), or never. */
  quiesce?: Input<"require" | "try" | "never"> | undefined;
  /** Seconds after which a frozen guest is thawed whatever happens. Default 10. */
  freezeMax?: Input<number> | undefined;
  /** Which disks, by target name (`vda`). Default: all writable ones. A disk left out is listed as uncovered. */
  disks?:
    | Input<{
        include?: Input<Input<string>[]> | undefined;
        exclude?: Input<Input<string>[]> | undefined;
        maxSize?: Input<Size> | undefined;
      }>
    | undefined;
  /** Copy-on-write room per disk for `lvm-snapshot`. Default `"20%ORIGIN"`. */
  snapshotSize?: Input<Size> | undefined;
  /** Default `zstd`. */
  compress?: Input<"zstd" | "pigz" | "none"> | undefined;
  /** KiB/s over all disks; 0 = unlimited (default). */
  bwlimit?: Input<number> | undefined;
  /** 0 to 8, as in vzdump. Default 7. */
  ionice?: Input<number> | undefined;
  /** Seconds after which the copy is given up; the clean-up always completes. Default: none. */
  maxRuntime?: Input<number> | undefined;
  /** Seconds; spreads the start over hosts that share a server. Default 0. */
  randomizedDelay?: Input<number> | undefined;
  /** Read each set back before it counts. Default true. */
  verify?: Input<boolean> | undefined;
  /** Refuse to run when `directory` is not on a mount of its own. Default true. */
  requireMount?: Input<boolean> | undefined;
  /** systemd unit started when a run fails, e.g. `"alert@%n.service"`. */
  onFailure?: Input<string> | undefined;
}

/** KVM with libvirt: a systemd timer that writes self-describing backup sets into a directory. Not in this version. */
export interface LibvirtBackupArgs extends BackupScheduleCommon {
  /** Directory on the host, usually an NFS mount. */
  directory: Input<string>;
  /** Default `"all"`: every defined guest, running or not. Also names or `{ allExcept: names }`. */
  guests?: Input<"all" | Input<string>[] | { allExcept: Input<Input<string>[]> }> | undefined;
  retention?: Input<Retention> | undefined;
  libvirt?: Input<LibvirtBackupOptions> | undefined;
  storage?: undefined;
  vzdump?: undefined;
}

/** `storage` makes it a Proxmox VE job, `directory` a libvirt timer. */
export type BackupScheduleArgs = ProxmoxBackupArgs | LibvirtBackupArgs;

export interface BackupStatus {
  asOf: Time;
  nextRun?: Time;
  lastRun?: { startedAt: Time; finishedAt?: Time; result: "ok" | "failed" | "running"; message?: string };
  /** Guests that a run covers completely. */
  covered: number;
  /** Guests or disks it does not cover, and why (at most 20). */
  uncovered: { guest: string; reason: string }[];
  /** The covered guest whose newest backup is oldest. */
  stalest?: { guest: string; newestBackup?: Time };
}

/**
 * Backups on a schedule. On Proxmox VE: a vzdump job of the datacenter.
 *
 * ```ts
 * new BackupSchedule("nightly", { host: "node4", schedule: "02:30", storage: dumps.storageId, retention: { keepLast: 3, keepDaily: 7 } });
 * ```
 *
 * - `schedule` is in local time of the host unless it ends in ` UTC`, and is checked in preview. What Proxmox would misread is
 *   refused with the cure: `"22"` (a minute, every hour), `"25:00"`, `"8:00,12:00"`, a date that never comes.
 * - The comment of the job ends with a mark that names its owner.
 * - Refused before anything is changed: a storage that does not exist, is disabled or takes no backups; guests, a pool or a node
 *   that do not exist, a date that has passed. Refused in preview: a guest that is listed twice, `protected` with a retention.
 * - `adopt` takes over what is declared, option by option of `vzdump`; the rest of the job stays. A retention whose next run would
 *   remove backups is refused with their list: adopt the job first, and declare it afterwards.
 * - Backups stay when the schedule goes.
 */
export class BackupSchedule extends HostResource {
  declare readonly name: Output<string>;
  declare readonly schedule: Output<string>;
  declare readonly enabled: Output<boolean>;
  /** As seen by the last up or refresh. `lastRun`: of the schedule itself, not of "Run now". */
  declare readonly status: Output<BackupStatus>;
  /** What the job has: an adopted one keeps it, as long as `enabled` is not declared. */
  declare private readonly isEnabled: Output<boolean | undefined>;

  constructor(name: string, args: BackupScheduleArgs, opts?: pulumi.CustomResourceOptions) {
    const named = { enabled: undefined, ...args, name: args.name ?? name };
    const read = ["name", "schedule", "enabled", "storage"];
    super("BackupSchedule", name, named, { outputs: ["status", "isEnabled"], read, identity: [named.name] }, opts);
    const enabled = this.enabled.apply(
      (declared: boolean | undefined) => declared ?? this.isEnabled.apply((found) => found ?? true),
    );
    Object.defineProperty(this, "enabled", { value: enabled });
  }

  /** Reads an existing schedule, also one that is not ours. id: the job id. Throws when there is none. */
  static get(name: string, id: Input<pulumi.ID>, lookup: Lookup, opts?: pulumi.CustomResourceOptions): BackupSchedule {
    return new BackupSchedule(name, lookup as BackupScheduleArgs, { ...opts, id });
  }
}

// ---------------------------------------------------------------- LvSnapshot

/**
 * A point in time of a logical volume. It is never taken again by itself: `pulumi up --replace`, `replacementTrigger` or a new
 * `name` take a new one.
 */
export interface LvSnapshotArgs extends OnHost {
  /** Fixed: a change replaces. */
  volumeGroup: Input<string>;
  /** Name of the volume to snapshot. Fixed; a later lvrename of the origin is followed by its uuid. */
  origin: Input<string>;
  /** Name of the snapshot. Fixed. Default: the resource's name. */
  name?: Input<string> | undefined;
  /**
   * Room for changed blocks: bytes, `"1G"` or `"20%ORIGIN"` (resolved once, at creation). Needed for an ordinary origin, refused
   * for a thin one. A floor: a larger value extends, a smaller one is refused; what LVM rounds up to whole extents, caps at what
   * the origin can use or extends by itself is no drift.
   */
  size?: Input<Size> | undefined;
  /** Extend by `by` percent whenever `at` percent (50 to 99) are used. Not in this version. */
  autoExtend?: Input<{ at: Input<number>; by: Input<number> }> | undefined;
  /** Refuse when less than this percentage of the thin pool is free. Default 10. */
  minFreePoolPercent?: Input<number> | undefined;
  /** Name of the libvirt guest whose file systems are frozen while the snapshot is taken. Not in this version. */
  freeze?: Input<string> | undefined;
  /** Offer the snapshot read-only over the network. Not in this version. */
  nbd?: Input<NbdExport> | undefined;
}

export interface NbdExport {
  /** Address of this host that is bound and that clients use; `0.0.0.0` and `::` are refused. */
  address: Input<string>;
  /** Addresses or networks that may connect; never empty. */
  allow: Input<Input<string>[]>;
  /** Default 10809. */
  port?: Input<number> | undefined;
  /** Default: the snapshot's name. */
  exportName?: Input<string> | undefined;
}

/**
 * A point-in-time copy of one logical volume (`lvcreate --snapshot`), thick or thin, on any Linux host with LVM.
 *
 * ```ts
 * const before = new LvSnapshot("before-upgrade", { host: "kvm1", volumeGroup: "vg0", origin: "web1", size: "20%ORIGIN" });
 * export const device = before.path;
 * ```
 *
 * - A snapshot of an ordinary volume has room of its own (`size`); when more of the origin changes than fits, LVM drops it. Then,
 *   and when it was removed or merged, the point in time is **lost**: `refresh` says so with `status.valid: false`, `up` fails
 *   until you take a new one on purpose.
 * - It is known by its uuid: one that was renamed by hand is drift, and gets its name back.
 * - An ordinary origin cannot be resized while it has a snapshot.
 * - Rolling back (`lvconvert --merge`) is an act by hand, never part of an update, replacement or destroy.
 * - Refused: an unknown volume group, origin or too little room (before anything is changed), a name that is taken, a snapshot of
 *   a thick snapshot, a thin pool with less than `minFreePoolPercent` free.
 */
export class LvSnapshot extends HostResource {
  declare readonly volumeGroup: Output<string>;
  declare readonly origin: Output<string>;
  declare readonly name: Output<string>;
  /** LVM's uuid of the snapshot. */
  declare readonly uuid: Output<string>;
  /** When the snapshot was taken. */
  declare readonly takenAt: Output<Time>;
  /** As seen by the last up or refresh. `consistency`: `crash`, as after a power cut. */
  declare readonly status: Output<{
    asOf: Time;
    valid: boolean;
    thin: boolean;
    sizeBytes: number;
    usedPercent: number;
    consistency: "crash" | "filesystem";
  }>;

  constructor(name: string, args: LvSnapshotArgs, opts?: pulumi.CustomResourceOptions) {
    const named = { ...args, name: args.name ?? name };
    const identity = [args.volumeGroup, named.name];
    const read = ["volumeGroup", "origin", "name"];
    super("LvSnapshot", name, named, { outputs: ["uuid", "takenAt", "status"], read, identity }, opts);
  }

  /** Reads an existing snapshot, also one that is not ours. id: `vg/snapshot`. Throws when there is none. */
  static get(name: string, id: Input<pulumi.ID>, lookup: Lookup, opts?: pulumi.CustomResourceOptions): LvSnapshot {
    return new LvSnapshot(name, lookup as LvSnapshotArgs, { ...opts, id });
  }

  /** `/dev/vg/name`. Known in preview. */
  get path(): Output<string> {
    return pulumi.interpolate`/dev/${this.volumeGroup}/${this.name}`;
  }

  /** `nbd://address:port/exportName`. Reading it without `nbd` throws. */
  get nbdUri(): Output<string> {
    throw new Error(
      `${this.constructor.name}: nbdUri needs the input \`nbd\`, which offers the snapshot over the network.`,
    );
  }
}

// ---------------------------------------------------------------- RestoredTemplate

interface RestoreCommon extends OnHost {
  /** Name of the guest. Default: the one in the backup. */
  name?: Input<string> | undefined;
  /** Make it a template (default), or leave it a stopped guest. */
  template?: Input<boolean> | undefined;
  /** Check the archive before anything is written, and the volumes afterwards. Default true. On Proxmox VE its size, head and
   *  configuration are always looked at; it is read to its end only before a guest is removed for it, as reading takes as long as restoring. */
  verify?: Input<boolean> | undefined;
  /** What destroy does. Default `destroy` for a template restored here, `keep` for `template: false` and for what was adopted.
   *  Destroy refuses while the guest runs or has clones. */
  onDelete?: Input<"destroy" | "keep"> | undefined;
}

/** A vzdump archive of the node: by volume id, or the newest (or the one made at `at`) of a guest on a storage. Chosen at creation and then kept. */
export type DumpSource =
  | { archive: Input<string>; storage?: undefined; vmId?: undefined; guest?: undefined; at?: undefined }
  | {
      storage: Input<string>;
      vmId: Input<number>;
      /** Name the archived guest must have. */
      guest?: Input<string> | undefined;
      /** `"latest"` (default), a UTC time, or the stamp in the archive's name. */
      at?: Input<string> | undefined;
      archive?: undefined;
    };

/** Proxmox VE. */
export interface ProxmoxRestoreArgs extends RestoreCommon {
  from: Input<DumpSource>;
  /** Storage for the disks; of several the one with most room at creation. */
  to: Input<{ storage: Input<string> } | Input<{ storage: Input<string> }>[]>;
  /** The id, `ids.nth(1)`, or a range (`ids`), of which the lowest id that is free is taken.
   *  A change of `from` is an update: with a range the new guest comes first and the old one goes afterwards; with an id it is restored in place (templates only). */
  vmId: Input<number> | VmIds;
  /** New MAC addresses and uuid. Default true. */
  unique?: Input<boolean> | undefined;
  pool?: Input<string> | undefined;
  /** Replaces the archive's tags. */
  tags?: Input<Input<string>[]> | undefined;
  description?: Input<string> | undefined;
  /** KiB/s. */
  bwlimit?: Input<number> | undefined;
  disks?: undefined;
  networks?: undefined;
}

/** A backup set made by a BackupSchedule, or volumes offered over NBD, by target disk name. */
export type LibvirtSource =
  | {
      directory: Input<string>;
      guest: Input<string>;
      at?: Input<string> | undefined;
      nbd?: undefined;
      domainXml?: undefined;
    }
  | {
      nbd: Input<Record<string, Input<string>>>;
      /** Domain XML of the guest. Absent: only volumes are made. */
      domainXml?: Input<string> | undefined;
      directory?: undefined;
      guest?: undefined;
      at?: undefined;
    };

export type LibvirtPlace =
  | { pool: Input<string>; volumeGroup?: undefined }
  | { volumeGroup: Input<string>; pool?: undefined };

/** KVM with libvirt or plain LVM. */
export interface LibvirtRestoreArgs extends RestoreCommon {
  from: Input<LibvirtSource>;
  /** Storage pool or volume group; of several the one with most room at creation. */
  to: Input<LibvirtPlace | Input<LibvirtPlace>[]>;
  /** Volume name and size by target disk name; a size is never smaller than the source. Default name `<name>-<disk>`. */
  disks?:
    | Input<Record<string, Input<{ name?: Input<string> | undefined; size?: Input<Size> | undefined }>>>
    | undefined;
  /** Source network or bridge → one of this host. */
  networks?: Input<Record<string, Input<string>>> | undefined;
  vmId?: undefined;
  unique?: undefined;
  pool?: undefined;
  tags?: undefined;
  description?: undefined;
  bwlimit?: undefined;
}

/** `vmId` makes it Proxmox VE, its absence libvirt or LVM. */
export type RestoredTemplateArgs = ProxmoxRestoreArgs | LibvirtRestoreArgs;

/**
 * A guest or template restored from a backup, and kept. On Proxmox VE: from a vzdump archive of the node.
 *
 * ```ts
 * const ubuntu = new RestoredTemplate("ubuntu", { host: "node4", from: { storage: dumps.storageId, vmId: 107 }, to: { storage: "local" }, vmId: ids.nth(1) });
 * export const template = ubuntu.vmId;
 * ```
 *
 * - The archive is chosen once and kept: a newer dump is no change. Another `from` is: with a range the new guest comes first and
 *   the old one goes afterwards; with an id the template is restored in place, after the new archive was read to its end.
 * - The restore runs on the node by itself. When the connection or pulumi is lost, the next `up` joins it.
 * - The copy does not wake up as a twin: no start at boot, no devices of the host, no firewall rules (`status.changed`).
 * - Refused before anything is made: an archive that does not exist, is empty, unreadable or a container's; dumps of two guests
 *   under one id; a storage without images or room; an id that is not free.
 * - Room: thick storages (LVM, ZFS that is not sparse, preallocation) need the whole size of the disks, others the data. How much data
 *   a compressed archive holds is not known before it is read: then its own size is the least, and a warning says so.
 * - An id out of a range is written down on the export whose store claims it (`vmIds`), and not given out again.
 * - What was adopted is never removed for another `from`, unless `onDelete: "destroy"` is declared.
 * - Destroy refuses while the guest has linked clones, runs, is locked, protected, managed by HA, has snapshots, or is no longer
 *   what was restored.
 */
export class RestoredTemplate extends HostResource {
  /** Name of the guest. */
  declare readonly name: Output<string>;
  /** Where the volumes went: `{ storage }`, `{ pool }` or `{ volumeGroup }`. */
  declare readonly place: Output<{ storage?: string; pool?: string; volumeGroup?: string }>;
  /** Volume id or path by disk. */
  declare readonly volumes: Output<Record<string, string>>;
  /** What was restored: the archive's volume id, the set's directory, or the NBD addresses. */
  declare readonly source: Output<string>;
  declare readonly sourceTime: Output<Time | undefined>;
  /** As seen by the last up or refresh. */
  declare readonly status: Output<{
    asOf: Time;
    isTemplate: boolean;
    running: boolean;
    clones: string[];
    bytes: number;
    seconds: number;
    /** Settings that differ from the archive on purpose, e.g. `onboot`, host devices. */
    changed: string[];
  }>;
  /** The guest's id. Proxmox only (throws otherwise). Known in preview when an id was given. */
  declare readonly vmId: Output<number>;

  constructor(name: string, args: RestoredTemplateArgs, opts?: pulumi.CustomResourceOptions) {
    const isGet = opts?.id !== undefined;
    const range = isGet ? undefined : rangeOf(args.vmId);
    const id = range === undefined ? (args.vmId as Input<number> | undefined) : undefined;
    const outputs = ["place", "volumes", "source", "sourceTime", "status", "guestName", "guestId"];
    super(
      "RestoredTemplate",
      name,
      { name: undefined, ...args, vmId: range ?? id },
      { outputs, read: ["name", "vmId"], identity: [typeof id === "number" ? String(id) : undefined] },
      // Only a given id makes a new guest collide with the old one: of a range another one is taken.
      range === undefined ? opts : { deleteBeforeReplace: false, ...opts },
    );
    // What was declared is known in preview; what only the node knows is not.
    const found = this as unknown as { guestName: Output<string>; guestId: Output<number> };
    if (isGet || args.name === undefined) Object.defineProperty(this, "name", { value: found.guestName });
    if (isGet || range !== undefined) Object.defineProperty(this, "vmId", { value: found.guestId });
    else if (id === undefined)
      Object.defineProperty(this, "vmId", {
        get: () => {
          throw new Error(`RestoredTemplate "${name}" has no vmId: it is a guest of libvirt, not of Proxmox VE.`);
        },
      });
  }

  /** Reads an existing guest, also one that is not ours. id: the vmid, or the domain name. Throws when there is none. */
  static get(
    name: string,
    id: Input<pulumi.ID>,
    lookup: Lookup,
    opts?: pulumi.CustomResourceOptions,
  ): RestoredTemplate {
    return new RestoredTemplate(name, lookup as RestoredTemplateArgs, { ...opts, id });
  }
}

/** A VmIdRange is one: its ends only, as a resource is no property of another. */
function rangeOf(vmId: RestoredTemplateArgs["vmId"]): VmIds | undefined {
  if (typeof vmId !== "object" || vmId === null || pulumi.Output.isInstance(vmId) || vmId instanceof Promise)
    return undefined;
  return "lower" in vmId ? { lower: vmId.lower, upper: vmId.upper } : undefined;
}
