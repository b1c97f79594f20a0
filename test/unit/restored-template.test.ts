import * as pulumi from "@pulumi/pulumi";
import { beforeEach, describe, expect, it } from "vitest";
import { check, diff } from "../../provider/engine-check.js";
import { Refused, Unfinished } from "../../provider/errors.js";
import type { JobState } from "../../provider/host-job.js";
import type { Line } from "../../provider/host-ledger.js";
import { RestoredTemplate, VmIdRange } from "../../provider/index.js";
import type { Storage, StorageState } from "../../provider/pve.js";
import { configOf, digestOf, type GuestFile, guestsOf, hostDevices } from "../../provider/pve-guests.js";
import {
  archivedConfig,
  restoreArgv,
  restoredBy,
  unpackedSize,
  verifyArgv,
  vmaData,
  zstdContent,
} from "../../provider/qmrestore.js";
import { restoredTemplate, type Want } from "../../provider/restored-template.js";
import { choosePlace, isThick, timesOf } from "../../provider/restored-template-choice.js";
import { changedByHand, type Have, type Mine, type Pins, settingsOf } from "../../provider/restored-template-look.js";
import { trouble } from "../../provider/restored-template-plan.js";
import { marked, unmarked } from "../../provider/restored-template-settings.js";
import { recording } from "../captures.js";

const A = "nfs:backup/vzdump-qemu-107-2023_07_26-02_23_55.vma.zst";
const B = "nfs:backup/vzdump-qemu-107-2023_08_01-02_23_55.vma.zst";
const UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
const good = {
  host: "n4",
  from: { archive: A },
  to: { storage: "local" },
  vmId: 14001,
  __owner: "o/p/s/RestoredTemplate/t",
  __provider: "x",
};

describe("check", () => {
  it("returns what was declared in normal form", () => {
    const { inputs, failures } = check(restoredTemplate, {
      ...good,
      from: { storage: "nfs", vmId: 107, at: "latest" },
      tags: ["b", "A", "b"],
    });
    expect(failures).toEqual([]);
    expect(inputs).toMatchObject({ from: { storage: "nfs", vmId: 107 }, to: [{ storage: "local" }], tags: ["a", "b"] });
    expect(inputs.from).not.toHaveProperty("at");
    expect(inputs).not.toHaveProperty("template"); // a default is left to plan
  });

  it.each([
    ["two ways to name the source", { from: { archive: A, storage: "s", vmId: 107 } }, "from.storage"],
    ["no source", { from: {} }, "from"],
    ["no guest", { from: { storage: "nfs" } }, "from.vmId"],
    ["a file's path", { from: { archive: "/mnt/dump/x.vma" } }, "from.archive"],
    ["another time zone", { from: { storage: "nfs", vmId: 107, at: "2023-07-26T02:23:55+02:00" } }, "from.at"],
    ["a directory (not yet)", { from: { directory: "/d", guest: "g" } }, "from.directory"],
    ["nbd (not yet)", { from: { nbd: { vda: "nbd://x" } } }, "from.nbd"],
    ["a pool of libvirt", { to: { pool: "default" } }, "to.pool"],
    ["a volume group in a list", { to: [{ storage: "local" }, { volumeGroup: "vg" }] }, "to[1].volumeGroup"],
    ["no storage", { to: [] }, "to"],
    ["no id: libvirt's form", { vmId: undefined }, "vmId"],
    ["id 99", { vmId: 99 }, "vmId"],
    ["a range without an end", { vmId: { lower: 14001 } }, "vmId.upper"],
    ["a range upside down", { vmId: { lower: 300, upper: 200 } }, "vmId.upper"],
    ["adopt with a range", { adopt: true, vmId: { lower: 200, upper: 300 } }, "vmId"],
    ["an underscore in the name", { name: "my_guest" }, "name"],
    ["networks", { networks: { br0: "br1" } }, "networks"],
    ["a word for onDelete", { onDelete: "purge" }, "onDelete"],
  ])("refuses %s, naming the property", (_name, over, property) => {
    expect(check(restoredTemplate, { ...good, ...over }).failures.map((f) => f.property)).toContain(property);
  });

  it("lets unknowns pass, and never replaces", () => {
    for (const field of ["host", "from", "to", "vmId", "name", "tags"]) {
      expect(check(restoredTemplate, { ...good, [field]: UNKNOWN }).failures).toEqual([]);
      expect(diff(restoredTemplate, { ...good, __v: 1 }, { ...good, [field]: UNKNOWN }).replaces).toEqual([]);
    }
    expect(check(restoredTemplate, { ...good, from: { storage: UNKNOWN, vmId: 107 } }).failures).toEqual([]);
    const other = { ...good, from: { archive: B }, vmId: 14002, to: { storage: "other" } };
    expect(diff(restoredTemplate, { ...good, __v: 1 }, other)).toEqual({ changes: undefined, replaces: [] });
  });
});

// ---------------------------------------------------------------- what qmrestore says

describe("the log of a restore, as recorded", () => {
  const restores = ["qmrestore", "qmrestore-failures", "qmrestore-sigterm-and-detached"]
    .flatMap((name) => recording(`pve/${name}`))
    .filter(({ cmd }) => cmd[0] === "qmrestore" && !cmd.includes("--force"));

  it("names every volume that a good one made", () => {
    const fine = restores.filter(
      ({ exit, cmd, stdout }) =>
        exit === 0 && cmd.includes("local") && /new volume ID[\s\S]*total bytes read/.test(stdout),
    );
    expect(fine.length).toBeGreaterThan(2);
    for (const { stdout, cmd } of fine) {
      const { began, made, bytes } = restoredBy(stdout);
      expect(began).toBe(true);
      expect(made).toEqual([0, 1].map((n) => `local:${cmd[2]}/vm-${cmd[2]}-disk-${n}.qcow2`));
      expect(bytes).toBeGreaterThan(0);
    }
  });

  it("names none that a failed one removed again", () => {
    const torn = restores.filter(({ stdout, exit }) => exit !== 0 && stdout.includes("new volume ID"));
    expect(torn.length).toBeGreaterThan(0);
    for (const { stdout } of torn) {
      const removed = [...stdout.matchAll(/temporary volume '([^']+)' succ/g)].map((m) => m[1]);
      const all = [...stdout.matchAll(/new volume ID is '([^']+)'/g)].map((m) => m[1]);
      expect(restoredBy(stdout).made).toEqual(all.filter((volid) => !removed.includes(volid)));
    }
  });

  it("knows that one never began for an id that was taken", () => {
    const taken = restores.filter(({ stderr }) => /already exists on node|can't lock file/.test(stderr));
    expect(taken.length).toBeGreaterThan(0);
    for (const { stdout, stderr } of taken)
      expect(restoredBy(stdout + stderr)).toMatchObject({ began: false, made: [] });
  });

  it("has no word that forces", () => {
    const argv = restoreArgv({ archive: A, vmId: 14001, storage: "local", unique: true, pool: "p", bwlimit: 5 });
    expect(argv.join(" ")).toBe(`qmrestore ${A} 14001 --storage local --unique 1 --pool p --bwlimit 5`);
  });
});

describe("the configuration in an archive, as recorded", () => {
  const { stdout } = recording("pve/qmrestore-failures").find(
    ({ cmd, exit }) => cmd[1] === "extractconfig" && exit === 0,
  ) ?? { stdout: "" };

  it("tells name, description, start at boot and the disks' whole size", () => {
    expect(archivedConfig(stdout)).toEqual({
      name: "db102",
      tags: "prod",
      description: "nightly database",
      onboot: true,
      template: false,
      devices: [],
      virtualBytes: (64 + 16) << 20,
      unsized: false,
    });
  });

  it("finds the devices of the host it came from", () => {
    const { values } = configOf(
      "hostpci0: 0000:01:00.0\nusb0: host=1234:5678\nusb1: spice\nserial0: /dev/ttyS0\nserial1: socket\nscsi5: /dev/sdb,size=1G\nscsi0: local:1/vm-1-disk-0.raw",
    );
    expect(hostDevices(values)).toEqual(["hostpci0", "scsi5", "serial0", "usb0"]);
  });
});

// ---------------------------------------------------------------- Proxmox's own files

describe("the guests of a node", () => {
  const conf =
    "#line1\n#line2 %C3%BC\nname: web\nmemory: 64\nscsi0: local:7/base-7-disk-0.raw,size=1G\n\n[snap1]\nname: old\n";
  const { node, byId } = guestsOf(
    [
      "",
      "node\nnodes/pve1\n",
      "running\n/run/qemu-server/107.pid\n",
      "firewall\n/etc/pve/firewall/107.fw\n",
      "containers\n/etc/pve/nodes/pve2/lxc/108.conf\n",
      "ha\nvm: 107\n\tstate started\n",
      "pools\npool:golden::107,109::\n",
      "starts\nUPID:pve1:00000AAF:0003FFAC:6B023098:qmstart:107:root@pam: 6B023098 OK\n",
      `conf /etc/pve/nodes/pve1/qemu-server/107.conf\n${conf}`,
      "conf /etc/pve/nodes/pve1/qemu-server/109.conf\n",
      "conf /etc/pve/nodes/pve1/qemu-server/110.conf\n",
      "gone\n",
    ].join("\u001e"),
  );

  it("reads what is written down and what stands around it", () => {
    expect(node).toBe("pve1");
    expect(byId.get(107)).toMatchObject({
      kind: "qemu",
      running: true,
      ha: true,
      firewall: true,
      pool: "golden",
      snapshots: ["snap1"],
      starts: [0x6b023098],
      values: { name: "web", description: "line1\nline2 ü" },
    });
    expect(byId.get(108)).toMatchObject({ kind: "lxc", node: "pve2" });
    expect(byId.get(109)).toMatchObject({ raw: "", values: {}, pool: "golden" }); // a placeholder is a guest
    expect(byId.has(110)).toBe(false);
  });
});

it("an owner's mark is found again, and nothing of the text is lost", () => {
  const owner = "org/pro ject/dev/RestoredTemplate/ü-->";
  expect(unmarked(marked("two\nlines", owner))).toEqual({ text: "two\nlines", owner });
  expect(unmarked(marked("", owner))).toEqual({ text: "", owner });
  expect(unmarked("no mark")).toEqual({ text: "no mark", owner: undefined });
  // Somebody else's words in the place of an owner: shown as they are, and no end of the run.
  expect(unmarked("x\n<!-- pulumi-vmbackup 50% -->")).toEqual({ text: "x", owner: "50%" });
});

// ---------------------------------------------------------------- what is chosen

const GiB = 2 ** 30;
const state = (storage: string, over: Partial<StorageState> = {}): StorageState => ({
  storage,
  type: "dir",
  content: ["images"],
  enabled: true,
  active: true,
  total: 200 * GiB,
  used: 0,
  avail: 100 * GiB,
  ...over,
});
const storage = (name: string, type = "dir", over: Partial<Storage> = {}): Storage => ({
  storage: name,
  type,
  ...over,
});

describe("the place", () => {
  const rows = {
    states: [
      state("local"),
      state("big", { avail: 900 * GiB }),
      state("thick", { avail: 300 * GiB }),
      state("iso", { content: ["iso"] }),
      state("off", { enabled: false, active: false }),
      state("down", { active: false }),
    ],
    storages: [
      storage("local"),
      storage("big"),
      storage("thick", "lvm"),
      ...["iso", "off", "down"].map((s) => storage(s)),
    ],
  };
  const pick = (names: string[], virtual: number, least: number) =>
    choosePlace(
      names.map((name) => ({ storage: name })),
      rows,
      { virtual, data: { least, known: true } },
    );

  it("is the one with most room", () => {
    expect(pick(["local", "big", "thick"], GiB, GiB).storage).toBe("big");
  });
  it("takes a sparse disk of 512 GiB with 8 GB of data on 100 GB, with a warning", () => {
    expect(pick(["local"], 512 * GiB, 8 * GiB)).toMatchObject({
      storage: "local",
      overcommitted: { virtual: 512 * GiB, available: 100 * GiB, data: 8 * GiB, known: true },
    });
  });
  it("wants the whole size where it is reserved at once", () => {
    expect(() => pick(["thick"], 512 * GiB, 8 * GiB)).toThrow(/thick has \d+ bytes free, and reserves the whole/);
    expect(pick(["thick"], 200 * GiB, 8 * GiB).overcommitted).toBeUndefined();
  });
  it("is refused with every reason", () => {
    expect(() => pick(["nosuch", "iso", "off", "down"], GiB, GiB)).toThrow(
      /nosuch does not exist.*iso takes no disk images; off is disabled.*down is not active/s,
    );
    expect(() => pick(["local"], 200 * GiB, 101 * GiB)).toThrow(/the data is \d+ bytes\./);
  });
});

describe("what is known of the data before it is restored", () => {
  it("of a zstd archive: the size in its frame's head, where there is one", () => {
    const head = (...bytes: number[]) =>
      Buffer.concat([Buffer.from([0x28, 0xb5, 0x2f, 0xfd, ...bytes]), Buffer.alloc(18)]).subarray(0, 18);
    expect(zstdContent(head(0x00, 0x58))).toEqual({ bytes: 0, known: false }); // a stream, as vzdump compresses
    expect(zstdContent(head(0x60, 0x10, 0x27))).toEqual({ bytes: 10_000 + 256, known: true });
    expect(zstdContent(head(0xa0, 0, 0, 0, 0x40))).toEqual({ bytes: GiB, known: true });
    expect(zstdContent(head(0xc0, 0x58, 0, 0, 0, 0, 2))).toEqual({ bytes: 8 * GiB, known: true });
    expect(zstdContent(Buffer.from([0x28, 0xb5, 0x2f, 0xfd]))).toEqual({ bytes: 0, known: false });
    expect(zstdContent(Buffer.alloc(18))).toEqual({ bytes: 0, known: false });
  });
  it("of a gzip archive: its last four bytes, which are no more than the least", () => {
    const { parse } = unpackedSize("local:backup/vzdump-qemu-107-2023_07_26-02_23_55.vma.gz");
    expect(parse?.("gz\n   0   0  16   1\n")).toEqual({ bytes: (1 << 24) + (16 << 16), known: false });
    expect(parse?.("")).toEqual({ bytes: 0, known: false }); // lzo tells nothing
  });
  it("is never more than an archive of that size holds", () => {
    expect(vmaData(8 * GiB, 512 * GiB)).toBeGreaterThan(7.9 * GiB);
    expect(vmaData(8 * GiB, 512 * GiB)).toBeLessThan(8 * GiB);
    expect(vmaData(1000, 512 * GiB)).toBe(0);
  });
  it("a disk whose configuration tells no size is not taken for an empty one", () => {
    const text =
      "scsi0: local:7/vm-7-disk-0.raw,size=1G\nscsi1: local:7/vm-7-disk-1.raw\n#qmdump#map:scsi0:drive-scsi0:local:raw:\n#qmdump#map:scsi1:drive-scsi1:local:raw:\n";
    expect(archivedConfig(text)).toMatchObject({ unsized: true });
  });
  it("a pool of ZFS reserves the whole size, unless it is sparse", () => {
    expect(isThick(storage("z", "zfspool"))).toBe(true);
    expect(isThick(storage("z", "zfspool", { sparse: true }))).toBe(false);
    expect(isThick(storage("d", "dir", { preallocation: "falloc" }))).toBe(true);
    expect(isThick(storage("t", "lvmthin"))).toBe(false);
  });
});

describe("the time of a dump", () => {
  const dump = (stamp: string, utc: string) => ({
    volid: `nfs:backup/vzdump-qemu-107-${stamp}.vma.zst`,
    ctime: Date.parse(utc) / 1000,
  });
  it("is one moment, but two in the hour that the clock repeats", () => {
    expect(timesOf(dump("2026_10_25-01_30_00", "2026-10-24T23:30:00Z"), "Europe/Prague")).toHaveLength(1);
    const twice = timesOf(dump("2026_10_25-02_30_00", "2026-10-25T01:30:00Z"), "Europe/Prague");
    expect(twice.map((t) => new Date(t * 1000).toISOString())).toEqual([
      "2026-10-25T00:30:00.000Z",
      "2026-10-25T01:30:00.000Z",
    ]);
    expect(timesOf(dump("2026_10_25-02_30_00", "2026-10-25T02:30:00Z"), "UTC")).toHaveLength(1);
  });
});

// ---------------------------------------------------------------- plans

const raw = (lines: Record<string, string>) =>
  Object.entries(lines)
    .map(([key, value]) => `${key}: ${value}\n`)
    .join("");
const PLAIN = {
  boot: "order=scsi0",
  memory: "1024",
  name: "ubuntu",
  scsi0: "local:14001/vm-14001-disk-0.qcow2,size=64M",
  vmgenid: "g-1",
};
const OWNER = "o/p/s/RestoredTemplate/t";
const MARK = `#${marked("", OWNER)}\n`;

function guest(over: Record<string, string> = {}, more: Partial<GuestFile> = {}, mark = MARK): GuestFile {
  const text = mark + raw({ ...PLAIN, ...over });
  const around = {
    node: "pve1",
    kind: "qemu",
    running: false,
    ha: false,
    firewall: false,
    pool: undefined,
    starts: [],
  };
  return { vmid: 14001, ...around, ...configOf(text), ...more } as GuestFile;
}
const TEMPLATE = { template: "1", scsi0: "local:14001/base-14001-disk-0.qcow2,size=64M" };

const want: Want = { host: { host: "n4" }, from: { archive: A }, to: [{ storage: "local" }], vmId: 14001 };
const chosen: Pins = {
  vmId: 14001,
  asked: { archive: A },
  archive: A,
  storage: "local",
  archived: { name: "ubuntu", description: "" },
};
const restored: Pins = {
  ...chosen,
  token: "g-1",
  volumes: { scsi0: "local:14001/vm-14001-disk-0.qcow2" },
  settings: settingsOf(guest(TEMPLATE)),
};
const none: JobState = { state: "none", log: "", rebooted: false };

function have(over: Partial<Have> = {}): Have {
  const nothing = { mine: undefined, placeholder: undefined, old: undefined, stranger: undefined, refused: undefined };
  return {
    exists: false,
    job: none,
    leftovers: [],
    unseen: [],
    unremembered: [],
    otherwise: false,
    verified: false,
    keep: false,
    ...nothing,
    ...over,
  };
}
const mine = (file: GuestFile, pinned: Pins = restored, clones: string[] = []): Mine => ({
  file,
  pinned,
  clones,
  unknown: [],
  missing: [],
  unconverted: [],
  frees: new Map(),
});

function line(pins: Pins | undefined, over: Partial<Line<Pins>> = {}): Line<Pins> {
  return {
    v: 1,
    kind: "RestoredTemplate",
    identity: "14001",
    owner: OWNER,
    incarnation: "i",
    finished: false,
    kept: [],
    pins,
    ...over,
  };
}
/** The tool's own words of each step. */
const tools = (steps: { argv: readonly string[]; shown?: readonly string[] | undefined }[]) =>
  steps.map(({ argv, shown }) => (shown ?? argv).join(" ").replace(/--digest \w+ /, ""));
const planned = (h: Have, pins: Pins | undefined = h.mine?.pinned ?? chosen, w: Want = want, over = {}) =>
  tools(restoredTemplate.plan(w, h, line(pins, over)));

const RESTORE = `qmrestore ${A} 14001 --storage local --unique 1`;

describe("plan", () => {
  it("restores as a job", () => {
    const [step] = restoredTemplate.plan(want, have(), line(chosen));
    expect(step).toMatchObject({ job: true, argv: RESTORE.split(" ") });
  });
  it("then sets what differs, and makes it a template last", () => {
    const fresh = { ...chosen, token: "g-1" };
    const twin = guest({ onboot: "1", hostpci0: "0000:01:00.0" }, { firewall: true }, "");
    const at = (file: GuestFile, w = want) => planned(have({ exists: true, mine: mine(file, fresh) }), fresh, w);
    const set = `qm set 14001 --onboot 0 --description ${marked("", OWNER)} --delete hostpci0`;
    expect(at(twin)).toEqual([set, "rm -- /etc/pve/firewall/14001.fw", "qm template 14001"]);
    const join = "pvesh set /pools/golden --vms 14001";
    expect(at(guest(), { ...want, pool: "golden" })).toEqual([join, "qm template 14001"]);
    const leave = "pvesh set /pools/p --vms 14001 --delete 1";
    expect(at(guest({ ...TEMPLATE }, { pool: "p" }), { ...want, pool: "golden" })).toEqual([leave, join]);
    expect(at(guest())).toEqual(["qm template 14001"]);
    expect(at(guest(), { ...want, template: false })).toEqual([]);
  });
  it("is empty when all is so", () => {
    expect(planned(have({ exists: true, mine: mine(guest(TEMPLATE)) }))).toEqual([]);
  });
  it("repairs what is declared, and leaves start at boot and devices to their owner afterwards", () => {
    const drift = guest({ ...TEMPLATE, name: "other", tags: "x", onboot: "1", hostpci0: "0000:01:00.0" });
    expect(planned(have({ exists: true, mine: mine(drift) }))).toEqual(["qm set 14001 --name ubuntu --delete tags"]);
  });
  it("leaves what adoption found", () => {
    const found = guest({ tags: "x" }, { pool: "p" });
    const adopted: Pins = { vmId: 14001, token: "g-1", adopted: true, settings: settingsOf(found) };
    const kept = ["name", "tags", "description", "template", "pool"];
    expect(planned(have({ exists: true, mine: mine(found, adopted) }), adopted, want, { kept })).toEqual([]);
  });
  it("joins a restore that runs, and refuses one of another archive", () => {
    const running = have({ exists: true, job: { ...none, state: "running" } });
    expect(planned(running)).toEqual([RESTORE]);
    const other = { ...want, from: { archive: B } };
    expect(() => planned({ ...running, otherwise: true }, chosen, other)).toThrow(
      new RegExp(`${A} is still being restored as guest 14001.*${B}`),
    );
  });
  it("clears up after a failed one: the placeholder, then exactly the volumes it reported", () => {
    const placeholder = { file: guest({}, configOf("memory: 128\n")), free: true };
    const failed = have({ exists: true, placeholder, job: { ...none, state: "failed" }, leftovers: ["local:14001/x"] });
    expect(planned(failed)).toEqual(["qm destroy 14001"]);
    expect(() => planned({ ...failed, placeholder: { ...placeholder, free: false } })).toThrow(/something is at work/);
    expect(planned({ ...failed, placeholder: undefined })).toEqual(["pvesm free local:14001/x"]);
    const locked = { file: guest({}, configOf("lock: create\n")), free: true };
    expect(planned({ ...failed, placeholder: locked })).toEqual(["qm unlock 14001"]);
  });
  it("touches nothing that has the id and is not ours", () => {
    expect(() => planned(have({ stranger: guest({ vmgenid: "g-9" }) }))).toThrow(/is not the one that was restored/);
  });
  it("turns no template back", () => {
    const w = { ...want, template: false };
    expect(() => planned(have({ exists: true, mine: mine(guest(TEMPLATE)) }), restored, w)).toThrow(
      /turns no template/,
    );
  });
});

describe("plan of a change to another archive", () => {
  const next: Pins = { ...chosen, asked: { archive: B }, archive: B, old: restored };
  const w: Want = { ...want, from: { archive: B } };
  const old = mine(guest(TEMPLATE));
  const verify = ["vma", "verify", B].join(" ");

  it("with an id: reads the new archive, removes, restores", () => {
    const before = have({ exists: true, old });
    expect(planned(before, next, w)).toEqual([verify]);
    expect(planned({ ...before, verified: true }, next, w)).toEqual(["qm destroy 14001"]);
    expect(planned(before, next, { ...w, verify: false })).toEqual(["qm destroy 14001"]);
    const gone = restoredTemplate.plan(w, have(), line({ ...next, old: undefined, instead: A }));
    expect(tools(gone)).toEqual([RESTORE.replace(A, B)]);
    expect(gone[0]).toMatchObject({ halfway: true, next: expect.stringContaining(A) }); // whoever fails now is told how to go back
    const no = new Refused({ what: "B does not exist.", next: "Name another." });
    expect(() => planned(have({ refused: no }), { ...next, old: undefined, instead: A }, w)).toThrow(Unfinished);
    expect(() => planned(have({ refused: no }), { ...next, old: undefined, instead: A }, w)).toThrow(
      new RegExp(`B does not exist[\\s\\S]*${A}`),
    );
    const stranger = guest({ vmgenid: "g-9" });
    expect(() => planned(have({ stranger }), { ...next, old: undefined, instead: A }, w)).toThrow(Unfinished);
  });
  it("with an id: refuses a guest that is no template, and one in use", () => {
    const at = (o: Mine) => () => planned(have({ exists: true, old: o }), next, w);
    expect(at(mine(guest()))).toThrow(/it is no template/);
    expect(at({ ...old, clones: ["110"] })).toThrow(/linked clones.*110/);
    expect(at(mine(guest({ ...TEMPLATE, memory: "2048" })))).toThrow(/memory was changed by hand/);
    const adopted = mine(guest(TEMPLATE), { ...restored, adopted: true });
    expect(at(adopted)).toThrow(/it was adopted/); // what it holds may be nowhere else
    expect(planned(have({ exists: true, old: adopted, verified: true }), next, { ...w, onDelete: "destroy" })).toEqual([
      "qm destroy 14001",
    ]);
  });
  it("with a range: the new guest first, the old one afterwards", () => {
    const beside: Pins = { ...next, vmId: 14002 };
    expect(planned(have({ exists: true, old }), beside, w)).toEqual([RESTORE.replace(A, B).replace("14001", "14002")]);
    expect(() => planned(have({ exists: true, old: { ...old, clones: ["110"] } }), beside, w)).toThrow(/linked clones/);
    const file = guest({ ...TEMPLATE, vmgenid: "g-2" }, { vmid: 14002 });
    const made = { ...beside, token: "g-2", settings: settingsOf(file) };
    expect(planned(have({ exists: true, old, mine: mine(file, made) }), made, w)).toEqual(["qm destroy 14001"]);
  });
});

describe("delete", () => {
  const removal = (m: Mine, over: Partial<Have> = {}) =>
    tools(restoredTemplate.remove(have({ mine: m, ...over }), line(restored)));

  it("is one plain destroy of exactly what was looked at", () => {
    const file = guest(TEMPLATE);
    expect(removal(mine(file))).toEqual(["qm destroy 14001"]);
    const [step] = restoredTemplate.remove(have({ mine: mine(file) }), line(restored));
    expect(step?.argv).toContain(digestOf(file));
  });
  it.each<[string, Mine, RegExp]>([
    ["has linked clones", mine(guest(TEMPLATE), restored, ["110", "111"]), /linked clones.*110, 111/],
    ["runs", mine(guest({}, { running: true })), /it runs/],
    ["is locked", mine(guest({ ...TEMPLATE, lock: "backup" })), /locked \(backup\)/],
    ["is protected", mine(guest({ ...TEMPLATE, protection: "1" })), /protected/],
    ["is managed by HA", mine(guest(TEMPLATE, { ha: true })), /HA/],
    ["has snapshots", mine(guest({}, { snapshots: ["s1"] })), /snapshots: s1/],
    ["was started since", mine(guest({}, { starts: [1] })), /started since/],
    ["has another disk", mine(guest({ ...TEMPLATE, scsi1: "local:14001/vm-14001-disk-1.raw" })), /scsi1 was changed/],
    ["has more memory", mine(guest({ ...TEMPLATE, memory: "4096" })), /memory was changed/],
  ])("refuses while the guest %s", (_name, guestOf, message) => {
    expect(() => removal(guestOf)).toThrow(message);
  });
  it("knows a disk again that became a template's", () => {
    expect(changedByHand({ ...restored, settings: settingsOf(guest()) }, guest(TEMPLATE))).toEqual([]);
    expect(trouble(mine(guest(TEMPLATE)))).toBeUndefined();
  });
  it("keeps when that is declared, and when a storage cannot tell of clones", () => {
    expect(removal(mine(guest(TEMPLATE)), { keep: true })).toEqual([]);
    expect(() => removal({ ...mine(guest(TEMPLATE)), unknown: ["nfs"] })).toThrow(/nfs does not answer/);
    // Its guest is gone, and a volume of it may be on a storage that is down.
    const nothing = have({ unseen: ["nfs"] });
    expect(() => restoredTemplate.remove(nothing, line(restored))).toThrow(/nfs does not answer.*guest 14001/s);
    expect(() => planned(nothing)).toThrow(/nfs does not answer/);
  });
  it("waits for a restore that runs", () => {
    expect(() => restoredTemplate.remove(have({ job: { ...none, state: "running" } }), line(chosen))).toThrow(
      /still being restored/,
    );
  });
});

it("reading an archive ends with the error of whichever part fails", () => {
  expect(verifyArgv(A)[2]).toContain("pipefail");
});

// ---------------------------------------------------------------- the class

describe("the class", () => {
  const registered: pulumi.runtime.MockResourceArgs[] = [];
  beforeEach(() => {
    registered.length = 0;
    pulumi.runtime.setMocks({
      newResource: (args) => {
        registered.push(args);
        return { id: args.id ?? "14001", state: { ...args.inputs, guestName: "ubuntu", guestId: 14007 } };
      },
      call: () => ({}),
    });
  });
  const value = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => output.apply(resolve));
  const args = { host: "n4", from: { archive: A }, to: { storage: "local" } };

  it("tells a given id from the program, one of a range and the name from the node", async () => {
    expect(await value(new RestoredTemplate("t", { ...args, vmId: 14001 }).vmId)).toBe(14001);
    const ids = new VmIdRange("ids", { host: "n4", lower: 14001, upper: 14999 });
    const some = new RestoredTemplate("u", { ...args, vmId: ids });
    expect(await value(some.vmId)).toBe(14007);
    expect(await value(some.name)).toBe("ubuntu");
    expect(registered.find(({ name }) => name === "u")?.inputs.vmId).toEqual({ lower: 14001, upper: 14999 });
    expect(await value(new RestoredTemplate("v", { ...args, vmId: ids.nth(2), name: "mine" }).name)).toBe("mine");
  });
  it("has no vmId for a guest of libvirt", () => {
    const libvirt = new RestoredTemplate("l", { host: "k1", from: { directory: "/d", guest: "g" }, to: { pool: "p" } });
    expect(() => libvirt.vmId).toThrow(/guest of libvirt/);
  });
});
