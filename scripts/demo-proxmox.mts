// The demo's second part: two Proxmox VE nodes that are not one cluster and share one export, and examples/standalone-nodes on them.
import { mkdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { execa } from "execa";
import { root } from "./cache.mts";
import { ask, folder, head, hosts, lab, onHost, Project, sshConfig } from "./demo-tools.mts";

export const nodes = { pve1: 14, pve2: 15 };
const names = Object.keys(nodes);
export const project = new Project("standalone-nodes", join(root, "examples/standalone-nodes"));
/** The NFS servers that both nodes see, by name; below them their exports. */
const servers = `${folder}-nfs`;

/** Starts the nodes; true when they are new. */
export async function start(): Promise<boolean> {
  const there = await hosts();
  const fresh = !names.every((name) => there.has(name));
  if (fresh) {
    await execa(lab, ["down", ...names]);
    await rm(servers, { recursive: true, force: true });
  }
  await mkdir(join(servers, "skydev/mnt/data/pve-dump/dump"), { recursive: true });
  await execa(lab, ["up", "--pve", ...names], {
    env: { LAB_BIND_RW: `${servers}:/srv/nfs` },
    stdout: "ignore",
    stderr: "inherit",
  });
  return fresh;
}

/** The dump of a guest that is long gone, copied into the export by hand. */
async function makeDump(): Promise<void> {
  await onHost(
    "pve1",
    `set -e
    exec >/dev/null
    dumps=/srv/nfs/skydev/mnt/data/pve-dump/dump
    if ls $dumps/vzdump-qemu-107-*.vma.zst 2>/dev/null; then exit; fi
    echo /mnt/data/pve-dump '*' >/srv/nfs/skydev/.exports
    qm create 107 --name ubuntu --memory 2048 --cores 2 --net0 virtio,bridge=vmbr0 --onboot 1 --scsi0 local:1
    vzdump 107 --dumpdir /var/tmp --compress zstd
    qm destroy 107
    mv /var/tmp/vzdump-qemu-107-* $dumps/`,
  );
}

export async function show(fresh: boolean): Promise<void> {
  await makeDump();
  if (fresh || !(await project.exists()))
    await project.make({
      "vmbackup:connection": JSON.stringify({ configFile: await sshConfig() }),
      "standalone-nodes:nodes": JSON.stringify(nodes),
    });
  head("Two standalone Proxmox VE nodes, and examples/standalone-nodes for them");
  console.log(`  pve1 and pve2 are stand-ins: hosts of the lab on which commands of ours answer as the real pvesm, pvesh, qm and
  qmrestore did when they were recorded (docs/proxmox-stand-ins.md). They share the export skydev:/mnt/data/pve-dump,
  into which somebody has copied a dump of guest 107 by hand.`);
  await project.pulumi("up", "--yes");
  head("The dump, as both nodes see it");
  for (const name of names) await ask(name, "pvesm list nfs-fast-dump");
  head("The template, restored from it on each node under the first id of the node's own block");
  for (const [name, block] of Object.entries(nodes)) await ask(name, `qm config ${block}001`);
  head("The drift check: every node is as declared");
  await project.pulumi("preview --refresh --expect-no-changes");
  head("Somebody removes a job by hand; the drift check sees it");
  await ask("pve1", "pvesh delete /cluster/backup/nightly");
  await project.fails("preview --refresh --expect-no-changes");
  head("Repaired");
  await project.pulumi("up --refresh", "--yes", "--skip-preview");
  await ask("pve1", "pvesh get /cluster/backup/nightly --noborder");
}

export async function clear(): Promise<void> {
  await rm(servers, { recursive: true, force: true });
}
