// BackupSchedule on the stand-ins of Proxmox's commands: the laws, and what is told of runs and coverage.
import { afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import type { BackupStatus } from "../../provider/index.js";
import { laws } from "../laws.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";

const { node } = useHosts({ node: { pve: true } });
beforeAll(async () => {
  await node.ssh(
    "mkdir -p /srv/isos /srv/off && pvesm add dir isos --path /srv/isos --content iso && pvesm add dir off --path /srv/off --content backup --disable 1 && pvesh create /pools --poolid p1 && qm create 101 --name db1 --scsi0 local:1 && qm create 102 --name db2 --scsi0 local:1 --scsi1 local:1,backup=0",
  );
});

/** What the node says of a job, out of band. */
async function job(id: string): Promise<Record<string, unknown> | undefined> {
  const answer = await node.ssh(["pvesh", "get", `/cluster/backup/${id}`, "--output-format", "json"], {
    reject: false,
  });
  if (answer.exitCode === 0) return JSON.parse(answer.stdout);
  expect(answer.stderr).toContain("No such job");
  return undefined;
}
const remove = (id: string) => node.ssh(["pvesh", "delete", `/cluster/backup/${id}`]);
const inputs = (name: string, over: Fields = {}): Fields => ({
  host: node.connection,
  name,
  schedule: "02:30",
  storage: "local",
  ...over,
});

laws({
  kind: "BackupSchedule",
  inputs: (tag) => inputs(tag),
  look: async (tag) => {
    const found = await job(tag);
    return found && JSON.stringify(found);
  },
  vanish: async (tag) => void (await remove(tag)),
  foreign: async (tag) =>
    void (await node.ssh(
      `pvesh create /cluster/backup --id ${tag} --schedule 02:30 --storage local --vmid 101 --mode stop --comment 'by hand' --enabled 0`,
    )),
  bad: [
    ["a bare hour", { schedule: "22" }, "schedule"],
    ["hour 25", { schedule: "25:00" }, "schedule"],
    ["a name that can never be read again", { name: "x".repeat(51) }, "name"],
    ["a guest twice", { guests: [101, 101] }, "guests[1]"],
    ["protected with a retention", { retention: { keepLast: 1 }, vzdump: { protected: true } }, "retention"],
    ["a directory: not yet", { directory: "/backup" }, "directory"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
  ],
  badOnHost: [
    ["a storage that is not there", { storage: "nosuch" }, /storage: there is no storage nosuch.*local/s],
    ["a storage that takes no backups", { storage: "isos" }, /storage: the storage isos takes no backups/],
    ["a storage that is disabled", { storage: "off" }, /storage: the storage off is disabled/],
    ["a guest that is not there", { guests: [101, 999] }, /guests: there is no guest 999.*101, 102/s],
    ["a pool that is not there", { guests: { pool: "nosuch" } }, /guests.pool: there is no pool nosuch.*p1/s],
    ["a node that is not there", { vzdump: { node: "nosuch" } }, /vzdump.node: there is no node nosuch/],
  ],
  mutable: [
    ["schedule", { schedule: "sat 03:00" }, /"schedule":"sat 03:00"/],
    ["guests: ids", { guests: [102, 101] }, /"vmid":"101,102"/],
    ["guests: all but some", { guests: { allExcept: [102] } }, /"exclude":"102"/],
    ["guests: a pool", { guests: { pool: "p1" } }, /"pool":"p1"/],
    [
      "retention and enabled",
      { retention: { keepLast: 3, keepDaily: 7 }, enabled: false },
      /"enabled":0.*"keep-daily":"?7/,
    ],
    [
      "options of vzdump",
      {
        vzdump: {
          mode: "stop",
          compress: "zstd",
          zstd: 2,
          notesTemplate: "{{guestname}} ü\\n",
          fleecing: { enabled: true, storage: "local" },
          performance: { maxWorkers: 4 },
          excludePath: ["/tmp/?*"],
          mailTo: ["root@pam"],
          stdexcludes: false,
          notificationMode: "legacy-sendmail",
        },
      },
      /"mode":"stop"/,
    ],
  ],
  optional: [
    [
      "comment, catchUp, retention and vzdump",
      { comment: "grüße", catchUp: true, retention: { keepLast: 3 }, vzdump: { mode: "stop", zstd: 2 } },
      /grüße|"repeat-missed":1|prune-backups|"mode"|"zstd"/,
    ],
    ["guests: all but one", { guests: { allExcept: [102] } }, /exclude/],
  ],
  replacing: [["name", (tag) => ({ name: `${tag}x` })]],
});

describe("BackupSchedule on a node", () => {
  const stacks: Stack[] = [];
  const stackFor = (name: string, stack?: string) => {
    const made = new Stack("BackupSchedule", name, stack);
    stacks.push(made);
    return made;
  };
  const status = (stack: Stack) => stack.recorded?.outputs.status as BackupStatus;
  afterEach(async () => {
    vi.restoreAllMocks();
    for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
  });

  it("marks the job with its owner, and tells the next run and what is covered", async () => {
    const stack = stackFor("nightly", "prod");
    await stack.up(inputs("nightly", { comment: "every night" }));
    expect(await job("nightly")).toMatchObject({
      all: 1,
      comment: "every night [pulumi-vmbackup organization/laws/prod/BackupSchedule/nightly]",
    });
    // The node's own answer, in its own zone: 02:30 in Tokyo is 17:30 UTC
    await node.ssh("ln -sf /usr/share/zoneinfo/Asia/Tokyo /etc/localtime");
    try {
      await stack.refresh();
      const jobs = (await node.ssh("pvesh get /cluster/backup --output-format json")).stdout;
      const { "next-run": next } = (JSON.parse(jobs) as { id: string; "next-run": number }[]).find(
        ({ id }) => id === "nightly",
      ) ?? { "next-run": 0 };
      expect(status(stack).nextRun).toBe(new Date(next * 1000).toISOString());
      expect(status(stack).nextRun).toMatch(/T17:30:00.000Z$/);
      expect(next * 1000).toBeGreaterThan(Date.now());
    } finally {
      await node.ssh("ln -sf /usr/share/zoneinfo/Etc/UTC /etc/localtime");
    }
    expect(status(stack)).toMatchObject({ covered: 1, stalest: { guest: "101 (db1)" } });
    expect(status(stack).uncovered).toEqual([{ guest: "102 (db2) scsi1", reason: "backup=no" }]);
    expect(status(stack).lastRun).toBeUndefined();
    expect(JSON.stringify(stack.recorded?.outputs).length).toBeLessThan(2048);
    await stack.up(inputs("nightly", { guests: [101], enabled: false }));
    expect(status(stack).nextRun).toBeUndefined();
    const reason = "not among the guests of this schedule";
    expect(status(stack).uncovered).toEqual([{ guest: expect.stringMatching(/^102/), reason }]);
  });

  it("finds the guest with the oldest backup, and the one that is gone", async () => {
    try {
      await node.ssh("qm create 103 --name gone && vzdump 101 --storage local --quiet 1");
      const stack = stackFor("dumps");
      await stack.up(inputs("dumps", { guests: [101, 103] }));
      expect(status(stack).stalest).toEqual({ guest: "103 (gone)" });
      await node.ssh("qm destroy 103");
      await stack.refresh();
      const { covered, uncovered, stalest } = status(stack);
      expect(covered).toBe(1);
      expect(uncovered[0]).toEqual({ guest: "103", reason: "does not exist: every run fails for it" });
      expect(stalest?.guest).toBe("101 (db1)");
      expect(Math.abs(Date.parse(stalest?.newestBackup ?? "") - Date.now())).toBeLessThan(600_000);
      // Listed, and yet no backup: a run that ended on a full disk
      await node.ssh("rm /var/lib/vz/dump/*; touch /var/lib/vz/dump/vzdump-qemu-101-2026_01_01-00_00_00.vma.zst");
      expect((await node.ssh("pvesm list local --content backup")).stdout).toContain("2026_01_01");
      await stack.refresh();
      expect(status(stack).stalest).toEqual({ guest: "101 (db1)" });
    } finally {
      await node.ssh("rm -f /var/lib/vz/dump/*");
    }
  });

  it("tells the last run by the job's id: ok, failed, running", async () => {
    const stack = stackFor("runs");
    await stack.up(inputs("runs"));
    // As pvescheduler leaves it (PVE/Jobs.pm): which task, and in the task's log how it ended.
    const ran = (last: string) =>
      node.ssh(
        `mkdir -p /var/lib/pve-manager/jobs /var/log/pve/tasks/0
u=UPID:$(uname -n):0000FFFF:00000001:69000000:vzdump::root@pam:
printf '{"state":"started","upid":"%s","config":{"enabled":1,"schedule":"02:30"}}' "$u" >/var/lib/pve-manager/jobs/vzdump-runs.json
printf 'INFO: starting new backup job: vzdump --all 1\\n%s\\n' '${last}' >"/var/log/pve/tasks/0/$u"
touch -d @1761608000 "/var/log/pve/tasks/0/$u"`,
      );
    const startedAt = new Date(0x69000000 * 1000).toISOString();
    await ran("TASK OK");
    await stack.refresh();
    expect(status(stack).lastRun).toEqual({
      startedAt,
      finishedAt: new Date(1761608000 * 1000).toISOString(),
      result: "ok",
    });
    await ran("TASK ERROR: job errors");
    await stack.refresh();
    expect(status(stack).lastRun).toMatchObject({ result: "failed", message: "job errors" });
    await ran("INFO: Starting Backup of VM 101 (qemu)");
    await stack.refresh();
    expect(status(stack).lastRun).toMatchObject({ result: "failed", message: /without a result/ });
    // A process that lives, with the start time that the task was given.
    await node.ssh(
      `set -- $(sed 's/^.*) //' /proc/1/stat); u=$(printf 'UPID:%s:%08X:%08X:69000000:vzdump::root@pam:' "$(uname -n)" 1 "\${20}")
printf '{"state":"started","upid":"%s"}' "$u" >/var/lib/pve-manager/jobs/vzdump-runs.json`,
    );
    await stack.refresh();
    expect(status(stack).lastRun).toEqual({ startedAt, result: "running" });
    await node.ssh(
      `printf '{"state":"stopped","msg":"no such storage","time":1761608000}' >/var/lib/pve-manager/jobs/vzdump-runs.json`,
    );
    await stack.refresh();
    expect(status(stack).lastRun).toMatchObject({ result: "failed", message: "no such storage" });
  });

  it("tells no last run where Proxmox keeps none, also when there is a task", async () => {
    const stack = stackFor("old");
    await stack.up(inputs("old"));
    await node.ssh("vzdump 101 --storage local --quiet 1; rm -rf /var/lib/pve-manager/jobs /var/lib/vz/dump/*");
    await stack.refresh();
    expect(status(stack)).toMatchObject({ covered: 1 });
    expect(status(stack)).not.toHaveProperty("lastRun");
  });

  it("shows a mark that is none of ours as it is", async () => {
    await node.ssh([
      "pvesh",
      "create",
      "/cluster/backup",
      "--id",
      "half",
      "--schedule",
      "02:30",
      "--storage",
      "local",
      "--all",
      "1",
      "--comment",
      "[pulumi-vmbackup 50%]",
    ]);
    await expect(stackFor("half").up(inputs("half"))).rejects.toThrow(/belongs to 50%/);
    await remove("half");
  });

  it("warns of hours that a change of the clock skips or doubles, in the node's time zone", async () => {
    await node.ssh("ln -sf /usr/share/zoneinfo/Europe/Prague /etc/localtime");
    try {
      const said = vi.spyOn(console, "warn").mockImplementation(() => {});
      await stackFor("warned").up(inputs("warned"));
      expect(said.mock.calls.join()).toMatch(/warning: schedule 02:30: in Europe\/Prague .* does not exist/);
      said.mockClear();
      await stackFor("quiet").up(inputs("quiet", { schedule: "02:30 UTC" }));
      expect(said).not.toHaveBeenCalled();
    } finally {
      await node.ssh("ln -sf /usr/share/zoneinfo/Etc/UTC /etc/localtime");
    }
  });

  it("shows what somebody changed by hand, and repairs it", async () => {
    const stack = stackFor("drift");
    await stack.up(inputs("drift"));
    await node.ssh(
      "pvesh set /cluster/backup/drift --enabled 0 --schedule 25:00 --vmid 102,102 --mode stop --comment mine",
    );
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.inputs).toMatchObject({
      enabled: false,
      guests: [102, 102],
      vzdump: { mode: "stop" },
      comment: "mine",
    });
    expect(await stack.preview(inputs("drift"))).toBe("update");
    await stack.up(inputs("drift"));
    const { mode, ...found } = (await job("drift")) ?? {};
    expect(found).toMatchObject({ enabled: 1, schedule: "02:30", all: 1 });
    expect(mode).toBeUndefined();
  });

  it("takes over what is declared only, and leaves the rest of a job as it is", async () => {
    await node.ssh(
      "pvesh create /cluster/backup --id mine --schedule 04:00 --storage local --vmid 101,102 --mode stop --prune-backups keep-last=9 --comment hello --enabled 0",
    );
    const stack = stackFor("mine");
    await stack.up(inputs("mine", { adopt: true }));
    expect(await job("mine")).toMatchObject({
      schedule: "02:30",
      vmid: "101,102",
      mode: "stop",
      enabled: 0,
      "prune-backups": { "keep-last": "9" },
      comment: "hello [pulumi-vmbackup organization/laws/dev/BackupSchedule/mine]",
    });
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(inputs("mine"))).toBe("same");
    expect(stack.recorded?.outputs.isEnabled).toBe(false);
    await stack.up(inputs("mine", { guests: "all" })); // declared from now on
    expect(await job("mine")).toMatchObject({ all: 1, mode: "stop" });
    await stack.up(inputs("mine", { guests: "all", enabled: true }));
    await stack.up(inputs("mine", { guests: "all" })); // and gone from the program: the default
    expect(await job("mine")).toMatchObject({ enabled: 1 });
    expect(stack.recorded?.outputs.isEnabled).toBe(true);
  });

  it("takes over the declared options of vzdump only", async () => {
    await node.ssh(
      "pvesh create /cluster/backup --id some --schedule 02:30 --storage local --all 1 --mode snapshot --compress gzip --zstd 2 --exclude-path /tmp",
    );
    const rest = { zstd: 2, "exclude-path": ["/tmp"] };
    const declared = inputs("some", { adopt: true, vzdump: { mode: "stop", compress: "zstd" } });
    const stack = stackFor("some");
    await stack.up(declared);
    expect(await job("some")).toMatchObject({ mode: "stop", compress: "zstd", ...rest });
    expect(await stack.preview(declared)).toBe("same");
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(declared)).toBe("same");
    await stack.up({ ...declared, vzdump: { mode: "stop" } }); // what was declared once is the program's
    expect(await job("some")).not.toHaveProperty("compress");
    await stack.up({ ...declared, vzdump: { zstd: 4 } });
    await stack.up(inputs("some"));
    const found = await job("some");
    expect(found).toMatchObject({ "exclude-path": ["/tmp"] });
    expect(Object.keys(found ?? {})).not.toEqual(expect.arrayContaining(["mode"]));
    expect(Object.keys(found ?? {})).not.toEqual(expect.arrayContaining(["zstd"]));
    await node.ssh("pvesh set /cluster/backup/some --mode stop"); // drift, since adoption did not find it undeclared
    await stack.refresh();
    await stack.up(inputs("some"));
    expect(await job("some")).not.toHaveProperty("mode");
  });

  it("refuses to adopt a job with a retention that would prune now, with the list", async () => {
    const dump = (id: number, day: string) => `/var/lib/vz/dump/vzdump-qemu-${id}-2026_01_0${day}-00_00_00.vma`;
    const [old, newer, others] = [dump(101, "1"), dump(101, "2"), [dump(102, "1"), dump(102, "2")]];
    try {
      await node.ssh(`mkdir -p /var/lib/vz/dump; for f in ${[old, newer, ...others].join(" ")}; do echo x >$f; done
        pvesh create /cluster/backup --id keep --schedule 02:30 --storage local --vmid 101 --prune-backups keep-last=9`);
      const before = await job("keep");
      const stack = stackFor("keep");
      const pruning = inputs("keep", { adopt: true, retention: { keepLast: 1 } });
      const failure: unknown = await stack.up(pruning).catch((error: unknown) => error);
      expect(String(failure)).toMatch(
        /adopt.*retention: its next run would remove local:backup\/vzdump-qemu-101-2026_01_01/,
      );
      expect(String(failure)).not.toMatch(/2026_01_02|qemu-102/); // not the newest, and not those of guests that it is not for
      expect(await job("keep")).toEqual(before);
      expect(stack.recorded).toBeUndefined();
      await stack.up(inputs("keep", { adopt: true, retention: { keepLast: 2 } }));
      await stack.up(inputs("keep", { adopt: true, retention: { keepLast: 1 } })); // ours now, and meant
      expect(await job("keep")).toMatchObject({ "prune-backups": { "keep-last": "1" } });
    } finally {
      await node.ssh("rm -f /var/lib/vz/dump/*");
    }
  });

  it("keeps a job that another resource made under the name since", async () => {
    const stack = stackFor("again");
    await stack.up(inputs("again"));
    await remove("again");
    await node.ssh(
      "pvesh create /cluster/backup --id again --schedule 04:00 --storage local --all 1 --comment '[pulumi-vmbackup a/b/c/d/e]'",
    );
    await stack.destroy();
    expect(await job("again")).toMatchObject({ schedule: "04:00" });
    await remove("again");
  });

  it("is read by .get, also what is not ours", async () => {
    await node.ssh("pvesh create /cluster/backup --id seen --schedule 25:00 --storage local --vmid 101 --mode stop");
    const { calls } = stackFor("seen");
    const { props } = await calls.read("seen", { host: node.connection });
    expect(props).toMatchObject({
      name: "seen",
      schedule: "25:00",
      storage: "local",
      guests: [101],
      vzdump: { mode: "stop" },
    });
    await calls.delete("seen", props);
    expect(await job("seen")).toBeDefined();
    await remove("seen");
    await expect(calls.read("seen", { host: node.connection })).rejects.toThrow(/does not exist/);
  });
});
