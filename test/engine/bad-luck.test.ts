// A create that is cut short, in every place where a real run can be: ssh, the provider's process, pulumi and the host are killed
// in the middle of lvcreate. Afterwards one more `pulumi up` leaves one snapshot, recorded.
import { afterEach, beforeAll, describe, expect, it } from "vitest";
import { useHosts } from "../lab/lab.js";
import { type Project, useProjects } from "./project.js";
import { errors, kill, ledger, literal, processes, program, servers, snapshots, sshs, until } from "./snapshots.js";

// A host of its own: its lvcreate and lvremove wait where a test wants them to.
const { luck: host } = useHosts({ luck: { uml: true } });
const make = useProjects();
const vg = "luck";

// In front of the real one, by PATH. /run/gate/NAME says where to wait: "before" the work or "after" it.
const GATE = `#!/bin/sh
for word; do case $last in -n|--name) name=$word;; esac; last=$word; done
: "\${name:=\${last#*/}}"
at() {
  [ "$(cat "/run/gate/$name" 2>/dev/null)" = "$1" ] || return 0
  mkdir -p /run/reached; : >"/run/reached/$name"
  while [ -e "/run/gate/$name" ]; do sleep 0.1; done
}
at before
/usr/sbin/\${0##*/} "$@"; e=$?
at after
exit $e
`;

beforeAll(async () => {
  await host.ssh(
    "cd /usr/local/sbin && cat >lvcreate && chmod 755 lvcreate && cp -p lvcreate lvremove && sync lvcreate lvremove .",
    { input: GATE },
  );
  await host.ssh(
    `vgcreate -qq -y ${vg} /dev/ubdb && lvcreate -qq -y -W n -L 64M -n root ${vg} && lvcreate -qq -y -W n -L 64M -n other ${vg}`,
  );
}, 300_000);

const close = (name: string, at: "before" | "after") => host.ssh(`mkdir -p /run/gate && echo ${at} >/run/gate/${name}`);
const open = (name: string) => host.ssh(`rm -f /run/gate/${name}`);
const reached = (name: string) =>
  until(`the command for ${name} runs`, async () => {
    const { exitCode } = await host.ssh(`rm /run/reached/${name} 2>/dev/null`, { reject: false });
    return exitCode === 0;
  });
const line = async (name: string) =>
  (await host.ssh(`cat /var/lib/pulumi-vmbackup/LvSnapshot/${vg}%2F${name}.json`)).stdout;
/** A run waits for the lock that the command of an earlier one still holds. */
const waiting = (name: string) =>
  until(`a second run waits for ${name}`, async () => {
    const { stdout } = await host.ssh("pgrep -x flock | wc -l");
    return Number(stdout) > 0;
  });

const projects: Project[] = [];
async function project(...names: string[]): Promise<Project> {
  const resources = names.map(
    (name, i) =>
      `const r${i} = new LvSnapshot("${name}", { host: ${literal(host.connection)}, volumeGroup: "${vg}", origin: "${i === 0 ? "root" : "other"}", size: "8M" }, { dependsOn: [${i === 0 ? "" : `r${i - 1}`}] });`,
  );
  const it = await make(program(resources.join("\n")), { language: "esm" });
  projects.push(it);
  return it;
}

/** One snapshot of each name, recorded as it is, and nothing left to do. */
async function settled(it: Project, ...names: string[]): Promise<void> {
  const there = await snapshots(host, vg);
  expect(Object.keys(there).sort()).toEqual(names);
  const recorded = await it.resources();
  expect(recorded.map(({ id, outputs }) => [id, outputs?.uuid])).toEqual(
    names.map((name) => [`${vg}/${name}`, there[name]?.uuid]),
  );
  expect(recorded.flatMap(({ initErrors = [] }) => initErrors)).toEqual([]);
  expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
}

afterEach(async () => {
  await host.ssh("rm -rf /run/gate /run/reached");
  for (const it of projects.splice(0)) kill(...(await processes(it)));
  // By hand: what a failed test left is not the next one's trouble
  for (const name of Object.keys(await snapshots(host, vg))) await host.ssh(["lvremove", "-qq", "-y", `${vg}/${name}`]);
  await host.ssh("rm -rf /var/lib/pulumi-vmbackup/LvSnapshot");
}, 300_000);

describe("a create that is cut short", { timeout: 1_800_000 }, () => {
  it("by kill -9 of ssh: half made, and finished by the next up, also while the command still runs there", async () => {
    const it = await project("cut");
    await close("cut", "before");
    const first = it.up();
    await reached("cut");
    kill(...(await sshs(it)));
    const failed = await first;
    expect(failed.exitCode).not.toBe(0);
    expect(errors(failed)).toMatch(/the connection to .* was lost while the command ran/);
    expect(await it.resources()).toMatchObject([
      { id: `${vg}/cut`, initErrors: [expect.stringContaining("was lost")] },
    ]);

    const second = it.up();
    await waiting("cut");
    await open("cut");
    expect(await second).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    await settled(it, "cut");
  });

  it("by kill -9 of ssh, and destroyed while the command still runs there: nothing is left", async () => {
    const it = await project("undone");
    await close("undone", "before");
    const first = it.up();
    await reached("undone");
    kill(...(await sshs(it)));
    expect((await first).exitCode).not.toBe(0);

    const second = it.destroy();
    await waiting("undone");
    await open("undone");
    expect((await second).exitCode).toBe(0);
    expect(await it.resources()).toEqual([]);
    expect(await snapshots(host, vg)).toEqual({});
    expect(await ledger(host, vg)).toEqual([]);
  });

  it("by customTimeouts: before the work nothing is begun, in its middle it is half made and finished by the next up", async () => {
    const it = await project("timed");
    const within = (create: string) =>
      it.write(
        program(
          `new LvSnapshot("timed", { host: ${literal(host.connection)}, volumeGroup: "${vg}", origin: "root", size: "8M" }, { customTimeouts: { create: "${create}" } });`,
        ),
      );
    await within("1s");
    const over = await it.up();
    expect(over.exitCode).not.toBe(0);
    expect(errors(over)).toMatch(/the time given by customTimeouts is over before "take the snapshot/);
    expect(await it.resources()).toEqual([]);
    expect(await ledger(host, vg)).toEqual([]);

    await close("timed", "before");
    await within("20s");
    const late = await it.up();
    expect(late.exitCode).not.toBe(0);
    expect(errors(late)).toMatch(/did not answer within \d+ s.*it looks first/s);
    expect(await it.resources()).toMatchObject([{ id: `${vg}/timed`, initErrors: [expect.any(String)] }]);
    await within("10m");
    const second = it.up();
    await waiting("timed");
    await open("timed");
    expect(await second).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    await settled(it, "timed");
  });

  it("a destroy by kill -9 of ssh: the next one waits for its command and has nothing left to do", async () => {
    const it = await project("leaving");
    expect((await it.up()).exitCode).toBe(0);
    await close("leaving", "before");
    const first = it.destroy();
    await reached("leaving");
    kill(...(await sshs(it)));
    const failed = await first;
    expect(failed.exitCode).not.toBe(0);
    expect(errors(failed)).toMatch(/the connection to .* was lost while the command ran/);
    expect(Object.keys(await snapshots(host, vg))).toEqual(["leaving"]);

    const second = it.destroy();
    await waiting("leaving");
    await open("leaving");
    expect((await second).exitCode).toBe(0);
    expect(await it.resources()).toEqual([]);
    expect(await snapshots(host, vg)).toEqual({});
    expect(await ledger(host, vg)).toEqual([]);
  });

  it.each(["before", "after"] as const)(
    "by kill -9 of pulumi, while its provider goes on (%s the work): one snapshot, recorded",
    async (at) => {
      const it = await project("orphan");
      await close("orphan", at);
      const first = it.start(["up", "--yes", "--skip-preview"]);
      await reached("orphan");
      first.kill("SIGKILL");
      await first;
      const orphans = await servers(it);
      expect(orphans).toHaveLength(1);
      await it.pulumi(["cancel", "--yes", it.stack]);
      expect(await it.resources()).toEqual([]);

      const second = it.up();
      await waiting("orphan");
      await open("orphan");
      expect(await second).toMatchObject({ exitCode: 0, summary: { create: 1 } });
      await settled(it, "orphan");
      await until("the orphan ends", async () => !(await servers(it)).some(({ pid }) => pid === orphans[0]?.pid));
      expect((await it.destroy()).exitCode).toBe(0);
      expect(await snapshots(host, vg)).toEqual({});
    },
  );

  it("by kill -9 of the provider's process", async () => {
    const it = await project("served");
    await close("served", "before");
    const first = it.up();
    await reached("served");
    kill(...(await servers(it)));
    expect((await first).exitCode).not.toBe(0);

    const second = it.up();
    await waiting("served");
    await open("served");
    expect((await second).exitCode).toBe(0);
    await settled(it, "served");
  });

  it.each(["before", "after"] as const)(
    "by the host's crash, %s the work: finished by the next up, from what the ledger kept through the power cut",
    async (at) => {
      const it = await project("power");
      await close("power", at);
      const first = it.up();
      await reached("power");
      await host.crash();
      const failed = await first;
      expect(failed.exitCode).not.toBe(0);
      // Switched off, it is not taken for gone
      if (at === "after") expect((await it.refresh()).exitCode).not.toBe(0);
      expect(await it.resources()).toMatchObject([{ id: `${vg}/power`, initErrors: [expect.any(String)] }]);
      await host.up();
      // Written before the work, and whole
      expect(JSON.parse(await line("power"))).toMatchObject({
        identity: `${vg}/power`,
        owner: "organization/test/dev/LvSnapshot/power",
        finished: false,
      });
      const made = await snapshots(host, vg);
      expect(Object.keys(made)).toEqual(at === "before" ? [] : ["power"]);

      expect(await it.up()).toMatchObject({ exitCode: 0, summary: { update: 1 } });
      if (at === "after") expect((await snapshots(host, vg)).power?.uuid).toBe(made.power?.uuid);
      await settled(it, "power");

      // And the last line of a run that ended well
      await host.crash();
      await host.up();
      expect(JSON.parse(await line("power"))).toMatchObject({ finished: true });
      await settled(it, "power");
      expect((await it.destroy()).exitCode).toBe(0);
      expect(await snapshots(host, vg)).toEqual({});
      expect(await ledger(host, vg)).toEqual([]);
    },
  );

  it("by ^C: what runs is ended and recorded, what had not begun is left to the next up", async () => {
    const it = await project("begun", "waits");
    await close("begun", "before");
    const first = it.start(["up", "--yes", "--skip-preview"]);
    await reached("begun");
    first.kill("SIGINT");
    await open("begun");
    expect((await first).exitCode).not.toBe(0);
    expect((await it.resources()).map(({ id }) => id)).toEqual([`${vg}/begun`]);
    expect(Object.keys(await snapshots(host, vg))).toEqual(["begun"]);

    expect(await it.up()).toMatchObject({ exitCode: 0, summary: { create: 1, same: 2 } });
    await settled(it, "begun", "waits");
  });
});

describe("two at one snapshot", { timeout: 1_800_000 }, () => {
  it("two stacks: one has it, the other is told whose it is, also at the same time; and destroys nothing", async () => {
    const it = await project("shared");
    const other = await it.other("prod");
    projects.push(other);
    await close("shared", "before");
    const first = it.up();
    await reached("shared");
    const late = await other.up();
    await open("shared");
    expect(await first).toMatchObject({ exitCode: 0, summary: { create: 2 } });
    expect(late.exitCode).not.toBe(0);
    expect(errors(late)).toContain("organization/test/dev/LvSnapshot/shared");

    const later = await other.up();
    expect(later.exitCode).not.toBe(0);
    expect(errors(later)).toMatch(/exists already and is not this resource's.*adopt/s);
    expect((await other.destroy()).exitCode).toBe(0);
    await settled(it, "shared");

    // Taken over: the first stack's destroy leaves what is the other's now
    await it.write(
      program(
        `new LvSnapshot("shared", { host: ${literal(host.connection)}, volumeGroup: "${vg}", origin: "root", size: "8M", adopt: true });`,
      ),
    );
    expect((await other.up()).exitCode).toBe(0);
    expect((await snapshots(host, vg)).shared?.tags).toContain("/prod/");
    const left = await it.destroy();
    expect(left.exitCode).toBe(0);
    expect(left.all).toContain("is left where it is");
    expect(Object.keys(await snapshots(host, vg))).toEqual(["shared"]);
    expect((await other.destroy()).exitCode).toBe(0);
    expect(await snapshots(host, vg)).toEqual({});
    expect(await ledger(host, vg)).toEqual([]);
  });
});
