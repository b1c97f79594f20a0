// Figures of the whole Proxmox side: the example on seven nodes, one restore, many jobs on one node. Stand-ins: a real pvesm or
// pvesh costs about a second, so that what is beyond the commands themselves weighs less on real nodes.
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, it } from "vitest";
import { type StackResource, useProjects } from "../test/engine/project.js";
import { sshConfig, useHosts } from "../test/lab/lab.js";
import { counted, good, idle, ratio, seconds, useTable } from "./figures.js";

const servers = mkdtempSync(join(tmpdir(), "bench-nfs-"));
mkdirSync(join(servers, "skydev/mnt/data/pve-dump/dump"), { recursive: true });
const node = { pve: true, bindRw: { [servers]: "/srv/nfs" } };
const fleet = useHosts({ n1: node, n2: node, n3: node, n4: node, n5: node, n6: node, n7: node });
const nodes = Object.values(fleet);
afterAll(() => rmSync(servers, { recursive: true, force: true }));
const project = useProjects();
const figure = useTable();

/** examples/standalone-nodes on these nodes. */
async function example() {
  const folder = join(__dirname, "../examples/standalone-nodes");
  const it = await project(readFileSync(join(folder, "index.ts"), "utf8"), {
    name: "standalone-nodes",
    config: {
      "vmbackup:connection": JSON.stringify({ configFile: sshConfig }),
      "standalone-nodes:nodes": JSON.stringify(Object.fromEntries(nodes.map(({ name }, i) => [name, 14 + i]))),
    },
  });
  cpSync(join(folder, "backed-up-node.ts"), join(it.folder, "backed-up-node.ts"));
  return it;
}

/** What is ours in a state, as an export shows it: the rest is Pulumi's (URNs, dependencies, the program's stack trace). */
const bytes = ({ inputs, outputs }: StackResource) => Buffer.byteLength(JSON.stringify({ inputs, outputs }));

describe("the fleet", () => {
  beforeAll(async () => {
    // A dump of guest 107, made elsewhere and copied into the shared directory, as in job 1.
    await fleet.n1.ssh(
      "set -e; qm create 107 --name ubuntu --memory 512 --scsi0 local:1 >/dev/null; vzdump 107 --dumpdir /srv/nfs/skydev/mnt/data/pve-dump/dump --compress zstd >/dev/null; qm destroy 107 >/dev/null",
    );
  });

  it("takes the example up, looks, refreshes and destroys it", async () => {
    const ours = await example();
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
      "set -e; pvesh set /cluster/options --next-id lower=ID,upper=$((ID+999)); pvesm add nfs loop --server skydev --export /mnt/data/pve-dump --content backup; pvesh create /cluster/backup --id loop --schedule 02:30 --storage loop --all 1; qmrestore $(pvesm list loop --vmid 107 | awk 'NR==2{print $1}') 9000 --storage local --unique 1; qm template 9000",
    );
    const largest = new Map<string, number>();
    for (const resource of await ours.resources()) {
      const kind = resource.type.split(":").at(-1) ?? "";
      if (resource.type.startsWith("pulumi-nodejs:"))
        largest.set(kind, Math.max(largest.get(kind) ?? 0, bytes(resource)));
    }
    for (const [kind, most] of largest)
      figure({ what: `bytes in the state, inputs and outputs: ${kind}`, value: String(most), goal: "2048" });
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
      "set -e; qm destroy 9000; pvesh delete /cluster/backup/loop; pvesm remove loop; umount /mnt/pve/loop; pvesh set /cluster/options --delete next-id",
    );
  }, 1_800_000);

  it("restores one template", async () => {
    const one = (verify: boolean) => `
import { RestoredTemplate } from "pulumi-vmbackup";
new RestoredTemplate("one", { host: ${JSON.stringify(fleet.n1.connection)}, from: { storage: "dumps", vmId: 107 }, to: { storage: "local" }, vmId: 9100, template: false, onDelete: "destroy", verify: ${verify} });
`;
    await fleet.n1.ssh("pvesm add nfs dumps --server skydev --export /mnt/data/pve-dump --content backup");
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
