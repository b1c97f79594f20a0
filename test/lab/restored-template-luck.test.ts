// RestoredTemplate and what others do meanwhile: volumes that look like ours, room that is not there, a removal that is not followed by a
// restore, a conversion that stops. What is asserted is looked up in Proxmox's own files and tools, never through our own read.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { hooks } from "../../provider/host-ledger.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";
import { A, B, DUMPS, restoresOn, until } from "./restores.js";

const { node } = useHosts({ node: { pve: true } });
const { setUp, conf, volumes, vanish, order, slow, behave, unit, halfway, archive } = restoresOn(node);

const stacks: Stack[] = [];
let id = 15000;
function stackFor(stack = "dev"): Stack {
  const made = new Stack("RestoredTemplate", `t${++id}`, stack);
  stacks.push(made);
  return made;
}
const mine = (over: Fields = {}): Fields => ({
  host: node.connection,
  from: { archive: A },
  to: { storage: "local" },
  vmId: id,
  onDelete: "destroy",
  ...over,
});
const outputs = (stack: Stack) => stack.recorded?.outputs as Record<string, unknown> & { status: Fields };
const BOTH = () => [`base-${id}-disk-0.qcow2`, `base-${id}-disk-1.qcow2`];
/** The tools' own words of the changing steps, as they begin. */
async function steps(work: () => Promise<unknown>): Promise<string[]> {
  const run: string[] = [];
  hooks.beforeStep = (_line, command) => void run.push((command.shown ?? command.argv).slice(0, 2).join(" "));
  await work();
  delete hooks.beforeStep;
  return run;
}
/** A small storage, so that room is a matter of a few MiB. */
const small = (mib: number) =>
  node.ssh(
    `mkdir -p /mnt/small; umount /mnt/small 2>/dev/null; mount -t tmpfs -o size=${mib}m tmpfs /mnt/small; pvesm add dir small --path /mnt/small --content images 2>/dev/null || true`,
  );

beforeEach(setUp);
afterEach(async () => {
  delete hooks.beforeStep;
  delete hooks.afterStep;
  vi.restoreAllMocks();
  await behave();
  for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
});

describe("volumes that look like ours", () => {
  it("of a restore that somebody else runs under the same id: destroy leaves them, and up says whose id it is", async () => {
    const stack = stackFor();
    await stack.up(mine());
    await node.ssh(`qm destroy ${id}`);
    await slow(60);
    const theirs = `theirs-${id}`;
    await node.ssh(["systemd-run", "--quiet", `--unit=${theirs}`, "qmrestore", B, String(id), "--storage", "local"]);
    await halfway(id);
    const before = await volumes(id);
    await expect(stack.up(mine({ tags: ["x"] }))).rejects.toThrow(/is not the one that was restored/);
    expect(await stack.refresh()).toBe("gone");
    await stack.destroy();
    const other = stackFor("other");
    await expect(other.up(mine({ vmId: id - 1 }))).rejects.toThrow(/exists already/);
    expect(await volumes(id - 1)).toEqual(before);
    expect((await node.ssh(["systemctl", "is-active", theirs])).stdout).toBe("active");
    await node.ssh(`systemctl kill --signal=KILL ${theirs}`, { reject: false });
    await until(async () => (await node.ssh(`systemctl is-active ${theirs}`, { reject: false })).stdout !== "active");
    await vanish(id - 1);
  });

  it("destroyed without a refresh, with a snapshot's disk of the next guest of that id: it stays", async () => {
    const stack = stackFor();
    await stack.up(mine());
    await node.ssh(`qm destroy ${id}`);
    // Its one disk is named in a snapshot only.
    await node.ssh(`pvesm alloc local ${id} vm-${id}-disk-0.qcow2 1M --format qcow2`);
    await node.ssh(["tee", `/etc/pve/qemu-server/${id}.conf`], {
      input: `memory: 64\nparent: one\n\n[one]\nmemory: 64\nscsi0: local:${id}/vm-${id}-disk-0.qcow2,size=1M\nsnaptime: 1\n`,
    });
    await stack.destroy();
    expect(await volumes(id)).toEqual([`vm-${id}-disk-0.qcow2`]);
    await node.ssh(`rm /etc/pve/qemu-server/${id}.conf; pvesm free local:${id}/vm-${id}-disk-0.qcow2`);
  });

  it("taken between our look and the removal of a volume that was left over: it stays", async () => {
    const stack = stackFor();
    await stack.up(mine());
    await node.ssh(`rm /etc/pve/qemu-server/${id}.conf`); // without the disks
    hooks.beforeStep = async (_line, { shown = [] }) => {
      if (shown.join(" ").startsWith("pvesm free"))
        await node.ssh(["tee", `/etc/pve/qemu-server/${id}.conf`], { input: "memory: 64\n" });
    };
    await expect(stack.destroy()).rejects.toThrow(/may be its guest's/);
    expect(await volumes(id)).toEqual(BOTH());
    hooks.beforeStep = async (_line, { shown = [] }) => {
      if (shown.join(" ").startsWith("pvesm free"))
        await node.ssh(
          `rm -f /etc/pve/qemu-server/${id}.conf; setsid flock /var/lock/qemu-server/lock-${id}.conf sleep 5 >/dev/null 2>&1 & sleep 0.5`,
        );
    };
    await node.ssh(`rm -f /etc/pve/qemu-server/${id}.conf`);
    await expect(stack.destroy()).rejects.toThrow(/something is at work on guest/);
    expect(await volumes(id)).toEqual(BOTH());
    delete hooks.beforeStep;
    await until(
      async () =>
        (await node.ssh(`flock -n /var/lock/qemu-server/lock-${id}.conf true`, { reject: false })).exitCode === 0,
    );
    await stack.destroy(); // nobody has them
    expect(await volumes(id)).toEqual([]);
  });

  it("an id with a volume is not free, also when dumps of the same guest lie there", async () => {
    const stack = stackFor();
    await node.ssh("pvesm alloc local 101 vm-101-disk-7.raw 1M");
    await expect(stack.up(mine({ vmId: 101 }))).rejects.toThrow(/101 is not free: the volume/);
    expect(await volumes(101)).toEqual(["vm-101-disk-7.raw"]);
    await node.ssh("pvesm free local:101/vm-101-disk-7.raw");
  });

  it("a storage that is down may hold them: neither up nor destroy takes it for empty", async () => {
    const stack = stackFor();
    await stack.up(mine({ to: { storage: "second" } }));
    await node.ssh(`rm /etc/pve/qemu-server/${id}.conf; pvesm set second --disable 1`);
    await expect(stack.destroy()).rejects.toThrow(/second does not answer/);
    await node.ssh("pvesm set second --disable 0");
    await stack.destroy();
    expect(await volumes(id)).toEqual([]);
  });

  it("a guest without a name is another one than those of the same id with one", async () => {
    await archive({ vmId: 120, stamp: "2026_11_01-10_00_00", data: 1, name: "web" });
    await archive({ vmId: 120, stamp: "2026_11_02-10_00_00", data: 1, name: null });
    const from = { storage: "local", vmId: 120 };
    const stack = stackFor();
    await expect(stack.up(mine({ from }))).rejects.toThrow(/several guests: one without a name, web/);
    await stack.up(mine({ from: { ...from, guest: "web" } }));
    expect(await conf(id)).toMatch(/name: web/);
  });
});

describe("delete", () => {
  it("refuses what is managed by HA, locked or has snapshots", async () => {
    const stack = stackFor();
    await stack.up(mine({ template: false }));
    const refuses = async (make: string, undo: string, why: RegExp) => {
      await node.ssh(make);
      const before = [await conf(id), await volumes(id)];
      await expect(stack.destroy()).rejects.toThrow(why);
      expect([await conf(id), await volumes(id)]).toEqual(before);
      await node.ssh(undo);
    };
    const ha = "/etc/pve/ha/resources.cfg";
    await refuses(`mkdir -p /etc/pve/ha; printf 'vm: ${id}\\n\\tstate stopped\\n' >${ha}`, `rm ${ha}`, /managed by HA/);
    await refuses(`qm set ${id} --lock backup`, `qm unlock ${id}`, /locked \(backup\)/);
    await refuses(`qm snapshot ${id} before`, `qm delsnapshot ${id} before`, /has snapshots: before/);
    await stack.destroy();
    expect(await conf(id)).toBeUndefined();
    expect(await volumes(id)).toEqual([]);
  });

  it("that keeps the guest says so", async () => {
    const said: string[] = [];
    vi.spyOn(console, "log").mockImplementation((text) => void said.push(String(text)));
    const stack = stackFor();
    await stack.up(mine({ onDelete: "keep" }));
    await stack.destroy();
    expect(await conf(id)).toMatch(/template: 1/);
    expect(said.join("\n")).toMatch(new RegExp(`RestoredTemplate ${id} on ${node.name}: guest ${id} is kept`));
    await vanish(id);
  });
});

describe("room", () => {
  it("a thick group must hold the whole size; what fits has it, and gives it back", async () => {
    await node.ssh(
      "mkdir -p /var/lib/pve-lvm/thick; echo 134217728 >/var/lib/pve-lvm/thick.size; pvesm add lvm thick --vgname thick --content images",
    );
    const huge = await archive({ vmId: 121, data: 8, size: 512 * 1024 });
    const big = await archive({ vmId: 122, data: 4, size: 100 });
    const other = await archive({ vmId: 123, data: 4, size: 96 });
    const stack = stackFor();
    const plain = { to: { storage: "thick" }, template: false };
    await expect(stack.up(mine({ ...plain, from: { archive: huge } }))).rejects.toThrow(
      /thick has \d+ bytes free, and reserves the whole 549755813888 bytes/,
    );
    expect(await conf(id)).toBeUndefined();
    // The sparse one has room on the directory
    await stack.up(mine({ ...plain, from: { archive: big } }));
    expect(await volumes(id)).toEqual([`vm-${id}-disk-0`]);
    expect(outputs(stack).place).toEqual({ storage: "thick" });
    const second = stackFor();
    await expect(second.up(mine({ ...plain, from: { archive: other } }))).rejects.toThrow(/thick has \d+ bytes free/);
    await stack.destroy();
    await second.up(mine({ ...plain, from: { archive: other } }));
    expect(await volumes(id)).toEqual([`vm-${id}-disk-0`]);
    // In place what goes makes room: a template, as the other form is never replaced.
    await node.ssh(["qm", "template", String(id)]);
    const template = { to: { storage: "thick" }, from: { archive: other } };
    await second.up(mine(template));
    await second.up(mine({ ...template, from: { archive: big } }));
    expect(await conf(id)).toMatch(/name: made122/);
  });

  it("what an archive tells of its data counts: plain, or zstd with a size; of a stream the warning says that it is unknown", async () => {
    await small(16);
    const to = { storage: "small" };
    const plain = await archive({ vmId: 124, data: 32, size: 256, by: "plain" });
    const sized = await archive({ vmId: 125, data: 32, size: 256, by: "zstd FILE" });
    const stream = await archive({ vmId: 126, data: 4, size: 256 });
    const stack = stackFor();
    await expect(stack.up(mine({ to, from: { archive: plain } }))).rejects.toThrow(/the data is 33\d{6} bytes\./);
    await expect(stack.up(mine({ to, from: { archive: sized } }))).rejects.toThrow(/the data is 33\d{6} bytes\./);
    const warned = vi.spyOn(console, "warn").mockImplementation(() => {});
    await stack.up(mine({ to, from: { archive: stream } }));
    expect(warned.mock.calls.flat().join()).toMatch(/may grow to 268435456 bytes.*how much more is not known/);
  });

  it("in place it is proven with the data that the reading counted, before anything is removed", async () => {
    await small(24);
    const to = { storage: "small" };
    const first = await archive({ vmId: 127, data: 4, size: 256 });
    const much = await archive({ vmId: 128, data: 64, size: 256 }); // a few KiB as it lies there
    const stack = stackFor();
    vi.spyOn(console, "warn").mockImplementation(() => {});
    await stack.up(mine({ to, from: { archive: first } }));
    const before = [await conf(id), await volumes(id)];
    const run = await steps(() =>
      expect(stack.up(mine({ to, from: { archive: much } }))).rejects.toThrow(/the data is 67108864 bytes\./),
    );
    expect(run).toEqual(["vma verify"]);
    expect([await conf(id), await volumes(id)]).toEqual(before);
    await stack.up(mine({ to, from: { archive: first } }));
    expect([await conf(id), await volumes(id)]).toEqual(before);
  });
});

describe("a change to another archive", () => {
  it("in place, failed after the removal: it is unfinished and names the old archive, which brings the guest back", async () => {
    const stack = stackFor();
    await stack.up(mine());
    await order("qmrestore.data", "once\nfail no space left\n");
    const failure = await stack.up(mine({ from: { archive: B } })).catch((error: unknown) => error);
    expect(String(failure)).toContain(`The guest that ${A} had been restored to was removed for this.`);
    expect(await conf(id)).toBe("memory: 128");
    await stack.up(mine());
    expect(await conf(id)).toMatch(/name: db101/);
    expect(await volumes(id)).toEqual(BOTH());
    expect(await stack.preview(mine())).toBe("same");
  });

  it("in place, the new archive pruned between the removal and the restore: the same", async () => {
    const gone = await archive({ vmId: 129, data: 1 });
    const stack = stackFor();
    await stack.up(mine());
    await order("qm.destroy.disks", `once\nrun rm ${DUMPS}/${gone.slice(gone.indexOf("/") + 1)}\n`);
    const failure = await stack.up(mine({ from: { archive: gone } })).catch((error: unknown) => error);
    expect(String(failure)).toMatch(/vzdump-qemu-129-\S+ does not exist/);
    expect(String(failure)).toContain(`The guest that ${A} had been restored to was removed for this.`);
    await stack.up(mine());
    expect(await conf(id)).toMatch(/name: db101/);
  });

  it("with a range nothing is read beforehand, as nothing goes before the new guest is there: the old one stays when it fails", async () => {
    await node.ssh(
      `head -c 15000000 ${DUMPS}/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst >${DUMPS}/vzdump-qemu-104-2026_11_04-10_00_00.vma.zst`,
    );
    const torn = { archive: "local:backup/vzdump-qemu-104-2026_11_04-10_00_00.vma.zst" };
    const range = { lower: 16301, upper: 16309 };
    const stack = stackFor();
    expect(await steps(() => stack.up(mine({ vmId: range })))).not.toContain("vma verify");
    const content = "sha256sum /etc/pve/qemu-server/16301.conf /var/lib/vz/images/16301/*";
    const before = (await node.ssh(content)).stdout;
    const run = await steps(() =>
      expect(stack.up(mine({ vmId: range, from: torn }))).rejects.toThrow(/short vma extent/),
    );
    expect(run).not.toContain("vma verify");
    expect((await node.ssh(content)).stdout).toBe(before);
    await stack.up(mine({ vmId: range })); // back: what the failed one left goes
    expect((await node.ssh(content)).stdout).toBe(before);
    expect(await conf(16302)).toBeUndefined();
    expect(await volumes(16302)).toEqual([]);
    expect(await stack.preview(mine({ vmId: range }))).toBe("same");
  });

  it("with a range whose next id somebody takes meanwhile: the one after it, also in a later run", async () => {
    const range = { lower: 16401, upper: 16409 };
    const stack = stackFor();
    await stack.up(mine({ vmId: range }));
    await order("qmrestore.start", "once\nrun qm create 16402 --name other --memory 64\n");
    const to = mine({ vmId: range, from: { archive: B } });
    await expect(stack.up(to)).rejects.toThrow(/16402 already exists/);
    expect(await conf(16401)).toMatch(/name: db101/);
    await stack.up(to);
    expect(outputs(stack).guestId).toBe(16403);
    expect(await conf(16402)).toMatch(/name: other/);
    expect(await conf(16401)).toBeUndefined();
    expect(await stack.preview(to)).toBe("same");
    await node.ssh("qm destroy 16402");
  });

  it("in place, a reading of long ago does not count", async () => {
    const stack = stackFor();
    await stack.up(mine());
    hooks.afterStep = (_line, { shown = [] }) => {
      if (shown[0] === "vma") throw new Error("killed");
    };
    await expect(stack.up(mine({ from: { archive: B } }))).rejects.toThrow("killed");
    delete hooks.afterStep;
    await until(async () => (await unit()) === "");
    const ledger = `/var/lib/pulumi-vmbackup/RestoredTemplate/${id}.json`;
    await node.ssh(`sed -i -E 's/"startedAt":"2026-/"startedAt":"2025-/' ${ledger}`);
    expect(await steps(() => stack.up(mine({ from: { archive: B } })))).toContain("vma verify");
    expect(await conf(id)).toMatch(/name: db102/);
  });

  it("never takes an adopted guest away, unless the program says so", async () => {
    const stack = stackFor();
    await node.ssh(`qm create ${id} --name theirs --memory 64 --scsi0 local:0.01 && qm template ${id}`);
    await stack.up(mine({ adopt: true, onDelete: undefined, from: { archive: A } }));
    const before = await conf(id);
    await expect(stack.up(mine({ onDelete: undefined, from: { archive: B } }))).rejects.toThrow(/it was adopted/);
    expect(await conf(id)).toBe(before);
    await stack.up(mine({ from: { archive: B } }));
    expect(await conf(id)).toMatch(/name: db102/);
  });
});

describe("what a restored guest brings with it", () => {
  it("start at boot, devices of its host and firewall rules are taken off, and told", async () => {
    const twin = await archive({
      vmId: 130,
      data: 1,
      firewall: true,
      config: "onboot: 1\nhostpci0: 0000:01:00.0\nusb0: host=1234:5678\n",
    });
    const stack = stackFor();
    await stack.up(mine({ from: { archive: twin } }));
    const text = (await conf(id)) ?? "";
    expect(text).toMatch(/template: 1/);
    expect(text).not.toMatch(/onboot: 1|hostpci|usb0/);
    expect((await node.ssh(`ls /etc/pve/firewall/${id}.fw`, { reject: false })).exitCode).not.toBe(0);
    expect([...(outputs(stack).status.changed as string[])].sort()).toEqual(["firewall", "hostpci0", "onboot", "usb0"]);
    expect(await stack.preview(mine({ from: { archive: twin } }))).toBe("same");
  });

  it("a conversion that fails without saying so is seen, and one that stopped between two disks is finished", async () => {
    const stack = stackFor();
    // Proxmox waits a second for the guest's lock, and then exits 0.
    await order(
      "qm.template.start",
      `once\nrun setsid flock /var/lock/qemu-server/lock-${id}.conf sleep 8 >/dev/null 2>&1 & sleep 0.5\n`,
    );
    await stack.up(mine()).catch((error: unknown) => expect(String(error)).toMatch(/qm template|make guest/));
    await behave();
    await until(
      async () =>
        (await node.ssh(`flock -n /var/lock/qemu-server/lock-${id}.conf true`, { reject: false })).exitCode === 0,
    );
    await stack.up(mine());
    expect(await volumes(id)).toEqual(BOTH());

    const other = stackFor();
    await order("qm.template.disk", "once\nfail no more\n");
    await other.up(mine()).catch(() => {});
    await other.up(mine());
    expect(await conf(id)).toMatch(/template: 1/);
    expect(await volumes(id)).toEqual(BOTH());
    expect(outputs(other).volumes).toEqual({
      scsi0: `local:${id}/base-${id}-disk-0.qcow2`,
      scsi1: `local:${id}/base-${id}-disk-1.qcow2`,
    });
    await node.ssh(`qm clone ${id} 17301 && qm destroy 17301`); // as a template is for
  });
});

it("tells every tenth of its progress to whoever waits", async () => {
  const said: string[] = [];
  vi.spyOn(console, "log").mockImplementation((text) => void said.push(String(text)));
  const stack = stackFor();
  await slow(45);
  await stack.up(mine());
  const tenths = said.flatMap(
    (line) => /restore local:backup\/\S+ as guest \d+: (\d+) %$/.exec(line)?.slice(1).map(Number) ?? [],
  );
  expect(tenths.length).toBeGreaterThan(1);
  expect(tenths).toEqual([...tenths].sort((a, b) => a - b));
  expect(tenths.at(-1)).toBe(100);
  expect(await unit()).toBe("");
});
