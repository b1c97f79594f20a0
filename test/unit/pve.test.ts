import { describe, expect, it } from "vitest";
import {
  activeTasks,
  backupJobs,
  contentOf,
  datacenter,
  flag,
  guests,
  isAtLeast,
  numeral,
  properties,
  propertyString,
  pruneBackups,
  retentionOf,
  retentionSchema,
  setOf,
  storageIdSchema,
  storageStates,
  storages,
  version,
  vmIdsSchema,
  vmidSchema,
} from "../../provider/pve.js";
import { answers, recording } from "../captures.js";

describe("what the real tools answered", () => {
  const read = (text: string) => storages.answer.parse(storages.parse?.(text));

  it("storage.cfg, as /storage tells it", () => {
    const calls = recording("pve/pvesm");
    const said = (command: string) => calls.filter(({ cmd, exit }) => exit === 0 && cmd.join(" ") === command);
    // The same two storages, each with the retention of that time.
    const [api] = said("pvesh get /storage --output-format json");
    const file = said("cat /etc/pve/storage.cfg").find(
      ({ stdout }) => /keep-daily=7/.test(stdout) && !/nodes/.test(stdout),
    );
    const told = (JSON.parse(api?.stdout ?? "") as Record<string, unknown>[]).map(
      ({ content, digest, shared, ...row }) => ({
        ...row,
        content: setOf(String(content)),
      }),
    );
    expect(told).toHaveLength(2);
    expect(read(file?.stdout ?? "")).toEqual(told);
  });

  it("storage.cfg: flags are bare words, and Proxmox has a storage that no file names", () => {
    const disabled = recording("pve/pvesm").find(({ stdout }) => /^nfs: nfs-fast-dump\n\tdisable\n/.test(stdout));
    expect(read(disabled?.stdout ?? "")).toContainEqual(
      expect.objectContaining({ storage: "nfs-fast-dump", disable: true, nodes: ["pve1"] }),
    );
    const local = expect.objectContaining({ storage: "local", type: "dir", path: "/var/lib/vz" });
    expect(read("")).toEqual([local]);
    expect(read("lvm: local\n\tvgname x\n")).toEqual([local]);
    expect(read("dir: local\n\tpath /srv\n")).toEqual([local]);
  });

  it("the state of the storages: lists in random order are one set", () => {
    const found = answers("pve/pvesm", storageStates);
    expect(found.length).toBeGreaterThan(1);
    const contents = found.map((rows) => rows.find((row) => row.storage === "local")?.content);
    expect(new Set(contents.map(String)).size).toBe(1);
    expect(found[0]?.find((row) => row.storage === "nfs-fast-dump")).toMatchObject({
      active: true,
      enabled: true,
      total: 270553174016,
    });
  });

  it("the content of a storage", () => {
    const [found] = answers("pve/vzdump", contentOf("nfs-fast-dump", "backup"));
    expect(found?.find((v) => v.volid.endsWith("vzdump-qemu-110-2026_11_22-00_18_34.vma.zst"))).toMatchObject({
      size: 314,
      vmid: 110,
      protected: true,
      ctime: 1795306714,
    });
  });

  it("backup jobs", () => {
    const found = answers("pve/pvesh-cluster", backupJobs);
    expect(found[0]).toEqual([]);
    expect(found[1]?.[0]).toMatchObject({
      id: "nightly-fast",
      enabled: true,
      storage: "nfs-fast-dump",
      vmid: "100,101",
      "next-run": 1795401000,
    });
    expect(retentionOf(found[1]?.[0]?.["prune-backups"])).toEqual({ keepLast: 3, keepDaily: 7 });
    expect(found[2]?.[1]).toMatchObject({ all: true, exclude: "102" });
  });

  it("the datacenter: node, cluster, next-id range", () => {
    const files = recording("pve/pvesh-cluster").filter(({ cmd }) => cmd.join(" ") === "cat /etc/pve/datacenter.cfg");
    expect(files).toHaveLength(2);
    const read = (before: string, file: string) => datacenter.answer.parse(datacenter.parse?.(`${before}\n${file}`));
    for (const { stdout } of files)
      expect(read("nodes/pve1\nalone", stdout)).toEqual({
        node: "pve1",
        clustered: false,
        nextId: { lower: 14001, upper: 14999 },
      });
    expect(read("nodes/pve1\nmember", "keyboard: de\n")).toEqual({ node: "pve1", clustered: true, nextId: undefined });
    expect(read("nodes/pve1\nalone", "")).toMatchObject({ nextId: undefined });
    for (const odd of ["", "\nalone"]) expect(() => read(odd, "")).toThrow(); // no node: no answer
    expect(() => read("nodes/pve1\nalone", "next-id: lower=x\n")).toThrow();
  });

  it("guests, version, tasks", () => {
    expect(answers("pve/pvesh-cluster", guests)[0]?.map((g) => g.vmid)).toEqual([100, 101, 102]);
    expect(answers("pve/pvesh-cluster", version)[0]).toEqual({ version: "9.2.11" });
    expect(answers("pve/qmrestore-failures", activeTasks)[0]).toEqual([]);
  });
});

describe("values", () => {
  it("booleans and numbers in every form", () => {
    for (const yes of [1, "1", true]) expect(flag.parse(yes)).toBe(true);
    for (const no of [0, "0", false]) expect(flag.parse(no)).toBe(false);
    expect(flag.safeParse("yes").success).toBe(false);
    expect(numeral.parse("14001")).toBe(14001);
    expect(numeral.safeParse("").success).toBe(false);
  });

  it("sets and property strings", () => {
    expect(setOf("b,a; a  c")).toEqual(["a", "b", "c"]);
    expect(setOf(undefined)).toEqual([]);
    expect(properties("1,storage=local", "enabled")).toEqual({ enabled: "1", storage: "local" });
    expect(properties("")).toEqual({});
    expect(propertyString({ lower: 1, gone: undefined, on: true })).toBe("lower=1,on=1");
  });

  it("versions are compared by number", () => {
    expect(isAtLeast("9.2.11", "9.2.2")).toBe(true);
    expect(isAtLeast("8.2.5", "8.3")).toBe(false);
  });
});

describe("inputs", () => {
  it("retention: normal form, and as Proxmox writes it", () => {
    expect(retentionSchema.parse({ keepLast: 3, keepDaily: 7, keepWeekly: 0 })).toEqual({ keepLast: 3, keepDaily: 7 });
    expect(pruneBackups({ keepDaily: 7, keepLast: 3 })).toBe("keep-last=3,keep-daily=7");
    expect(pruneBackups({ keepAll: true })).toBe("keep-all=1");
    for (const all of [undefined, "", "keep-all=1", "keep-last=0"]) expect(retentionOf(all)).toEqual({ keepAll: true });
    expect(retentionOf("keep-daily=7,keep-last=3")).toEqual({ keepLast: 3, keepDaily: 7 });
  });

  it.each([
    [{ keepLats: 3 }, "keepLats"],
    [{ keepLast: -1 }, "keepLast"],
    [{ keepLast: 1.5 }, "keepLast"],
    [{ keepLast: "3" }, "keepLast"],
    [{ keepAll: true, keepLast: 3 }, "keepAll"],
    [{ keepAll: false, keepLast: 3 }, "keepAll"],
    [{}, "names no number"],
    [{ keepLast: 0 }, "names no number"],
  ])("retention that is refused: %j", (value, said) => {
    const result = retentionSchema.safeParse(value);
    expect(JSON.stringify(result.error?.issues)).toContain(said);
  });

  it("ids", () => {
    expect(vmidSchema.parse(100)).toBe(100);
    for (const bad of [99, 1e9, 100.5, "100"]) expect(vmidSchema.safeParse(bad).success).toBe(false);
    expect(vmIdsSchema.safeParse({ lower: 200, upper: 199 }).error?.issues[0]?.path).toEqual(["upper"]);
    for (const good of ["local", "NFS-Fast.dump_1", "ab"]) expect(storageIdSchema.parse(good)).toBe(good);
    for (const bad of ["1bad", "bad_", "x", "a b", "ü", "", "a/b"])
      expect(storageIdSchema.safeParse(bad).success).toBe(false);
  });
});
