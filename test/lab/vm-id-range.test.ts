// VmIdRange on the stand-ins of Proxmox's commands: the laws, what Proxmox is told and keeps, and what a free id is.
import { afterEach, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { connect, hooks } from "../../provider/host.js";
import { firstFree, idsTaken } from "../../provider/vm-id-range.js";
import { laws } from "../laws.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";

const { node } = useHosts({ node: { pve: true } });

/** What the node says, out of band. */
async function options(): Promise<{ "next-id"?: { lower?: string; upper?: string } }> {
  return JSON.parse((await node.ssh(["pvesh", "get", "/cluster/options", "--output-format", "json"])).stdout);
}
async function nextId(): Promise<string | undefined> {
  const range = (await options())["next-id"];
  return range && `${range.lower} to before ${range.upper}`;
}
const set = (value: string) => node.ssh(["pvesh", "set", "/cluster/options", "--next-id", value]);
const unset = () => node.ssh(["pvesh", "set", "/cluster/options", "--delete", "next-id"]);

const first = (tag: string) => 10_000 + 100 * Number(tag.replace(/\D/g, ""));

laws({
  kind: "VmIdRange",
  inputs: (tag) => ({ host: node.connection, lower: first(tag), upper: first(tag) + 98 }),
  look: async (tag) => {
    const found = await nextId();
    return found?.startsWith(`${first(tag)} `) ? found : undefined;
  },
  vanish: async () => void (await unset()),
  foreign: async (tag) => void (await set(`lower=${first(tag)},upper=${first(tag) + 99}`)),
  bad: [
    ["lower above upper", { lower: 200, upper: 150 }, "upper"],
    ["below 100", { lower: 99 }, "lower"],
    ["above 999999999", { upper: 1_000_000_000 }, "upper"],
    ["half an id", { lower: 10_000.5 }, "lower"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
  ],
  badOnHost: [],
  mutable: [["upper", { upper: 999_999 }, /to before 1000000$/]],
  optional: [["enforce", { enforce: true }, undefined]],
  replacing: [],
});

describe("VmIdRange on a node", () => {
  const stacks: Stack[] = [];
  const stackFor = (name: string, stack?: string) => {
    const made = new Stack("VmIdRange", name, stack);
    stacks.push(made);
    return made;
  };
  const inputs = (over: Fields = {}): Fields => ({ host: node.connection, lower: 14001, upper: 14999, ...over });
  afterEach(async () => {
    delete hooks.beforeStep;
    for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
    await unset();
  });

  it("makes the node give ids of the range, and puts the earlier setting back", async () => {
    await set("lower=300,upper=400");
    const stack = stackFor("ids");
    await stack.up(inputs());
    expect(await nextId()).toBe("14001 to before 15000");
    expect((await node.ssh("pvesh get /cluster/nextid")).stdout).toBe("14001");
    expect(stack.recorded?.id).toBe("14001-14999");
    expect(JSON.stringify(stack.recorded?.outputs).length).toBeLessThan(2048);
    await stack.up(inputs({ enforce: false }));
    expect(await nextId()).toBe("300 to before 400");
    await stack.up(inputs({ upper: 14899 }));
    expect(await nextId()).toBe("14001 to before 14900");
    expect(await stack.preview(inputs({ upper: 14899 }))).toBe("same");
    await stack.destroy();
    expect(await nextId()).toBe("300 to before 400");
  });

  it("keeps the other options of the datacenter", async () => {
    await node.ssh(["pvesh", "set", "/cluster/options", "--keyboard", "de"]);
    const stack = stackFor("ids");
    await stack.up(inputs());
    await stack.destroy();
    expect(await options()).toMatchObject({ keyboard: "de" });
  });

  it("leaves what somebody set since, at delete", async () => {
    const stack = stackFor("ids");
    await stack.up(inputs());
    await set("lower=500,upper=600");
    await stack.destroy();
    expect(await nextId()).toBe("500 to before 600");
  });

  it("shows another setting as drift, and repairs it", async () => {
    const stack = stackFor("ids");
    await stack.up(inputs());
    await set("lower=14001,upper=14999"); // what a reader of Proxmox's manual would set
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.inputs).toMatchObject({ enforce: false });
    expect(await stack.preview(inputs())).toBe("update");
    await stack.up(inputs());
    expect(await nextId()).toBe("14001 to before 15000");
  });

  it.each([
    ["overlapping", { lower: 14500, upper: 15500 }, /overlaps 14001-14999.*organization\/laws\/one\/VmIdRange\/a/],
    ["overlapping and not enforced", { lower: 14500, upper: 15500, enforce: false }, /overlaps 14001-14999/],
    [
      "a second one that is enforced",
      { lower: 15001, upper: 15999 },
      /cannot be enforced.*14001-14999 of organization\/laws\/one/,
    ],
  ])("refuses another stack's range of the same node: %s", async (_name, over, message) => {
    await stackFor("a", "one").up(inputs());
    const other = stackFor("b", "two");
    await expect(other.up(inputs(over))).rejects.toThrow(message);
    expect(other.recorded).toBeUndefined();
    expect(await nextId()).toBe("14001 to before 15000");
  });

  it("allows a second block of a node that is not enforced", async () => {
    await stackFor("a", "one").up(inputs());
    const other = stackFor("b", "two");
    await other.up(inputs({ lower: 15001, upper: 15999, enforce: false }));
    expect(await other.refresh()).toBe("there");
    expect(await nextId()).toBe("14001 to before 15000");
  });

  it("does not overwrite what was set between its look and its step, and says who is there", async () => {
    const first = stackFor("a", "one");
    hooks.beforeStep = async () => {
      delete hooks.beforeStep;
      await first.up(inputs());
    };
    const late = stackFor("b", "two");
    await expect(late.up(inputs({ lower: 15001, upper: 15999 }))).rejects.toThrow(
      /changed since it was looked at.*lower=14001 upper=15000.*14001-14999 is declared by organization\/laws\/one/s,
    );
    expect(late.recorded).toBeUndefined();
    expect(await nextId()).toBe("14001 to before 15000");
    hooks.beforeStep = async () => {
      delete hooks.beforeStep;
      await set("upper=700,lower=600");
    };
    await expect(first.destroy()).rejects.toThrow(/changed since it was looked at/);
    expect(await nextId()).toBe("600 to before 700");
    await first.destroy();
    expect(await nextId()).toBe("600 to before 700");
  });

  it("two at once for one node: the one that is in force stands, the other is told", async () => {
    const [a, b] = [stackFor("a", "one"), stackFor("b", "two")];
    const inputsB = inputs({ lower: 15001, upper: 15999 });
    const ended = await Promise.allSettled([a.up(inputs()), b.up(inputsB)]);
    const lost = ended.filter((end) => end.status === "rejected");
    expect(lost).toHaveLength(1);
    expect(String(lost[0]?.reason)).toMatch(/organization\/laws\/(one|two)/);
    const [winner, wanted] = ended[0]?.status === "fulfilled" ? [a, inputs()] : [b, inputsB];
    await (winner === a ? b : a).destroy();
    expect(await winner.preview(wanted)).toBe("same");
    expect(await nextId()).toBe(winner === a ? "14001 to before 15000" : "15001 to before 16000");
    await winner.destroy();
    expect(await nextId()).toBeUndefined();
  });

  it("refuses a member of a cluster, before anything is changed", async () => {
    await node.ssh("echo 'totem { }' > /etc/pve/corosync.conf");
    try {
      const stack = stackFor("ids");
      await expect(stack.up(inputs())).rejects.toThrow(/member of a cluster.*enforce: false/s);
      expect(stack.recorded).toBeUndefined();
      expect(await nextId()).toBeUndefined();
      await stack.up(inputs({ enforce: false }));
      expect(await stack.refresh()).toBe("there");
      await stack.destroy();
    } finally {
      await node.ssh("rm /etc/pve/corosync.conf");
    }
  });

  it("counts as free only what no guest, volume or dump has", async () => {
    try {
      await node.ssh("qm create 14001 --name a && qm create 107 --name outside && qm create 108 --name gone");
      await node.ssh("pvesm alloc local 14002 vm-14002-disk-0.raw 1M --format raw");
      await node.ssh("mkdir -p /var/lib/vz/dump && touch /var/lib/vz/dump/vzdump-qemu-14003-2026_01_01-00_00_00.vma");
      const stack = stackFor("ids");
      await stack.up(inputs());
      expect(stack.recorded?.outputs.status).toMatchObject({ used: 1, free: 996, next: 14004, outside: [107, 108] });
      const taken = await idsTaken(connect(node.connection), [14004]);
      expect(firstFree({ lower: 14001, upper: 14999 }, taken)).toBe(14005);
      expect(taken.ids.get(14002)).toContain("vm-14002-disk-0.raw");
      expect(taken.ids.get(14003)).toContain("dump");
      expect(taken.unknown).toEqual([]);
      await node.ssh("qm destroy 108");
      await stack.refresh();
      expect(stack.recorded?.outputs.status).toMatchObject({ outside: [107] });
    } finally {
      await node.ssh(
        "for id in 14001 107 108; do qm destroy $id; done; pvesm free local:14002/vm-14002-disk-0.raw; rm -f /var/lib/vz/dump/*",
        { reject: false },
      );
    }
  });

  it("sees the dumps and the used ids of a storage that is not mounted yet", async () => {
    await node.ssh(
      "set -e; mkdir -p /srv/nfs/nas/dump; pvesm add nfs dumps --server nas --export /dump --content backup; touch /mnt/pve/dumps/dump/vzdump-qemu-14001-2026_01_01-00_00_00.vma; mkdir /mnt/pve/dumps/.pulumi-vmbackup; cd /mnt/pve/dumps/.pulumi-vmbackup; cat /proc/sys/kernel/random/uuid >uuid; echo 'used 14002 .' >claims; cd /; umount /mnt/pve/dumps",
    );
    try {
      const taken = await idsTaken(connect(node.connection));
      expect(taken.ids.get(14001)).toContain("dumps:backup/vzdump-qemu-14001");
      expect(taken.ids.get(14002)).toBe("was used before");
      expect(taken.unknown).toEqual([]);
    } finally {
      await node.ssh("pvesm remove dumps; umount /mnt/pve/dumps; rm -rf /srv/nfs/nas");
    }
  });

  it("is read by .get, also what is not ours", async () => {
    await set("lower=14001,upper=15000");
    const { calls } = stackFor("seen");
    const { props } = await calls.read("14001-14999", { host: node.connection });
    expect(props).toMatchObject({ lower: 14001, upper: 14999, status: { used: 0, outside: [] } });
    await calls.delete("14001-14999", props);
    expect(await nextId()).toBe("14001 to before 15000");
    await expect(calls.read("15001-15999", { host: node.connection })).rejects.toThrow(/does not exist/);
  });
});
