import * as pulumi from "@pulumi/pulumi";
import { beforeEach, describe, expect, it } from "vitest";
import { backupSchedule } from "../../provider/backup-schedule.js";
import { check, diff } from "../../provider/engine-check.js";
import type { Line } from "../../provider/host-ledger.js";
import { BackupSchedule, type BackupScheduleArgs } from "../../provider/index.js";

const UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
const owner = "organization/p/s/BackupSchedule/nightly";
const good = { host: "n4", name: "nightly", schedule: "02:30", storage: "nfs", __owner: owner, __provider: "x" };
const refused = (over: object) => check(backupSchedule, { ...good, ...over }).failures;

describe("check", () => {
  it("returns what was declared, in normal form, without defaults", () => {
    expect(check(backupSchedule, good)).toEqual({ inputs: { ...good, host: { host: "n4" } }, failures: [] });
    const over = { schedule: " Mon,tue 2:30", guests: [107, 101], retention: { keepLast: 3, keepDaily: 0 } };
    expect(check(backupSchedule, { ...good, ...over }).inputs).toMatchObject({
      schedule: "mon,tue 02:30",
      guests: [101, 107],
      retention: { keepLast: 3 },
    });
    expect(check(backupSchedule, { ...good, guests: { allExcept: [] } }).inputs.guests).toBe("all");
  });

  it.each<[string, object, string, RegExp?]>([
    ["a bare number", { schedule: "22" }, "schedule", /"22:00"/],
    ["hour 25", { schedule: "25:00" }, "schedule", /no hour/],
    ["a list of times", { schedule: "8:00,12:00" }, "schedule", /"8,12:00"/],
    ["cron", { schedule: "30 2 * * *" }, "schedule", /cron/],
    ["a date that never comes", { schedule: "*-02-30" }, "schedule", /never comes/],
    ["no schedule", { schedule: undefined }, "schedule", /required/],
    ["a name of 51 characters", { name: "x".repeat(51) }, "name", /at most 50/],
    ["a blank in the name", { name: "my job" }, "name"],
    ["a name that starts with a digit", { name: "1job" }, "name"],
    ["a guest twice", { guests: [101, 107, 101] }, "guests[2]", /101 stands here twice/],
    ["an exception twice", { guests: { allExcept: [101, 101] } }, "guests.allExcept[1]"],
    ["no guests at all", { guests: [] }, "guests", /empty/],
    ["a guest by name", { guests: ["web1"] }, "guests[0]", /guest id/],
    ["a guest id that is none", { guests: [99] }, "guests[0]"],
    ["text for guests", { guests: "some" }, "guests", /"all"/],
    ["two selections", { guests: { pool: "p", allExcept: [101] } }, "guests", /or \{ pool \}/],
    [
      "protected with retention",
      { vzdump: { protected: true }, retention: { keepLast: 3 } },
      "retention",
      /never pruned|ever pruned/,
    ],
    ["a retention of nothing", { retention: { keepLast: 0 } }, "retention"],
    ["keepAll with a number", { retention: { keepAll: true, keepLast: 3 } }, "retention.keepAll"],
    ["no storage", { storage: undefined }, "storage", /required/],
    ["a directory: not yet", { storage: undefined, directory: "/backup" }, "directory", /not there yet/],
    ["libvirt options: not yet", { libvirt: { quiesce: "try" } }, "libvirt", /not there yet/],
    ["a mode that is none", { vzdump: { mode: "hot" } }, "vzdump.mode", /"snapshot"/],
    ["an option that is none", { vzdump: { maxfiles: 3 } }, "vzdump.maxfiles", /no such property/],
    ["fewer threads than none", { vzdump: { zstd: -1 } }, "vzdump.zstd"],
    ["an ionice above 8", { vzdump: { ionice: 9 } }, "vzdump.ionice"],
    ["an unknown variable", { vzdump: { notesTemplate: "{{bogus}} x" } }, "vzdump.notesTemplate", /\{\{guestname\}\}/],
    ["an unknown escape", { vzdump: { notesTemplate: "a\\t" } }, "vzdump.notesTemplate"],
    ["notes of two lines", { vzdump: { notesTemplate: "a\nb" } }, "vzdump.notesTemplate", /one line/],
    ["fleecing without storage", { vzdump: { fleecing: { enabled: true } } }, "vzdump.fleecing.storage", /required/],
    ["too many workers", { vzdump: { performance: { maxWorkers: 257 } } }, "vzdump.performance.maxWorkers"],
    ["a relative script", { vzdump: { script: "hook.pl" } }, "vzdump.script", /absolute/],
    [
      "mail that would be ignored",
      { vzdump: { mailTo: ["a@b"], notificationMode: "notification-system" } },
      "vzdump.mailTo",
    ],
    ["a comment of two lines", { comment: "a\nb" }, "comment", /one line/],
    ["a comment that is too long", { comment: "x".repeat(301) }, "comment"],
    ["another property", { retain: 3 }, "retain"],
  ])("refuses %s, naming the property", (_name, over, property, reason = /./) => {
    const failures = refused(over);
    expect(failures.map((f) => f.property)).toContain(property);
    expect(failures.find((f) => f.property === property)?.reason).toMatch(reason);
  });

  it("takes every option", () => {
    const vzdump = {
      mode: "stop",
      compress: "zstd",
      zstd: 0,
      bwlimit: 0,
      ionice: 8,
      lockwait: 60,
      stopwait: 5,
      notesTemplate: "{{guestname}} {{vmid}} on {{node}} of {{cluster}}\\n\\\\",
      protected: true,
      fleecing: { enabled: true, storage: "local" },
      performance: { maxWorkers: 4, pbsEntriesMax: 1 },
      stdexcludes: false,
      excludePath: ["/tmp/?*", "-x"],
      script: "/usr/local/bin/hook.pl",
      node: "pve1",
      notificationMode: "legacy-sendmail",
      mailTo: ["b@c", "a@b", "a@b"],
      pbsChangeDetectionMode: "metadata",
    };
    const checked = check(backupSchedule, { ...good, vzdump, retention: { keepAll: true } });
    expect(checked.failures).toEqual([]);
    expect(checked.inputs.vzdump).toEqual({ ...vzdump, mailTo: ["a@b", "b@c"] });
    // A second pass through the schema changes nothing: the record is read with it again.
    expect(check(backupSchedule, checked.inputs)).toEqual(checked);
  });

  it("lets unknowns pass; only another name replaces", () => {
    for (const field of ["host", "name", "schedule", "storage", "guests", "retention", "vzdump", "enabled", "comment"])
      expect(refused({ [field]: UNKNOWN })).toEqual([]);
    expect(refused({ guests: [101, UNKNOWN] })).toEqual([]);
    const olds = { ...good, __v: 1 };
    expect(diff(backupSchedule, olds, { ...good, storage: UNKNOWN }).replaces).toEqual([]);
    expect(diff(backupSchedule, olds, { ...good, storage: "other" }).replaces).toEqual([]);
    expect(diff(backupSchedule, olds, { ...good, name: "weekly" }).replaces).toEqual(["name"]);
    expect(diff(backupSchedule, olds, { ...good, schedule: "2:30" }).changes).toBe(false);
  });
});

// ---------------------------------------------------------------- plans

type Have = Awaited<ReturnType<typeof backupSchedule.observe>>;
type Want = Parameters<typeof backupSchedule.plan>[0];
type Job = NonNullable<Have["job"]>;

const want = (over: object = {}) =>
  check(backupSchedule, { host: "n4", name: "nightly", schedule: "02:30", storage: "nfs", ...over }).inputs as Want;
const mark = `[pulumi-vmbackup ${owner}]`;
const job = (over: object = {}): Job =>
  ({
    id: "nightly",
    type: "vzdump",
    enabled: true,
    schedule: "02:30",
    storage: "nfs",
    all: true,
    comment: mark,
    ...over,
  }) as Job;
const storage = (id: string, over: object = {}) => ({
  storage: id,
  type: "nfs",
  digest: "",
  content: ["backup"],
  ...over,
});
const node = {
  name: "pve1",
  nodes: ["pve1", "pve2"],
  storages: [
    storage("nfs"),
    storage("isos", { content: ["iso"] }),
    storage("off", { disable: true }),
    storage("elsewhere", { nodes: ["pve2"] }),
    storage("local", { content: ["images"] }),
  ],
  guests: [101, 107].map((vmid) => ({ vmid, node: "pve1", type: "qemu" as const })),
  pools: ["p1"],
  pruned: [] as string[],
};
function have(found: Job | undefined): Have {
  const [, said, name] = /^(.*?) ?\[pulumi-vmbackup (.*)\]$/.exec(found?.comment ?? "") ?? [];
  return {
    exists: found !== undefined,
    job: found,
    comment: said || (name ? undefined : found?.comment),
    owner: name,
    node,
  };
}
const line = (kept: string[] = []): Line<never> => ({
  v: 1,
  kind: "BackupSchedule",
  identity: "nightly",
  owner,
  incarnation: "i",
  finished: false,
  kept,
});
const tools = (steps: { argv: readonly string[] }[]) =>
  steps.map(({ argv }) => argv.slice(argv.indexOf("pvesh")).join(" "));
const plan = (wanted: Want, found: Job | undefined, kept: string[] = []) =>
  tools(backupSchedule.plan(wanted, have(found), line(kept)));

describe("plan", () => {
  it("creates with the whole selection and the owner's mark", () => {
    expect(plan(want(), undefined)).toEqual([
      `pvesh create /cluster/backup --id nightly --schedule 02:30 --storage nfs --enabled 1 --all 1 --comment=${mark}`,
    ]);
    const over = {
      schedule: "sat 3:00",
      guests: [107, 101],
      catchUp: true,
      enabled: false,
      comment: "-x nightly",
      retention: { keepDaily: 7, keepLast: 3 },
      vzdump: {
        compress: "zstd",
        zstd: 2,
        protected: false,
        notesTemplate: "{{guestname}}",
        fleecing: { enabled: true, storage: "local" },
        performance: { maxWorkers: 4 },
        excludePath: ["/a", "-b"],
        mailTo: ["b", "a"],
        node: "pve2",
      },
    };
    expect(plan(want(over), undefined)).toEqual([
      "pvesh create /cluster/backup --id nightly --schedule sat 03:00 --storage nfs --enabled 0 --repeat-missed 1 --vmid 101,107 " +
        "--prune-backups keep-last=3,keep-daily=7 --compress zstd --zstd 2 --notes-template={{guestname}} --protected 0 " +
        "--fleecing enabled=1,storage=local --performance max-workers=4 --exclude-path=/a --exclude-path=-b --node pve2 --mailto a,b " +
        `--comment=-x nightly ${mark}`,
    ]);
  });

  it.each<[string, object, object, string]>([
    ["schedule", { schedule: "03:00" }, {}, "--schedule 03:00 --all 1"],
    ["storage", { storage: "nfs" }, { storage: "other" }, "--storage nfs --all 1"],
    ["switched off by hand", {}, { enabled: false }, "--enabled 1 --all 1"],
    ["all instead of ids", {}, { all: undefined, vmid: "101" }, "--all 1"],
    ["all instead of all but one", {}, { exclude: "101" }, "--all 1 --delete exclude"],
    ["all but one", { guests: { allExcept: [101] } }, {}, "--all 1 --exclude 101"],
    ["ids", { guests: [107, 101] }, {}, "--vmid 101,107"],
    ["an id twice on the node", { guests: [101] }, { all: undefined, vmid: "101,101" }, "--vmid 101"],
    ["pool", { guests: { pool: "p1" } }, {}, "--pool p1"],
    ["all and pool, as Proxmox stores it", { guests: { pool: "p1" } }, { pool: "p1" }, "--pool p1"],
    [
      "retention",
      { retention: { keepLast: 3 } },
      { "prune-backups": { "keep-last": "2" } },
      "--prune-backups keep-last=3 --all 1",
    ],
    ["no retention any more", {}, { "prune-backups": { "keep-all": "1" } }, "--all 1 --delete prune-backups"],
    ["an option", { vzdump: { mode: "stop" } }, { mode: "snapshot" }, "--mode stop --all 1"],
    ["no option any more", {}, { mode: "snapshot", zstd: 2 }, "--all 1 --delete mode,zstd"],
    ["a dump directory, which would win", {}, { dumpdir: "/srv" }, "--all 1 --delete dumpdir"],
    ["comment", { comment: "hello" }, {}, `--comment=hello ${mark} --all 1`],
    ["another owner's mark", {}, { comment: "[pulumi-vmbackup x/y]" }, `--comment=${mark} --all 1`],
  ])("updates: %s", (_name, over, found, words) => {
    const [step] = plan(want(over), job(found));
    const said = words.includes("--storage") ? words : `--storage nfs ${words}`; // with every change
    expect(step?.split(" ").sort()).toEqual(`pvesh set /cluster/backup/nightly ${said}`.split(" ").sort());
  });

  it.each<[string, object, object]>([
    ["as declared", {}, {}],
    ["another wording of the schedule", {}, { schedule: "2:30" }],
    ["daily", { schedule: "daily" }, { schedule: "00:00" }],
    ["ids in another order and with other separators", { guests: [101, 107] }, { all: undefined, vmid: "107 101" }],
    ["exclude alone", { guests: { allExcept: [101] } }, { all: undefined, exclude: "101" }],
    [
      "numbers as text, property strings as objects",
      {
        retention: { keepLast: 3 },
        vzdump: {
          zstd: 2,
          fleecing: { enabled: true, storage: "local" },
          performance: { maxWorkers: 4 },
          mailTo: ["a", "b"],
        },
      },
      {
        "prune-backups": { "keep-last": "3" },
        zstd: "2",
        fleecing: { enabled: 1, storage: "local" },
        performance: { "max-workers": "4" },
        mailto: "b,a",
      },
    ],
    [
      "property strings as text",
      { vzdump: { fleecing: { enabled: true, storage: "local" } } },
      { fleecing: "1,storage=local" },
    ],
    ["default options that are not ours", {}, { mailnotification: "always", quiet: 0 }],
  ])("settled: %s", (_name, over, found) => {
    expect(plan(want(over), job(found))).toEqual([]);
  });

  it("keeps what adoption left undeclared, and still marks the job", () => {
    const found = {
      enabled: false,
      mode: "stop",
      "prune-backups": { "keep-last": "2" },
      vmid: "101",
      all: undefined,
      comment: "by hand",
    };
    const kept = ["enabled", "vzdump", "retention", "guests", "comment", "catchUp"];
    expect(plan(want(), job(found), kept)).toEqual([
      `pvesh set /cluster/backup/nightly --storage nfs --comment=by hand ${mark} --vmid 101`,
    ]);
  });

  it("keeps the options of vzdump that adoption found and that are not declared", () => {
    const found = { mode: "snapshot", zstd: 2, "exclude-path": ["/tmp"], comment: mark };
    const kept = backupSchedule.keeps?.(want(), have(job(found))) ?? [];
    expect(kept).toEqual(["vzdump.mode", "vzdump.zstd", "vzdump.excludePath"]);
    const [step = ""] = plan(want({ vzdump: { mode: "stop" } }), job(found), kept);
    expect(step).toContain("--mode stop");
    expect(step).not.toMatch(/delete|zstd|exclude/);
    expect(plan(want(), job(found), ["vzdump", ...kept])).toEqual([]);
  });

  it.each<[string, object, RegExp]>([
    ["a storage that does not exist", { storage: "nosuch" }, /^storage: there is no storage nosuch/],
    ["a storage that takes no backups", { storage: "isos" }, /storage: the storage isos takes no backups.*nfs/s],
    ["a storage that is disabled", { storage: "off" }, /disabled/],
    ["a storage of another node", { storage: "elsewhere" }, /not for the node pve1/],
    ["a guest that does not exist", { guests: [101, 999] }, /guests: there is no guest 999 on pve1.*101, 107/s],
    ["a pool that does not exist", { guests: { pool: "nosuch" } }, /guests.pool: there is no pool nosuch.*p1/s],
    ["a node that does not exist", { vzdump: { node: "nosuch" } }, /vzdump.node: there is no node nosuch.*pve1/s],
    [
      "fleecing on a storage without images",
      { vzdump: { fleecing: { enabled: true, storage: "nfs" } } },
      /vzdump.fleecing.storage.*local/s,
    ],
  ])("refuses %s, with what there is", (_name, over, message) => {
    expect(() => plan(want(over), undefined)).toThrow(message);
  });

  it("refuses dates that have passed, when the schedule would be written", () => {
    const past = { schedule: "2020-01-01 10:00" };
    expect(() => plan(want(past), undefined)).toThrow(/schedule: the last date of "2020-01-01 10:00" has passed/);
    expect(plan(want({ ...past, comment: "x" }), job(past))).toHaveLength(1);
    expect(plan(want({ schedule: "2099-01-01" }), undefined)).toHaveLength(1);
  });

  it("refuses to adopt with a retention that would prune, with the list", () => {
    const pruned = ["nfs:backup/vzdump-qemu-101-2026_01_01-00_00_00.vma.zst"];
    const adopting = { ...have(job({ comment: "by hand" })), node: { ...node, pruned } };
    expect(() => backupSchedule.plan(want({ adopt: true, retention: { keepLast: 1 } }), adopting, line())).toThrow(
      /adopt.*retention.*vzdump-qemu-101-2026_01_01-00_00_00/,
    );
  });

  it("allows another node's storage for a job of that node", () => {
    expect(plan(want({ storage: "elsewhere", vzdump: { node: "pve2" } }), undefined)).toHaveLength(1);
  });
});

it("knows its own mark where the owner is too long for one", () => {
  const long = `${owner}${"x".repeat(200)}`;
  const wanted = backupSchedule.plan(want(), have(undefined), { ...line(), owner: long })[0]?.argv ?? [];
  const comment = wanted.find((word) => word.startsWith("--comment="))?.slice("--comment=".length);
  expect(comment?.length).toBeLessThan(212); // Proxmox takes 512, and ours may have 300
  expect(tools(backupSchedule.remove(have(job({ comment })), { ...line(), owner: long }))).toHaveLength(1);
});

it("removes its job, and not one that carries another's mark", () => {
  const removal = (found: Job | undefined) => tools(backupSchedule.remove(have(found), line()));
  expect(removal(job())).toEqual(["pvesh delete /cluster/backup/nightly"]);
  expect(removal(job({ comment: undefined }))).toEqual(["pvesh delete /cluster/backup/nightly"]);
  expect(removal(job({ comment: "[pulumi-vmbackup x/y]" }))).toEqual([]);
  expect(removal(undefined)).toEqual([]);
});

describe("what the job says", () => {
  const found = (over: object, wanted: object = {}, kept: string[] = []) =>
    backupSchedule.asFound(want(wanted), have(job(over)), line(kept));

  it("is no drift as declared", () => expect(found({})).toEqual(want()));

  it.each<[string, object, object, object]>([
    ["switched off", { enabled: false }, {}, { enabled: false }],
    ["another schedule", { schedule: "03:00" }, {}, { schedule: "03:00" }],
    ["other guests", { vmid: "101", all: undefined }, {}, { guests: [101] }],
    ["an option", { mode: "stop" }, {}, { vzdump: { mode: "stop" } }],
    ["a retention", { "prune-backups": { "keep-last": "1" } }, {}, { retention: { keepLast: 1 } }],
    ["a comment", { comment: `hello ${mark}` }, {}, { comment: "hello" }],
    ["a comment that went", {}, { comment: "hello" }, { comment: undefined }],
    ["an option that went", {}, { vzdump: { mode: "stop" } }, { vzdump: {} }],
  ])("is drift: %s", (_name, over, wanted, drift) => {
    expect(found(over, wanted)).toEqual({ ...want(wanted), ...drift });
  });

  it("is no drift where adoption left it alone", () => {
    expect(found({ enabled: false, mode: "stop" }, {}, ["enabled", "vzdump"])).toEqual(want());
    const declared = { vzdump: { mode: "stop" } };
    expect(found({ mode: "stop", zstd: 2 }, declared, ["vzdump.zstd"])).toEqual(want(declared));
    expect(found({ mode: "stop", zstd: 2 }, declared)).toMatchObject({ vzdump: { mode: "stop", zstd: 2 } });
  });

  it("is told of `enabled`, also where adoption left it alone", () => {
    expect(backupSchedule.facts(want(), have(job({ enabled: false })), line(["enabled"]))).toMatchObject({
      isEnabled: false,
    });
  });
});

describe("constructor", () => {
  beforeEach(() =>
    pulumi.runtime.setMocks({
      newResource: ({ name, inputs }) => ({ id: `${name}-id`, state: inputs }),
      call: () => ({}),
    }),
  );
  const value = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => void output.apply(resolve));

  it("takes the resource's name as the job's, and fills the default of `enabled`", async () => {
    const nightly = new BackupSchedule("nightly", { host: "n4", schedule: "02:30", storage: "nfs" });
    expect(await value(nightly.name)).toBe("nightly");
    expect(await value(nightly.enabled)).toBe(true);
    const off = new BackupSchedule("off", { host: "n4", schedule: "02:30", storage: "nfs", enabled: false });
    expect(await value(off.enabled)).toBe(false);
  });

  it("tells what an adopted job has, where `enabled` is not declared", async () => {
    pulumi.runtime.setMocks({
      newResource: ({ name, inputs }) => ({ id: `${name}-id`, state: { ...inputs, isEnabled: false } }),
      call: () => ({}),
    });
    const args = { host: "n4", schedule: "02:30", storage: "nfs" };
    expect(await value(new BackupSchedule("adopted", args).enabled)).toBe(false);
    expect(await value(new BackupSchedule("declared", { ...args, enabled: true }).enabled)).toBe(true);
  });

  it("throws for the same job of the same host twice", () => {
    const args: BackupScheduleArgs = { host: "n4", name: "nightly", schedule: "02:30", storage: "nfs" };
    new BackupSchedule("a", args);
    expect(() => new BackupSchedule("b", args)).toThrow(/"b" and "a"/);
    new BackupSchedule("c", { ...args, host: "n5" });
  });
});
