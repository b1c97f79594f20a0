import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  encodedOwner,
  normalPath,
  normalServer,
  ON_MOUNT,
  parsedSource,
  REGISTRY,
  registered,
  sourceOf,
} from "../../provider/nfs-export.js";

describe("sources", () => {
  it.each([
    ["skydev", "/mnt/data", "skydev:/mnt/data"],
    ["10.0.0.5", "/", "10.0.0.5:/"],
    ["fd00::1", "/e", "[fd00::1]:/e"],
  ])("%s %s", (server, exported, source) => {
    expect(sourceOf(server, exported)).toBe(source);
    expect(parsedSource(source)).toEqual({ server, export: exported });
  });

  it("has one form for brackets, case and slashes", () => {
    expect(parsedSource("[FD00::1]:/a//b/")).toEqual({ server: "fd00::1", export: "/a/b" });
    expect(parsedSource("/dev/sda1")).toBeUndefined();
    expect(normalServer("[fd00::1]")).toBe("fd00::1");
    expect(normalPath("/")).toBe("/");
    expect(normalPath("//a/")).toBe("/a");
  });
});

// The real script, over a folder that stands for the mounted export. Two machines, both called by this machine's name, as
// standalone nodes are all called pve.
describe("the registry of claims", () => {
  const root = mkdtempSync(join(tmpdir(), "registry-"));
  const machines = { a: "a".repeat(32), b: "b".repeat(32), clone: "a".repeat(32) };
  const owner = (name: string) => encodedOwner(`organization/p/${name}/NfsDumpStorage/my dumps`);
  const script = `${ON_MOUNT}source_at() { [ -d "$1" ] && echo s:/e; }\nclaim "$@"`;
  let folders = 0;

  beforeAll(() => {
    for (const [name, id] of Object.entries(machines)) {
      writeFileSync(join(root, `${name}.machine`), `${id}\n`);
      writeFileSync(join(root, `${name}.ledger`), `ledger-of-${name}\n`);
    }
  });
  afterAll(() => rmSync(root, { recursive: true }));

  const fresh = () => {
    const folder = join(root, `export${++folders}`);
    mkdirSync(folder);
    return folder;
  };
  const words = (
    folder: string,
    machine: string,
    lower: number,
    upper: number,
    { who = machine, storage = "dumps", adopt = 0, used = "" } = {},
  ) =>
    [
      folder,
      "s:/e",
      join(root, `${machine}.machine`),
      join(root, `${machine}.ledger`),
      storage,
      owner(who),
      lower,
      upper,
      adopt,
      used,
    ].map(String);
  const claim = (...args: Parameters<typeof words>) => {
    const { status, stderr } = spawnSync("sh", ["-c", script, "claim", ...words(...args)], { encoding: "utf8" });
    return { status, said: stderr.trim() };
  };
  const read = (folder: string) => registered(readFileSync(join(folder, REGISTRY, "claims"), "utf8"));
  const ranges = (folder: string) =>
    read(folder)
      .claims.map(({ lower, upper, ledger }) => `${ledger.slice(10)} ${lower}-${upper}`)
      .sort();

  it("is claimed, refused with the holder's name, changed, given back", () => {
    const folder = fresh();
    expect(claim(folder, "a", 14001, 14999)).toEqual({ status: 0, said: "" });
    expect(existsSync(join(folder, REGISTRY, "uuid"))).toBe(true);
    const refused = claim(folder, "b", 14999, 15500);
    expect(refused.status).toBe(3);
    expect(refused.said).toContain("14001 to 14999 are claimed by organization/p/a/NfsDumpStorage/my dumps on node");
    expect(refused.said).toContain(machines.a);
    expect(claim(folder, "b", 15000, 15999).status).toBe(0);
    expect(claim(folder, "b", 15000, 16999).status).toBe(0); // our own may grow
    expect(claim(folder, "b", 14500, 16999).status).toBe(3);
    expect(ranges(folder)).toEqual(["a 14001-14999", "b 15000-16999"]); // what was refused changed nothing
    expect(claim(folder, "a", 0, 0).status).toBe(0);
    expect(claim(folder, "b", 14500, 16999).status).toBe(0);
    expect(ranges(folder)).toEqual(["b 14500-16999"]);
    expect(existsSync(join(folder, REGISTRY, "lock"))).toBe(false);
  });

  it("two storages of one node share the ids, each with a claim of its own to give back", () => {
    const folder = fresh();
    expect(claim(folder, "a", 100, 200).status).toBe(0);
    expect(claim(folder, "a", 100, 200, { storage: "images", who: "other" }).status).toBe(0);
    expect(claim(folder, "a", 0, 0).status).toBe(0);
    expect(claim(folder, "b", 150, 160).status).toBe(3);
    expect(claim(folder, "a", 0, 0, { storage: "images", who: "other" }).status).toBe(0);
    expect(claim(folder, "b", 150, 160).status).toBe(0);
  });

  it("a clone shares the machine id and is another machine all the same; a lost ledger is not", () => {
    const folder = fresh();
    expect(claim(folder, "a", 100, 200).status).toBe(0);
    expect(claim(folder, "clone", 100, 200).status).toBe(3);
    expect(claim(folder, "clone", 100, 200, { who: "a" }).status).toBe(0); // the same owner on it: only the ledger's uuid is new
    expect(ranges(folder)).toEqual(["clone 100-200"]);
  });

  it("only adopt breaks a claim, and only one that overlaps", () => {
    const folder = fresh();
    claim(folder, "a", 100, 200);
    claim(folder, "a", 300, 400, { storage: "second" });
    expect(claim(folder, "b", 150, 250, { adopt: 1 }).status).toBe(0);
    expect(ranges(folder)).toEqual(["a 300-400", "b 150-250"]);
  });

  it("remembers the ids that were used, once each, also after the claim was given back", () => {
    const folder = fresh();
    claim(folder, "a", 100, 200, { used: "101,105" });
    claim(folder, "a", 0, 0, { used: "105,107" });
    expect(read(folder)).toEqual({ claims: [], used: [101, 105, 107] });
    expect(readFileSync(join(folder, REGISTRY, "claims"), "utf8").match(/^used 105/gm)).toHaveLength(1);
  });

  it("the same again writes nothing", () => {
    const folder = fresh();
    claim(folder, "a", 100, 200);
    const before = readFileSync(join(folder, REGISTRY, "claims"), "utf8");
    claim(folder, "a", 100, 200);
    claim(folder, "b", 0, 0);
    expect(readFileSync(join(folder, REGISTRY, "claims"), "utf8")).toBe(before);
  });

  it("a line that was cut off does not count, and does not spoil the next", () => {
    const folder = fresh();
    claim(folder, "a", 100, 200);
    const file = join(folder, REGISTRY, "claims");
    writeFileSync(file, `${readFileSync(file, "utf8")}claim 300 400 ${machines.a} ledger-of-a x 2026`);
    expect(claim(folder, "b", 350, 360).status).toBe(0);
    expect(ranges(folder)).toEqual(["a 100-200", "b 350-360"]);
  });

  it("nothing is written where the export is not mounted", () => {
    expect(claim(join(root, "nosuch"), "a", 100, 200)).toMatchObject({
      status: 1,
      said: expect.stringContaining("there is no"),
    });
    const folder = fresh();
    const lost = script.replace("echo s:/e", "echo other:/e");
    const { status, stderr } = spawnSync("sh", ["-c", lost, "claim", ...words(folder, "a", 100, 200)], {
      encoding: "utf8",
    });
    expect(status).not.toBe(0);
    expect(stderr).toContain("is mounted other:/e, not s:/e");
    expect(existsSync(join(folder, REGISTRY))).toBe(false);
  });

  it("a lock whose holder died is broken after two minutes, on the server's clock", () => {
    const folder = fresh();
    claim(folder, "a", 100, 200);
    const lock = join(folder, REGISTRY, "lock");
    writeFileSync(lock, "a dead run\n");
    // The link's time cannot be set back: so the ticket is put into the future instead, by a `touch` of two minutes ahead.
    const ahead = script.replace(/touch "\$ticket"/, 'touch -d "+130 seconds" "$ticket"');
    const { status } = spawnSync("sh", ["-c", ahead, "claim", ...words(folder, "b", 300, 400)], { encoding: "utf8" });
    expect(status).toBe(0);
    expect(existsSync(lock)).toBe(false);
    expect(existsSync(join(folder, REGISTRY, "lock.break"))).toBe(false);
    utimesSync(folder, new Date(), new Date());
  });
});
