// The Proxmox side as people meet it: the acceptance programs in a first preview, with no host in sight, and the example from `up`
// to `destroy` on two stand-in nodes. What the nodes hold is asked of the nodes.
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { LocalWorkspace, PulumiCommand } from "@pulumi/pulumi/automation";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { VmIdRange } from "../../provider/index.js";
import { sshConfig, useHosts } from "../lab/lab.js";
import { type Project, useProjects } from "./project.js";

const root = join(__dirname, "../..");
/** Of each node: component, range, storage, job, template; and the stack. */
const ALL = 11;
const project = useProjects();

describe("a first preview, all hosts switched off", () => {
  it("refuses ranges that overlap, with both names and both ranges", async () => {
    const it = await project(`
      import { VmIdRange } from "pulumi-vmbackup";
      new VmIdRange("one", { host: "n4", lower: 14001, upper: 14999 });
      new VmIdRange("two", { host: "n5", lower: 14500, upper: 15500 });`);
    const run = await it.preview();
    expect(run.exitCode).not.toBe(0);
    expect(run.all).toMatch(/"two": its ids 14500 to 15500 overlap those of "one", 14001 to 14999/);
    expect(run.all).toMatch(/index\.ts:4/);
  });

  it("lets stacks of one process have equal ranges, in turn and at once", async () => {
    const { folder, env } = await project("");
    const PATH = process.env.PATH;
    process.env.PATH = env.PATH ?? PATH; // where the Automation API looks for the CLI
    const pulumiCommand = await PulumiCommand.get();
    process.env.PATH = PATH;
    const program = async () => {
      new VmIdRange("ids", { host: "n4", lower: 14001, upper: 14999 });
    };
    const preview = async (stackName: string) => {
      const stack = await LocalWorkspace.createOrSelectStack(
        { stackName, projectName: "test", program },
        { workDir: folder, envVars: env, pulumiCommand },
      );
      return (await stack.preview()).changeSummary;
    };
    expect(await preview("a")).toMatchObject({ create: 2 });
    expect(await Promise.all([preview("b"), preview("c")])).toMatchObject([{ create: 2 }, { create: 2 }]);
  });

  it("shows where things will be: path, dumpPath, the first id, a given id", async () => {
    const source = readFileSync(join(root, "test/programs/s0-fleet.ts"), "utf8");
    const shown = "templates[`${host} is known`] = [dumps.path, dumps.dumpPath, ids.nth(1)];";
    const it = await project(source.replace(/\}\s*$/, `${shown}\n}\n`));
    const run = await it.preview();
    expect(run, run.all).toMatchObject({ exitCode: 0, summary: { create: 36 } });
    expect(run.all).toMatch(/skyserver4\s*: 14001/);
    const known =
      /skyserver4 is known: \[\s*\[0\]: "\/mnt\/pve\/nfs-fast-dump"\s*\[1\]: "\/mnt\/pve\/nfs-fast-dump\/dump"\s*\[2\]: 14001/;
    expect(run.all).toMatch(known);
  });

  it("names the property of what check refuses", async () => {
    const it = await project(`
      import { BackupSchedule } from "pulumi-vmbackup";
      new BackupSchedule("h25", { host: "n4", schedule: "25:00", storage: "s" });`);
    const run = await it.preview();
    expect(run.exitCode).not.toBe(0);
    expect(run.all).toMatch(/schedule.*25/);
  });
});

describe("examples/standalone-nodes on two nodes", () => {
  const servers = mkdtempSync(join(tmpdir(), "nfs-"));
  const dumps = join(servers, "skydev/mnt/data/pve-dump/dump");
  mkdirSync(dumps, { recursive: true });
  writeFileSync(join(servers, "skydev/.exports"), "/mnt/data/pve-dump *\n");
  const node = { pve: true, bindRw: { [servers]: "/srv/nfs" } };
  const hosts = useHosts({ pve1: node, pve2: node });
  const { pve1, pve2 } = hosts;
  afterAll(() => rmSync(servers, { recursive: true, force: true }));

  const folder = join(root, "examples/standalone-nodes");
  let example: Project;
  /** The example's files, changed here and there. */
  const write = async (change: (source: string) => string = (source) => source) => {
    for (const file of ["index.ts", "backed-up-node.ts"])
      writeFileSync(join(example.folder, file), change(readFileSync(join(folder, file), "utf8")));
  };
  const on = async (host: typeof pve1, command: string) => (await host.ssh(command)).stdout;
  const json = async (host: typeof pve1, command: string) =>
    JSON.parse(await on(host, `${command} --output-format json`));
  const jobs = (host: typeof pve1) => json(host, "pvesh get /cluster/backup") as Promise<{ id: string }[]>;

  beforeAll(async () => {
    // A dump of a guest that is long gone, copied into the export by hand.
    await pve1.ssh(
      `set -e; qm create 107 --name ubuntu --memory 512 --onboot 1 --scsi0 local:1; vzdump 107 --dumpdir /var/tmp --compress zstd; qm destroy 107
       mv /var/tmp/vzdump-qemu-107-* /srv/nfs/skydev/mnt/data/pve-dump/dump/`,
    );
    example = await project("", {
      name: "standalone-nodes",
      config: {
        "vmbackup:connection": JSON.stringify({ configFile: sshConfig }),
        "standalone-nodes:nodes": JSON.stringify({ [pve1.name]: 14, [pve2.name]: 15 }),
      },
    });
    cpSync(join(folder, "backed-up-node.ts"), join(example.folder, "backed-up-node.ts"));
    await write();
  }, 300_000);

  it("shows the dumps' directory in the first preview", async () => {
    const run = await example.preview();
    expect(run).toMatchObject({ exitCode: 0, summary: { create: ALL } });
    expect(run.all).toContain('dumpPath : "/mnt/pve/nfs-fast-dump/dump"');
    expect(run.all).toMatch(/ubuntu: 14001/);
    // What a reviewer wants to see, and nothing of the machinery
    for (const said of [/schedule *: "02:30"/, /keepDaily *: 7/, /lower *: 14001/, /export *: "\/mnt\/data\/pve-dump"/])
      expect(run.all).toMatch(said);
    expect(run.all).not.toMatch(/__|exports\.handler|require\(/);
  });

  it("up: both nodes have storage, ids and job, and see the dump", async () => {
    const run = await example.up();
    expect(run, run.all).toMatchObject({ exitCode: 0, summary: { create: ALL } });
    const dump = readdirSync(dumps).find((name) => name.endsWith(".vma.zst"));
    for (const [host, block] of [
      [pve1, 14],
      [pve2, 15],
    ] as const) {
      expect(await on(host, "pvesm list nfs-fast-dump")).toContain(`nfs-fast-dump:backup/${dump}`);
      expect(await jobs(host)).toMatchObject([{ id: "nightly", schedule: "02:30", storage: "nfs-fast-dump", all: 1 }]);
      // The template of the dump, which does not wake up as a twin
      expect(await on(host, `cat /etc/pve/qemu-server/${block}001.conf`)).toMatch(/name: ubuntu.*template: 1/s);
      expect(await on(host, `cat /etc/pve/qemu-server/${block}001.conf`)).not.toMatch(/onboot: 1/);
      // Proxmox's own upper end is exclusive
      const { lower, upper } = (await json(host, "pvesh get /cluster/options"))["next-id"];
      expect([Number(lower), Number(upper)]).toEqual([block * 1000 + 1, (block + 1) * 1000]);
      expect(await on(host, "cat /etc/pve/storage.cfg")).toMatch(/nfs: nfs-fast-dump[^:]*export \/mnt\/data\/pve-dump/);
    }
  });

  it("is as declared, and says so", async () => {
    expect(await example.preview("--refresh", "--expect-no-changes")).toMatchObject({ exitCode: 0 });
    expect(await example.up()).toMatchObject({ exitCode: 0, summary: { same: ALL } });
  });

  it.each([
    ["retention", (s: string) => s.replace("retention: {", "retention: block === 14 ? { keepLast: 5 } : {")],
    [
      "enforce",
      (s: string) =>
        s.replace("upper: block * 1000 + 999", "upper: block * 1000 + 999, ...(block === 14 && { enforce: false })"),
    ],
  ])("a changed %s of one node is one update, and no replacement", async (_field, change) => {
    await write(change);
    const run = await example.preview();
    await write();
    expect(run, run.all).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    expect(run.summary.replace).toBeUndefined();
    expect(run.summary.same).toBe(ALL - 1);
  });

  it("finds what was changed by hand, and repairs it", async () => {
    await pve1.ssh("pvesh delete /cluster/backup/nightly");
    await pve2.ssh("pvesm set nfs-fast-dump --prune-backups keep-last=1");
    const drift = await example.preview("--refresh", "--expect-no-changes");
    expect(drift.exitCode).not.toBe(0);
    expect(drift.summary).toMatchObject({ create: 1, update: 1 });
    expect(drift.all).toMatch(/retention/);
    expect(await example.up("--refresh")).toMatchObject({ exitCode: 0, summary: { create: 1, update: 1 } });
    expect(await jobs(pve1)).toMatchObject([{ id: "nightly" }]);
    expect(await on(pve2, "cat /etc/pve/storage.cfg")).toMatch(/keep-daily=7/);
    expect(await example.preview("--refresh", "--expect-no-changes")).toMatchObject({ exitCode: 0 });
  });

  it("destroy: nothing is left on the nodes, and the dump stays", async () => {
    expect(await example.destroy()).toMatchObject({ exitCode: 0 });
    for (const host of [pve1, pve2]) {
      expect(await jobs(host)).toEqual([]);
      expect(await on(host, "ls /etc/pve/qemu-server /var/lib/vz/images")).not.toMatch(/[0-9]{3}/);
      expect(await json(host, "pvesh get /cluster/options")).not.toHaveProperty("next-id");
      expect(await on(host, "cat /etc/pve/storage.cfg")).not.toContain("nfs-fast-dump");
      expect(await on(host, "findmnt -n -o SOURCE --mountpoint /mnt/pve/nfs-fast-dump || true")).toBe("");
    }
    expect(readdirSync(dumps).filter((name) => name.endsWith(".vma.zst"))).toHaveLength(1);
  });
});
