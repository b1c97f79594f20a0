// One connection object serves @pulumi/command and this package: a matter of types, checked by `tsc` (npm run check) against the
// real package, and of the fields that check accepts.
import type * as command from "@pulumi/command";
import type * as pulumi from "@pulumi/pulumi";
import { expect, expectTypeOf, it } from "vitest";
import { check } from "../../provider/engine-check.js";
import type { Connection, Host, LvSnapshotArgs } from "../../provider/index.js";
import { lvSnapshot } from "../../provider/lv-snapshot.js";

type CommandConnection = command.types.input.remote.ConnectionArgs;

it("takes a connection of @pulumi/command, plain and as an Output", () => {
  // `password` is in its type and refused in words by check: everything else must fit.
  expectTypeOf<Omit<CommandConnection, "password">>().toExtend<Connection>();
  expectTypeOf<CommandConnection>().toExtend<LvSnapshotArgs["host"]>();
  expectTypeOf<pulumi.Output<CommandConnection>>().toExtend<LvSnapshotArgs["host"]>();
  expectTypeOf<Promise<CommandConnection>>().toExtend<LvSnapshotArgs["host"]>();
  expectTypeOf<string>().toExtend<Host>();
});

it("accepts every field that such a connection can have, but a password", () => {
  const fields: Record<keyof Omit<CommandConnection, "password">, unknown> = {
    host: "n4",
    user: "admin",
    port: 2222,
    privateKey: "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
    privateKeyPassword: "words",
    agentSocketPath: "/run/agent",
    hostKey: `ssh-ed25519 ${"A".repeat(68)}`,
    dialErrorLimit: 10,
    perDialTimeout: 15,
    proxy: { host: "bastion", user: "jump", port: 22, dialErrorLimit: 10, perDialTimeout: 15 },
  };
  const inputs = { volumeGroup: "vg", origin: "root", name: "snap", size: "1G" };
  expect(check(lvSnapshot, { ...inputs, host: fields }).failures).toEqual([]);
  expect(check(lvSnapshot, { ...inputs, host: { ...fields, password: "x" } }).failures).toMatchObject([
    { property: "host.password" },
  ]);
});
