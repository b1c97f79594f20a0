// Proxmox VE nodes that are not one cluster, and one NFS server for their dumps.
import * as pulumi from "@pulumi/pulumi";
import { BackedUpNode } from "./backed-up-node";

const config = new pulumi.Config();

/** Name as one types it after ssh, and block of guest ids: 14 means 14001 to 14999. A stack's configuration may name others. */
const nodes = config.getObject<Record<string, number>>("nodes") ?? {
  skyserver4: 14,
  skyserver5: 15,
  skyserver6: 16,
  skyserver7: 17,
  skyserver8: 18,
  skyserver9: 19,
  skyserver10: 20,
};

const fleet = Object.entries(nodes).map(
  ([host, block]) =>
    new BackedUpNode(host, {
      host,
      block,
      nfs: { server: "skydev", export: "/mnt/data/pve-dump" },
      schedule: "02:30",
      retention: { keepLast: 3, keepDaily: 7 },
      templates: { ubuntu: 107 },
    }),
);

/** Put a dump into this directory of any node, and all of them see it. */
export const dumpPath = fleet[0]?.dumps.dumpPath;
/** Of each node: how its last run ended, and which guests it does not cover. */
export const nightly = Object.fromEntries(
  fleet.map(({ name, nightly: { status } }) => [name, { lastRun: status.lastRun, uncovered: status.uncovered }]),
);
/** `qm clone ID NEW` makes a guest of it. */
export const templates = Object.fromEntries(
  fleet.map(({ name, templates }) => [
    name,
    Object.fromEntries(Object.entries(templates).map(([t, { vmId }]) => [t, vmId])),
  ]),
);
