// RestoredTemplate on the Proxmox stand-ins: the laws, and all the bad luck that a restore can have. What is asserted is looked up
// in Proxmox's own files and tools, never through our own read.
import { afterEach, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { laws } from "../laws.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";

const { node } = useHosts({ node: { pve: true } });

const DUMPS = "/var/lib/vz/dump";
const A = "local:backup/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst";
const B = "local:backup/vzdump-qemu-102-2026_11_20-11_00_00.vma.zst";

let made: Promise<unknown> | undefined;
const setUp = () =>
  (made ??= node.ssh(
    `python3 /usr/lib/pve-stand-ins/recorded_archives.py ${DUMPS}
     mkdir -p /run/pve-misbehave /var/lib/second /var/lib/pve-lvm/vg0
     pvesm add dir second --path /var/lib/second --content images,backup
     pvesm add lvmthin thin --vgname vg0 --thinpool data --content images
     pvesm add dir dumps --path /var/lib/dumps --mkdir 1 --content backup
     pvesh create /pools --poolid golden; pvesh create /pools --poolid other`,
  ));

/** A law's tag is `lawN`: each has an id of its own. */
const idOf = (tag: string) => 14000 + Number(tag.replace(/\D/g, ""));

async function conf(id: number): Promise<string | undefined> {
  await setUp();
  const { stdout, exitCode } = await node.ssh(["cat", `/etc/pve/qemu-server/${id}.conf`], { reject: false });
  return exitCode === 0 ? stdout : undefined;
}

/** Every volume of an id on the node. */
async function volumes(id: number): Promise<string[]> {
  const { stdout } = await node.ssh(
    `for d in /var/lib/vz/images/${id} /var/lib/second/images/${id} /var/lib/pve-lvm/vg0; do [ ! -d $d ] || ls $d; done`,
  );
  return stdout.split("\n").filter((name) => name.includes(`-${id}-`));
}

async function vanish(id: number): Promise<void> {
  await node.ssh(
    `qm unlock ${id}; qm set ${id} --protection 0; qm destroy ${id} --destroy-unreferenced-disks 1; rm -rf /run/qemu-server/${id}.pid`,
    { reject: false },
  );
}

const inputs = (over: Fields): Fields => ({
  host: node.connection,
  from: { archive: A },
  to: { storage: "local" },
  ...over,
});

laws({
  kind: "RestoredTemplate",
  inputs: (tag) => inputs({ vmId: idOf(tag), onDelete: "destroy" }),
  look: (tag) => conf(idOf(tag)),
  vanish: (tag) => vanish(idOf(tag)),
  foreign: async (tag) => {
    await setUp();
    await node.ssh(["qm", "create", String(idOf(tag)), "--name", "foreign", "--memory", "64", "--scsi0", "local:0.01"]);
  },
  token: async (tag) => /vmgenid: (\S+)/.exec((await conf(idOf(tag))) ?? "")?.[1],
  bad: [
    ["no source", { from: {} }, "from"],
    ["two sources", { from: { archive: A, storage: "local" } }, "from.storage"],
    ["a storage without a guest", { from: { storage: "local" } }, "from.vmId"],
    ["a path", { from: { archive: "/mnt/x.vma" } }, "from.archive"],
    ["a time in words", { from: { storage: "local", vmId: 101, at: "yesterday" } }, "from.at"],
    ["not there yet: a directory", { from: { directory: "/d", guest: "g" } }, "from.directory"],
    ["not there yet: a libvirt place", { to: { pool: "default" } }, "to.pool"],
    ["no place", { to: [] }, "to"],
    ["no id", { vmId: undefined }, "vmId"],
    ["an id below 100", { vmId: 99 }, "vmId"],
    ["a range upside down", { vmId: { lower: 14999, upper: 14001 } }, "vmId.upper"],
    ["a name with a blank", { name: "my guest" }, "name"],
    ["a tag with a blank", { tags: ["my tag"] }, "tags[0]"],
    ["a negative limit", { bwlimit: -1 }, "bwlimit"],
    ["disks", { disks: {} }, "disks"],
    ["adopting of a range", { adopt: true, vmId: { lower: 14001, upper: 14999 } }, "vmId"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
  ],
  badOnHost: [
    ["an unknown storage", { from: { archive: A.replace("local", "nosuch") } }, /no storage nosuch.*local/s],
    [
      "an archive that is gone",
      { from: { archive: A.replace("_20-", "_25-") } },
      /does not exist.*vzdump-qemu-101-2026_11_20/s,
    ],
    ["a guest without backups", { from: { storage: "local", vmId: 999 } }, /no backup of guest 999.*101, 102/s],
    [
      "a time without a backup",
      { from: { storage: "local", vmId: 101, at: "2020_01_01-00_00_00" } },
      /made at 2020_01_01/,
    ],
    ["another guest's name", { from: { storage: "local", vmId: 101, guest: "web" } }, /named web.*db101/s],
    ["an unknown place", { to: { storage: "nosuch" } }, /nosuch does not exist/],
    ["a place that takes no images", { to: { storage: "dumps" } }, /dumps takes no disk images/],
  ],
  mutable: [
    ["name", { name: "renamed" }, /name: renamed/],
    ["tags", { tags: ["Golden", "b"] }, /tags: b;golden/],
    ["description", { description: "two\nlines: ü %" }, /two\n#lines%3A %C3%BC/],
    ["pool", { pool: "golden" }, /./],
    ["bwlimit", { bwlimit: 50_000 }, /./],
  ],
  optional: [
    ["name", { name: "renamed" }, /name: renamed/],
    ["tags", { tags: ["golden"] }, /tags: golden/],
    ["description", { description: "mine" }, /#mine/],
    ["pool", { pool: "golden" }, undefined],
  ],
  replacing: [],
});
