// Figures of LvSnapshot: ratios within one run, on a real host with LVM. Goals are aims; README explains those that are missed.
import { beforeAll, describe, it } from "vitest";
import { type StackResource, useProjects } from "../test/engine/project.js";
import { useHosts, useVolumeGroup } from "../test/lab/lab.js";
import { counted, good, idle, multiplied, ratio, seconds, useTable } from "./figures.js";

const { lvm } = useHosts({ lvm: { uml: true } });
const vg = useVolumeGroup(lvm, "bench", 1024);
const project = useProjects();
const figure = useTable();
const TYPE = "pulumi-nodejs:dynamic/vmbackup:LvSnapshot";

const program = (n: number, name = "s") => `
import { LvSnapshot } from "pulumi-vmbackup";
for (let i = 0; i < ${n}; i++)
  new LvSnapshot("${name}" + i, { host: ${JSON.stringify(lvm.connection)}, volumeGroup: "${vg}", origin: "thin" });
`;

describe("LvSnapshot", () => {
  beforeAll(async () => {
    await lvm.ssh(
      `lvcreate -qq -y --type thin-pool -L 256M --poolmetadatasize 32M -n pool ${vg} && lvcreate -qq -y --thinpool pool -V 64M -n thin ${vg}`,
    );
  }, 300_000);

  it("creates and destroys 20 snapshots", async () => {
    const ours = await project(program(20));
    const none = await project(idle(20));
    const loop = (command: string) => lvm.ssh(`for i in $(seq 0 19); do ${command} || exit; done`);
    const made = await counted(lvm, async () => {
      const [up, idleUp] = [
        await seconds(async () => good(await ours.up())),
        await seconds(async () => good(await none.up())),
      ];
      await lvm.ssh("true"); // the loop has its connection already, as we have ours
      const floor = await seconds(() =>
        loop(`lvcreate -qq --yes --snapshot --setactivationskip n --name loop$i -- ${vg}/thin`),
      );
      figure({
        what: "create 20 snapshots, beyond doing nothing, to a shell loop of the same lvcreate",
        value: ratio(up - idleUp, floor),
        goal: "1.2",
        note: `${up.toFixed(1)} s, ${idleUp.toFixed(1)} s, ${floor.toFixed(1)} s`,
      });
    });
    figure({ what: "connections, commands to create 20", value: `${made.connections}, ${made.commands}` });
    const [state] = (await ours.resources()).filter((resource) => resource.type === TYPE);
    figure({
      what: "bytes of `__provider`",
      value: String(Buffer.byteLength(String(state?.inputs?.__provider))),
      goal: "about 80",
    });
    const bytes = (value: unknown) => Buffer.byteLength(JSON.stringify(value) ?? "");
    const { inputs, outputs, stackTrace } = state as StackResource & { stackTrace?: unknown };
    figure({
      what: "bytes in the state per snapshot, inputs and outputs together",
      value: String(bytes(inputs) + bytes(outputs)),
      goal: "2048",
      note: `the engine's own record adds ${bytes(state) - bytes(inputs) - bytes(outputs)}, ${bytes(stackTrace)} of them where the program made it`,
    });
    const gone = await counted(lvm, async () => {
      const [down, idleDown] = [
        await seconds(async () => good(await ours.destroy())),
        await seconds(async () => good(await none.destroy())),
      ];
      const floor = await seconds(() => loop(`lvremove -qq --yes -- ${vg}/loop$i`));
      figure({
        what: "destroy 20 snapshots, beyond doing nothing, to a shell loop of the same lvremove",
        value: ratio(down - idleDown, floor),
        goal: "1.2",
        note: `${down.toFixed(1)} s, ${idleDown.toFixed(1)} s, ${floor.toFixed(1)} s`,
      });
    });
    figure({ what: "connections, commands to destroy 20", value: `${gone.connections}, ${gone.commands}` });
  }, 1_800_000);

  it("refreshes 100 snapshots of one host", async () => {
    await lvm.ssh(`for i in $(seq 0 99); do lvcreate -qq --yes --snapshot --name r$i -- ${vg}/thin || exit; done`);
    const { stdout } = await lvm.ssh(["lvs", "--noheadings", "-o", "lv_name,lv_uuid", vg]);
    const uuids = new Map(stdout.split("\n").map((line) => line.trim().split(/\s+/) as [string, string]));
    const ours = await project(program(1, "r"));
    await lvm.ssh(["lvrename", "-qq", vg, "r0", "kept"]);
    good(await ours.up());
    await ours.import(
      await multiplied(ours, TYPE, 100, (copy, i) => {
        const name = `r${i}`;
        copy.urn = copy.urn.replace(/::r0$/, `::${name}`);
        copy.id = `${vg}/${name}`;
        const uuid = i === 0 ? (copy.outputs?.uuid as string) : uuids.get(name);
        copy.inputs = { ...copy.inputs, name };
        copy.outputs = { ...copy.outputs, name, uuid, __pins: { ...(copy.outputs?.__pins as object), uuid } };
      }),
    );
    const seen = await counted(lvm, async () => good(await ours.refresh("--parallel", "200")));
    figure({ what: "refresh 100 snapshots: connections", value: String(seen.connections), goal: "1" });
    figure({ what: "refresh 100 snapshots: commands", value: String(seen.commands), goal: "3 at most" });
    await lvm.ssh(`lvremove -qq -y $(lvs --noheadings -o lv_full_name -S 'vg_name=${vg} && origin=thin')`);
  }, 1_800_000);

  // Last: it takes the host away.
  it("previews 200 snapshots with the host switched off", async () => {
    const ours = await project(program(1));
    good(await ours.up());
    await ours.import(
      await multiplied(ours, TYPE, 200, (copy, i) => {
        copy.urn = copy.urn.replace(/::s0$/, `::s${i}`);
        copy.id = `${vg}/s${i}`;
        copy.inputs = { ...copy.inputs, name: `s${i}`, __owner: String(copy.inputs?.__owner).replace(/s0$/, `s${i}`) };
        copy.outputs = { ...copy.outputs, name: `s${i}`, __owner: copy.inputs.__owner };
      }),
    );
    await ours.write(program(200));
    const none = await project(idle(200));
    good(await none.up());
    await lvm.crash();
    const times = { ours: Number.POSITIVE_INFINITY, none: Number.POSITIVE_INFINITY };
    for (let round = 0; round < 3; round++) {
      times.none = Math.min(times.none, await seconds(async () => good(await none.preview("--expect-no-changes"))));
      times.ours = Math.min(times.ours, await seconds(async () => good(await ours.preview("--expect-no-changes"))));
    }
    figure({
      what: "no-op preview of 200 snapshots, host off, to 200 of a provider that does nothing",
      value: ratio(times.ours, times.none),
      goal: "1.1",
      note: `${times.ours.toFixed(1)} s, ${times.none.toFixed(1)} s; 0 host contacts: it was off`,
    });
  }, 1_800_000);
});
