// The program's side of a resource, with Pulumi's own mocks: what the class registers, and what it refuses on the user's line.
import * as pulumi from "@pulumi/pulumi";
import { beforeEach, describe, expect, it } from "vitest";
import { seconds } from "../../provider/door.js";
import { LvSnapshot, type LvSnapshotArgs } from "../../provider/index.js";

let registered: pulumi.runtime.MockResourceArgs[] = [];

async function mocks(preview = false): Promise<void> {
  // A list of its own: what an earlier test did not wait for comes late.
  const mine: typeof registered = [];
  registered = mine;
  await pulumi.runtime.setMocks(
    {
      newResource: (args) => {
        mine.push(args);
        return { id: args.id || "vg0/dump", state: args.inputs };
      },
      call: ({ inputs }) => inputs,
    },
    "fleet",
    "prod",
    preview,
    "acme",
  );
}
beforeEach(() => mocks());

/** Everything that was registered, once Pulumi has sent it. */
async function sent(): Promise<pulumi.runtime.MockResourceArgs[]> {
  await pulumi.runtime.disconnect();
  return registered;
}

const args: LvSnapshotArgs = { host: "kvm1", volumeGroup: "vg0", origin: "web1", size: "20%ORIGIN" };
const known = <T>(output: pulumi.Output<T>) => new Promise<T>((resolve) => output.apply(resolve));

describe("a resource is registered with", () => {
  it("its type, what was declared, its owner, and the text that finds the provider: a constant for ever", async () => {
    new LvSnapshot("dump", args);
    const [it] = await sent();
    expect(it).toMatchObject({ type: "pulumi-nodejs:dynamic/vmbackup:LvSnapshot", name: "dump" });
    expect(it?.inputs).toEqual({
      host: "kvm1",
      volumeGroup: "vg0",
      origin: "web1",
      size: "20%ORIGIN",
      name: "dump",
      __owner: "acme/fleet/prod/LvSnapshot/dump",
      __provider: 'exports.handler=()=>require("pulumi-vmbackup/dynamic").provider("LvSnapshot")',
    });
  });

  it("the name that is declared", async () => {
    new LvSnapshot("dump", { ...args, name: "other" });
    expect((await sent())[0]?.inputs.name).toBe("other");
  });

  it("the time that it may take, in seconds", async () => {
    new LvSnapshot("dump", args, { customTimeouts: { create: "1h30m", delete: "90s" } });
    expect((await sent())[0]?.inputs.__timeouts).toEqual({ create: 5400, delete: 90 });
  });
});

describe("customTimeouts", () => {
  it.each([
    ["5m", 300],
    ["90s", 90],
    ["1h30m", 5400],
    ["1.5h", 5400],
    ["500ms", 0.5],
  ])("%s", (text, expected) => expect(seconds("create", text)).toBe(expected));

  it.each(["", "5", "5 m", "m", "-5m", "1d", "5m!"])("refuses %j, naming the field", (text) =>
    expect(() => seconds("create", text)).toThrow(/customTimeouts\.create: .* is no duration; write e\.g\. "5m"/),
  );
});

describe("what a program can use", () => {
  it("path is known in preview, also with mocks", async () => {
    await mocks(true);
    const it = new LvSnapshot("dump", args);
    expect(await known(it.path)).toBe("/dev/vg0/dump");
  });

  it("nbdUri throws its reason", () => {
    const it = new LvSnapshot("dump", args);
    expect(() => it.nbdUri).toThrow(/LvSnapshot: nbdUri needs the input `nbd`/);
  });

  it(".get reads by id, with nothing of ours but the text that finds the provider", async () => {
    LvSnapshot.get("found", "vg1/byhand", { host: "kvm1" });
    const [it] = await sent();
    expect(it).toMatchObject({ id: "vg1/byhand" });
    expect(Object.keys(it?.inputs ?? {}).sort()).toEqual(["__provider", "host"]);
  });

  it("a replacement is deleted first, unless it is declared otherwise", () => {
    const asked: (boolean | undefined)[] = [];
    const look: pulumi.ResourceTransformation = ({ props, opts }) => {
      asked.push((opts as pulumi.CustomResourceOptions).deleteBeforeReplace);
      return { props, opts };
    };
    new LvSnapshot("a", args, { transformations: [look] });
    new LvSnapshot("b", args, { transformations: [look], deleteBeforeReplace: false });
    expect(asked).toEqual([true, false]);
  });
});

describe("secrets", () => {
  const key = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
  const connection = { host: "kvm1", user: "backup", privateKey: key, privateKeyPassword: "open sesame" };

  /** What a resource was given as `host`, with its secrets marked. */
  async function given(host: LvSnapshotArgs["host"]): Promise<Record<string, unknown>> {
    let props: Record<string, unknown> = {};
    const look: pulumi.ResourceTransformation = (it) => {
      props = it.props;
      return { props: it.props, opts: it.opts };
    };
    new LvSnapshot("dump", { ...args, host }, { transformations: [look] });
    const marked = await pulumi.runtime.serializeProperties("host", { host: props.host });
    return marked.host as Record<string, unknown>;
  }
  const secret = (value: string) => ({ "4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270", value });

  it.each([
    ["in clear", connection],
    ["already secret", { ...connection, privateKey: pulumi.secret(key) }],
    ["in an Output", pulumi.output(connection)],
    ["in a Promise", Promise.resolve(connection)],
  ])("a key and its passphrase are, and nothing else: %s", async (_how, host) => {
    const it = await given(host as LvSnapshotArgs["host"]);
    const text = JSON.stringify(it);
    expect(text).toContain(JSON.stringify(secret(key)));
    if (pulumi.Output.isInstance(host) || host instanceof Promise) return; // an Output is secret as a whole or not at all
    expect(it).toEqual({
      host: "kvm1",
      user: "backup",
      privateKey: secret(key),
      privateKeyPassword: secret("open sesame"),
    });
  });

  it("a bastion's key is, too", async () => {
    const it = await given({ host: "kvm1", proxy: { host: "gate", privateKey: key } });
    expect(it).toEqual({ host: "kvm1", proxy: { host: "gate", privateKey: secret(key) } });
  });

  it("a host without a key is no secret", async () => {
    expect(await given({ host: "kvm1", port: 2222 })).toEqual({ host: "kvm1", port: 2222 });
    expect(await given("root@kvm1:22")).toBe("root@kvm1:22");
  });
});

describe("one object has one resource", () => {
  const same = /^"b" and "a" are the same object: LvSnapshot vg0\/x on kvm1\. One object has one resource/;

  it.each([
    ["as it is", {}],
    ["another origin", { origin: "web2" }],
    ["another login", { host: "root@kvm1" }],
    ["the port that is the default", { host: "kvm1:22" }],
    ["a connection object", { host: { host: "kvm1", user: "backup" } }],
  ])("twice on one host throws, naming both: %s", (_how, over) => {
    new LvSnapshot("a", { ...args, name: "x" });
    expect(() => new LvSnapshot("b", { ...args, name: "x", ...over })).toThrow(same);
  });

  it.each([
    ["another host", { host: "kvm2" }],
    ["another port", { host: "kvm1:2222" }],
    ["another group", { volumeGroup: "vg1" }],
    ["another name", { name: "y" }],
    ["a name not known yet", { name: pulumi.output("x") }],
    ["a host not known yet", { host: pulumi.output("kvm1") }],
  ])("is no matter with %s", (_how, over) => {
    new LvSnapshot("a", { ...args, name: "x" });
    new LvSnapshot("b", { ...args, name: "x", ...over });
  });

  it("looking at it with .get is allowed", () => {
    new LvSnapshot("a", { ...args, name: "x" });
    LvSnapshot.get("b", "vg0/x", { host: "kvm1" });
  });

  it("another run of the same process is another run", async () => {
    new LvSnapshot("a", { ...args, name: "x" });
    await mocks();
    new LvSnapshot("b", { ...args, name: "x" });
  });
});
