import * as pulumi from "@pulumi/pulumi";
import { beforeEach, describe, expect, it } from "vitest";
import { check, diff } from "../../provider/engine-check.js";
import type { Line } from "../../provider/host-ledger.js";
import { VmIdRange } from "../../provider/index.js";
import { firstFree, vmIdRange } from "../../provider/vm-id-range.js";

const UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
const good = { host: "n4", lower: 14001, upper: 14999, __owner: "o/p/s/VmIdRange/ids", __provider: "x" };

describe("check", () => {
  it("returns what was declared", () => {
    expect(check(vmIdRange, good)).toEqual({ inputs: { ...good, host: { host: "n4" } }, failures: [] });
  });

  it.each([
    ["lower above upper", { lower: 200, upper: 150 }, "upper"],
    ["an id below 100", { lower: 99 }, "lower"],
    ["an id above 999999999", { upper: 1_000_000_000 }, "upper"],
    ["half an id", { lower: 14001.5 }, "lower"],
    ["text", { lower: "14001" }, "lower"],
    ["no upper", { upper: undefined }, "upper"],
    ["enforce as text", { enforce: "yes" }, "enforce"],
    ["another property", { size: 999 }, "size"],
  ])("refuses %s, naming the property", (_name, over, property) => {
    expect(check(vmIdRange, { ...good, ...over }).failures.map((f) => f.property)).toContain(property);
  });

  it("lets unknowns pass, and never replaces", () => {
    for (const field of ["host", "lower", "upper", "enforce"])
      expect(check(vmIdRange, { ...good, [field]: UNKNOWN }).failures).toEqual([]);
    expect(diff(vmIdRange, { ...good, __v: 1 }, { ...good, upper: 14899 })).toEqual({
      changes: undefined,
      replaces: [],
    });
  });
});

// ---------------------------------------------------------------- plans

type Have = Awaited<ReturnType<typeof vmIdRange.observe>>;
type Pins = NonNullable<Have["pins"]>;

const want = { host: { host: "n4" }, lower: 14001, upper: 14999 };
const ours: Pins = { lower: 14001, upper: 14999, enforced: true, set: { lower: 14001, upper: 14999 }, before: null };
const inForce = { lower: 14001, upper: 15000 };

function have(over: Partial<Have> = {}): Have {
  return {
    exists: false,
    nextId: undefined,
    node: "pve1",
    clustered: false,
    others: [],
    ...over,
  };
}

function line(pins: Pins | undefined): Line<Pins> {
  return {
    v: 1,
    kind: "VmIdRange",
    identity: "14001-14999",
    owner: "o",
    incarnation: "i",
    finished: false,
    kept: [],
    pins,
  };
}

/** The tool's own words of each step. */
const tools = (steps: { argv: readonly string[] }[]) =>
  steps.map(({ argv }) => argv.slice(argv.indexOf("pvesh")).join(" "));

const SET = "pvesh set /cluster/options --next-id lower=14001,upper=15000";
const DELETE = "pvesh set /cluster/options --delete next-id";

describe("plan", () => {
  it.each([
    ["nothing is there: Proxmox's upper is exclusive", {}, undefined, {}, [SET]],
    ["it is in force", {}, ours, { nextId: inForce }, []],
    ["somebody set another", {}, ours, { nextId: { lower: 100, upper: 200 } }, [SET]],
    ["not enforced, never set", { enforce: false }, undefined, { nextId: { lower: 100, upper: 200 } }, []],
    ["no longer enforced, nothing was before", { enforce: false }, ours, { nextId: inForce }, [DELETE]],
    [
      "no longer enforced, something was before",
      { enforce: false },
      { ...ours, before: { lower: 300, upper: 400 } },
      { nextId: inForce },
      ["pvesh set /cluster/options --next-id lower=300,upper=400"],
    ],
    [
      "no longer enforced, and changed by hand since",
      { enforce: false },
      ours,
      { nextId: { lower: 1000, upper: 2000 } },
      [],
    ],
    [
      "another upper",
      { upper: 14899 },
      ours,
      { nextId: inForce },
      ["pvesh set /cluster/options --next-id lower=14001,upper=14900"],
    ],
    ["in force on a cluster member already", {}, ours, { nextId: inForce, clustered: true }, []],
    ["a cluster member, not enforced", { enforce: false }, undefined, { clustered: true }, []],
  ])("%s", (_name, over, pins, seen, steps) => {
    expect(tools(vmIdRange.plan({ ...want, ...over }, have(seen), line(pins)))).toEqual(steps);
  });

  it("refuses a member of a cluster, with the cure", () => {
    expect(() => vmIdRange.plan(want, have({ clustered: true }), line(undefined))).toThrow(/cluster.*enforce: false/s);
  });

  const other = { lower: 15001, upper: 15999, enforced: true, owner: "o/p/two/VmIdRange/b" };
  it.each([
    [
      "another enforced range of the node",
      want,
      { others: [other], nextId: { lower: 15001, upper: 16000 } },
      /15001-15999 of o\/p\/two/,
    ],
    ["an overlapping one", { ...want, upper: 15500 }, { others: [other] }, /overlaps 15001-15999.*o\/p\/two/s],
    [
      "an overlapping one, neither enforced",
      { ...want, upper: 15500, enforce: false },
      { others: [{ ...other, enforced: false }] },
      /overlaps/,
    ],
  ])("refuses %s", (_name, wanted, seen, message) => {
    expect(() => vmIdRange.plan(wanted, have(seen), line(undefined))).toThrow(message);
  });

  it.each([
    ["a second block that is not enforced", { ...want, enforce: false }, { others: [other] }],
    ["the one in force, when two came at once", want, { others: [other], nextId: inForce }],
  ])("allows %s", (_name, wanted, seen) => {
    expect(vmIdRange.plan(wanted, have(seen), line(ours))).toEqual([]);
  });
});

describe("remove", () => {
  it.each([
    [
      "what was there before comes back",
      { ...ours, before: { lower: 300 } },
      { nextId: inForce },
      ["pvesh set /cluster/options --next-id lower=300"],
    ],
    ["nothing was there before", ours, { nextId: inForce }, [DELETE]],
    ["stopped before the setting was seen", { ...ours, set: undefined }, { nextId: inForce }, [DELETE]],
    ["changed by hand since", ours, { nextId: { lower: 1, upper: 2 } }, []],
    ["gone", ours, {}, []],
    ["never enforced", { lower: 14001, upper: 14999, enforced: false }, { nextId: inForce }, []],
  ])("%s", (_name, pins, seen, steps) => {
    expect(tools(vmIdRange.remove(have(seen), line(pins as Pins)))).toEqual(steps);
  });
});

it("tells how many ids are used and free, and which guests are outside", () => {
  const guest = (vmid: number, node = "pve1") => ({ vmid, node });
  const guests = [guest(14002), guest(107), guest(14001), guest(100), guest(50000, "pve2")];
  const taken = { ids: new Map([14001, 14002, 14003, 107].map((id) => [id, "x"])), unknown: [] };
  expect(vmIdRange.facts(want, have({ status: { guests, taken } }), line(ours)).status).toEqual({
    asOf: expect.stringMatching(/^\d{4}-\d\d-\d\dT.*Z$/),
    used: 2,
    free: 996,
    next: 14004,
    outside: [100, 107],
  });
  const many = { guests: Array.from({ length: 30 }, (_, i) => guest(200 - i)), taken };
  const { outside } = vmIdRange.facts(want, have({ status: many }), line(ours)).status as { outside: number[] };
  expect(outside).toEqual(Array.from({ length: 20 }, (_, i) => 171 + i)); // the state stays small
  const full = { ids: new Map([[100, "x"]]), unknown: [] };
  expect(firstFree({ lower: 100, upper: 100 }, full)).toBeUndefined();
});

it("shows a setting that somebody changed as drift of `enforce`", () => {
  expect(vmIdRange.asFound(want, have({ nextId: { lower: 1 } }), line(ours))).toEqual({ ...want, enforce: false });
  expect(vmIdRange.asFound(want, have({ nextId: inForce }), line(ours))).toEqual(want);
});

it("reads an id", () => {
  expect(vmIdRange.fromId("14001-14999")).toEqual({ lower: 14001, upper: 14999 });
  for (const id of ["14001", "14999-14001", "99-200", "a-b"]) expect(() => vmIdRange.fromId(id)).toThrow(/14001-14999/);
});

// ---------------------------------------------------------------- the program's side

describe("constructor", () => {
  beforeEach(() =>
    pulumi.runtime.setMocks({
      newResource: ({ name, inputs }) => ({ id: `${name}-id`, state: inputs }),
      call: () => ({}),
    }),
  );
  const range = (name: string, lower: number, upper: number, host = "n4") =>
    new VmIdRange(name, { host, lower, upper });
  const value = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => void output.apply(resolve));

  it("throws for a range that overlaps on one node, which is no other object by its numbers", () => {
    range("a", 14001, 14999);
    expect(() => range("b", 14999, 15998)).toThrow(/"b".*14999 to 15998.*"a", 14001 to 14999/s);
    expect(() => range("c", 14001, 14999)).toThrow(/"c".*"a"/s);
  });

  it("throws for a range that overlaps, also on another host, with both names and both ranges", () => {
    range("a", 14001, 14999);
    expect(() => range("b", 14500, 15500, "n5")).toThrow(/"b".*14500 to 15500.*"a", 14001 to 14999/s);
    range("c", 15000, 15999, "n5");
  });

  it("knows nothing of another run", () => {
    range("a", 14001, 14999);
  });

  it.each([
    [200, 150, "upper"],
    [99, 150, "lower"],
    [100, 1_000_000_000, "upper"],
    [100.5, 200, "lower"],
  ])("throws for %d to %d, naming the property", (lower, upper, property) => {
    expect(() => range("a", lower, upper)).toThrow(new RegExp(`"a": ${property}: `));
  });

  it("counts from 1", async () => {
    const ids = range("a", 14001, 14999);
    expect(await value(ids.nth(1))).toBe(14001);
    expect(await value(ids.nth(999))).toBe(14999);
    for (const n of [0, 1000, -1, 1.5, Number.NaN]) expect(() => ids.nth(n)).toThrow(/a has 999 of them/);
  });
});
