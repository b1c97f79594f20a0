// Ways to write a program: against the packed package, wrongly, with `adopt` and `.get`, and inside another program.
import { mkdir, rm, symlink } from "node:fs/promises";
import { join } from "node:path";
import { LocalWorkspace, type Stack } from "@pulumi/pulumi/automation/index.js";
import { execa } from "execa";
import { beforeAll, describe, expect, it } from "vitest";
import { LvSnapshot } from "../../provider/index.js";
import { useStore, useVolumeGroup } from "../lab/lab.js";
import { useProjects } from "./project.js";
import { done, errors, ledger, literal, program, snapshots } from "./snapshots.js";

const root = join(__dirname, "../..");
const project = useProjects();

describe("a program without any host", { timeout: 1_800_000 }, () => {
  it.each(["cjs", "esm"] as const)("runs in preview with the packed package, in %s", async (language) => {
    const args = { host: "no-such-host.invalid", volumeGroup: "vg0", origin: "web1" };
    const body = (size: string) => program(`new LvSnapshot("snap", ${literal({ ...args, size })});`, language);
    const it = await project(body("1G"), { language });
    // As npm installs it: the packed files, and beside them what they depend on
    const modules = join(it.folder, "node_modules");
    const { stdout } = await execa("npm", ["pack", "--silent", "--ignore-scripts", "--pack-destination", it.folder], {
      cwd: root,
    });
    await rm(join(modules, "pulumi-vmbackup"));
    await mkdir(join(modules, "pulumi-vmbackup"));
    await execa("tar", [
      "-xzf",
      join(it.folder, stdout.trim()),
      "--strip-components=1",
      "-C",
      join(modules, "pulumi-vmbackup"),
    ]);
    for (const dependency of ["execa", "zod"])
      await symlink(join(root, "node_modules", dependency), join(modules, dependency));
    const good = await it.preview();
    expect(good.exitCode).toBe(0);
    expect(done(good)).toMatchObject({ snap: "create" });
    await it.write(body("20 GB"));
    const bad = await it.preview();
    expect(bad.exitCode).not.toBe(0);
    expect(errors(bad)).toMatch(/size.*"20 GB" is no size/s);
  });

  it("fails on the user's own line: twice one object, nbdUri without nbd", async () => {
    const args = { host: "n4", volumeGroup: "vg", origin: "lv", size: "1G", name: "one" };
    const it = await project(
      program(`const failed = [];
const a = new LvSnapshot("a", ${literal(args)});
try { new LvSnapshot("b", ${literal({ ...args, host: "root@n4" })}); } catch (error) { failed.push(error.message); }
try { a.nbdUri; } catch (error) { failed.push(error.message); }
export const reasons = failed;
new LvSnapshot("c", ${literal(args)});`),
      { language: "esm" },
    );
    const run = await it.preview();
    expect(run.exitCode).not.toBe(0);
    expect(errors(run)).toContain('"c" and "a" are the same object: LvSnapshot vg/one on n4');
    await it.write(
      program(`const failed = [];
const a = new LvSnapshot("a", ${literal(args)});
try { new LvSnapshot("b", ${literal({ ...args, host: "root@n4" })}); } catch (error) { failed.push(error.message); }
try { a.nbdUri; } catch (error) { failed.push(error.message); }
export const reasons = failed;`),
    );
    const caught = await it.preview();
    expect(caught.exitCode).toBe(0);
    expect(caught.stdout).toContain('\\"b\\" and \\"a\\" are the same object');
    expect(caught.stdout).toContain("nbdUri needs the input `nbd`");
  });
});

describe("what is there already", { timeout: 1_800_000 }, () => {
  const store = useStore();
  const vg = useVolumeGroup(store, "there", 320);
  beforeAll(async () => {
    await store.ssh(
      `lvcreate -qq -y -W n -L 32M -n root ${vg} && lvcreate -qq -y -W n -L 32M -n other ${vg} && lvcreate -qq -y -s -L 8M -n byhand ${vg}/root`,
    );
  }, 300_000);
  const host = () => literal(store.connection);

  it("is looked at with .get and left alone, and taken over with adopt only", async () => {
    const byHand = (await snapshots(store, vg)).byhand;
    const look = (id: string) => `const seen = LvSnapshot.get("seen", "${vg}/${id}", { host: ${host()} });
export const uuid = seen.uuid, origin = seen.origin, path = seen.path, status = seen.status;`;
    const it = await project(program(look("byhand")), { language: "esm" });
    expect((await it.up()).exitCode).toBe(0);
    expect(await it.outputs()).toMatchObject({
      uuid: byHand?.uuid,
      origin: "root",
      path: `/dev/${vg}/byhand`,
      status: { valid: true, sizeBytes: 8 << 20 },
    });
    await it.write(program(look("nosuch")));
    const missing = await it.preview();
    expect(missing.exitCode).not.toBe(0);
    expect(errors(missing)).toMatch(new RegExp(`LvSnapshot ${vg}/nosuch does not exist on store`));
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({ byhand: byHand });
    expect(await ledger(store, vg)).toEqual([]);

    const take = (more: object) =>
      program(
        `export const uuid = new LvSnapshot("byhand", { host: ${host()}, volumeGroup: "${vg}", origin: "root", size: "8M", ...${literal(more)} }).uuid;`,
      );
    await it.write(take({}));
    const refused = await it.up();
    expect(refused.exitCode).not.toBe(0);
    expect(errors(refused)).toMatch(/exists already and is not this resource's: it was made by hand.*adopt: true/s);
    expect(await snapshots(store, vg)).toEqual({ byhand: byHand });

    await it.write(take({ adopt: true }));
    expect(done(await it.up())).toEqual({ byhand: "create" });
    expect(await it.outputs()).toEqual({ uuid: byHand?.uuid });
    await it.write(take({}));
    expect((await it.preview("--refresh", "--expect-no-changes")).exitCode).toBe(0);
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
  });

  it("and what is not, in a program inside another: two runs of one process never meet", async () => {
    const it = await project(program(""), { language: "esm" });
    const inline = (stackName: string): Promise<Stack> =>
      LocalWorkspace.createOrSelectStack(
        {
          stackName,
          projectName: "test",
          program: async () => {
            const made = new LvSnapshot("inline", {
              host: store.connection,
              volumeGroup: vg,
              origin: "other",
              size: "4M",
            });
            return { path: made.path, uuid: made.uuid };
          },
        },
        { workDir: it.folder, envVars: it.env },
      );
    process.env.PATH = it.env.PATH;
    const [first, second] = [await inline("first"), await inline("second")];
    const ups = await Promise.allSettled([first.up(), second.up()]);
    const winner = ups.findIndex(({ status }) => status === "fulfilled");
    const [won, lost] = winner === 0 ? [first, ups[1]] : [second, ups[0]];
    expect(lost).toMatchObject({ status: "rejected" });
    const reason = lost?.status === "rejected" ? String(lost.reason) : "";
    expect(reason).toContain(`LvSnapshot ${vg}/inline`);
    expect(reason).not.toContain("are the same object");
    const made = (await snapshots(store, vg)).inline;
    const again = await won.up();
    expect(again.summary.resourceChanges).toEqual({ same: 2 });
    expect(again.outputs).toMatchObject({ path: { value: `/dev/${vg}/inline` }, uuid: { value: made?.uuid } });
    for (const stack of [first, second]) await stack.destroy();
    expect(await snapshots(store, vg)).toEqual({});
  });
});
