import * as pulumi from "@pulumi/pulumi";
import { describe, expect, it } from "vitest";
import { check, diff } from "../../provider/engine-check.js";
import type { Fields } from "../../provider/engine-values.js";
import type { Host, Report } from "../../provider/host.js";
import type { Line } from "../../provider/host-ledger.js";
import { NfsDumpStorage, VmIdRange } from "../../provider/index.js";
import { nfsDumpStorage } from "../../provider/nfs-dump-storage.js";
import { asDeclared, declared, found, sameValue } from "../../provider/nfs-dump-storage-inputs.js";
import { sectionHash, sections } from "../../provider/pve.js";
import { recording } from "../captures.js";

const good = {
  host: "n4",
  storageId: "nfs-fast-dump",
  server: "skydev",
  export: "/mnt/data/pve-dump",
  __owner: "o/p/s/k/n",
  __provider: "x",
};
const checked = (over: Fields) => check(nfsDumpStorage, { ...good, ...over });

type Have = Parameters<typeof nfsDumpStorage.plan>[1];
type Want = Parameters<typeof nfsDumpStorage.plan>[0];
type Pins = NonNullable<Have["pins"]>;

describe("check", () => {
  it("returns what was declared, in normal form", () => {
    const { inputs, failures } = checked({
      server: "[FD00::1]",
      export: "/mnt//data/",
      content: ["iso", "backup", "iso"],
      nodes: ["b", "a"],
      bwlimit: "restore=10,default=5",
      contentDirs: { backup: "dump-n4/" },
      retention: { keepLast: 3, keepDaily: 0 },
    });
    expect(failures).toEqual([]);
    expect(inputs).toMatchObject({
      server: "fd00::1",
      export: "/mnt/data",
      content: ["backup", "iso"],
      nodes: ["a", "b"],
      bwlimit: "default=5,restore=10",
      contentDirs: { backup: "dump-n4" },
      retention: { keepLast: 3 },
    });
    expect(checked({}).inputs).toEqual({ ...good, host: { host: "n4" } }); // no defaults: "not declared" stays visible
  });

  it("sees no change in another order or spelling", () => {
    const news = checked({ content: ["iso", "backup"] }).inputs;
    expect(diff(nfsDumpStorage, { ...good, content: ["backup", "iso"], __v: 1 }, news)).toEqual({
      changes: false,
      replaces: [],
    });
    for (const [field, value, replaces] of [
      ["server", "other", []],
      ["export", "/other", []],
      ["vmIds", { lower: 200, upper: 300 }, []],
      ["storageId", "other", ["storageId"]],
      ["path", "/mnt/other", ["path"]],
    ] as const)
      expect(diff(nfsDumpStorage, { ...good, __v: 1 }, checked({ [field]: value }).inputs).replaces, field).toEqual(
        replaces,
      );
  });

  it("names what guests' disks need", () => {
    expect(checked({ content: ["images"] }).failures[0]).toMatchObject({
      property: "content",
      reason: expect.stringContaining("needs `vmIds`"),
    });
    expect(checked({ content: ["images"], vmIds: { lower: 14001, upper: 14999 } }).failures).toEqual([]);
    const unknown = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
    expect(checked({ content: ["images"], vmIds: { lower: unknown, upper: unknown } }).failures).toEqual([]);
  });
});

describe("storage.cfg", () => {
  // The real file, as the recordings show it.
  const files = recording("pve/pvesm").filter(({ cmd, exit }) => cmd.join(" ").includes("storage.cfg") && exit === 0);

  it("is read as the real tools write it", () => {
    expect(files.length).toBeGreaterThan(5);
    const all = files.flatMap(({ stdout }) => sections(stdout)).filter(({ type }) => type === "nfs");
    expect(all.length).toBeGreaterThan(5);
    for (const section of all)
      expect(section.values).toMatchObject({ server: "127.0.0.1", path: expect.stringMatching(/^\//) });
    expect(all.some((section) => found(section).disable === "1")).toBe(true);
    expect(all.some((section) => found(section).retention === "keep-last=3,keep-daily=7")).toBe(true);
  });

  it("has one hash for one content, in whatever order", () => {
    const a = sections("nfs: x\n\tcontent iso,backup\n\tpath /p\n\n")[0];
    const b = sections("dir: y\n\tpath /q\n\nnfs: x\n\tpath /p\n\tcontent backup,iso\n")[1];
    const c = sections("nfs: x\n\tpath /p\n\tcontent backup\n")[0];
    if (a === undefined || b === undefined || c === undefined) throw new Error("not read");
    expect(sectionHash(a)).toBe(sectionHash(b));
    expect(sectionHash(a)).not.toBe(sectionHash(c));
  });

  it("goes to inputs and back", () => {
    const want = checked({
      content: ["backup", "iso"],
      retention: { keepLast: 3, keepDaily: 7 },
      maxProtectedBackups: -1,
      contentDirs: { iso: "i", backup: "d" },
      options: "vers=4.2,soft",
      bwlimit: "restore=1",
      preallocation: "off",
      nodes: ["a", "b"],
      disable: true,
    }).inputs as Want;
    const { host: _h, storageId: _s, server: _v, export: _e, ...fields } = want;
    const { __owner: _o, __provider: _p, ...mine } = fields as Fields;
    expect(asDeclared(declared(want))).toEqual(mine);
    expect(sameValue("options", "a,b", "b,a")).toBe(true);
    expect(sameValue("content", "a,b", "b,a")).toBe(false); // in normal form already
  });
});

describe("plan", () => {
  const want = (over: Fields = {}) => checked(over).inputs as Want;
  const row = (lines: string) => {
    const section = sections(
      `nfs: nfs-fast-dump\n\texport /mnt/data/pve-dump\n\tserver skydev\n\tpath /mnt/pve/nfs-fast-dump\n${lines}`,
    )[0];
    if (section === undefined) throw new Error("not read");
    return section;
  };
  const have = (lines: string | undefined, over: Partial<Have> = {}): Have => {
    const section = lines === undefined ? undefined : row(lines);
    return {
      exists: section !== undefined,
      node: "pve",
      ...(section === undefined ? {} : { row: section }),
      values: section === undefined ? {} : found(section),
      path: "/mnt/pve/nfs-fast-dump",
      mounted: section === undefined ? [] : ["skydev:/mnt/data/pve-dump"],
      source: "skydev:/mnt/data/pve-dump",
      isDeclared: true,
      on: { answers: true, dumps: 0, holds: [], dumpedIds: [], claims: [], used: [] },
      claim: undefined,
      usedIds: [],
      proven: "skydev:/mnt/data/pve-dump -",
      users: { jobs: [], disks: [], tasks: [], storages: [] },
      pruned: [],
      ...over,
    };
  };
  const line = (over: Partial<Line<Pins>> = {}): Line<Pins> => ({
    v: 1,
    kind: "NfsDumpStorage",
    identity: "nfs-fast-dump",
    owner: "o/p/s/k/n",
    incarnation: "1",
    finished: false,
    kept: [],
    pins: {},
    ...over,
  });
  const words = (w: Want, h: Have, l = line()) =>
    nfsDumpStorage.plan(w, h, l).map((step) => (step.shown ?? step.argv).join(" "));

  it("adds what is not there, with what is declared and no more", () => {
    expect(words(want({ retention: { keepLast: 3 }, path: "/mnt/x" }), have(undefined))).toEqual([
      "pvesm add nfs nfs-fast-dump --server skydev --export /mnt/data/pve-dump --path /mnt/x --content backup --prune-backups keep-last=3",
    ]);
    expect(words(want({ server: "fd00::1" }), have(undefined))[0]).toContain("--server fd00::1 ");
  });

  it("adds it without guests' disks as long as their ids are not claimed", () => {
    const w = want({ content: ["images", "iso"], vmIds: { lower: 100, upper: 200 } });
    expect(words(w, have(undefined))[0]).toContain("--content iso");
    expect(words(w, have("\tcontent iso\n"))).toEqual(["claim /mnt/pve/nfs-fast-dump 100-200"]);
    const claim = { lower: 100, upper: 200, machine: "m", ledger: "l", storage: "nfs-fast-dump", owner: "o/p/s/k/n" };
    expect(words(w, have("\tcontent iso\n", { claim }))).toEqual(["pvesm set nfs-fast-dump --content images,iso"]);
    expect(words(w, have("\tcontent iso,images\n", { claim }))).toEqual([]);
    expect(words(w, have("\tcontent iso,images\n", { claim: { ...claim, owner: "renamed" } }))).toEqual([
      "claim /mnt/pve/nfs-fast-dump 100-200",
    ]);
    expect(words(want(), have("\tcontent backup\n", { claim }))).toEqual(["claim /mnt/pve/nfs-fast-dump nothing"]);
  });

  it("is settled in whatever order Proxmox writes it", () => {
    const w = want({
      content: ["backup", "iso"],
      nodes: ["pve", "b"],
      options: "soft,vers=4.2",
      retention: { keepDaily: 7, keepLast: 3 },
    });
    const settled =
      "\tcontent iso,backup\n\tnodes b,pve\n\toptions vers=4.2,soft\n\tprune-backups keep-daily=7,keep-last=3\n";
    expect(words(w, have(settled, { proven: "skydev:/mnt/data/pve-dump vers=4.2,soft" }))).toEqual([]);
  });

  it("changes all that differs with one command", () => {
    expect(
      words(want({ retention: { keepLast: 3 } }), have("\tcontent iso,backup\n\tbwlimit restore=1\n\tdisable\n")),
    ).toEqual(["pvesm set nfs-fast-dump --content backup --prune-backups keep-last=3 --delete bwlimit,disable"]);
  });

  it("leaves what adoption found, also when a move has disabled it", () => {
    const l = line({
      kept: ["bwlimit", "content"],
      pins: { proven: "skydev:/mnt/data/pve-dump -", carried: { bwlimit: "restore=1", content: "iso", mkdir: "0" } },
    });
    expect(words(want(), have("\tcontent iso\n\tbwlimit restore=1\n"), l)).toEqual([]);
    expect(words(want(), have(undefined), l)).toEqual([
      "pvesm add nfs nfs-fast-dump --server skydev --export /mnt/data/pve-dump --content iso --bwlimit restore=1 --mkdir 0",
    ]);
  });

  it("writes down ids that were used meanwhile, with the first run that has the export at hand", () => {
    const w = want({ vmIds: { lower: 100, upper: 200 } });
    const claim = { lower: 100, upper: 200, machine: "m", ledger: "l", storage: "nfs-fast-dump", owner: "o/p/s/k/n" };
    const used = { claim, usedIds: [107] };
    const [step] = nfsDumpStorage.plan(w, have("\tcontent backup\n", used), line());
    expect(step?.argv.slice(-5)).toEqual(["o/p/s/k/n", "100", "200", "0", "107"]);
    const l = line({ pins: { claim: "100-200" } });
    expect(words(w, have("\tcontent backup\n", { ...used, on: undefined }), l)).toEqual([]);
  });

  it("moves: disable and unmount, then remove, then add; options need no removal", () => {
    const w = want({ export: "/other" });
    const moved = { isDeclared: false };
    expect(words(w, have("\tcontent backup\n", moved))).toEqual(["umount /mnt/pve/nfs-fast-dump"]);
    expect(words(w, have("\tcontent backup\n\tdisable\n", { ...moved, mounted: [] }))).toEqual([
      "pvesm remove nfs-fast-dump",
    ]);
    const o = want({ options: "vers=4.2" });
    expect(words(o, have("\tcontent backup\n"))).toEqual(["umount /mnt/pve/nfs-fast-dump"]);
    expect(words(o, have("\tcontent backup\n\tdisable\n", { mounted: [] }))).toEqual([
      "pvesm set nfs-fast-dump --options vers=4.2 --delete disable",
    ]);
  });

  it.each<[string, Partial<Have["users"]>]>([
    ["a guest's disk", { disks: [{ who: "guest 101 (x)", content: "images" }] }],
    ["a running restore", { tasks: ["qmrestore of 14001"] }],
    ["another storage", { storages: ["sub"] }],
  ])("refuses to move under %s, and to be removed", (_name, users) => {
    const h = have("\tcontent backup\n", { isDeclared: false, users: { ...have(undefined).users, ...users } });
    expect(() => words(want({ export: "/other" }), h)).toThrow(/in use by/);
    expect(() => nfsDumpStorage.remove(h, line())).toThrow(/in use by/);
  });

  it("is removed when only a job is gone, and unmounts what is left of it", () => {
    const h = have("\tcontent backup\n", { users: { ...have(undefined).users, jobs: ["nightly"] } });
    expect(() => nfsDumpStorage.remove(h, line())).toThrow(/the backup job nightly/);
    expect(nfsDumpStorage.remove(have(undefined), line())).toEqual([]);
    expect(nfsDumpStorage.remove(have(undefined, { mounted: ["skydev:/mnt/data/pve-dump"] }), line())).toHaveLength(1);
    expect(nfsDumpStorage.remove(have(undefined, { mounted: ["other:/x"] }), line())).toEqual([]);
    expect(nfsDumpStorage.remove(have(undefined, { stranger: "dir" }), line())).toEqual([]);
  });

  it("refuses another kind of storage, another mount point, and a mount that is not ours", () => {
    expect(() => words(want(), have(undefined, { stranger: "dir" }))).toThrow(/type dir/);
    expect(() => words(want({ path: "/mnt/other" }), have("\tcontent backup\n"))).toThrow(/is mounted at \/mnt\/pve/);
    expect(() => words(want(), have(undefined, { mounted: ["tmpfs"] }))).toThrow(/tmpfs is mounted already/);
    expect(() => words(want(), have("\tcontent backup\n", { mounted: ["tmpfs"] }))).toThrow(/tmpfs is mounted and not/);
  });

  it("shows undeclared and not kept fields as drift, and no others", () => {
    const h = have("\tcontent backup\n\tbwlimit restore=1\n\tpreallocation off\n");
    const l = line({ kept: ["preallocation"] });
    expect(nfsDumpStorage.asFound(want(), h, l)).toEqual({ ...want(), bwlimit: "restore=1" });
    expect(nfsDumpStorage.asFound(want({ bwlimit: "restore=1" }), h, l)).toEqual(want({ bwlimit: "restore=1" }));
    expect(nfsDumpStorage.asFound(want({ retention: { keepLast: 3 } }), have("\tcontent backup\n"), l)).toEqual(want());
  });
});

describe("observe", () => {
  /** A node that answers the questions from these files and this mount table; no server is behind it. */
  function node(storageCfg: string, mounts: { target: string; source: string }[]): Host {
    const parts = {
      node: "pve\n",
      machine: "m\n",
      ledger: "l\n",
      storage: storageCfg,
      mounts: JSON.stringify({ filesystems: mounts.map((mount) => ({ ...mount, fstype: "nfs4" })) }),
    };
    const look = Object.entries(parts).map(([name, text]) => `\u001e${name}\n${text}`);
    const run = async () => {
      throw new Error("observe only asks");
    };
    const ask = async <T>({ argv, parse = JSON.parse, answer }: Report<T>): Promise<T> =>
      answer.parse(parse(argv[0] === "pvesh" ? "[]" : look.join("\n")));
    return { name: "pve", run, ask, identity: async () => ({ machineId: "m" }) };
  }
  const row =
    "nfs: nfs-fast-dump\n\texport /mnt/data/pve-dump\n\tserver skydev\n\tpath /mnt/pve/nfs-fast-dump\n\tcontent backup\n";
  const mounts = [{ target: "/mnt/pve/nfs-fast-dump", source: "skydev:/mnt/data/pve-dump" }];
  const want = (over: Fields = {}) => checked(over).inputs as Want;
  const line = (pins: Pins): Line<Pins> => ({
    v: 1,
    kind: "NfsDumpStorage",
    identity: "nfs-fast-dump",
    owner: "o/p/s/k/n",
    incarnation: "1",
    finished: false,
    kept: [],
    pins,
  });

  it("remembers the mount as soon as it is seen, also before the work is finished", async () => {
    const { pins, exists } = await nfsDumpStorage.observe(want(), line({}), node(row, mounts));
    expect(exists).toBe(true);
    expect(pins).toEqual({ source: "skydev:/mnt/data/pve-dump" });
  });

  it("knows our mount that was left by a removal by hand, also when the program moved the storage meanwhile", async () => {
    const ours = line({ source: "skydev:/mnt/data/pve-dump" });
    const moved = want({ export: "/other" });
    const have = await nfsDumpStorage.observe(moved, ours, node("", mounts));
    expect(have).toMatchObject({ exists: false, source: "skydev:/mnt/data/pve-dump" });
    const [step] = nfsDumpStorage.plan(moved, have, ours);
    // Path, the new source, and what is to be unmounted before.
    expect(step?.argv.slice(5, 8)).toEqual(["/mnt/pve/nfs-fast-dump", "skydev:/other", "skydev:/mnt/data/pve-dump"]);
    const stranger = await nfsDumpStorage.observe(moved, line({}), node("", mounts));
    expect(() => nfsDumpStorage.plan(moved, stranger, line({}))).toThrow(/is mounted already/);
  });

  it("knows whether it was disabled before our own work disabled it", async () => {
    const kept = (pins: Pins, finished = false): Line<Pins> => ({ ...line(pins), kept: ["disable"], finished });
    const disabled = async (text: string, l: Line<Pins> | undefined) =>
      (await nfsDumpStorage.observe(want({ options: "soft" }), l, node(row + text, []))).pins?.carried?.disable;
    expect(await disabled("\tdisable\n", undefined)).toBe("1"); // adopted like that
    expect(await disabled("\tdisable\n", kept({ source: "s", carried: { disable: "1" } }))).toBe("1");
    expect(await disabled("\tdisable\n", kept({ source: "s" }))).toBeUndefined(); // by our own remount
    expect(await disabled("\tdisable\n", kept({ source: "s" }, true))).toBe("1"); // by hand, since
    // So a remount ends as it began.
    for (const [carried, words] of [
      [{ disable: "1" }, ["pvesm", "set", "nfs-fast-dump", "--options", "soft"]],
      [{}, ["pvesm", "set", "nfs-fast-dump", "--options", "soft", "--delete", "disable"]],
    ] as const) {
      const l = kept({ source: "skydev:/mnt/data/pve-dump", carried });
      const have = await nfsDumpStorage.observe(want({ options: "soft" }), l, node(`${row}\tdisable\n`, []));
      const [step] = nfsDumpStorage.plan(want({ options: "soft" }), have, { ...l, pins: have.pins ?? {} });
      expect(step?.shown).toEqual(words);
    }
  });

  it("takes a storage of another kind for no object of ours", async () => {
    const have = await nfsDumpStorage.observe(want(), line({}), node("dir: nfs-fast-dump\n\tpath /x\n", []));
    expect(have).toMatchObject({ exists: false, stranger: "dir" });
  });
});

describe("the class", () => {
  const known = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => output.apply(resolve));
  async function run(program: () => void): Promise<pulumi.runtime.MockResourceArgs[]> {
    const sent: pulumi.runtime.MockResourceArgs[] = [];
    const newResource = (args: pulumi.runtime.MockResourceArgs) => {
      sent.push(args);
      return { id: args.id || args.name, state: args.inputs };
    };
    await pulumi.runtime.setMocks({ newResource, call: ({ inputs }) => inputs }, "fleet", "prod", true, "acme");
    program();
    await pulumi.runtime.disconnect();
    return sent;
  }
  const args = { host: "n4", storageId: "dumps", server: "s", export: "/e" };

  it("knows path and dumpPath in preview, from its own inputs", async () => {
    let paths: Promise<string>[] = [];
    const sent = await run(() => {
      const one = new NfsDumpStorage("one", args);
      const two = new NfsDumpStorage("two", {
        ...args,
        storageId: "b",
        path: "/mnt/x",
        contentDirs: { backup: "dump-n4" },
      });
      paths = [one.path, one.dumpPath, two.path, two.dumpPath].map(known);
    });
    expect(await Promise.all(paths)).toEqual(["/mnt/pve/dumps", "/mnt/pve/dumps/dump", "/mnt/x", "/mnt/x/dump-n4"]);
    expect(sent.find(({ name }) => name === "one")?.inputs).toMatchObject({
      path: "/mnt/pve/dumps",
      __owner: "acme/fleet/prod/NfsDumpStorage/one",
    });
  });

  it("takes a VmIdRange as two numbers", async () => {
    const sent = await run(() => {
      const ids = new VmIdRange("ids", { host: "n4", lower: 14001, upper: 14999 });
      new NfsDumpStorage("one", { ...args, vmIds: ids });
      new NfsDumpStorage("two", { ...args, storageId: "b", vmIds: pulumi.output({ lower: 1000, upper: 2000 }) });
    });
    expect(sent.find(({ name }) => name === "one")?.inputs.vmIds).toEqual({ lower: 14001, upper: 14999 });
    expect(sent.find(({ name }) => name === "two")?.inputs.vmIds).toEqual({ lower: 1000, upper: 2000 });
  });

  it("refuses two resources for one storage on the user's line", async () => {
    await run(() => {
      new NfsDumpStorage("one", args);
      expect(() => new NfsDumpStorage("two", args)).toThrow(/"two" and "one" are the same object/);
    });
  });
});
