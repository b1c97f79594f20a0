// The component of examples/standalone-nodes with mocks alone: no CLI, no host.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as pulumi from "@pulumi/pulumi";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { parse } from "yaml";
import { BackedUpNode } from "../../examples/standalone-nodes/backed-up-node.ts";
import { provider } from "../../provider/dynamic.js";

const nfs = { server: "skydev", export: "/mnt/data/pve-dump" };
const value = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => void output.apply(resolve));

it("has a workflow: preview on a pull request, up on merge, a drift check every morning", () => {
  const folder = join(__dirname, "../../examples/standalone-nodes");
  const workflow = parse(readFileSync(join(folder, ".github/workflows/backup.yml"), "utf8"));
  expect(Object.keys(workflow.on)).toEqual(expect.arrayContaining(["pull_request", "push", "schedule"]));
  expect(workflow.on.push.branches).toEqual(["main"]);
  expect(workflow.concurrency["cancel-in-progress"]).toBe(false); // a restore is not cut off
  const steps: { if?: string; run?: string }[] = workflow.jobs.pulumi.steps;
  const runs = (event: string) => steps.filter((step) => step.if?.includes(`'${event}'`)).map(({ run = "" }) => run);
  expect(runs("pull_request")).toEqual([expect.stringMatching(/^pulumi preview /)]);
  expect(runs("push")).toEqual([expect.stringMatching(/^pulumi up .*--yes/)]);
  expect(runs("schedule")).toEqual([expect.stringMatching(/^pulumi preview .*--refresh --expect-no-changes/)]);
  // What it takes from the repository's secrets and configuration is told in the README.
  const readme = readFileSync(join(folder, "README.md"), "utf8");
  for (const name of JSON.stringify(workflow).matchAll(/secrets\.([A-Z_]+)/g)) expect(readme).toContain(name[1]);
  expect(readme).toContain("--secret vmbackup:connection");
});

describe("a backed-up node", () => {
  let made: Record<string, Record<string, unknown>>;

  beforeEach(async () => {
    made = {};
    await pulumi.runtime.setMocks(
      {
        async newResource({ name, type, inputs }) {
          const kind = type.split(":").at(-1) ?? "";
          made[`${kind} ${name}`] = inputs;
          if (type.startsWith("pulumi-nodejs:")) expect((await provider(kind).check({}, inputs)).failures).toEqual([]);
          return { id: `${name}-id`, state: inputs };
        },
        call: () => ({}),
      },
      "fleet",
      "prod",
    );
  });

  afterEach(() => pulumi.runtime.disconnect());

  it("is a range, a storage and a job, which belong together", async () => {
    const node = new BackedUpNode("n4", { host: "n4", block: 14, nfs });
    await value(pulumi.all([node.dumps.urn, node.nightly.urn]));
    expect(made["VmIdRange n4"]).toMatchObject({ host: "n4", lower: 14001, upper: 14999 });
    expect(made["NfsDumpStorage n4"]).toMatchObject({
      ...nfs,
      host: "n4",
      storageId: "nfs-fast-dump",
      vmIds: { lower: 14001, upper: 14999 },
    });
    expect(made["BackupSchedule n4"]).toMatchObject({
      host: "n4",
      name: "nightly",
      schedule: "02:30",
      storage: "nfs-fast-dump",
    });
    expect(await value(node.dumps.dumpPath)).toBe("/mnt/pve/nfs-fast-dump/dump");
    expect(await value(node.ids.nth(1))).toBe(14001);
    expect(made["NfsDumpStorage n4"]?.retention).toBeUndefined();
  });

  it("takes another schedule, a retention and a connection", async () => {
    const host = { host: "10.0.0.4", user: "deploy", sudo: true };
    const retention = { keepLast: 3, keepDaily: 7 };
    const node = new BackedUpNode("n4", { host, block: 14, nfs, schedule: "sat 03:00", retention });
    await value(pulumi.all([node.dumps.urn, node.nightly.urn]));
    expect(made["NfsDumpStorage n4"]).toMatchObject({ host, retention });
    expect(made["BackupSchedule n4"]).toMatchObject({ host, schedule: "sat 03:00" });
  });

  it("restores templates under the first ids of its block", async () => {
    const node = new BackedUpNode("n4", { host: "n4", block: 14, nfs, templates: { ubuntu: 107, debian: 102 } });
    await value(pulumi.all(Object.values(node.templates).map(({ urn }) => urn)));
    expect(made["RestoredTemplate n4-ubuntu"]).toMatchObject({
      from: { storage: "nfs-fast-dump", vmId: 107 },
      to: { storage: "local" },
      vmId: 14001,
    });
    expect(made["RestoredTemplate n4-debian"]).toMatchObject({ from: { vmId: 102 }, vmId: 14002 });
    expect(await value(pulumi.output(node.templates.debian?.vmId))).toBe(14002);
  });

  it("has ids of its own: a block that is given twice is refused, with both names", () => {
    new BackedUpNode("n4", { host: "n4", block: 14, nfs });
    expect(() => new BackedUpNode("n5", { host: "n5", block: 14, nfs })).toThrow(/"n5".*"n4"/s);
  });

  it("is refused twice on one host", () => {
    new BackedUpNode("n4", { host: "n4", block: 14, nfs });
    expect(() => new BackedUpNode("again", { host: "root@n4", block: 15, nfs })).toThrow(/"again" and "n4"/);
  });
});
