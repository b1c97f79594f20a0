// Figures of the whole Proxmox side: the example on seven nodes, one restore, many jobs on one node. Stand-ins: a real pvesm or
// pvesh costs about a second, so that what is beyond the commands themselves weighs less on real nodes.
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, it } from "vitest";
import { useProjects } from "../test/engine/project.js";
import { useHosts } from "../test/lab/lab.js";
import { counted, good, idle, ratio, seconds, useTable } from "./figures.js";

const servers = mkdtempSync(join(tmpdir(), "bench-nfs-"));
mkdirSync(join(servers, "skydev/pve-dump"), { recursive: true });
const node = { pve: true, bindRw: { [servers]: "/srv/nfs" } };
const fleet = useHosts({ n1: node, n2: node, n3: node, n4: node, n5: node, n6: node, n7: node });
const nodes = Object.values(fleet);
afterAll(() => rmSync(servers, { recursive: true, force: true }));
const project = useProjects();
const figure = useTable();

/** The example of README on these nodes: range, storage, nightly job and template, each. */
const program = () => `
import { BackupSchedule, NfsDumpStorage, RestoredTemplate, VmIdRange } from "pulumi-vmbackup";
${JSON.stringify(nodes.map((n) => n.connection))}.forEach((host, i) => {
  const lower = (14 + i) * 1000 + 1;
  const ids = new VmIdRange("ids" + i, { host, lower, upper: lower + 998 });
  const dumps = new NfsDumpStorage("dumps" + i, { host, storageId: "nfs-fast-dump", server: "skydev", export: "/pve-dump", vmIds: ids, retention: { keepLast: 3, keepDaily: 7 } });
  new BackupSchedule("nightly" + i, { host, schedule: "02:30", storage: dumps.storageId });
  new RestoredTemplate("ubuntu" + i, { host, from: { storage: dumps.storageId, vmId: 107 }, to: { storage: "local" }, vmId: ids.nth(1) });
});
`;

describe("the fleet", () => {
  beforeAll(async () => {
    // A dump of guest 107, made elsewhere and copied into the shared directory, as in job 1.
    await fleet.n1.ssh(
      "set -e; qm create 107 --name ubuntu --memory 512 --scsi0 local:1 >/dev/null; mkdir -p /srv/nfs/skydev/pve-dump/dump; vzdump 107 --dumpdir /srv/nfs/skydev/pve-dump/dump --compress zstd >/dev/null; qm destroy 107 >/dev/null",
    );
  });

  it("takes the example up, looks, refreshes and destroys it", async () => {
    const ours = await project(program());
    const none = await project(idle(28));
    const everywhere = (command: string) =>
      Promise.all(nodes.map((n, i) => n.ssh(command.replaceAll("ID", String((14 + i) * 1000 + 1)))));
    const measure = async (
      name: string,
      work: () => Promise<unknown>,
      nothing: () => Promise<unknown>,
      loop: string,
    ) => {
      let took = 0;
      const seen = await counted(fleet.n2, async () => {
        took = await seconds(work);
      });
      const [idling, floor] = [await seconds(nothing), await seconds(() => everywhere(loop))];
      figure({
        what: `${name} the example on 7 nodes, beyond doing nothing, to a shell loop of the same commands`,
        value: ratio(took - idling, floor),
        goal: "1.2",
        note: `${took.toFixed(1)} s, ${idling.toFixed(1)} s, ${floor.toFixed(1)} s`,
      });
      figure({
        what: `${name}: connections, commands per node`,
        value: `${seen.connections}, ${seen.commands}`,
        goal: "1 connection",
      });
    };
    const wide = ["--parallel", "40"];
    await measure(
      "create",
      async () => good(await ours.up(...wide)),
      async () => good(await none.up(...wide)),
      "set -e; echo pvesh set /cluster/options; pvesm add nfs loop --server skydev --export /pve-dump --content backup; pvesh create /cluster/backup --id loop --schedule 02:30 --storage loop --all 1; qmrestore $(pvesm list loop --vmid 107 | awk 'NR==2{print $1}') 9000 --storage local --unique 1; qm template 9000",
    );
    for (const resource of (await ours.resources()).slice(0, 4))
      figure({
        what: `bytes in the state: ${resource.type.split(":").pop()}`,
        value: String(Buffer.byteLength(JSON.stringify(resource))),
        goal: "2048",
      });
    const look = await counted(fleet.n2, async () => good(await ours.preview("--expect-no-changes")));
    figure({ what: "no-op preview: commands per node", value: String(look.commands), goal: "0" });
    await measure(
      "refresh",
      async () => good(await ours.refresh(...wide)),
      async () => good(await none.refresh(...wide)),
      "set -e; pvesh get /cluster/options; pvesm status; pvesh get /cluster/backup; qm config 9000",
    );
    await measure(
      "destroy",
      async () => good(await ours.destroy(...wide)),
      async () => good(await none.destroy(...wide)),
      "set -e; qm destroy 9000; pvesh delete /cluster/backup/loop; pvesm remove loop; umount /mnt/pve/loop",
    );
  }, 1_800_000);

  it("restores one template", async () => {
    const one = (verify: boolean) => `
import { RestoredTemplate } from "pulumi-vmbackup";
new RestoredTemplate("one", { host: ${JSON.stringify(fleet.n1.connection)}, from: { storage: "dumps", vmId: 107 }, to: { storage: "local" }, vmId: 9100, template: false, onDelete: "destroy", verify: ${verify} });
`;
    await fleet.n1.ssh("pvesm add nfs dumps --server skydev --export /pve-dump --content backup");
    const none = await project(idle(1));
    for (const verify of [true, false]) {
      const ours = await project(one(verify));
      const took = await seconds(async () => good(await ours.up()));
      const idling = await seconds(async () => good(await none.up()));
      good(await ours.destroy());
      good(await none.destroy());
      const bare = await seconds(() =>
        fleet.n1.ssh(
          "qmrestore $(pvesm list dumps --vmid 107 | awk 'NR==2{print $1}') 9101 --storage local --unique 1",
        ),
      );
      await fleet.n1.ssh("qm destroy 9101");
      figure({
        what: `one restore${verify ? "" : " with verify: false"}: seconds beyond the bare qmrestore`,
        value: (took - idling - bare).toFixed(1),
        goal: "2",
        note: `${took.toFixed(1)} s, ${idling.toFixed(1)} s, ${bare.toFixed(1)} s`,
      });
    }
  }, 1_800_000);

  it("keeps 20 and 200 jobs on one node", async () => {
    const jobs = (n: number) => `
import { BackupSchedule } from "pulumi-vmbackup";
for (let i = 0; i < ${n}; i++)
  new BackupSchedule("job" + i, { host: ${JSON.stringify(fleet.n3.connection)}, schedule: "02:30", storage: "local", guests: [100 + i] });
`;
    await fleet.n3.ssh(
      "pvesm set local --content backup,images,iso; for i in $(seq 100 299); do echo name: g$i > /etc/pve/qemu-server/$i.conf; done",
    );
    const times: Record<string, number> = {};
    for (const n of [20, 200]) {
      const [ours, none] = [await project(jobs(n)), await project(idle(n))];
      for (const act of ["up", "refresh", "destroy"] as const)
        times[`${act} ${n}`] =
          ((await seconds(async () => good(await ours[act]()))) -
            (await seconds(async () => good(await none[act]())))) /
          n;
    }
    for (const act of ["up", "refresh", "destroy"])
      figure({
        what: `200 jobs on one node to 20, time of each beyond doing nothing: ${act}`,
        value: ratio(times[`${act} 200`] ?? 0, times[`${act} 20`] ?? 1),
        goal: "1.3",
      });
  }, 1_800_000);
});
