// RestoredTemplate on the Proxmox stand-ins: the laws, and all the bad luck that a restore can have. What is asserted is looked up
// in Proxmox's own files and tools, never through our own read.
import { readFileSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { closeAll } from "../../provider/host.js";
import { hooks } from "../../provider/host-ledger.js";
import { laws } from "../laws.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";
import { A, B, DUMPS, restoresOn, until } from "./restores.js";

const { node } = useHosts({ node: { pve: true } });

const { setUp, conf, volumes, vanish, order, slow, unit, halfway } = restoresOn(node);

/** A law's tag is `lawN`: each has an id of its own. */
const idOf = (tag: string) => 14000 + Number(tag.replace(/\D/g, ""));

const inputs = (over: Fields): Fields => ({
  host: node.connection,
  from: { archive: A },
  to: { storage: "local" },
  ...over,
});

laws({
  kind: "RestoredTemplate",
  inputs: (tag) => inputs({ vmId: idOf(tag), onDelete: "destroy" }),
  look: (tag) => conf(idOf(tag)),
  vanish: (tag) => vanish(idOf(tag)),
  foreign: async (tag) => {
    await setUp();
    await node.ssh(["qm", "create", String(idOf(tag)), "--name", "foreign", "--memory", "64", "--scsi0", "local:0.01"]);
  },
  token: async (tag) => /vmgenid: (\S+)/.exec((await conf(idOf(tag))) ?? "")?.[1],
  bad: [
    ["no source", { from: {} }, "from"],
    ["two sources", { from: { archive: A, storage: "local" } }, "from.storage"],
    ["a storage without a guest", { from: { storage: "local" } }, "from.vmId"],
    ["a path", { from: { archive: "/mnt/x.vma" } }, "from.archive"],
    ["a time in words", { from: { storage: "local", vmId: 101, at: "yesterday" } }, "from.at"],
    ["not there yet: a directory", { from: { directory: "/d", guest: "g" } }, "from.directory"],
    ["not there yet: a libvirt place", { to: { pool: "default" } }, "to.pool"],
    ["no place", { to: [] }, "to"],
    ["no id", { vmId: undefined }, "vmId"],
    ["an id below 100", { vmId: 99 }, "vmId"],
    ["a range upside down", { vmId: { lower: 14999, upper: 14001 } }, "vmId.upper"],
    ["a name with a blank", { name: "my guest" }, "name"],
    ["a tag with a blank", { tags: ["my tag"] }, "tags[0]"],
    ["a negative limit", { bwlimit: -1 }, "bwlimit"],
    ["disks", { disks: {} }, "disks"],
    ["adopting of a range", { adopt: true, vmId: { lower: 14001, upper: 14999 } }, "vmId"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
  ],
  badOnHost: [
    ["an unknown storage", { from: { archive: A.replace("local", "nosuch") } }, /no storage nosuch.*local/s],
    [
      "an archive that is gone",
      { from: { archive: A.replace("_20-", "_25-") } },
      /does not exist.*vzdump-qemu-101-2026_11_20/s,
    ],
    ["a guest without backups", { from: { storage: "local", vmId: 999 } }, /no backup of guest 999.*101, 102/s],
    [
      "a time without a backup",
      { from: { storage: "local", vmId: 101, at: "2020_01_01-00_00_00" } },
      /made at 2020_01_01/,
    ],
    ["another guest's name", { from: { storage: "local", vmId: 101, guest: "web" } }, /named web.*db101/s],
    ["an unknown place", { to: { storage: "nosuch" } }, /nosuch does not exist/],
    ["a place that takes no images", { to: { storage: "dumps" } }, /dumps takes no disk images/],
  ],
  mutable: [
    ["name", { name: "renamed" }, /name: renamed/],
    ["tags", { tags: ["Golden", "b"] }, /tags: b;golden/],
    ["description", { description: "two\nlines: ü %" }, /two\n#lines%3A %C3%BC/],
    ["pool", { pool: "golden" }, /./],
    ["bwlimit", { bwlimit: 50_000 }, /./],
  ],
  optional: [
    ["name", { name: "renamed" }, /name: renamed/],
    ["tags", { tags: ["golden"] }, /tags: golden/],
    ["description", { description: "mine" }, /#mine/],
    ["pool", { pool: "golden" }, undefined],
  ],
  replacing: [],
});

// ---------------------------------------------------------------- what is special about restores

describe("RestoredTemplate on the stand-ins", () => {
  const stacks: Stack[] = [];
  let id = 15000;
  const stackFor = (stack = "dev") => {
    const made = new Stack("RestoredTemplate", `t${++id}`, stack);
    stacks.push(made);
    return made;
  };
  const mine = (over: Fields = {}) => inputs({ vmId: id, onDelete: "destroy", ...over });
  const outputs = (stack: Stack) => stack.recorded?.outputs as Record<string, unknown> & { status: Fields };
  /** Stops where the first step has begun, as a killed pulumi does; the job goes on. */
  async function begun(stack: Stack, over: Fields): Promise<void> {
    hooks.afterStep = () => {
      throw new Error("killed");
    };
    await expect(stack.up(over)).rejects.toThrow("killed");
    delete hooks.afterStep;
    closeAll();
  }
  /** What is none of ours: it has to be the same afterwards, byte for byte. */
  const bystanders = async () =>
    (await node.ssh("sha256sum /etc/pve/qemu-server/9*.conf /var/lib/vz/images/9*/*")).stdout;
  const ids = async () =>
    (await node.ssh("cd /etc/pve/qemu-server && ls")).stdout.split("\n").map((f) => Number.parseInt(f, 10));

  beforeEach(setUp);
  afterEach(async () => {
    delete hooks.afterStep;
    await node.ssh("mkdir -p /run/pve-misbehave; rm -f /run/pve-misbehave/*");
    for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
  });

  it("tells id, place, volumes, source and what it changed; the guest carries its owner's mark", async () => {
    const stack = stackFor("prod");
    await stack.up(mine({ tags: ["golden"] }));
    const text = (await conf(id)) ?? "";
    expect(text).toMatch(/template: 1/);
    expect(text).not.toMatch(/onboot: 1/);
    expect(text).toMatch(/pulumi-vmbackup organization\/laws\/prod\/RestoredTemplate/);
    expect(await volumes(id)).toEqual([`base-${id}-disk-0.qcow2`, `base-${id}-disk-1.qcow2`]);
    expect(outputs(stack)).toMatchObject({
      guestId: id,
      guestName: "db101",
      place: { storage: "local" },
      source: A,
      volumes: { scsi0: `local:${id}/base-${id}-disk-0.qcow2`, scsi1: `local:${id}/base-${id}-disk-1.qcow2` },
      status: { isTemplate: true, running: false, clones: [], changed: ["onboot"] },
    });
    expect(outputs(stack).status.bytes).toBeGreaterThan(10 << 20);
    expect(outputs(stack).sourceTime).toMatch(/^2026-11-20T\d\d:00:00.000Z$/);
    expect(JSON.stringify(outputs(stack)).length).toBeLessThan(2048);
    const read = await stack.calls.read(String(id), { host: node.connection });
    expect(read.props).toMatchObject({ guestId: id, guestName: "db101" });
    await expect(stack.calls.read("999999", { host: node.connection })).rejects.toThrow(/does not exist/);
  });

  it("refuses archives that are empty, garbage or a container's before anything is made", async () => {
    await node.ssh(
      `cd ${DUMPS}; : >vzdump-qemu-105-2026_11_01-10_00_00.vma.zst; head -c 100000 /dev/urandom >vzdump-qemu-105-2026_11_02-10_00_00.vma; echo x >vzdump-lxc-106-2026_11_01-10_00_00.tar.zst`,
    );
    const stack = stackFor();
    const at = (name: string) => stack.up(mine({ from: { archive: `local:backup/vzdump-${name}` } }));
    await expect(at("qemu-105-2026_11_01-10_00_00.vma.zst")).rejects.toThrow(/is empty/);
    await expect(at("qemu-105-2026_11_02-10_00_00.vma")).rejects.toThrow(/cannot be read[\s\S]*wrong magic/);
    await expect(at("lxc-106-2026_11_01-10_00_00.tar.zst")).rejects.toThrow(/container/);
    await expect(stack.up(mine({ from: { storage: "local", vmId: 106 } }))).rejects.toThrow(/container/);
    expect(await conf(id)).toBeUndefined();
    expect(stack.recorded).toBeUndefined();
  });

  it("asks which one is meant when an id was used by two guests, or the clock went back", async () => {
    const prague = readFileSync("/usr/share/zoneinfo/Europe/Prague").toString("base64");
    await node.ssh(
      `cd ${DUMPS}; cp vzdump-qemu-101-2026_11_20-10_00_00.vma.zst vzdump-qemu-107-2026_11_20-10_00_00.vma.zst; cp vzdump-qemu-102-2026_11_20-11_00_00.vma.zst vzdump-qemu-107-2026_11_21-10_00_00.vma.zst
       for t in 2026_10_24-02_15_00 2026_10_25-02_15_00 2026_10_25-02_45_00; do cp vzdump-qemu-101-2026_11_20-10_00_00.vma.zst vzdump-qemu-108-$t.vma.zst; done
       mkdir -p /usr/share/zoneinfo/Europe; base64 -d >/usr/share/zoneinfo/Europe/Prague; cp -P /etc/localtime /root/localtime 2>/dev/null; ln -sfn /usr/share/zoneinfo/Europe/Prague /etc/localtime`,
      { input: prague },
    );
    try {
      const stack = stackFor();
      await expect(stack.up(mine({ from: { storage: "local", vmId: 107 } }))).rejects.toThrow(
        /several guests: db101, db102/,
      );
      await expect(stack.up(mine({ from: { storage: "local", vmId: 108 } }))).rejects.toThrow(
        /cannot be told.*2026_10_25-02_15_00.*2026_10_25-02_45_00/s,
      );
      await stack.up(mine({ from: { storage: "local", vmId: 107, guest: "db101" } }));
      expect(outputs(stack).source).toMatch(/107-2026_11_20/);
      await node.ssh(
        `cp ${DUMPS}/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst ${DUMPS}/vzdump-qemu-107-2026_11_22-10_00_00.vma.zst`,
      );
      expect(await stack.preview(mine({ from: { storage: "local", vmId: 107, guest: "db101" } }))).toBe("same"); // kept
    } finally {
      await node.ssh(
        `rm -f ${DUMPS}/vzdump-qemu-10[78]-*; rm -f /etc/localtime; mv /root/localtime /etc/localtime 2>/dev/null || true`,
      );
    }
  });

  it("refuses an id that a container, a volume or another guest's dump has", async () => {
    await node.ssh("pvesm alloc local 14901 vm-14901-disk-5.raw 1M; mkdir -p /etc/pve/lxc; : >/etc/pve/lxc/14902.conf");
    const stack = stackFor();
    await expect(stack.up(mine({ vmId: 14901 }))).rejects.toThrow(/14901 is not free: the volume/);
    await expect(stack.up(mine({ vmId: 14902 }))).rejects.toThrow(/Conflict|exists already/);
    await expect(stack.up(mine({ vmId: 102 }))).rejects.toThrow(/102 is not free: the dump/); // db102's, and we restore db101
    expect(await volumes(14901)).toEqual(["vm-14901-disk-5.raw"]);
    await node.ssh("rm /etc/pve/lxc/14902.conf; pvesm free local:14901/vm-14901-disk-5.raw");
    // A guest that comes back under its own id inherits its own past.
    await stack.up(mine({ vmId: 101, onDelete: "destroy" }));
    expect(await conf(101)).toMatch(/name: db101/);
  });

  it("takes the place with most room, and keeps it", async () => {
    await node.ssh(
      "mkdir -p /mnt/small; mount -t tmpfs -o size=8m tmpfs /mnt/small; pvesm add dir small --path /mnt/small --content images",
    );
    const stack = stackFor();
    await expect(stack.up(mine({ to: { storage: "small" } }))).rejects.toThrow(
      /small has \d+ bytes free, and the data is/,
    );
    await stack.up(mine({ to: [{ storage: "small" }, { storage: "second" }] }));
    expect(outputs(stack).place).toEqual({ storage: "second" });
    expect(await stack.preview(mine({ to: [{ storage: "small" }, { storage: "second" }] }))).toBe("same");
    await node.ssh("pvesm remove small; umount /mnt/small");
  });

  it("restores a disk of 512 GiB with little data where 512 GiB are not free, and says so", async () => {
    await node.ssh(`python3 - ${DUMPS}`, {
      input: `import sys; sys.path.insert(0, "/usr/lib/pve-stand-ins"); import recorded_archives as r
r.CONFIG = r.CONFIG.replace("size=64M", "size=512G"); r.DUMPS = (("110", "2026_11_20-10_00_00", "zst", 1795305480),); r.main(sys.argv[1])\n`,
    });
    const warned = vi.spyOn(console, "warn").mockImplementation(() => {});
    const stack = stackFor();
    await stack.up(mine({ from: { storage: "local", vmId: 110 } }));
    expect(warned.mock.calls.flat().join()).toMatch(/may grow to \d{12,} bytes, and local had \d+ free/);
    expect(await conf(id)).toMatch(/template: 1/);
    warned.mockRestore();
  });

  it("an id that is taken between our look and the restore: a range goes on, a number says so, the other guest stays", async () => {
    const grab = (vmid: number) => order("qmrestore.start", `once\nrun qm create ${vmid} --name other --memory 64\n`);
    const one = stackFor();
    await grab(id);
    await expect(one.up(mine())).rejects.toThrow(/already exists on node/);
    expect(one.recorded).toBeUndefined();
    expect(await conf(id)).toMatch(/name: other/);
    const some = stackFor();
    const range = { lower: 16001, upper: 16009 };
    await grab(16001);
    await some.up(mine({ vmId: range }));
    expect(outputs(some).guestId).toBe(16002);
    expect(await conf(16001)).toMatch(/name: other/);
    expect(await some.preview(mine({ vmId: range }))).toBe("same");
    await node.ssh(`qm destroy ${id - 1}; qm destroy 16001`);
  });

  it("several stacks at once never get one id twice", async () => {
    const range = { lower: 16101, upper: 16109 };
    const rivals = ["a", "b", "c"].map((name) => stackFor(name));
    await Promise.all(rivals.map((stack) => stack.up(mine({ vmId: range }))));
    const got = rivals.map((stack) => outputs(stack).guestId);
    expect(new Set(got).size).toBe(3);
    for (const vmid of got) expect(await conf(Number(vmid))).toMatch(/template: 1/);
  });

  it("goes on when the connection is lost in the middle of it", async () => {
    const stack = stackFor();
    await slow(4);
    const up = stack.up(mine());
    await halfway(id);
    await node.ssh("pkill -9 -f 'sshd: root@notty'", { reject: false });
    await up;
    expect(await conf(id)).toMatch(/template: 1/);
    expect(outputs(stack).status.seconds).toBeGreaterThan(2);
  });

  it.each(["the unit is killed", "the node is started anew"])(
    "%s at half: the next up has one guest and no stray volume",
    async (how) => {
      await node.ssh(
        "[ -e /etc/pve/qemu-server/9001.conf ] || qm create 9001 --memory 64 --scsi0 local:0.01; pvesm alloc local 9002 vm-9002-disk-0.raw 1M 2>/dev/null || true",
      );
      const before = await bystanders();
      const stack = stackFor();
      await slow(60);
      await begun(stack, mine());
      await halfway(id);
      if (how === "the unit is killed") await node.ssh(`systemctl kill --signal=KILL ${await unit()}`);
      else {
        await node.crash();
        await node.up();
        await node.ssh("mkdir -p /run/pve-misbehave");
      }
      await until(
        async () =>
          (await unit()) === "" ||
          !(await node.ssh(`systemctl is-active ${await unit()}`, { reject: false })).stdout.includes("active\n"),
      );
      await node.ssh("rm -f /run/pve-misbehave/restore-seconds");
      await stack.up(mine());
      expect(await conf(id)).toMatch(/template: 1/);
      expect(await volumes(id)).toEqual([`base-${id}-disk-0.qcow2`, `base-${id}-disk-1.qcow2`]);
      expect(await bystanders()).toBe(before);
      expect(await stack.preview(mine())).toBe("same");
      await stack.destroy();
      expect(await volumes(id)).toEqual([]);
      expect(await conf(id)).toBeUndefined();
    },
  );

  it("a truncated archive fails in the middle; another archive or destroy clears up", async () => {
    await node.ssh(
      `head -c 15000000 ${DUMPS}/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst >${DUMPS}/vzdump-qemu-104-2026_11_01-10_00_00.vma.zst`,
    );
    const torn = { archive: "local:backup/vzdump-qemu-104-2026_11_01-10_00_00.vma.zst" };
    const stack = stackFor();
    await expect(stack.up(mine({ from: torn }))).rejects.toThrow(/qmrestore exited[\s\S]*short vma extent/);
    expect(await conf(id)).toBe("memory: 128");
    expect(stack.recorded?.unfinished).toBe(true);
    await stack.up(mine());
    expect(await conf(id)).toMatch(/template: 1/);
    const other = stackFor();
    await expect(other.up(mine({ from: torn }))).rejects.toThrow(/short vma extent/);
    await other.destroy();
    expect(await conf(id)).toBeUndefined();
  });

  it("an archive that is pruned in the middle of its restore fails as any other", async () => {
    const gone = "vzdump-qemu-109-2026_11_01-10_00_00.vma.zst";
    await node.ssh(`cp ${DUMPS}/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst ${DUMPS}/${gone}`);
    const stack = stackFor();
    await order("qmrestore.header", `run rm -f ${DUMPS}/${gone}\n`);
    await expect(stack.up(mine({ from: { storage: "local", vmId: 109 } }))).rejects.toThrow(/restore/);
    await node.ssh("rm -f /run/pve-misbehave/*");
    await expect(stack.up(mine({ from: { storage: "local", vmId: 109 } }))).rejects.toThrow(/no backup of guest 109/);
    await stack.up(mine());
    expect(await conf(id)).toMatch(/template: 1/);
  });

  it("changed from A to B while A is being restored: says so, and changes over afterwards", async () => {
    const stack = stackFor();
    await slow(6);
    await begun(stack, mine());
    const other = mine({ from: { archive: B } });
    await expect(stack.up(other)).rejects.toThrow(/101-2026.*is still being restored as guest.*102-2026/s);
    await until(async () => (await unit()) === "");
    await node.ssh("rm -f /run/pve-misbehave/*");
    await stack.up(mine());
    expect(await conf(id)).toMatch(/name: db101/);
    await stack.up(other);
    expect(await conf(id)).toMatch(/name: db102/);
    expect(await conf(id)).toMatch(/template: 1/);
    expect(await volumes(id)).toEqual([`base-${id}-disk-0.qcow2`, `base-${id}-disk-1.qcow2`]);
    expect(outputs(stack).source).toBe(B);
    expect(await stack.preview(other)).toBe("same");
  });

  it("in place only after the new archive was read to its end, and only what nobody uses", async () => {
    const torn = { archive: "local:backup/vzdump-qemu-104-2026_11_03-10_00_00.vma.zst" };
    await node.ssh(
      `head -c 15000000 ${DUMPS}/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst >${DUMPS}/vzdump-qemu-104-2026_11_03-10_00_00.vma.zst`,
    );
    const stack = stackFor();
    await stack.up(mine());
    const before = await conf(id);
    await expect(stack.up(mine({ from: torn }))).rejects.toThrow(/read local:backup\/vzdump-qemu-104/);
    expect(await conf(id)).toBe(before);
    expect(await stack.up(mine())).toBe("update"); // and back
    expect(await conf(id)).toBe(before);
    await node.ssh(`qm clone ${id} 17001`);
    await expect(stack.up(mine({ from: { archive: B } }))).rejects.toThrow(/linked clones.*17001/);
    expect(await conf(id)).toBe(before);
    await node.ssh("qm destroy 17001");
  });

  it("with a range the new guest comes first and the old one goes", async () => {
    const range = { lower: 16201, upper: 16209 };
    const stack = stackFor();
    await stack.up(mine({ vmId: range }));
    expect(outputs(stack).guestId).toBe(16201);
    await stack.up(mine({ vmId: range, from: { archive: B } }));
    expect(outputs(stack).guestId).toBe(16202);
    expect(await conf(16201)).toBeUndefined();
    expect(await volumes(16201)).toEqual([]);
    expect(await conf(16202)).toMatch(/name: db102/);
    expect(await stack.preview(mine({ vmId: range, from: { archive: B } }))).toBe("same");
    expect(await stack.refresh()).toBe("there");
    await stack.destroy();
    expect((await ids()).filter((vmid) => vmid >= 16201 && vmid <= 16209)).toEqual([]);
  });

  it.each(["local", "thin"])("delete refuses while linked clones exist, on %s, and names them", async (storage) => {
    const stack = stackFor();
    await stack.up(mine({ to: { storage } }));
    await node.ssh(`qm clone ${id} 17101`);
    const before = [await conf(id), await volumes(id), await volumes(17101)];
    await expect(stack.destroy()).rejects.toThrow(/linked clones.*17101/);
    expect([await conf(id), await volumes(id), await volumes(17101)]).toEqual(before);
    await stack.refresh();
    expect(outputs(stack).status.clones).toEqual(["17101"]);
    await node.ssh("qm destroy 17101");
    await stack.destroy();
    expect(await conf(id)).toBeUndefined();
    expect(await volumes(id)).toEqual([]);
  });

  it("delete leaves what somebody changed, protected or started by hand", async () => {
    const stack = stackFor();
    const plain = mine({ template: false });
    await stack.up(plain);
    const refuses = async (make: string, undo: string, why: RegExp) => {
      await node.ssh(make);
      await expect(stack.destroy()).rejects.toThrow(why);
      expect(await conf(id)).toBeDefined();
      await node.ssh(undo);
    };
    await refuses(`qm set ${id} --memory 2048`, `qm set ${id} --memory 1024`, /memory was changed by hand/);
    await refuses(`qm set ${id} --protection 1`, `qm set ${id} --protection 0`, /protected/);
    await refuses(
      `qm set ${id} --scsi7 local:0.01`,
      `qm set ${id} --delete scsi7; qm set ${id} --delete unused0`,
      /scsi7/,
    );
    await refuses(
      `mkdir -p /run/qemu-server; echo 1 >/run/qemu-server/${id}.pid`,
      `rm /run/qemu-server/${id}.pid`,
      /it runs/,
    );
    await refuses(
      `qm start ${id}`,
      `qm stop ${id}; sed -i '/qmstart:${id}:/d' /var/log/pve/tasks/index`,
      /was started since/,
    );
    await stack.destroy();
    expect(await conf(id)).toBeUndefined();
  });

  it("somebody's own conversion, removal and restore under the same id", async () => {
    const stack = stackFor();
    const plain = mine({ template: false });
    await stack.up(plain);
    await node.ssh(`qm template ${id}`);
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(plain)).toBe("update");
    await expect(stack.up(plain)).rejects.toThrow(/turns no template back/);
    await node.ssh(`qm destroy ${id} && qmrestore ${A} ${id} --storage local`);
    const foreign = await conf(id);
    await expect(stack.up({ ...plain, tags: ["x"] })).rejects.toThrow(/is not the one that was restored/);
    await stack.destroy();
    expect(await conf(id)).toBe(foreign);
    expect(await volumes(id)).toHaveLength(2);
    await vanish(id);
  });

  it("keeps what it adopted, unless told otherwise", async () => {
    const stack = stackFor();
    await node.ssh(`qm create ${id} --name theirs --memory 64 --scsi0 local:0.01`);
    const adopt = inputs({ vmId: id, adopt: true });
    await stack.up(adopt);
    await stack.destroy();
    expect(await conf(id)).toMatch(/name: theirs/);
    await node.ssh(`qm destroy ${id}`);
  });
});
