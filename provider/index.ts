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
    const declared = isGet ? { ...args, ...unread(["lower", "upper"]) } : { ...args };
    super("VmIdRange", name, declared, ["status"], [isGet ? undefined : `${args.lower}-${args.upper}`], opts);
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
    const named =
      opts?.id === undefined
        ? { ...args, name: args.name ?? name }
        : { ...args, ...unread(["volumeGroup", "origin", "name"]) };
    super("LvSnapshot", name, named, ["uuid", "takenAt", "status"], [args.volumeGroup, named.name], opts);
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

/** Inputs that `.get` learns by reading: registered without a value, so that they become outputs. */
function unread(fields: readonly string[]): Record<string, undefined> {
  return Object.fromEntries(fields.map((field) => [field, undefined]));
}
