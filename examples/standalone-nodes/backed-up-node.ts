// A standalone Proxmox VE node whose guests are backed up. Copy this file and change it: it is yours, not the package's.
import * as pulumi from "@pulumi/pulumi";
import {
  BackupSchedule,
  type Host,
  NfsDumpStorage,
  RestoredTemplate,
  type Retention,
  VmIdRange,
} from "pulumi-vmbackup";

export interface BackedUpNodeArgs {
  host: pulumi.Input<Host>;
  /** 14 means ids 14001 to 14999. */
  block: number;
  nfs: { server: pulumi.Input<string>; export: pulumi.Input<string> };
  /** Local time of the node. */
  schedule?: pulumi.Input<string>;
  /** Of each guest's dumps. Default: all of them stay. */
  retention?: pulumi.Input<Retention>;
  /** Templates by name: the archived guest's id. They get the first ids of the block, in this order: append new ones at the end. */
  templates?: Record<string, number>;
}

export class BackedUpNode extends pulumi.ComponentResource {
  readonly name: string;
  readonly ids: VmIdRange;
  readonly dumps: NfsDumpStorage;
  readonly nightly: BackupSchedule;
  readonly templates: Record<string, RestoredTemplate> = {};

  constructor(name: string, args: BackedUpNodeArgs, opts?: pulumi.ComponentResourceOptions) {
    super("examples:index:BackedUpNode", name, {}, opts);
    this.name = name;
    const { host, block, nfs, schedule = "02:30", retention, templates = {} } = args;
    const mine = { parent: this };

    this.ids = new VmIdRange(name, { host, lower: block * 1000 + 1, upper: block * 1000 + 999 }, mine);
    this.dumps = new NfsDumpStorage(
      name,
      { host, ...nfs, storageId: "nfs-fast-dump", vmIds: this.ids, retention },
      mine,
    );
    this.nightly = new BackupSchedule(name, { host, name: "nightly", schedule, storage: this.dumps.storageId }, mine);
    Object.entries(templates).forEach(([template, vmId], i) => {
      this.templates[template] = new RestoredTemplate(
        `${name}-${template}`,
        { host, from: { storage: this.dumps.storageId, vmId }, to: { storage: "local" }, vmId: this.ids.nth(i + 1) },
        mine,
      );
    });

    this.registerOutputs({ dumps: this.dumps.dumpPath, nightly: this.nightly.status });
  }
}
