// A standalone Proxmox VE node whose guests are backed up. Copy this file and change it: it is yours, not the package's.
import * as pulumi from "@pulumi/pulumi";
import { BackupSchedule, type Host, NfsDumpStorage, type Retention, VmIdRange } from "pulumi-vmbackup";

export interface BackedUpNodeArgs {
  host: pulumi.Input<Host>;
  /** 14 means ids 14001 to 14999. */
  block: number;
  nfs: { server: pulumi.Input<string>; export: pulumi.Input<string> };
  /** Local time of the node. */
  schedule?: pulumi.Input<string>;
  /** Of each guest's dumps. Default: all of them stay. */
  retention?: pulumi.Input<Retention>;
}

export class BackedUpNode extends pulumi.ComponentResource {
  readonly name: string;
  readonly ids: VmIdRange;
  readonly dumps: NfsDumpStorage;
  readonly nightly: BackupSchedule;

  constructor(name: string, args: BackedUpNodeArgs, opts?: pulumi.ComponentResourceOptions) {
    super("examples:index:BackedUpNode", name, {}, opts);
    this.name = name;
    const { host, block, nfs, schedule = "02:30", retention } = args;
    const mine = { parent: this };

    this.ids = new VmIdRange(name, { host, lower: block * 1000 + 1, upper: block * 1000 + 999 }, mine);
    this.dumps = new NfsDumpStorage(
      name,
      { host, ...nfs, storageId: "nfs-fast-dump", vmIds: this.ids, retention },
      mine,
    );
    this.nightly = new BackupSchedule(name, { host, name: "nightly", schedule, storage: this.dumps.storageId }, mine);

    this.registerOutputs({ dumps: this.dumps.dumpPath, nightly: this.nightly.status });
  }
}
