// The demo's first part: a host with LVM, and the root's Pulumi.yaml on it.
import { root } from "./cache.mts";
import { ask, head, onHost, Project, sshConfig } from "./demo-tools.mts";

export const host = "demo";
export const project = new Project("lv-snapshot", root);

/** The volume group of the demo, with a guest's volume in it; true when it had to be made. */
async function makeVolumes(): Promise<boolean> {
  const answer = await onHost(
    host,
    `if vgs vgdata >/dev/null 2>&1; then echo there; exit; fi
    set -e
    vgcreate -qq -y vgdata /dev/ubdb
    lvcreate -qq -y -n vm1 -L 256M vgdata
    mkfs.ext4 -q /dev/vgdata/vm1`,
  );
  return answer.trim() !== "there";
}

export async function show(): Promise<void> {
  // A new host is another machine: what is recorded about the last one does not count.
  const fresh = await makeVolumes();
  if (fresh || !(await project.exists()))
    await project.make({ "vmbackup:connection": JSON.stringify({ configFile: await sshConfig() }) });
  head("A snapshot: examples/lv-snapshot/index.ts, by way of Pulumi.yaml");
  await project.pulumi("up", "--yes");
  head("What the host itself says");
  await ask(host, "lvs -o lv_name,origin,lv_size,data_percent,lv_tags vgdata");
  head("Once more: nothing is left to do");
  await project.pulumi("up --expect-no-changes", "--yes", "--skip-preview");
}
