// LvSnapshot without a host: what it reads of real LVM's recorded answers, and its plans as a reviewer would read them.
import { describe, expect, it } from "vitest";
import type { Line } from "../../provider/host-ledger.js";
import {
  isOverflowed,
  isThickSnapshot,
  isThin,
  lvRow,
  lvSnapshot,
  roomFor,
  tagOf,
  vgs,
} from "../../provider/lv-snapshot.js";
import { recording } from "../captures.js";

const MiB = 1 << 20;

describe("the recorded answers of lvs", () => {
  const row = lvRow.partial().loose();
  const rows = ["linux/lvm-thick", "linux/lvm-thin-autoextend", "linux/lvm-thin-full"].flatMap((name) =>
    recording(name)
      .filter(({ cmd, stdout }) => /\blvs\b/.test(String(cmd)) && stdout.trimStart().startsWith("{"))
      .flatMap(({ cmd, stdout }) =>
        // A few were asked without "--units b": their sizes are text for people, which we never ask for.
        /--units b/.test(String(cmd)) ? (JSON.parse(stdout) as { report: [{ lv: object[] }] }).report[0].lv : [],
      ),
  );
  const parsed = rows.map((each) => row.parse(each));

  it("parse, every row of them", () => {
    expect(parsed.length).toBeGreaterThan(60);
    expect(parsed.every((each) => each.lv_size === undefined || Number.isSafeInteger(each.lv_size))).toBe(true);
  });

  it("tell a thick snapshot, a thin volume and an overflow apart", () => {
    const named = (name: string) =>
      parsed.filter((each) => each.lv_name === name && each.lv_attr !== undefined) as never[];
    expect(named("snap").every(isThickSnapshot)).toBe(true);
    expect(named("[snap]").every(isThickSnapshot)).toBe(true); // being merged
    expect(named("vm1").some(isThickSnapshot)).toBe(false);
    expect(named("tsnap").every(isThin)).toBe(true);
    expect(named("snap").some(isThin)).toBe(false);
    const overflowed = parsed.filter((each) => each.lv_attr !== undefined && isOverflowed(each as never));
    expect(overflowed.length).toBeGreaterThan(0);
    expect(overflowed.every((each) => each.lv_attr === "swi-I-s---")).toBe(true);
  });
});

describe("the recorded answers of vgs", () => {
  it("name the volume groups, also when there is none", () => {
    const named = ["linux/lvm-thick", "linux/lvm-thin-autoextend"].flatMap((name) =>
      recording(name)
        .filter(({ cmd, stdout }) => /^vgs\b/.test(String(cmd)) && stdout.trimStart().startsWith("{"))
        .map(({ stdout }) => vgs.answer.parse(JSON.parse(stdout))),
    );
    expect(named).toContainEqual(["vgdata"]);
    expect(named).toContainEqual([]);
  });
});

describe("room", () => {
  it.each([
    // asked, origin, extent -> the size that LVM really gave (captures/linux/lvm-thick.json)
    [100 * 1024 * MiB, 512 * MiB, 4 * MiB, 516 * MiB],
    [1024, 512 * MiB, 4 * MiB, 4 * MiB],
    [32 * MiB, 512 * MiB, 4 * MiB, 32 * MiB],
    [41 * MiB, 512 * MiB, 4 * MiB, 44 * MiB],
  ])("for %i bytes of a volume of %i in extents of %i is %i", (asked, origin, extent, room) => {
    expect(roomFor(asked, origin, extent)).toBe(room);
  });
});

describe("plan", () => {
  const want = { host: { host: "h" }, volumeGroup: "vg", origin: "root", name: "snap", size: 32 * MiB };
  const base = {
    vg_name: "vg",
    origin: "",
    origin_uuid: "",
    pool_lv: "",
    data_percent: undefined,
    metadata_percent: undefined,
    lv_snapshot_invalid: "unknown",
    lv_merging: "",
    lv_tags: "",
    lv_time: "1764500000",
    vg_free: 1024 * MiB,
    vg_extent_size: 4 * MiB,
  };
  const root = { ...base, lv_name: "root", lv_uuid: "O", lv_attr: "owi-a-s---", lv_size: 512 * MiB };
  const snap = {
    ...base,
    lv_name: "snap",
    lv_uuid: "S",
    lv_attr: "swi-a-s---",
    lv_size: 32 * MiB,
    origin: "root",
    origin_uuid: "O",
    lv_snapshot_invalid: "",
  };
  const thin = { ...base, lv_name: "root", lv_uuid: "O", lv_attr: "Vwi-a-tz--", lv_size: 512 * MiB, pool_lv: "pool" };
  const pool = {
    ...base,
    lv_name: "pool",
    lv_uuid: "P",
    lv_attr: "twi-aotz--",
    lv_size: 256 * MiB,
    data_percent: 95,
    metadata_percent: 10,
  };
  const owner = "organization/p/s/LvSnapshot/snap";
  const tag = tagOf(owner);

  /** The plan as a shell transcript. */
  const transcript = async (over: object, rows: object[], pins?: object, kept: string[] = []) => {
    const wanted = { ...want, ...over };
    const line = {
      v: 1,
      kind: "LvSnapshot",
      identity: "vg/snap",
      owner,
      incarnation: "i",
      finished: false,
      pins,
      kept,
    } as Line<never>;
    const host = {
      name: "h",
      run: () => Promise.reject(new Error("a plan runs nothing")),
      ask: async () => rows as never,
      identity: () => Promise.reject(new Error("not asked")),
    };
    const have = await lvSnapshot.observe(wanted, line, host);
    if (have.pins !== undefined) line.pins = have.pins as never;
    return lvSnapshot.plan(wanted, have, line).map(({ argv, shown }) => (shown ?? argv).join(" "));
  };

  it("takes a thick one, in whole extents", async () => {
    expect(await transcript({ size: 30 * MiB }, [root])).toEqual([
      `lvcreate --yes --snapshot --size ${32 * MiB}b --name snap --addtag ${tag} -- vg/root`,
    ]);
  });
  it("takes a thin one, active", async () => {
    expect(await transcript({ size: undefined, minFreePoolPercent: 5 }, [thin, pool])).toEqual([
      `lvcreate --yes --snapshot --setactivationskip n --name snap --addtag ${tag} -- vg/root`,
    ]);
  });
  it("resolves a share once: the pinned bytes count, not the origin's size of today", async () => {
    const pins = { uuid: "S", originUuid: "O", takenAt: "t", asked: "10%ORIGIN", bytes: 32 * MiB };
    const grown = { ...root, lv_size: 1024 * MiB };
    const marked = { ...snap, lv_tags: tag };
    expect(await transcript({ size: "10%ORIGIN" }, [grown, marked], pins)).toEqual([]);
    expect(await transcript({ size: "20%ORIGIN" }, [grown, marked], pins)).toEqual([
      `lvextend --size ${208 * MiB}b -- vg/snap`,
    ]);
  });
  it("is settled when marked and large enough, and extends when it is not", async () => {
    const marked = { ...snap, lv_tags: `other,${tag}` };
    expect(await transcript({}, [root, marked])).toEqual([]);
    expect(await transcript({ size: 40 * MiB }, [root, marked])).toEqual([`lvextend --size ${40 * MiB}b -- vg/snap`]);
  });
  it("stamps today's owner over yesterday's", async () => {
    expect(await transcript({}, [root, { ...snap, lv_tags: `${tagOf("o/p/old/k/n")},keep` }])).toEqual([
      `lvchange --addtag ${tag} --deltag ${tagOf("o/p/old/k/n")} -- vg/snap`,
    ]);
  });
  it("gives one that was renamed by hand its name back, and then looks again", async () => {
    const pins = { uuid: "S", originUuid: "O", takenAt: "t", asked: 32 * MiB, bytes: 32 * MiB };
    const renamed = { ...snap, lv_name: "byhand" };
    const of = async (over: object, ...more: object[]) => transcript(over, [root, renamed, ...more], pins);
    expect((await of({ size: 40 * MiB }))[0]).toBe("lvrename -- vg byhand snap");
    await expect(of({}, { ...snap, lv_uuid: "X" })).rejects.toThrow(
      /renamed to byhand, and another volume has its name/,
    );
    await expect(
      transcript(
        {},
        [
          { ...root, vg_name: "vg1" },
          { ...renamed, vg_name: "vg1" },
        ],
        pins,
      ),
    ).rejects.toThrow(/vg\/snap is vg1\/byhand now \(uuid S\).*volumeGroup: "vg1"/s);
  });
  it("keeps to the declared volume group, also when a clone of it has volumes of the same uuids", async () => {
    const pins = { uuid: "S", originUuid: "O", takenAt: "t", asked: 32 * MiB, bytes: 32 * MiB };
    const clones = [root, { ...snap, lv_tags: tag }].map((row) => ({ ...row, vg_name: "a-clone" }));
    const rows = [...clones, root, { ...snap, lv_tags: tag }];
    expect(await transcript({}, rows, pins)).toEqual([]);
    const line = { owner, pins } as never;
    const have = await lvSnapshot.observe(want, line, { ask: async () => rows } as never);
    expect(lvSnapshot.remove(have, line).map(({ shown }) => shown?.join(" "))).toEqual([
      "lvremove --yes --select lv_uuid=S -- vg/snap",
    ]);
  });
  it.each([
    [
      "an overflow",
      { ...snap, lv_attr: "swi-I-s---", lv_snapshot_invalid: "snapshot invalid" },
      /2025-11-30T00:00:00Z is lost: it overflowed/,
    ],
    [
      "a merge",
      { ...snap, lv_name: "[snap]", lv_attr: "Swi-a-s---", lv_merging: "merging" },
      /lost: it is being merged/,
    ],
    ["another volume under its name", { ...snap, lv_uuid: "X" }, /lost: it has vanished/],
  ])("calls a point in time lost after %s", async (_name, row, message) => {
    const pins = { uuid: "S", originUuid: "O", takenAt: "2025-11-30T00:00:00Z" };
    await expect(transcript({}, [root, row], pins)).rejects.toThrow(message);
  });
  it.each([
    [
      "less room than needed",
      { size: 2048 * MiB },
      [{ ...root, lv_size: 4096 * MiB }],
      /size: .* needs 2147483648 bytes, and the volume group has 1073741824 free/,
    ],
    [
      "a pool that is too full",
      { size: undefined },
      [thin, pool],
      /minFreePoolPercent: the thin pool vg\/pool is 95 % full/,
    ],
    ["a size for a thin one", {}, [thin, pool], /size: vg\/root is a thin volume/],
    ["no size for a thick one", { size: undefined }, [root], /size: vg\/root is no thin volume/],
    ["a snapshot of a snapshot", { origin: "snap", name: "two" }, [root, snap], /itself a snapshot \(of root\)/],
    ["a pool", { origin: "pool" }, [thin, pool], /is a pool or an internal volume/],
    [
      "an origin with a merge pending",
      {},
      [root, { ...snap, lv_name: "[old]", lv_merging: "merging" }],
      /being merged into it/,
    ],
    ["an origin that is not there", { origin: "nosuch" }, [root], /no logical volume nosuch.*\nThere is root/],
  ])("refuses %s", async (_name, over, rows, message) => {
    await expect(transcript(over, rows)).rejects.toThrow(message);
  });
});

describe("the owner's tag", () => {
  it.each(["organization/p/dev/LvSnapshot/plain", 'o/p/s/k/it\'s "ünique"=; $(x)', "o/p/s/k/\n"])(
    "holds %j in what a tag may hold",
    (owner) => {
      expect(tagOf(owner)).toMatch(/^pulumi-vmbackup=[A-Za-z0-9_+.\-/!:&#=]+$/);
    },
  );
  it("shortens what no tag could hold", () => {
    expect(tagOf("x".repeat(2000)).length).toBeLessThan(1024);
    expect(tagOf(`${"x".repeat(2000)}1`)).not.toBe(tagOf(`${"x".repeat(2000)}2`));
  });
});
