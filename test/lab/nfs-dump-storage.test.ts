// NfsDumpStorage on Proxmox VE nodes (stand-ins): the laws, then bad input and bad luck. What is asserted is looked up out of band:
// storage.cfg, the mount table, the files of the export.
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { connect } from "../../provider/host.js";
import { hooks } from "../../provider/host-ledger.js";
import { registered } from "../../provider/nfs-export.js";
import { idsTaken } from "../../provider/vm-id-range.js";
import { laws } from "../laws.js";
import { CheckFailed, Stack } from "../stack.js";
import { useHosts } from "./lab.js";

// The server is a folder that both nodes see.
const servers = mkdtempSync(join(tmpdir(), "nfs-"));
const server = (name: string) => {
  const folder = join(servers, name);
  mkdirSync(folder, { recursive: true });
  return folder;
};
const EXPORT = "/mnt/data/pve-dump";
const exported = (path = EXPORT, name = "skydev") => {
  const folder = join(server(name), path);
  mkdirSync(folder, { recursive: true });
  const list = join(server(name), ".exports");
  const lines = existsSync(list) ? readFileSync(list, "utf8").split("\n").filter(Boolean) : [];
  writeFileSync(list, `${[...new Set([...lines, `${path} *`])].join("\n")}\n`);
  return folder;
};
exported();
exported("/mnt/data/other");

const { pve1, pve2 } = useHosts({
  pve1: { pve: true, bindRw: { [servers]: "/srv/nfs" } },
  pve2: { pve: true, bindRw: { [servers]: "/srv/nfs" } },
});
afterAll(() => rmSync(servers, { recursive: true, force: true }));

/** What storage.cfg and the mount table of a node say, without the order of lists; undefined when there is neither. */
async function look(id: string, node = pve1, path = `/mnt/pve/${id}`): Promise<string | undefined> {
  const { stdout } = await node.ssh(
    `awk -v id=${id} '/^[a-z]+:/ { on = $2 == id } on' /etc/pve/storage.cfg; findmnt -n -o SOURCE --mountpoint ${path} | sed 's/^/mounted /'`,
    { reject: false },
  );
  const lines = stdout
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
  const sorted = lines.map((line) => {
    const [key = "", ...value] = line.split(" ");
    return `${key} ${value.join(" ").split(",").sort().join(",")}`.trim();
  });
  return sorted.length === 0 ? undefined : sorted.sort().join("\n");
}

const inputs = (storageId: string, over: Fields = {}): Fields => ({
  host: pve1.connection,
  storageId,
  server: "skydev",
  export: EXPORT,
  ...over,
});

const shell = (command: string, node = pve1) => node.ssh(command, { reject: false });

/** Adds a storage as a person would. */
const byHand = (id: string, options = "--content backup", from = { server: "skydev", export: EXPORT }) =>
  pve1.ssh(`pvesm add nfs ${id} --server ${from.server} --export ${from.export} ${options}`);

laws({
  kind: "NfsDumpStorage",
  inputs: (tag) => inputs(tag),
  look: (tag) => look(tag),
  vanish: async (tag) => void (await shell(`pvesm remove ${tag}; umount /mnt/pve/${tag}`)),
  foreign: async (tag) => void (await byHand(tag, "--content backup,iso --bwlimit restore=7")),
  bad: [
    ["guests' disks without ids of their own", { content: ["images"] }, "content"],
    ["containers' disks without ids of their own", { content: ["backup", "rootdir"] }, "content"],
    ["an unknown content", { content: ["backups"] }, "content[0]"],
    ["no content", { content: [] }, "content"],
    ["a typo in the retention", { retention: { keepLats: 3 } }, "retention.keepLats"],
    ["a negative retention", { retention: { keepLast: -1 } }, "retention.keepLast"],
    ["keepAll together with others", { retention: { keepAll: true, keepLast: 3 } }, "retention.keepAll"],
    ["a retention of zeros", { retention: { keepLast: 0 } }, "retention"],
    ["a storage id with a blank", { storageId: "a b" }, "storageId"],
    ["a server with a path", { server: "skydev:/x" }, "server"],
    ["a relative export", { export: "mnt/data" }, "export"],
    ["a mount point that climbs", { path: "/mnt/../etc" }, "path"],
    ["ids upside down", { vmIds: { lower: 200, upper: 100 } }, "vmIds.upper"],
    ["ids that are none", { vmIds: { lower: 1, upper: 100 } }, "vmIds.lower"],
    ["a directory outside", { contentDirs: { backup: "../x" } }, "contentDirs.backup"],
    ["an unknown limit", { bwlimit: "restor=1" }, "bwlimit"],
    ["options with a blank", { options: "vers=4.2, soft" }, "options"],
    ["a node with an underscore", { nodes: ["pve_1"] }, "nodes[0]"],
    ["fewer protected than none", { maxProtectedBackups: -2 }, "maxProtectedBackups"],
    ["a password", { host: { host: "x", password: "y" } }, "host.password"],
  ],
  badOnHost: [
    ["an id that a directory storage has", { storageId: "local" }, /taken by a storage of type dir/],
    ["a path that another storage has", { path: "/var/lib/vz" }, /belongs to the storage local/],
  ],
  // Each test costs ten looks at a node: what goes the same way through one `pvesm set` shares one.
  mutable: [
    ["retention", { retention: { keepLast: 3, keepDaily: 7 } }, /prune-backups keep-daily=7,keep-last=3/],
    [
      "content, contentDirs, maxProtectedBackups, bwlimit, preallocation",
      {
        content: ["backup", "iso"],
        contentDirs: { iso: "isos" },
        maxProtectedBackups: -1,
        bwlimit: "restore=102400",
        preallocation: "off",
      },
      /bwlimit restore=102400\ncontent backup,iso\ncontent-dirs iso=isos[\s\S]*max-protected-backups -1[\s\S]*preallocation off/,
    ],
    ["options", { options: "vers=4.2,soft" }, /options soft,vers=4.2/],
    ["nodes", { nodes: ["elsewhere"] }, /nodes elsewhere/],
    ["disable", { disable: true }, /disable/],
    ["export", { export: "/mnt/data/other" }, /mounted skydev:\/mnt\/data\/other/],
    ["vmIds", { vmIds: { lower: 50001, upper: 50009 } }, /nfs:/],
  ],
  optional: [
    ["options", { options: "vers=4.2" }, /options/],
    [
      "all others",
      { retention: { keepLast: 3 }, maxProtectedBackups: 4, bwlimit: "restore=1", nodes: ["elsewhere"], disable: true },
      /prune-backups|max-protected|bwlimit|nodes|disable/,
    ],
  ],
  replacing: [
    ["storageId", (tag) => ({ storageId: `${tag}x` })],
    ["path", () => ({ path: "/mnt/elsewhere" })],
  ],
});

let n = 0;
const stacks: Stack[] = [];
/** A stack with one storage of its own. */
function fresh(stackName = "dev", id = `dump${++n}`) {
  const stack = new Stack("NfsDumpStorage", id, stackName);
  stacks.push(stack);
  return { id, stack };
}
const on = (node: typeof pve1, over: Fields = {}): Fields => ({ host: node.connection, ...over });

/** The message of the error that a piece of work ends in. */
async function failure(work: Promise<unknown>): Promise<string> {
  return await work.then(
    (done) => `no error: ${JSON.stringify(done)}`,
    (error: unknown) => (error instanceof Error ? error.message : String(error)),
  );
}

/** The claims that hold on an export, as "machine's node lower-upper". */
function claims(folder: string): string[] {
  const file = join(folder, ".pulumi-vmbackup/claims");
  if (!existsSync(file)) return [];
  return registered(readFileSync(file, "utf8"))
    .claims.map(({ lower, upper, owner }) => `${owner.split("/")[2]} ${lower}-${upper}`)
    .sort();
}

afterEach(async () => {
  delete hooks.beforeStep;
  delete hooks.afterStep;
  await shell("rm -rf /run/pve-misbehave; rm -f /etc/pve/jobs.cfg /etc/pve/nodes/*/qemu-server/*.conf");
  for (const stack of stacks.splice(0)) {
    const { recorded } = stack;
    await stack.destroy().catch(() => {});
    if (recorded !== undefined)
      for (const node of [pve1, pve2])
        await shell(`pvesm remove ${recorded.id} 2>/dev/null; umount /mnt/pve/${recorded.id} 2>/dev/null; true`, node);
  }
});

describe("what the server refuses leaves nothing behind", () => {
  const nothing = async (id: string, stack: Stack) => {
    expect(await look(id)).toBeUndefined();
    expect((await shell(`ls -d /mnt/pve/${id} /var/lib/pulumi-vmbackup/NfsDumpStorage/${id}.json`)).stdout).toBe("");
    expect(stack.recorded).toBeUndefined();
  };

  it("an unknown server", async () => {
    const { id, stack } = fresh();
    expect(await failure(stack.up(inputs(id, { server: "nosuch.invalid" })))).toMatch(/not online|resolve/);
    await nothing(id, stack);
  });

  it("an export that is missing: told which there are", async () => {
    const { id, stack } = fresh();
    const said = await failure(stack.up(inputs(id, { export: "/mnt/data/typo" })));
    expect(said).toMatch(/reason given by server: No such file or directory/);
    expect(said).toMatch(/skydev exports:\n.*\/mnt\/data\/other/);
    await nothing(id, stack);
  });

  it("a server that exports nothing, and one that speaks only NFSv4", async () => {
    const { id, stack } = fresh();
    server("empty");
    writeFileSync(join(servers, "empty", ".exports"), "");
    expect(await failure(stack.up(inputs(id, { server: "empty", export: "/x" })))).toMatch(
      /answers, and exports nothing/,
    );
    await nothing(id, stack);
    exported("/e", "v4only");
    writeFileSync(join(servers, "v4only", ".v4only"), "");
    expect(await failure(stack.up(inputs(id, { server: "v4only", export: "/e" })))).toMatch(/vers=4\.2/);
    await nothing(id, stack);
    await stack.up(inputs(id, { server: "v4only", export: "/e", options: "vers=4.2" }));
    expect(await look(id)).toMatch(/mounted v4only:\/e/);
  });

  // In the node's own view the export is a file system that is full, read-only, or no place for root to write.
  it.each([
    [
      "no room",
      "-t tmpfs -o size=4k tmpfs",
      "mkdir $T/dump; head -c 9000 /dev/zero >$T/dump/full",
      /No space left|must be writable, with room/,
    ],
    ["read-only, dumps there", "-t tmpfs tmpfs", "mkdir $T/dump; /bin/mount -o remount,ro $T", /Read-only file system/],
    ["read-only, new", "-t tmpfs -o ro tmpfs", "true", /Read-only file system/],
    ["a squashed root", "-t sysfs sysfs", "true", /Operation not permitted|Permission denied/],
  ])("%s", async (_name, mount, then, message) => {
    const { id, stack } = fresh();
    exported("/odd");
    const T = "/srv/nfs/skydev/odd";
    await shell(`/bin/mount ${mount} ${T}; T=${T}; ${then}`);
    try {
      expect(await failure(stack.up(inputs(id, { export: "/odd" })))).toMatch(message);
      await nothing(id, stack);
    } finally {
      await shell(`/bin/umount ${T}`);
    }
  });
});

describe("whose is it", () => {
  it("an NFS storage of another server, made by hand: left as it is, and adopted only as it is", async () => {
    const { id, stack } = fresh();
    exported("/e", "elsewhere");
    await byHand(id, "--content backup", { server: "elsewhere", export: "/e" });
    const before = await look(id);
    expect(await failure(stack.up(inputs(id)))).toMatch(/exists already and is not this resource's.*by hand/);
    expect(await failure(stack.up(inputs(id, { adopt: true })))).toMatch(/It is elsewhere:\/e, and declared is skydev/);
    expect(await look(id)).toBe(before);
    await stack.up(inputs(id, { server: "elsewhere", export: "/e", adopt: true }));
    expect(await look(id)).toBe(before);
  });

  it("adoption keeps what is not declared, and refuses what would destroy", async () => {
    const { id, stack } = fresh();
    const folder = exported("/adopted");
    mkdirSync(join(folder, "dump"), { recursive: true });
    mkdirSync(join(folder, "template/iso"), { recursive: true });
    for (const day of [1, 2, 3])
      writeFileSync(join(folder, `dump/vzdump-qemu-101-2026_11_0${day}-10_00_00.vma.zst`), "x");
    writeFileSync(join(folder, "template/iso/debian.iso"), "x");
    await byHand(id, "--content backup,iso --bwlimit restore=5 --create-subdirs 1", {
      server: "skydev",
      export: "/adopted",
    });
    const before = await look(id);
    const want = inputs(id, { export: "/adopted", adopt: true });
    expect(await failure(stack.up({ ...want, content: ["backup"] }))).toMatch(/it holds iso/);
    expect(await failure(stack.up({ ...want, retention: { keepLast: 1 } }))).toMatch(
      /would remove .*2026_11_01.*2026_11_02/,
    );
    expect(await look(id)).toBe(before);
    await stack.up(want);
    expect(await look(id)).toBe(before);
    expect(stack.recorded?.outputs.status).toMatchObject({
      active: true,
      dumps: 3,
      newestDump: expect.stringContaining("2026-11-03"),
    });
    // Moved, what was kept and what we do not know goes along.
    exported("/adopted2");
    await stack.up({ ...want, export: "/adopted2" });
    expect(await look(id)).toBe(before?.replaceAll("/adopted", "/adopted2"));
    await stack.up({ ...want, export: "/adopted2", bwlimit: "restore=9" });
    await stack.up({ ...want, export: "/adopted2" });
    expect(await look(id)).not.toContain("bwlimit"); // once declared, it goes when it is left out
  }, 600_000);

  it("the same server by another name is the same server", async () => {
    const { id, stack } = fresh();
    await shell("grep -q alias.lab /etc/hosts || echo '10.99.0.1 skydev alias.lab' >>/etc/hosts");
    if (!existsSync(join(servers, "alias.lab"))) symlinkSync("skydev", join(servers, "alias.lab"));
    await byHand(id, "--content backup", { server: "alias.lab", export: EXPORT });
    const before = await look(id);
    await stack.up(inputs(id, { adopt: true }));
    expect(await look(id)).toBe(before);
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(inputs(id))).toBe("same");
    await stack.destroy(); // and its mount is known as ours
    expect(await look(id)).toBeUndefined();
    const unknown = fresh();
    await byHand(unknown.id, "--content backup", { server: "alias.lab", export: EXPORT });
    const refused = failure(unknown.stack.up(inputs(unknown.id, { server: "v4only", adopt: true })));
    expect(await refused).toMatch(/It is alias\.lab:.*and declared is v4only:/);
    await shell(`pvesm remove ${unknown.id}; umount /mnt/pve/${unknown.id}`);
  });

  it("a disabled storage is adopted as it is, and stays disabled when it is moved", async () => {
    const { id, stack } = fresh();
    await byHand(id, "--content backup --disable 1");
    const before = await look(id);
    expect(before).not.toMatch(/mounted/);
    await stack.up(inputs(id, { adopt: true }));
    expect(await look(id)).toBe(before);
    expect(stack.recorded?.outputs.status).toMatchObject({ active: false });
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(inputs(id))).toBe("same");
    await stack.up(inputs(id, { export: "/mnt/data/other" }));
    expect(await look(id)).toBe(before?.replace(EXPORT, "/mnt/data/other"));
    await stack.up(inputs(id, { export: "/mnt/data/other", options: "vers=4.1" }));
    expect(await look(id)).toMatch(/^disable$/m);
    // Enabled by hand, it stays enabled: remounted, and moved.
    await pve1.ssh(["pvesm", "set", id, "--delete", "disable"]);
    await stack.up(inputs(id, { export: "/mnt/data/other", options: "vers=4.2" }));
    expect(await look(id)).not.toMatch(/^disable$/m);
    await stack.up(inputs(id, { options: "vers=4.2" }));
    expect(await look(id)).not.toMatch(/^disable$/m);
    expect(await look(id)).toMatch(/mounted/);
  });

  it("`.get` reads what is there and throws for what is not", async () => {
    const { id } = fresh();
    await byHand(id, "--content backup,iso --prune-backups keep-last=2");
    const { calls } = new Stack("NfsDumpStorage", "get");
    const { props } = await calls.read(id, { host: pve1.connection });
    expect(props).toMatchObject({
      storageId: id,
      server: "skydev",
      export: EXPORT,
      path: `/mnt/pve/${id}`,
      content: ["backup", "iso"],
      retention: { keepLast: 2 },
      status: { active: true },
    });
    expect(await failure(calls.read("nosuch", { host: pve1.connection }))).toMatch(/does not exist/);
    await shell(`pvesm remove ${id}; umount /mnt/pve/${id}`);
  });
});

describe("in use", () => {
  /** A disk of guest 101 and an ISO in the drive of guest 102, and a job: lines of the real files. */
  const job = (id: string) =>
    `printf 'vzdump: nightly\\n\\tschedule daily\\n\\tstorage ${id}\\n\\tenabled 1\\n\\tall 1\\n\\n' >/etc/pve/jobs.cfg`;
  const disk = (id: string) =>
    `printf 'memory: 128\\nscsi0: ${id}:101/vm-101-disk-0.raw,size=1G\\n' >/etc/pve/qemu-server/101.conf`;
  const iso = (id: string) =>
    `printf 'memory: 128\\nide2: ${id}:iso/debian.iso,media=cdrom\\n' >/etc/pve/qemu-server/102.conf`;
  /** What looks like a running task: a live process, its entry, and its log. */
  const task = (id: string, log: string) =>
    `sleep 600 >/dev/null 2>&1 & p=$!; u=$(printf 'UPID:pve:%08X:%08X:6B02300D:qmrestore:14001:root@pam:' $p $(sed 's/.*) //' /proc/$p/stat | cut -d' ' -f20)); mkdir -p /var/log/pve/tasks/D; echo "$u 0" >>/var/log/pve/tasks/active; echo "${log.replaceAll("ID", id)}" >/var/log/pve/tasks/D/$u; echo $p`;

  it.each([
    ["a backup job", job, /the backup job nightly/],
    ["a guest's disk", disk, /guest 101 \(/],
    ["an ISO in a drive", iso, /guest 102 \(.*debian\.iso/],
  ])("delete is refused and names %s", async (_name, user, message) => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    const before = await look(id);
    await pve1.ssh(user(id));
    expect(await failure(stack.destroy())).toMatch(message);
    expect(await look(id)).toBe(before);
    await shell("rm -f /etc/pve/jobs.cfg /etc/pve/qemu-server/*.conf");
    await stack.destroy();
    expect(await look(id)).toBeUndefined();
  });

  it("delete and move are refused while a backup to it runs", async () => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    const before = await look(id);
    await pve1.ssh(
      "qm create 101 --memory 16 --scsi0 local:1 >/dev/null; mkdir -p /run/pve-misbehave; echo 600 >/run/pve-misbehave/dump-seconds",
    );
    const { stdout: pid } = await pve1.ssh(`vzdump 101 --storage ${id} >/dev/null 2>&1 & echo $!`);
    await pve1.ssh(`until ls /mnt/pve/${id}/dump/*.dat; do sleep 0.1; done`);
    expect(await failure(stack.destroy())).toMatch(/a running vzdump of 101/);
    expect(await failure(stack.up(inputs(id, { export: "/mnt/data/other" })))).toMatch(/a running vzdump of 101/);
    expect(await look(id)).toBe(before);
    await shell(`kill ${pid}; while kill -0 ${pid} 2>/dev/null; do sleep 0.1; done; qm unlock 101; qm destroy 101`);
    await stack.destroy();
    expect(await look(id)).toBeUndefined();
  });

  it("delete and move are refused while another storage lies on the mount, or a process has it open", async () => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    await pve1.ssh(["pvesm", "add", "dir", "onit", "--path", `/mnt/pve/${id}/sub`, "--content", "backup"]);
    expect(await failure(stack.destroy())).toMatch(/the storage onit/);
    await pve1.ssh(["pvesm", "remove", "onit"]);
    const { stdout: pid } = await pve1.ssh(`cd /mnt/pve/${id} && { sleep 600 >/dev/null 2>&1 & echo $!; }`);
    const before = await look(id);
    expect(await failure(stack.up(inputs(id, { export: "/mnt/data/other" })))).toMatch(/in use:\n.*sleep 600/);
    expect(await failure(stack.destroy())).toMatch(/in use:\n.*sleep 600/);
    expect(await look(id)).toBe(before); // enabled again, too
    await shell(`kill ${pid}`);
    await stack.destroy();
    expect(await look(id)).toBeUndefined();
  });

  it("a changed export is refused while a restore from it runs, and moves when it has ended; jobs keep pointing at it", async () => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    await pve1.ssh(job(id));
    const before = await look(id);
    const { stdout: pid } = await pve1.ssh(task(id, "restore vma archive: zstd -q -d -c /mnt/pve/ID/dump/x.vma.zst"));
    expect(await failure(stack.up(inputs(id, { export: "/mnt/data/other" })))).toMatch(
      /in use by a running qmrestore of 14001/,
    );
    expect(await look(id)).toBe(before);
    await shell(`kill ${pid}`);
    await stack.up(inputs(id, { export: "/mnt/data/other" }));
    expect(await look(id)).toMatch(/export \/mnt\/data\/other/);
    expect(await look(id)).toMatch(/mounted skydev:\/mnt\/data\/other$/m);
    expect(await look(id)).not.toMatch(/disable/);
  }, 600_000);

  it("a move that stops after any of its steps is finished by the next run", async () => {
    for (let k = 1; ; k++) {
      const { id, stack } = fresh();
      await stack.up(inputs(id, { retention: { keepLast: 2 } }));
      const want = inputs(id, { retention: { keepLast: 2 }, export: "/mnt/data/other", options: "vers=4.2" });
      let steps = 0;
      hooks.afterStep = () => {
        if (++steps === k) throw new Error("stopped here");
      };
      const said = await failure(stack.up(want));
      delete hooks.afterStep;
      await stack.up(want);
      expect(await look(id)).toMatch(/mounted skydev:\/mnt\/data\/other\nnfs: |mounted skydev:\/mnt\/data\/other/);
      expect(await look(id)).not.toMatch(/disable/);
      expect(await stack.preview(want)).toBe("same");
      expect(await stack.refresh()).toBe("there");
      expect(await stack.preview(want)).toBe("same");
      await stack.destroy();
      if (!said.includes("stopped here")) {
        expect(k).toBeGreaterThan(3);
        break;
      }
    }
  }, 600_000);

  it("a move whose connection is cut within a step is finished by the next run, or taken back by it", async () => {
    for (const [step, back] of [
      ["pvesm.set.written", false],
      ["pvesm.set.written", true],
      ["pvesm.remove.written", true],
      ["pvesm.add.locked", false],
    ] as const) {
      const { id, stack } = fresh();
      await stack.up(inputs(id));
      await shell(`mkdir -p /run/pve-misbehave; printf 'once\\ndisconnect\\nslow 1\\n' >/run/pve-misbehave/${step}`);
      const there = inputs(id, { export: "/mnt/data/other" });
      expect(await failure(stack.up(there))).toMatch(/connection to .* was lost|did not answer/);
      const want = back ? inputs(id) : there;
      await stack.up(want);
      const now = await look(id);
      expect(now?.match(/^mounted.*/gm)).toEqual([`mounted skydev:${want.export}`]);
      expect(now).toMatch(new RegExp(`^export ${want.export}$`, "m"));
      expect(now).not.toMatch(/^disable/m);
      expect(await stack.preview(want)).toBe("same");
    }
  }, 600_000);

  it("a content type that guests use is not dropped, a directory that holds something is not changed", async () => {
    const { id, stack } = fresh();
    const folder = exported("/dirs");
    const want = inputs(id, { export: "/dirs", content: ["backup", "iso"] });
    await stack.up(want);
    await pve1.ssh(iso(id));
    expect(await failure(stack.up({ ...want, content: ["backup"] }))).toMatch(
      /iso cannot be dropped: in use by guest 102/,
    );
    await shell("rm -f /etc/pve/qemu-server/*.conf");
    writeFileSync(join(folder, "dump/vzdump-qemu-101-2026_11_01-10_00_00.vma"), "x");
    expect(await failure(stack.up({ ...want, contentDirs: { backup: "dump-n4" } }))).toMatch(
      /backup cannot move from dump to dump-n4/,
    );
    rmSync(join(folder, "dump/vzdump-qemu-101-2026_11_01-10_00_00.vma"));
    await stack.up({ ...want, contentDirs: { backup: "dump-n4" } });
    expect(await look(id)).toMatch(/content-dirs backup=dump-n4/);
    expect(existsSync(join(folder, "dump-n4"))).toBe(true);
  });
});

describe("drift", () => {
  it("what was set by hand and never declared is drift, and goes; so does what was changed", async () => {
    const { id, stack } = fresh();
    const want = inputs(id, { retention: { keepLast: 3 } });
    await stack.up(want);
    const before = await look(id);
    await pve1.ssh(
      `pvesm set ${id} --bwlimit restore=1 --prune-backups keep-last=9 --disable 1 --content backup,iso --nodes pve9`,
    );
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.inputs).toMatchObject({
      bwlimit: "restore=1",
      retention: { keepLast: 9 },
      disable: true,
      nodes: ["pve9"],
    });
    expect(await stack.preview(want)).toBe("update");
    await stack.up(want);
    expect(await look(id)).toBe(before);
  });

  it("a storage that was changed between our look and our write is left as it is then", async () => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    hooks.beforeStep = async () => {
      delete hooks.beforeStep;
      await pve1.ssh(["pvesm", "set", id, "--bwlimit", "restore=3"]);
    };
    expect(await failure(stack.up(inputs(id, { retention: { keepLast: 1 } })))).toMatch(
      /was changed since it was looked at/,
    );
    expect(await look(id)).toMatch(/bwlimit restore=3/);
    expect(await look(id)).not.toMatch(/prune/);
    // Another storage's change is none of this one's.
    hooks.beforeStep = async () => {
      delete hooks.beforeStep;
      await pve1.ssh(["pvesm", "set", "local", "--bwlimit", "restore=4"]);
    };
    await stack.up(inputs(id, { retention: { keepLast: 1 } }));
    expect(await look(id)).toMatch(/prune-backups keep-last=1/);
    await pve1.ssh(["pvesm", "set", "local", "--delete", "bwlimit"]);
  });

  it("a mount that was lost is back after a look, and nothing is written below it meanwhile", async () => {
    const { id, stack } = fresh();
    await stack.up(inputs(id));
    await shell(`umount /mnt/pve/${id}`);
    expect(await stack.refresh()).toBe("there");
    expect(await look(id)).toMatch(/mounted skydev/);
    // A server that went away: still there, not active, and told within the deadline.
    await shell(`umount /mnt/pve/${id}`);
    writeFileSync(join(servers, "skydev", ".down"), "");
    try {
      expect(await stack.refresh()).toBe("there");
      expect(stack.recorded?.outputs.status).toMatchObject({ active: false });
      await stack.up(inputs(id, { retention: { keepLast: 4 } })); // what needs no server works without
      expect(await look(id)).toMatch(/keep-last=4/);
      expect((await shell(`ls -A /mnt/pve/${id}`)).stdout).toBe("");
    } finally {
      rmSync(join(servers, "skydev", ".down"));
    }
  });

  it("something else is mounted where the storage belongs", async () => {
    const { id, stack } = fresh();
    await shell(`mkdir -p /mnt/pve/${id}; /bin/mount -t tmpfs tmpfs /mnt/pve/${id}`);
    expect(await failure(stack.up(inputs(id)))).toMatch(/tmpfs is mounted already/);
    expect(await look(id)).toBe("mounted tmpfs");
    await shell(`/bin/umount /mnt/pve/${id}`);
  });

  it("a mount that an earlier storage left is not taken over", async () => {
    const { id, stack } = fresh();
    await byHand(id);
    await pve1.ssh(["pvesm", "remove", id]);
    expect(await look(id)).toMatch(/mounted/);
    await stack.up(inputs(id, { options: "vers=4.1" }));
    expect((await shell(`findmnt -n -o OPTIONS --mountpoint /mnt/pve/${id}`)).stdout).toMatch(/vers=4\.1/);
    // The same for our own, removed by hand, and moved in the same breath.
    await pve1.ssh(["pvesm", "remove", id]);
    await stack.up(inputs(id, { options: "vers=4.1", export: "/mnt/data/other" }));
    expect((await look(id))?.match(/mounted.*/g)).toEqual(["mounted skydev:/mnt/data/other"]);
  });
});

describe("locks and connections", () => {
  it("a lock that a killed pvesm left is waited for", async () => {
    const { id, stack } = fresh();
    // Taken 80 s ago: Proxmox breaks it after 120.
    await shell(
      "mkdir -p /etc/pve/priv/lock/file-storage_cfg; touch -d '80 seconds ago' /etc/pve/priv/lock/file-storage_cfg",
    );
    const begin = Date.now();
    await stack.up(inputs(id));
    expect(Date.now() - begin).toBeGreaterThan(20_000);
    expect(await look(id)).toMatch(/mounted/);
  });

  it("a connection that is cut in the middle of pvesm add: the next run finishes it", async () => {
    const { id, stack } = fresh();
    await shell(
      "mkdir -p /run/pve-misbehave; printf 'once\\ndisconnect\\nslow 2\\n' >/run/pve-misbehave/pvesm.add.locked",
    );
    expect(await failure(stack.up(inputs(id)))).toMatch(/connection to .* was lost|did not answer/);
    await stack.up(inputs(id));
    expect((await look(id))?.match(/mounted/g)).toHaveLength(1);
    expect(await stack.preview(inputs(id))).toBe("same");
  });

  it("pvesm that is killed in the middle leaves nothing that the next run cannot finish", async () => {
    for (const step of ["locked", "activated", "written"]) {
      const { id, stack } = fresh();
      await shell(
        `mkdir -p /run/pve-misbehave; printf 'once\\ndie\\n' >/run/pve-misbehave/pvesm.add.${step}; rm -rf /etc/pve/priv/lock/file-storage_cfg`,
      );
      expect(await failure(stack.up(inputs(id)))).toMatch(/Unable to add the storage/);
      await shell("rm -rf /etc/pve/priv/lock/file-storage_cfg"); // waiting for it is the test above
      await stack.up(inputs(id));
      expect((await look(id))?.match(/mounted/g)).toHaveLength(1);
    }
  }, 600_000);
});

describe("ids on a shared export", () => {
  const disks = (id: string, lower: number, upper: number, over: Fields = {}) =>
    inputs(id, { export: "/images", content: ["images", "iso"], vmIds: { lower, upper }, ...over });

  it("are claimed, and an overlapping claim of another node is refused and leaves nothing there", async () => {
    const folder = exported("/images");
    const { id, stack } = fresh("one");
    await stack.up(disks(id, 14001, 14999));
    expect(claims(folder)).toEqual(["one 14001-14999"]);
    const rival = new Stack("NfsDumpStorage", "rival", "two");
    stacks.push(rival);
    const said = await failure(rival.up(disks("rival", 14999, 15500, on(pve2))));
    expect(said).toMatch(/14001 to 14999 are claimed by organization\/laws\/one\/NfsDumpStorage/);
    expect(await look("rival", pve2)).toBeUndefined();
    expect(rival.recorded).toBeUndefined();
    await rival.up(disks("rival", 15001, 15500, on(pve2)));
    // A later overlap is an update that is refused, and changes nothing.
    expect(await failure(rival.up(disks("rival", 14500, 15500, on(pve2))))).toMatch(
      /claimed by organization\/laws\/one/,
    );
    expect(claims(folder)).toEqual(["one 14001-14999", "two 15001-15500"]);
    await rival.up(disks("rival", 15001, 15500, on(pve2)));
    // Two storages of one node share one claim.
    const second = fresh("one");
    await second.stack.up(disks(second.id, 14001, 14999));
    await stack.destroy();
    expect(claims(folder)).toContain("one 14001-14999");
    await second.stack.destroy();
    expect(claims(folder)).toEqual(["two 15001-15500"]);
  });

  it("used ids are remembered; only adopt breaks a claim; a broken one shows as drift", async () => {
    const folder = exported("/images2");
    const { id, stack } = fresh("one");
    const want = disks(id, 14001, 14999, { export: "/images2" });
    await stack.up(want);
    await pve1.ssh("printf 'memory: 128\\n' >/etc/pve/qemu-server/14007.conf");
    mkdirSync(join(folder, "dump"), { recursive: true });
    writeFileSync(join(folder, "dump/vzdump-qemu-14009-2026_11_01-10_00_00.vma"), "x");
    const rival = new Stack("NfsDumpStorage", "rival2", "two");
    stacks.push(rival);
    await rival.up(disks("rival2", 14500, 15500, { ...on(pve2), export: "/images2", adopt: true }));
    expect(claims(folder)).toEqual(["two 14500-15500"]);
    await stack.refresh();
    expect(await stack.preview(want)).toBe("update");
    expect(await failure(stack.up(want))).toMatch(/claimed by organization\/laws\/two/);
    await rival.destroy();
    await stack.up(want);
    expect(claims(folder)).toEqual(["one 14001-14999"]);
    await shell("rm -f /etc/pve/qemu-server/*.conf");
    const { ids } = await idsTaken(connect(pve1.connection));
    expect(ids.get(14007)).toBe("was used before"); // its guest is gone
    expect(ids.has(14008)).toBe(false);
    // Whatever run comes by writes down what was used meanwhile; so does the one that gives the claim back.
    const used = () => registered(readFileSync(join(folder, ".pulumi-vmbackup/claims"), "utf8")).used;
    await pve1.ssh("printf 'memory: 128\n' >/etc/pve/qemu-server/14011.conf");
    await stack.up({ ...want, retention: { keepLast: 9 } });
    expect(used()).toEqual([14007, 14009, 14011]);
    await pve1.ssh("printf 'memory: 128\n' >/etc/pve/qemu-server/14013.conf");
    const { vmIds: _ids, ...without } = want;
    await stack.up({ ...without, content: ["iso"] });
    expect(claims(folder)).toEqual([]);
    expect(used()).toEqual([14007, 14009, 14011, 14013]);
    await stack.destroy();
    expect(existsSync(join(folder, "dump/vzdump-qemu-14009-2026_11_01-10_00_00.vma"))).toBe(true); // dumps always stay
  });

  it("two stacks on two nodes at once: one wins, the other is told who", async () => {
    for (let i = 0; i < 3; i++) {
      const folder = exported(`/race${i}`);
      const one = fresh("one");
      const two = fresh("two");
      const ended = await Promise.allSettled([
        one.stack.up(disks(one.id, 14001, 14999, { export: `/race${i}` })),
        two.stack.up(disks(two.id, 14500, 15500, { ...on(pve2), export: `/race${i}` })),
      ]);
      const winner = ended[0]?.status === "fulfilled" ? "one" : "two";
      const lost = ended.filter((end) => end.status === "rejected");
      expect(lost).toHaveLength(1);
      expect(String(lost[0]?.reason)).toContain(`claimed by organization/laws/${winner}/`);
      expect(claims(folder)).toHaveLength(1);
      await one.stack.destroy();
      await two.stack.destroy();
    }
  }, 600_000);
});

describe("two nodes that share one export", () => {
  it("a dump that was copied there by hand is seen from both", async () => {
    const folder = exported("/shared");
    const one = fresh("one", "shared");
    const two = new Stack("NfsDumpStorage", "shared", "two");
    stacks.push(two);
    await one.stack.up(inputs("shared", { export: "/shared" }));
    await two.up(inputs("shared", { export: "/shared", ...on(pve2) }));
    writeFileSync(join(folder, "dump/vzdump-qemu-107-2023_07_26-02_23_55.vma"), "x");
    for (const stack of [one.stack, two]) {
      await stack.refresh();
      expect(stack.recorded?.outputs.status).toMatchObject({ dumps: 1, newestDump: "2023-07-26T02:23:55.000Z" });
    }
  });
});

it("check refuses what the program alone shows", async () => {
  const { stack } = fresh();
  await expect(stack.check(inputs("x1", { content: ["images"] }))).rejects.toThrow(CheckFailed);
});
