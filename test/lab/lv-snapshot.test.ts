// LvSnapshot on real LVM: the laws, and what is special about points in time.
import { readdirSync } from "node:fs";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { hooks } from "../../provider/host.js";
import { hooks as ledgerHooks } from "../../provider/host-ledger.js";
import { laws } from "../laws.js";
import { Stack } from "../stack.js";
import { useHosts, useStore, useVolumeGroup } from "./lab.js";

const MiB = 1 << 20;
const store = useStore();
const vg = useVolumeGroup(store, "snaps", 640);
beforeAll(async () => {
  await store.ssh(
    `lvcreate -qq -y -W n -L 64M -n root ${vg} && lvcreate -qq -y -W n -L 32M -n other ${vg} && lvcreate -qq -y --type thin-pool -L 64M -n pool ${vg} && lvcreate -qq -y --thinpool pool -V 64M -n thin ${vg}`,
  );
});

/** Every command that was run here, its operands left out. */
const issued = new Set<string>();
beforeEach(() => {
  const watch = hooks.argv;
  hooks.argv = (host, argv, deed, tool) => {
    watch?.(host, argv, deed, tool);
    if (tool[0].startsWith("lv") || tool[0].startsWith("vg"))
      issued.add(tool.map((word, i) => (i === 0 || word.startsWith("-") ? word : "…")).join(" "));
  };
});

/** What LVM says of a volume, without what moves by itself. */
async function lvs(name: string, columns = "lv_name,origin,lv_size,lv_tags,lv_uuid"): Promise<string | undefined> {
  const { stdout } = await store.ssh([
    "lvs",
    "--noheadings",
    "--units",
    "b",
    "-o",
    columns,
    "-S",
    `vg_name=${vg} && lv_name=${name}`,
  ]);
  return stdout.trim() === "" ? undefined : stdout.trim().replace(/\s+/g, " ");
}

const inputs = (over: Fields): Fields => ({
  host: store.connection,
  volumeGroup: vg,
  origin: "root",
  size: "8M",
  ...over,
});

laws({
  kind: "LvSnapshot",
  inputs: (tag) => inputs({ name: tag }),
  look: (tag) => lvs(tag),
  vanish: async (tag) => void (await store.ssh(["lvremove", "-qq", "--yes", `${vg}/${tag}`])),
  foreign: async (tag) => {
    await store.ssh(["lvcreate", "-qq", "-y", "-s", "-L", "8M", "-n", tag, `${vg}/root`]);
  },
  losable: true,
  token: (tag) => lvs(tag, "lv_uuid"),
  bad: [
    ["a reserved name", { name: "snapshot1" }, "name"],
    ["size 0", { size: 0 }, "size"],
    ["no unit of ours", { size: "20 GB" }, "size"],
    ["a share of nothing", { size: "20%" }, "size"],
    ["a negative size", { size: -5 }, "size"],
    ["a name that would be an option", { name: "--force" }, "name"],
    ["not there yet: nbd", { nbd: { address: "10.0.0.1", allow: ["10.0.0.2"] } }, "nbd"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
  ],
  badOnHost: [
    ["an unknown volume group, with those there are", { volumeGroup: "nosuchvg" }, /no volume group nosuchvg.*snaps/s],
    ["an unknown origin, with those there are", { origin: "nosuchlv" }, /no logical volume nosuchlv.*root/s],
    ["a thin origin with a size", { origin: "thin" }, /size: snaps\/thin is a thin volume/],
    ["an ordinary origin without a size", { size: undefined }, /size: snaps\/root is no thin volume/],
    ["a pool as origin", { origin: "pool" }, /is a pool/],
  ],
  mutable: [
    ["size", { size: "12M" }, /12582912B/],
    ["minFreePoolPercent", { minFreePoolPercent: 5 }, /8388608B/],
  ],
  optional: [["minFreePoolPercent", { minFreePoolPercent: 5 }, undefined]],
  replacing: [
    ["name", (tag) => ({ name: `${tag}x` })],
    ["origin", () => ({ origin: "other" })],
    ["volumeGroup", () => ({ volumeGroup: "elsewhere" })],
  ],
});

describe("LvSnapshot on real LVM", () => {
  const stacks: Stack[] = [];
  const stackFor = (name: string, stack?: string) => {
    const made = new Stack("LvSnapshot", name, stack);
    stacks.push(made);
    return made;
  };
  afterEach(async () => {
    for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
  });

  it("tells uuid, time and status, and marks the volume with its owner", async () => {
    const stack = stackFor("facts", "prod");
    await stack.up(inputs({ name: "facts" }));
    const outputs = stack.recorded?.outputs as { uuid: string; takenAt: string; status: Fields };
    expect(await lvs("facts", "lv_uuid")).toBe(outputs.uuid);
    expect(Math.abs(Date.parse(outputs.takenAt) - Date.now())).toBeLessThan(600_000);
    expect(outputs.takenAt).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.000Z$/);
    expect(outputs.status).toMatchObject({ valid: true, thin: false, sizeBytes: 8 * MiB, consistency: "crash" });
    expect(await lvs("facts", "lv_tags")).toBe("pulumi-vmbackup=organization/laws/prod/LvSnapshot/facts");
    expect(JSON.stringify(stack.recorded?.outputs).length).toBeLessThan(2048);
  });

  it("holds what was on the origin when it was taken", async () => {
    await store.ssh(`printf before | dd of=/dev/${vg}/root conv=fsync status=none`);
    await stackFor("content").up(inputs({ name: "content" }));
    await store.ssh(`printf after! | dd of=/dev/${vg}/root conv=fsync status=none`);
    const { stdout } = await store.ssh(`dd if=/dev/${vg}/content bs=6 count=1 status=none`);
    expect(stdout).toBe("before");
  });

  it("flushes a mounted origin first: what a guest wrote just before is in the snapshot and does not fill it", async () => {
    await store.ssh(`mkfs.ext4 -q -F /dev/${vg}/other && mkdir -p "/mnt/a b" && mount /dev/${vg}/other "/mnt/a b"`);
    try {
      await store.ssh(
        `dd if=/dev/urandom of="/mnt/a b/file" bs=1M count=8 status=none; sha256sum < "/mnt/a b/file" > /root/sum`,
      );
      const stack = stackFor("mounted");
      await stack.up(inputs({ name: "mounted", origin: "other" }));
      const status = stack.recorded?.outputs.status as { usedPercent: number };
      expect(status.usedPercent).toBeLessThan(30);
      const { stdout } = await store.ssh(
        `mkdir -p /mnt/look && mount -o ro,noload /dev/${vg}/mounted /mnt/look && sha256sum < /mnt/look/file | diff - /root/sum && echo same; umount /mnt/look`,
      );
      expect(stdout).toBe("same");
    } finally {
      await store.ssh(`umount "/mnt/a b"`);
    }
  });

  it("resolves a share of the origin once", async () => {
    const stack = stackFor("share");
    await stack.up(inputs({ name: "share", size: "20%ORIGIN" }));
    expect(await lvs("share", "lv_size")).toBe(`${16 * MiB}B`); // 20 % of 64 MiB, rounded up to 4 MiB extents
    expect(await stack.preview(inputs({ name: "share", size: "20%ORIGIN" }))).toBe("same");
    await stack.up(inputs({ name: "share", size: "30%ORIGIN" }));
    expect(await lvs("share", "lv_size")).toBe(`${20 * MiB}B`);
    await expect(stack.up(inputs({ name: "share", size: "10%ORIGIN" }))).rejects.toThrow(/never made smaller/);
    expect(await lvs("share", "lv_size")).toBe(`${20 * MiB}B`);
  });

  it("is settled where LVM reduces silently to what the origin can use", async () => {
    const stack = stackFor("capped");
    await stack.up(inputs({ name: "capped", size: "100G" }));
    const size = Number.parseInt((await lvs("capped", "lv_size")) ?? "", 10);
    expect(size).toBeGreaterThan(64 * MiB);
    expect(size).toBeLessThan(80 * MiB);
    expect(await stack.preview(inputs({ name: "capped", size: "100G" }))).toBe("same");
    expect(await stack.up(inputs({ name: "capped", size: "101G" }))).toBe("update");
  });

  it("takes a larger one that LVM extended by itself as settled", async () => {
    const stack = stackFor("extended");
    await stack.up(inputs({ name: "extended" }));
    await store.ssh(["lvextend", "-qq", "--size", "24M", `${vg}/extended`]);
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(inputs({ name: "extended" }))).toBe("same");
    expect(stack.recorded?.outputs.status).toMatchObject({ sizeBytes: 24 * MiB });
  });

  it("refuses more than the group has, and changes nothing", async () => {
    await store.ssh(["lvcreate", "-qq", "-y", "-W", "n", "-l", "90%FREE", "-n", "hog", vg]);
    try {
      await expect(stackFor("toobig").up(inputs({ name: "toobig", size: "64M" }))).rejects.toThrow(
        /needs 67108864 bytes, and the volume group has \d+ free/,
      );
      expect(await lvs("toobig")).toBeUndefined();
      const { stdout } = await store.ssh("ls /var/lib/pulumi-vmbackup/LvSnapshot 2>/dev/null | grep toobig || true");
      expect(stdout).toBe("");
    } finally {
      await store.ssh(["lvremove", "-qq", "-y", `${vg}/hog`]);
    }
  });

  it("refuses a snapshot of a snapshot", async () => {
    await stackFor("first").up(inputs({ name: "first" }));
    await expect(stackFor("second").up(inputs({ name: "second", origin: "first" }))).rejects.toThrow(
      /itself a snapshot \(of root\)/,
    );
    expect(await lvs("second")).toBeUndefined();
  });

  it("reports an overflowed one lost, never takes it again by itself, and --replace does", async () => {
    const stack = stackFor("small");
    const small = inputs({ name: "small", size: "4M" });
    await stack.up(small);
    const uuid = stack.recorded?.outputs.uuid;
    await store.ssh(`dd if=/dev/urandom of=/dev/${vg}/root bs=1M count=12 conv=fsync status=none`);
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.outputs.status).toMatchObject({ valid: false });
    await expect(stack.up(small)).rejects.toThrow(/the state of \S+ is lost: it overflowed.*--replace/s);
    expect(await lvs("small", "lv_uuid")).toBe(uuid);
    await stack.up(small, { replace: true });
    expect(stack.recorded?.outputs.uuid).not.toBe(uuid);
    expect(stack.recorded?.outputs.status).toMatchObject({ valid: true });
  });

  it("follows a renamed origin by its uuid, and does not take another volume of the same name for its own", async () => {
    await store.ssh(["lvcreate", "-qq", "-y", "-W", "n", "-L", "8M", "-n", "moving", vg]);
    const stack = stackFor("follow");
    const of = inputs({ name: "follow", origin: "moving", size: "4M" });
    await stack.up(of);
    await store.ssh(["lvrename", "-qq", vg, "moving", "moved"]);
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview(of)).toBe("same");
    // the snapshot goes, and something else gets its name
    await store.ssh(`lvremove -qq -y ${vg}/follow && lvcreate -qq -y -W n -L 4M -n follow ${vg}`);
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.outputs.status).toMatchObject({ valid: false });
    await stack.destroy();
    expect(await lvs("follow")).toBeDefined(); // not ours
    await store.ssh(`lvremove -qq -y ${vg}/follow ${vg}/moved`);
  });

  it("gives a snapshot that was renamed by hand its name back, and never replaces it for that", async () => {
    const stack = stackFor("named");
    const named = inputs({ name: "named" });
    await stack.up(named);
    const uuid = await lvs("named", "lv_uuid");
    await store.ssh(["lvrename", "-qq", vg, "named", "moved"]);
    expect(await stack.preview(named)).toBe("same"); // nobody looked yet
    expect(await stack.refresh()).toBe("there");
    expect(stack.recorded?.inputs).toMatchObject({ volumeGroup: vg, name: "moved" });
    expect(stack.recorded?.outputs).toMatchObject({ name: "moved", uuid, status: { valid: true } });
    expect(await stack.preview(named)).toBe("update");
    expect(await stack.preview({ ...named, name: "elsewhere" })).toBe("replace");

    // Another one has its name meanwhile: both stay
    await store.ssh(["lvcreate", "-qq", "-y", "-W", "n", "-L", "4M", "-n", "named", vg]);
    const other = await lvs("named", "lv_uuid");
    await expect(stack.up(named)).rejects.toThrow(/renamed to moved, and another volume has its name/);
    expect([await lvs("moved", "lv_uuid"), await lvs("named", "lv_uuid")]).toEqual([uuid, other]);
    await store.ssh(["lvremove", "-qq", "-y", `${vg}/named`]);

    expect(await stack.up({ ...named, size: "12M" })).toBe("update");
    expect(await lvs("named", "lv_uuid,lv_size")).toBe(`${uuid} ${12 * MiB}B`);
    expect(await lvs("moved")).toBeUndefined();
    expect(await stack.refresh()).toBe("there");
    expect(await stack.preview({ ...named, size: "12M" })).toBe("same");

    // Nothing but the name: what the ledger holds is finished again, too
    await store.ssh(["lvrename", "-qq", vg, "named", "again"]);
    await stack.refresh();
    expect(await stack.up({ ...named, size: "12M" })).toBe("update");
    const { stdout } = await store.ssh(`cat /var/lib/pulumi-vmbackup/LvSnapshot/${vg}%2Fnamed.json`);
    expect(JSON.parse(stdout)).toMatchObject({ finished: true, pins: { uuid } });

    // The program takes the new name over: nothing is done, and destroy removes the one that was made
    await store.ssh(["lvrename", "-qq", vg, "named", "kept"]);
    await stack.refresh();
    expect(await stack.preview({ ...named, name: "kept", size: "12M" })).toBe("same");
    expect(await lvs("kept", "lv_uuid")).toBe(uuid);
    await stack.destroy();
    expect(await lvs("kept")).toBeUndefined();
  });

  it("takes a new one where one that was half changed is gone, and with it the state that knew it", async () => {
    const want = inputs({ name: "forgotten" });
    const stack = stackFor("forgotten");
    await stack.up(want);
    const uuid = await lvs("forgotten", "lv_uuid");
    ledgerHooks.afterStep = () => {
      throw new Error("the power went");
    };
    try {
      await expect(stack.up({ ...want, size: "12M" })).rejects.toThrow("the power went");
    } finally {
      delete ledgerHooks.afterStep;
    }
    await store.ssh(["lvremove", "-qq", "-y", `${vg}/forgotten`]);
    await expect(stack.up({ ...want, size: "12M" })).rejects.toThrow(/is lost/); // whoever has the state is told
    expect(await stackFor("forgotten").up(want)).toBe("create");
    expect(await lvs("forgotten", "lv_uuid,lv_size")).toMatch(/ 8388608B$/);
    expect(await lvs("forgotten", "lv_uuid")).not.toBe(uuid);
  });

  it("keeps to its volume group when that was cloned, says so when it was renamed, and follows a program that names the new one", async () => {
    const [one, two, clone] = [`${vg}one`, `${vg}two`, `a${vg}clone`];
    const image = "/var/tmp/snapsone.img";
    await store.ssh(
      `truncate -s 64M ${image} && dev=$(losetup --find --show ${image}) && vgcreate -qq -y ${one} "$dev" && lvcreate -qq -y -W n -L 8M -n root ${one}`,
    );
    try {
      const stack = stackFor("group");
      const of = (volumeGroup: string, size = "4M") => inputs({ name: "group", volumeGroup, size });
      await stack.up(of(one));
      // A clone of the group has volumes of the same uuids, and comes first in every list
      await store.ssh(
        `cp ${image} ${image}.clone && dev=$(losetup --find --show ${image}.clone) && vgimportclone -n ${clone} "$dev" && vgs ${clone}`,
      );
      expect(await stack.refresh()).toBe("there");
      expect(await stack.preview(of(one))).toBe("same");
      const copies = await store.ssh(["lvs", "--noheadings", "-o", "lv_uuid", `${clone}/group`]);
      expect(copies.stdout.trim()).toBe(stack.recorded?.outputs.uuid);
      await stack.destroy();
      const left = await store.ssh(`lvs --noheadings -o lv_full_name ${clone} ${one}`);
      expect(left.stdout.split(/\s+/).filter(Boolean).sort()).toEqual([
        `${clone}/group`,
        `${clone}/root`,
        `${one}/root`,
      ]);
      await store.ssh(
        `vgremove -ff -y ${clone}; losetup -j ${image}.clone | cut -d: -f1 | xargs losetup -d; rm ${image}.clone`,
      );

      await stack.up(of(one));
      await store.ssh(["vgrename", "-qq", one, two]);
      expect(await stack.refresh()).toBe("there");
      expect(stack.recorded?.outputs).toMatchObject({ volumeGroup: two, status: { valid: true } });
      expect(await stack.preview(of(one))).toBe("update");
      await expect(stack.up(of(one))).rejects.toThrow(new RegExp(`${one}/group is ${two}/group now`));
      expect(await stack.preview(of(two))).toBe("same");
      expect(await stack.up(of(two, "8M"))).toBe("update");
      const seen = await store.ssh(["lvs", "--noheadings", "--units", "m", "-o", "lv_size", `${two}/group`]);
      expect(seen.stdout.trim()).toBe("8.00m");
      await stack.destroy();
      const last = await store.ssh(["lvs", "--noheadings", "-o", "lv_name", two]);
      expect(last.stdout.trim()).toBe("root");
    } finally {
      await store.ssh(
        `vgremove -ff -y ${one} ${two} ${clone}; for image in ${image} ${image}.clone; do losetup -j $image | cut -d: -f1 | xargs -r losetup -d; rm -f $image; done`,
        { reject: false },
      );
    }
  });

  it("takes thin snapshots, active at once, and keeps the last copy", async () => {
    const stack = stackFor("tsnap");
    const thin = inputs({ name: "tsnap", origin: "thin", size: undefined });
    await stack.up(thin);
    expect(await lvs("tsnap", "lv_active")).toBe("active");
    expect(stack.recorded?.outputs.status).toMatchObject({ thin: true, valid: true });
    const second = stackFor("tsnap2"); // of a thin one a snapshot may be taken
    await second.up(inputs({ name: "tsnap2", origin: "tsnap", size: undefined }));
    await store.ssh(["lvremove", "-qq", "-y", `${vg}/tsnap`]);
    const alone = inputs({ name: "tsnap2", origin: "tsnap", size: undefined, minFreePoolPercent: 5 });
    expect(await second.up(alone)).toBe("update"); // recorded; it is still what it was
    expect(await second.refresh()).toBe("there");
    expect(second.recorded?.outputs).toMatchObject({ origin: "tsnap", status: { valid: true, thin: true } });
    expect(await second.preview(alone)).toBe("same");
    await expect(second.destroy()).rejects.toThrow(/last copy/);
    expect(await lvs("tsnap2")).toBeDefined();
    await store.ssh(["lvremove", "-qq", "-y", `${vg}/tsnap2`]);
    await second.destroy();
  });

  it("refuses a pool that is too full, and takes it when less is asked for", async () => {
    const full = inputs({ name: "tfull", origin: "thin", size: undefined });
    await store.ssh(`dd if=/dev/urandom of=/dev/${vg}/thin bs=1M count=30 conv=fsync status=none`);
    await expect(stackFor("tfull").up({ ...full, minFreePoolPercent: 90 })).rejects.toThrow(
      /minFreePoolPercent: the thin pool snaps\/pool is [\d.]+ % full/,
    );
    expect(await lvs("tfull")).toBeUndefined();
    await stackFor("tfull").up({ ...full, minFreePoolPercent: 20 });
    expect(await lvs("tfull")).toBeDefined();
  });

  it("refuses while the origin is being merged into, and tells an in-use snapshot's holder to let go at destroy", async () => {
    const stack = stackFor("busy");
    await stack.up(inputs({ name: "busy", origin: "other" }));
    await store.ssh(
      `mkdir -p /mnt/busy && mount -o ro,noload /dev/${vg}/busy /mnt/busy || { mkfs.ext4 -q -F /dev/${vg}/busy; mount /dev/${vg}/busy /mnt/busy; }`,
    );
    await expect(stack.destroy()).rejects.toThrow(/filesystem in use.*unmount/s);
    expect(await lvs("busy")).toBeDefined();
    await store.ssh("umount /mnt/busy");
  });

  it("adopts a snapshot made by hand, also one of another stack, and stamps its own mark", async () => {
    await store.ssh(["lvcreate", "-qq", "-y", "-s", "-L", "8M", "--addtag", "keepme", "-n", "byhand", `${vg}/root`]);
    const uuid = await lvs("byhand", "lv_uuid");
    const stack = stackFor("byhand");
    await stack.up(inputs({ name: "byhand", adopt: true }));
    expect(await lvs("byhand", "lv_uuid")).toBe(uuid);
    expect(await lvs("byhand", "lv_tags")).toBe("keepme,pulumi-vmbackup=organization/laws/dev/LvSnapshot/byhand");
    const second = stackFor("byhand", "two");
    await second.up(inputs({ name: "byhand", adopt: true }));
    expect(await lvs("byhand", "lv_tags")).toBe("keepme,pulumi-vmbackup=organization/laws/two/LvSnapshot/byhand");
    await expect(stackFor("wrong").up(inputs({ name: "byhand", origin: "other", adopt: true }))).rejects.toThrow(
      /a snapshot of root, not of other/,
    );
  });

  it("reads with .get what is not ours, and throws for what is absent", async () => {
    await store.ssh(["lvcreate", "-qq", "-y", "-s", "-L", "8M", "-n", "seen", `${vg}/root`]);
    const stack = stackFor("seen");
    const read = await stack.calls.read(`${vg}/seen`, { host: store.connection, __provider: "x" });
    expect(read.props).toMatchObject({ volumeGroup: vg, origin: "root", name: "seen", status: { valid: true } });
    await expect(stack.calls.read(`${vg}/nosuch`, { host: store.connection, __provider: "x" })).rejects.toThrow(
      /does not exist/,
    );
    await store.ssh(["lvremove", "-qq", "-y", `${vg}/seen`]);
  });

  it.each([
    ["a semicolon", "x; touch /tmp/hit"],
    ["a substitution", "$(touch /tmp/hit)"],
    ["backquotes", "`touch /tmp/hit`"],
    ["quotes", `'"; touch /tmp/hit; "'`],
    ["a newline", "x\ntouch /tmp/hit"],
    ["an option", "--force"],
    ["unicode", "schnäppchen"],
  ])("never runs a hostile string, in any field: %s", async (_name, hostile) => {
    const stack = stackFor("hostile");
    for (const field of ["volumeGroup", "origin", "name", "size", "host"])
      await expect(stack.up(inputs({ name: "hostile", [field]: hostile }))).rejects.toThrow();
    const here = { host: "127.0.0.1", dialErrorLimit: 1, perDialTimeout: 1, port: 9 };
    for (const connection of [
      { ...store.connection, user: hostile },
      { ...here, host: hostile },
      { ...here, hostKey: hostile },
      { ...here, privateKey: hostile },
      { ...here, privateKey: store.privateKey, privateKeyPassword: hostile },
      { ...here, privateKey: `-----BEGIN OPENSSH PRIVATE KEY-----\n${hostile}` },
      { ...here, agentSocketPath: hostile },
      { ...here, configFile: hostile },
      { ...here, proxy: { host: hostile } },
      { ...here, proxy: { ...here, user: hostile } },
      { ...here, proxy: { ...here, agentSocketPath: hostile } },
    ])
      await expect(stack.up(inputs({ name: "hostile", host: connection }))).rejects.toThrow();
    for (const id of [hostile, `${vg}/${hostile}`, `${hostile}/x`])
      await expect(stack.calls.read(id, { host: store.connection, __provider: "x" })).rejects.toThrow();
    expect((await store.ssh("ls /tmp | grep hit || true")).stdout).toBe("");
    expect(readdirSync("/tmp").filter((name) => name.startsWith("hit"))).toEqual([]); // ssh runs shells here, too
  });

  it("carries any owner in the tag: blanks, quotes, unicode, and a name that no tag could hold", async () => {
    const stack = stackFor(`it's "ünique"; $(x) ${"y".repeat(30)}`);
    await stack.up(inputs({ name: "owners" }));
    expect(await stack.preview(inputs({ name: "owners" }))).toBe("same");
    await expect(stackFor("other").up(inputs({ name: "owners" }))).rejects.toThrow(/it's "ünique"; \$\(x\) y+/);
  });
});

describe("an answer that is none", () => {
  const { odd } = useHosts({ odd: {} });
  const EMPTY = `echo '{"report":[{"lv":[]}]}'`;
  const state = (more: Fields) => ({
    ...inputs({ name: "odd", host: odd.connection }),
    __v: 1,
    __owner: "organization/laws/dev/LvSnapshot/odd",
    __incarnation: "0123456789abcdef",
    __provider: "x",
    ...more,
  });
  const tool = (script: string) =>
    odd.ssh("cat >/usr/local/sbin/lvs && chmod 755 /usr/local/sbin/lvs", { input: `#!/bin/sh\n${script}\n` });
  const { calls } = new Stack("LvSnapshot", "odd");

  // What every line below must not be taken for
  it("gone is what a good answer says", async () => {
    await tool(EMPTY);
    expect(await calls.read(`${vg}/odd`, state({}))).toEqual({ props: {} });
  });

  it.each([
    [
      "lvs is missing",
      () => odd.ssh("rm /usr/local/sbin/lvs; mv /usr/sbin/lvs /root/"),
      {},
      /has no command lvs.*\nInstall the package lvm2 on odd/s,
    ],
    [
      "lvs fails, and prints an empty list all the same",
      () => tool(`${EMPTY}; echo "  Failed to set up devices" >&2; exit 5`),
      {},
      /lvs exited 5 on odd.*Failed to set up devices/s,
    ],
    [
      "it is no JSON",
      () => tool("echo WARNING: locking is off"),
      {},
      /answered, but not what was asked.*WARNING: locking is off.*\nRun the command by hand/s,
    ],
    ["it is empty", () => tool("true"), {}, /answered, but not what was asked/],
    ["it is JSON of another shape", () => tool(`echo '{"report":[]}'`), {}, /answered, but not what was asked/],
    [
      "sudo asks for a password",
      () => odd.ssh("rm -f /etc/sudoers.d/deploy"),
      { user: "deploy", sudo: true },
      /sudo on deploy@odd\S* wants a password.*NOPASSWD/s,
    ],
  ])(
    "%s: an error of its own, never an absent snapshot, and nothing is changed",
    async (_name, arrange, how, message) => {
      await arrange();
      const properties = state({ host: { ...odd.connection, ...how } });
      const before = hooks.argv;
      const changed: string[] = [];
      hooks.argv = (host, argv, deed, words) => {
        before?.(host, argv, deed, words);
        if (deed === "change" || deed === "ledger") changed.push(words.join(" "));
      };
      for (const call of [
        () => calls.read(`${vg}/odd`, properties),
        () => calls.create(properties),
        () => calls.update(`${vg}/odd`, properties, properties),
        () => calls.delete(`${vg}/odd`, properties),
      ])
        await expect(call()).rejects.toThrow(message);
      expect(changed).toEqual([]);
    },
  );
});

// Last: what the tests above have issued is all that there is.
it("every command that LvSnapshot issues was run here", () => {
  expect([...issued].sort()).toEqual([
    "lvchange --addtag … -- …",
    "lvchange --addtag … --deltag … -- …",
    "lvcreate --yes --snapshot --setactivationskip … --name … --addtag … -- …",
    "lvcreate --yes --snapshot --size … --name … --addtag … -- …",
    "lvextend --size … -- …",
    "lvremove --yes --select … -- …",
    "lvrename -- … … …",
    "lvs --all --reportformat … --units … --nosuffix --config … --options …",
    "vgs --reportformat … --units … --nosuffix --options …",
  ]);
});
