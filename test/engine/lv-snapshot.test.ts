// LvSnapshot with the real engine and real LVM: its life, its loss, and what depends on it.
import { beforeAll, describe, expect, it } from "vitest";
import { useStore, useVolumeGroup } from "../lab/lab.js";
import { useProjects } from "./project.js";
import { changes, done, errors, ledger, literal, MiB, note, program, remove, snapshots } from "./snapshots.js";

const store = useStore();
const vg = useVolumeGroup(store, "engine", 640);
const project = useProjects();

beforeAll(async () => {
  await store.ssh(
    `lvcreate -qq -y -W n -L 64M -n root ${vg} && lvcreate -qq -y -W n -L 32M -n other ${vg} && lvcreate -qq -y -W n -L 32M -n third ${vg}`,
  );
}, 300_000);

/** `new LvSnapshot(resource, { … })` as a program has it; `extra` is written as it stands. */
const snapshot = (resource: string, args: Record<string, unknown>, extra = "", opts = "") =>
  `new LvSnapshot(${literal(resource)}, { host: ${literal(store.connection)}, volumeGroup: "${vg}", ...${literal(args)}, ${extra} }${opts && `, ${opts}`})`;

describe("an LvSnapshot", { timeout: 1_800_000 }, () => {
  it.each(["typescript", "esm"] as const)("lives, in a program in %s", async (language) => {
    const name = `life-${language}`;
    const source = (args: Record<string, unknown>) =>
      program(
        `const it = ${snapshot(name, { origin: "root", size: "8M", ...args })};
export const path = it.path, uuid = it.uuid, takenAt = it.takenAt, status = it.status;`,
        language,
      );
    const it = await project(source({}), { language });

    const first = await it.preview();
    expect(first).toMatchObject({ exitCode: 0, summary: { create: 2 } });
    expect(first.stdout).toMatch(new RegExp(`path\\s*: "/dev/${vg}/${name}"`));
    expect(await snapshots(store, vg)).toEqual({});

    expect(await it.up()).toMatchObject({ exitCode: 0, summary: { create: 2 } });
    const made = (await snapshots(store, vg))[name];
    expect(made).toMatchObject({ origin: "root", bytes: 8 * MiB });
    expect(made?.tags).toBe(`pulumi-vmbackup=organization/test/dev/LvSnapshot/${name}`);
    expect(await it.outputs()).toMatchObject({
      path: `/dev/${vg}/${name}`,
      uuid: made?.uuid,
      status: { valid: true, thin: false, sizeBytes: 8 * MiB },
    });
    const [recorded] = await it.resources();
    expect(recorded).toMatchObject({ id: `${vg}/${name}`, inputs: { size: 8 * MiB } });
    expect(JSON.stringify(recorded?.outputs).length).toBeLessThan(2048);

    // Nothing to do, also for a night's refresh, and in another spelling
    const before = await changes(store, vg);
    expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
    await it.write(source({ size: 8 * MiB }));
    expect(await it.up()).toMatchObject({ exitCode: 0, summary: { same: 2 } });
    expect(await changes(store, vg)).toBe(before);

    await it.write(source({ size: "12M" }));
    const larger = await it.up();
    expect(larger).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    expect((await snapshots(store, vg))[name]).toMatchObject({ uuid: made?.uuid, bytes: 12 * MiB });

    await it.write(source({ size: "12M", name: `${name}-2` }));
    const preview = await it.preview();
    expect(preview.summary).toMatchObject({ replace: 1 });
    expect(preview.stdout).toContain(`"/dev/${vg}/${name}-2"`);
    expect(await it.up()).toMatchObject({ exitCode: 0, summary: { replace: 1 } });
    expect(Object.keys(await snapshots(store, vg))).toEqual([`${name}-2`]);
    expect(await ledger(store, vg)).toEqual([`${vg}/${name}-2`]);

    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
    expect(await ledger(store, vg)).toEqual([]);
    expect(await it.resources()).toEqual([]);
  });

  it("takes its fields from other resources, also while they are unknown", async () => {
    const source = (text: string, size: string) =>
      program(`${note}
const n = new Note("n", ${literal(text)});
const a = ${snapshot("a", { origin: "root" }, `size: n.made.apply(() => ${literal(size)}), name: n.made.apply(() => "from-note")`)};
const b = ${snapshot("b", { origin: "other", size: "4M" }, `name: a.uuid.apply((uuid) => "by-" + uuid.slice(0, 6)), host: n.made.apply(() => (${literal(store.connection)}))`)};
export const path = b.path;`);
    const it = await project(source("one", "4M"), { language: "esm" });
    const first = await it.preview();
    expect(first).toMatchObject({ exitCode: 0, summary: { create: 4 } });
    expect(await it.up()).toMatchObject({ exitCode: 0, summary: { create: 4 } });
    const made = await snapshots(store, vg);
    const other = `by-${made["from-note"]?.uuid.slice(0, 6)}`;
    expect(made).toMatchObject({ "from-note": { bytes: 4 * MiB }, [other]: { origin: "other" } });
    expect(await it.outputs()).toEqual({ path: `/dev/${vg}/${other}` });

    // Unknown again in this preview, and no reason to replace; afterwards one was extended, the other left alone
    await it.write(source("two", "8M"));
    const second = await it.preview();
    expect(done(second)).toEqual({ n: "update", a: "update", b: "update" });
    const up = await it.up();
    expect(up.exitCode).toBe(0);
    expect(done(up)).toEqual({ n: "update", a: "update" });
    expect(await snapshots(store, vg)).toMatchObject({
      "from-note": { uuid: made["from-note"]?.uuid, bytes: 8 * MiB },
      [other]: { uuid: made[other]?.uuid },
    });
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
  });

  it("is replaced on demand, and what depends on it stays; drift is shown and repaired", async () => {
    const source = (trigger: number) =>
      program(`${note}
const a = ${snapshot("a", { origin: "root", size: "8M" }, "", `{ replacementTrigger: ${trigger} }`)};
const user = new Note("user", a.path);
const beside = ${snapshot("beside", { origin: "other", size: "4M" }, "name: pulumi.interpolate`${a.name}-beside`")};
const seen = new Note("seen", a.uuid);
export const uuid = a.uuid, made = pulumi.all([user.made, seen.made]), besides = beside.uuid;`);
    const it = await project(source(1), { language: "esm" });
    expect((await it.up()).exitCode).toBe(0);
    const first = await it.outputs();
    const urn = (await it.resources()).find(({ id }) => id === `${vg}/a`)?.urn ?? "";

    const forced = await it.up("--replace", urn);
    expect(forced.exitCode).toBe(0);
    expect(forced.summary).toMatchObject({ replace: 1 });
    expect(forced.summary.delete).toBeUndefined();
    const second = await it.outputs();
    expect(second.uuid).not.toBe(first.uuid);
    expect(second).toEqual({ ...first, uuid: second.uuid });
    expect(await snapshots(store, vg)).toMatchObject({ a: { uuid: second.uuid }, "a-beside": { uuid: first.besides } });

    await it.write(source(2));
    const triggered = await it.up();
    expect(triggered).toMatchObject({ exitCode: 0, summary: { replace: 1 } });
    const third = await it.outputs();
    expect(third.uuid).not.toBe(second.uuid);
    expect(third).toEqual({ ...first, uuid: third.uuid });
    expect(Object.keys(await snapshots(store, vg))).toEqual(["a", "a-beside"]);

    // Drift: made smaller by hand
    expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
    await store.ssh(["lvreduce", "-qq", "-y", "--size", "4M", `${vg}/a`]);
    const drifted = await it.preview("--refresh", "--expect-no-changes");
    expect(drifted.exitCode).not.toBe(0);
    expect(drifted.stdout).toMatch(/size\s*: 4194304/);
    expect((await it.refresh()).exitCode).toBe(0);
    expect(done(await it.up())).toEqual({ a: "update" });
    expect(await snapshots(store, vg)).toMatchObject({ a: { uuid: third.uuid, bytes: 8 * MiB } });

    // Renamed by hand: shown, and renamed back; a replacement would lose the point in time
    await store.ssh(["lvrename", "-qq", vg, "a", "byhand"]);
    const renamed = await it.preview("--refresh", "--expect-no-changes");
    expect(renamed.exitCode).not.toBe(0);
    expect(renamed.stdout).toMatch(/name\s*: "byhand" => "a"/);
    expect(done(renamed)).toEqual({ a: "update", seen: "update" }); // its uuid counts as unknown meanwhile
    expect((await it.refresh()).exitCode).toBe(0);
    const back = await it.up();
    expect(back).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    expect(done(back)).toEqual({ a: "update" });
    expect(await snapshots(store, vg)).toMatchObject({ a: { uuid: third.uuid }, "a-beside": { uuid: first.besides } });
    expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
  });

  it("that is lost fails alone, until a new one is wanted", async () => {
    const source = (size: string, more = "") =>
      program(`export const time = ${snapshot("gone", { origin: "root", size: "4M" })}.takenAt;
${snapshot("stays", { origin: "other", size })};
${more}`);
    const it = await project(source("4M"), { language: "esm" });
    expect((await it.up()).exitCode).toBe(0);
    const { time } = await it.outputs();
    await remove(store, vg, "gone");

    // Removed behind our back: kept in the state, said in words, and no hindrance to anything else
    expect((await it.refresh()).exitCode).toBe(0);
    const recorded = (await it.resources()).find(({ id }) => id === `${vg}/gone`);
    expect(recorded?.outputs).toMatchObject({ takenAt: time, status: { valid: false } });
    await it.write(source("8M", `${snapshot("fresh", { origin: "third", size: "4M" })};`));
    const preview = await it.preview();
    expect(preview.exitCode).toBe(0);
    expect(done(preview)).toEqual({ gone: "update", stays: "update", fresh: "create" });

    const failed = await it.up("--continue-on-error");
    expect(failed.exitCode).not.toBe(0);
    expect(errors(failed)).toContain(`the state of ${time} is lost`);
    expect(errors(failed)).toContain("--replace");
    expect(await snapshots(store, vg)).toMatchObject({ stays: { bytes: 8 * MiB }, fresh: { origin: "third" } });
    expect((await snapshots(store, vg)).gone).toBeUndefined();

    const again = await it.up();
    expect(again.exitCode).not.toBe(0);
    expect(errors(again)).toContain(`the state of ${time} is lost`);

    expect((await it.up("--replace", recorded?.urn ?? "")).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toMatchObject({ gone: { origin: "root" } });
    expect((await it.outputs()).time).not.toBe(time);
    expect(await it.preview("--refresh", "--expect-no-changes")).toMatchObject({ exitCode: 0 });

    // Destroyed also while it is lost
    await remove(store, vg, "gone");
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
    expect(await ledger(store, vg)).toEqual([]);
  });
});
