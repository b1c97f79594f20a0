// Figures of NfsDumpStorage: 20 storages on 5 nodes (stand-ins: what pvesm itself costs on a real node is longer, see facts of the
// recordings: 0.8 s a call), against a plain shell loop of the same pvesm commands over one connection per node.
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, it } from "vitest";
import { useProjects } from "../test/engine/project.js";
import { useHosts } from "../test/lab/lab.js";
import { counted, good, idle, ratio, seconds, useTable } from "./figures.js";

const servers = mkdtempSync(join(tmpdir(), "bench-nfs-"));
for (let i = 0; i < 4; i++) mkdirSync(join(servers, `skydev/dump${i}`), { recursive: true });
const node = { pve: true, bindRw: { [servers]: "/srv/nfs" } };
const nodes = Object.values(useHosts({ n1: node, n2: node, n3: node, n4: node, n5: node }));
afterAll(() => rmSync(servers, { recursive: true, force: true }));
const project = useProjects();
const figure = useTable();

const program = () => `
import { NfsDumpStorage } from "pulumi-vmbackup";
for (const host of ${JSON.stringify(nodes.map((n) => n.connection))})
  for (let i = 0; i < 4; i++)
    new NfsDumpStorage(host.host + "-" + i, { host, storageId: "dump" + i, server: "skydev", export: "/dump" + i });
`;

it("creates, refreshes and destroys 20 storages on 5 nodes", async () => {
  const ours = await project(program());
  const none = await project(idle(20));
  const everywhere = (command: string) =>
    Promise.all(nodes.map((n) => n.ssh(`for i in 0 1 2 3; do ${command} || exit; done`)));
  const [first] = nodes;
  if (first === undefined) throw new Error("no nodes");
  const phase = async (
    name: string,
    work: () => Promise<unknown>,
    nothing: () => Promise<unknown>,
    floor: () => Promise<unknown>,
  ) => {
    let took = 0;
    const seen = await counted(first, async () => {
      took = await seconds(work);
    });
    const [idling, loop] = [await seconds(nothing), await seconds(floor)];
    figure({
      what: `${name} 20 storages on 5 nodes, beyond doing nothing, to a shell loop of the same commands`,
      value: ratio(took - idling, loop),
      goal: "1.2",
      note: `${took.toFixed(1)} s, ${idling.toFixed(1)} s, ${loop.toFixed(1)} s`,
    });
    figure({
      what: `${name}: connections, commands per node`,
      value: `${seen.connections}, ${seen.commands}`,
      goal: "1 connection",
    });
  };
  await Promise.all(nodes.map((n) => n.ssh("true")));
  await phase(
    "create",
    async () => good(await ours.up("--parallel", "40")),
    async () => good(await none.up("--parallel", "40")),
    () => everywhere("pvesm add nfs loop$i --server skydev --export /dump$i --content backup"),
  );
  await phase(
    "refresh",
    async () => good(await ours.refresh("--parallel", "40")),
    async () => good(await none.refresh("--parallel", "40")),
    () => everywhere("pvesm status --storage loop$i"),
  );
  await phase(
    "destroy",
    async () => good(await ours.destroy("--parallel", "40")),
    async () => good(await none.destroy("--parallel", "40")),
    () => everywhere("pvesm remove loop$i && umount /mnt/pve/loop$i"),
  );
}, 1_800_000);
