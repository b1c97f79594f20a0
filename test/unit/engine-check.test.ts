import { describe, expect, it } from "vitest";
import { check, diff } from "../../provider/engine-check.js";
import { lvSnapshot } from "../../provider/lv-snapshot.js";

const UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
const good = {
  host: "kvm1",
  volumeGroup: "vg0",
  origin: "root",
  name: "snap",
  size: "1G",
  __owner: "o/p/s/k/n",
  __provider: "x",
};

const refused = (over: object) => check(lvSnapshot, { ...good, ...over }).failures;

describe("check", () => {
  it("returns what was declared, in normal form, without defaults", () => {
    expect(check(lvSnapshot, good)).toEqual({
      inputs: { ...good, host: { host: "kvm1" }, size: 1 << 30 },
      failures: [],
    });
    expect(check(lvSnapshot, { ...good, size: "20%ORIGIN" }).inputs.size).toBe("20%ORIGIN");
    expect(check(lvSnapshot, { ...good, size: "512m" }).inputs.size).toBe(512 << 20);
  });

  it.each([
    ["size 0", { size: 0 }, "size"],
    ["size 0G", { size: "0G" }, "size"],
    ["a share of nothing", { size: "20%" }, "size"],
    ["a share of zero", { size: "0%ORIGIN" }, "size"],
    ["a blank in the size", { size: "20 GB" }, "size"],
    ["a negative size", { size: -1 }, "size"],
    ["a negative text size", { size: "-1G" }, "size"],
    ["half a byte", { size: 1.5 }, "size"],
    ["more bytes than a number holds", { size: "999999999T" }, "size"],
    ["a reserved name", { name: "snapshot1" }, "name"],
    ["another reserved name", { name: "pvmove0" }, "name"],
    ["an internal name", { name: "x_mlog" }, "name"],
    ["a leading hyphen", { name: "-x" }, "name"],
    ["a blank in a name", { origin: "a b" }, "origin"],
    ["a path as a name", { name: "a/b" }, "name"],
    ["an empty name", { volumeGroup: "" }, "volumeGroup"],
    ["a dot", { volumeGroup: "." }, "volumeGroup"],
    ["a name that is too long", { name: "x".repeat(128) }, "name"],
    ["the origin's own name", { name: "root" }, "name"],
    ["no origin", { origin: undefined }, "origin"],
    ["a number for a name", { origin: 7 }, "origin"],
    ["a percentage above 100", { minFreePoolPercent: 101 }, "minFreePoolPercent"],
    ["a percentage as text", { minFreePoolPercent: "10" }, "minFreePoolPercent"],
    ["a property that does not exist", { sise: "1G" }, "sise"],
    ["what is not there yet: autoExtend", { autoExtend: { at: 70, by: 20 } }, "autoExtend"],
    ["what is not there yet: freeze", { freeze: "web1" }, "freeze"],
    ["what is not there yet: nbd", { nbd: { address: "10.0.0.1", allow: ["10.0.0.2"] } }, "nbd"],
    ["a password", { host: { host: "h", password: "x" } }, "host.password"],
    ["a field that a connection has not", { host: { host: "h", username: "x" } }, "host.username"],
    ["a port above 65535", { host: { host: "h", port: 70000 } }, "host.port"],
    ["no host", { host: undefined }, "host"],
  ])("refuses %s, naming the property", (_name, over, property) => {
    const failures = refused(over);
    expect(failures.map((f) => f.property)).toContain(property);
    expect(failures.every((f) => f.reason.length > 3)).toBe(true);
  });

  it("says what is not there yet in words", () => {
    expect(refused({ freeze: "web1" })[0]?.reason).toMatch(/not there yet/);
    expect(refused({ host: { host: "h", password: "x" } })[0]?.reason).toMatch(/password logins/);
    expect(refused({ origin: undefined })[0]?.reason).toBe("is required");
  });

  it.each(Object.keys(good).filter((key) => !key.startsWith("__")))(
    "passes an unknown %s through, and still checks the others",
    (field) => {
      expect(check(lvSnapshot, { ...good, [field]: UNKNOWN }).failures).toEqual([]);
      const other = field === "size" ? { name: "-x" } : { size: 0 };
      expect(check(lvSnapshot, { ...good, [field]: UNKNOWN, ...other }).failures).toHaveLength(1);
    },
  );

  it("passes an unknown at any depth through", () => {
    const host = { host: "h", proxy: { host: UNKNOWN } };
    expect(check(lvSnapshot, { ...good, host })).toMatchObject({ failures: [], inputs: { host } });
  });
});

describe("diff", () => {
  const state = { ...check(lvSnapshot, good).inputs, uuid: "u", __v: 1 };
  const changed = (over: object) => diff(lvSnapshot, state, check(lvSnapshot, { ...good, ...over }).inputs);

  it("says no change for the same program", () => expect(changed({})).toEqual({ changes: false, replaces: [] }));
  it("says no change for the same size in another spelling", () =>
    expect(changed({ size: 1 << 30 })).toEqual({ changes: false, replaces: [] }));
  it("leaves a changed input to the engine's own comparison", () =>
    expect(changed({ size: "2G" })).toEqual({ changes: undefined, replaces: [] }));
  it.each(["volumeGroup", "origin", "name"])("replaces for another %s", (field) =>
    expect(changed({ [field]: "other" }).replaces).toEqual([field]),
  );
  it("does not replace an object that was renamed by hand: what is declared is what it was made as", () => {
    const { volumeGroup, name } = check(lvSnapshot, good).inputs;
    const renamed = (over: object) =>
      diff(
        lvSnapshot,
        { ...state, name: "byhand" },
        check(lvSnapshot, { ...good, ...over }).inputs,
        `${volumeGroup}/${name}`,
      );
    expect(renamed({})).toEqual({ changes: undefined, replaces: [] });
    expect(renamed({ name: "byhand" })).toEqual({ changes: false, replaces: [] });
    expect(renamed({ name: "other" }).replaces).toEqual(["name"]);
    expect(renamed({ origin: "other" }).replaces).toEqual(["origin"]);
  });
  it("never replaces for an unknown", () =>
    expect(changed({ name: UNKNOWN })).toEqual({ changes: undefined, replaces: [] }));
  it("never replaces for a host", () =>
    expect(changed({ host: "other" })).toEqual({ changes: undefined, replaces: [] }));
  it("does not count adopt", () => expect(changed({ adopt: true })).toEqual({ changes: false, replaces: [] }));
  it("calls for work when the owner changed", () =>
    expect(changed({ __owner: "another" })).toEqual({ changes: true, replaces: [] }));
  it("calls for work when the point in time is lost", () => {
    expect(diff(lvSnapshot, { ...state, status: { valid: false } }, check(lvSnapshot, good).inputs)).toEqual({
      changes: true,
      replaces: [],
    });
  });
});
