// The public surface: the classes and their argument types, nothing else. The work is done by another process
// (dynamic.ts -> engine.ts -> the resource's own file -> host.ts).

import type { Input, Output } from "@pulumi/pulumi";
import * as pulumi from "@pulumi/pulumi";
import { HostResource } from "./door.js";

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
