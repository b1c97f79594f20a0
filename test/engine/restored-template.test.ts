// RestoredTemplate with the real engine: cut short in the middle of a restore, followed by a person, and by several stacks at once.
import { afterEach, beforeAll, describe, expect, it } from "vitest";
import { useHosts } from "../lab/lab.js";
import { A, restoresOn } from "../lab/restores.js";
import { type Project, useProjects } from "./project.js";
import { errors, kill, literal, processes, servers, sshs, until } from "./snapshots.js";

const { pve: node } = useHosts({ pve: { pve: true } });
const { setUp, conf, volumes, slow, behave, halfway, vanish } = restoresOn(node);
const make = useProjects();

beforeAll(setUp);

const projects: Project[] = [];
const program = (...args: object[]) =>
  `import { RestoredTemplate } from "pulumi-vmbackup";\n${args
    .map((arg, i) => {
      const all = { host: node.connection, from: { archive: A }, to: { storage: "local" }, ...arg };
      return `new RestoredTemplate("t${i}", ${literal(all)});`;
    })
    .join("\n")}\n`;
async function project(...args: object[]): Promise<Project> {
  const it = await make(program(...args), { language: "esm" });
  projects.push(it);
  return it;
}

afterEach(async () => {
  await behave();
  for (const it of projects.splice(0)) kill(...(await processes(it)));
}, 300_000);

/** One guest with its two disks, recorded as it is, and nothing left to do. */
async function settled(it: Project, id: number): Promise<void> {
  expect(await conf(id)).toMatch(/template: 1/);
  expect(await volumes(id)).toEqual([`base-${id}-disk-0.qcow2`, `base-${id}-disk-1.qcow2`]);
  expect((await it.resources()).map((resource) => [resource.id, resource.initErrors ?? []])).toEqual([
    [String(id), []],
  ]);
  expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
  expect((await it.destroy()).exitCode).toBe(0);
  expect(await conf(id)).toBeUndefined();
  expect(await volumes(id)).toEqual([]);
}
/** How often a guest was restored, by the node's own tasks. */
const restores = async (id: number) =>
  Number((await node.ssh(`grep -c ':qmrestore:${id}:' /var/log/pve/tasks/index || true`)).stdout);

describe("a restore that is cut short at half", { timeout: 900_000 }, () => {
  it("by kill -9 of pulumi and its provider: the next up joins it", async () => {
    const it = await project({ vmId: 14101 });
    await slow(40);
    const first = it.start(["up", "--yes", "--skip-preview"]);
    await halfway(14101);
    kill(...(await servers(it)));
    first.kill("SIGKILL");
    await first;
    kill(...(await processes(it)));
    await it.pulumi(["cancel", "--yes", it.stack]);
    expect(await it.resources()).toEqual([]);
    expect(await conf(14101)).toBe("memory: 128"); // it goes on

    const second = await it.up();
    expect(second, second.all).toMatchObject({ exitCode: 0, summary: { create: 1 } });
    expect(await restores(14101)).toBe(1);
    expect(second.all).toMatch(/restore local:backup\/\S+ as guest 14101: \d+ %/); // and whoever waits sees how far it is
    await settled(it, 14101);
  });

  it("by kill -9 of ssh: it is waited for over a new connection", async () => {
    const it = await project({ vmId: 14102 });
    await slow(20);
    const first = it.up();
    await halfway(14102);
    const killed = await sshs(it);
    expect(killed.length).toBeGreaterThan(0);
    kill(...killed);
    const run = await first;
    expect(run.exitCode, errors(run)).toBe(0);
    expect(await restores(14102)).toBe(1);
    await settled(it, 14102);
  });

  it("by kill -9 of the unit: one failure that says so, and one more up", async () => {
    const it = await project({ vmId: 14103 });
    await slow(60);
    const first = it.up();
    await halfway(14103);
    await node.ssh("systemctl kill --signal=KILL 'vmbackup-RestoredTemplate-14103-*'");
    const failed = await first;
    expect(failed.exitCode).not.toBe(0);
    expect(errors(failed)).toMatch(/ended on \S+ without a result: it was killed/);
    await behave();
    const second = await it.up();
    expect(second.exitCode, errors(second)).toBe(0);
    await settled(it, 14103);
  });
});

describe("several at once", { timeout: 900_000 }, () => {
  it("two stacks with two templates each out of one range: four ids", async () => {
    const range = { lower: 14201, upper: 14209 };
    const it = await project({ vmId: range }, { vmId: range });
    const other = await it.other("prod");
    projects.push(other);
    const runs = await Promise.all([it.up(), other.up()]);
    for (const run of runs) expect(run.exitCode, errors(run)).toBe(0);
    const ids = [...(await it.resources()), ...(await other.resources())].map(({ id }) => Number(id));
    expect(new Set(ids).size).toBe(4);
    const there = (await node.ssh("ls /etc/pve/qemu-server")).stdout
      .split("\n")
      .map((file) => Number.parseInt(file, 10));
    expect(there.filter((id) => id >= 14201 && id <= 14209)).toEqual([...ids].sort());
    for (const id of ids) expect(await conf(id)).toMatch(/template: 1/);
    for (const run of await Promise.all([it.destroy(), other.destroy()])) expect(run.exitCode, errors(run)).toBe(0);
  });

  it("a template that is kept: destroy says so", async () => {
    const it = await project({ vmId: 14301, onDelete: "keep" });
    expect((await it.up()).exitCode).toBe(0);
    const gone = await it.destroy();
    expect(gone.exitCode).toBe(0);
    expect(gone.all).toMatch(/guest 14301 is kept/);
    expect(await conf(14301)).toMatch(/template: 1/);
    await vanish(14301);
    await until("the guest is gone", async () => (await conf(14301)) === undefined);
  });
});
