// The door of the provider process: Pulumi's calls in, engine calls out. FROZEN: every state refers to `provider(kind)` of
// "pulumi-vmbackup/dynamic" by name, so neither may ever be renamed or take other arguments.
import { connect as dial } from "node:net";
import { Engine } from "./engine.js";
import { check, diff } from "./engine-check.js";
import type { Fields } from "./engine-values.js";
import { Refused } from "./errors.js";
import { connect, connectionDefaultsSchema, type Host, hostSchema } from "./host.js";
import type { ConnectionDefaults } from "./host-connection.js";
import { resources } from "./resources.js";

// When the CLI is killed this process goes on and finishes its work, with nobody to print to. Without a listener the failed
// print is an uncaught exception, which Pulumi's server answers by printing: it spins for ever (seen).
for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});

// It would stay for ever (seen), with its connections and the agents that hold keys: when no call runs and the engine, whose
// address is Pulumi's first argument, is gone, it ends.
let running = 0;
const [, , engineAddress = ""] = process.argv;
const engineAt = /^(127\.0\.0\.1|\[::1\]|localhost):(\d+)$/.exec(engineAddress);
if (engineAt !== null)
  setInterval(() => {
    if (running > 0) return;
    const probe = dial(Number(engineAt[2]), engineAt[1]?.replace(/[[\]]/g, ""), () => probe.destroy());
    probe.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code === "ECONNREFUSED" && running === 0) process.exit(0);
    });
  }, 10_000).unref();

/** One that runs keeps the process. */
function counted<A extends unknown[], R>(call: (...given: A) => Promise<R>): (...given: A) => Promise<R> {
  return async (...given) => {
    running++;
    try {
      return await call(...given);
    } finally {
      running--;
    }
  };
}

/** What Pulumi's dynamic provider server calls; see facts of `cmd/dynamic-provider` in @pulumi/pulumi. */
export interface Calls {
  configure(request: { config: { get(key: string): string | undefined } }): void;
  check(olds: Fields, news: Fields): Promise<{ inputs: Fields; failures: { property: string; reason: string }[] }>;
  diff(id: string, olds: Fields, news: Fields): Promise<{ changes?: boolean; replaces: string[] }>;
  create(inputs: Fields): Promise<{ id: string; outs: Fields }>;
  read(id: string, properties: Fields): Promise<{ id?: string; props: Fields; inputs?: Fields }>;
  update(id: string, olds: Fields, news: Fields): Promise<{ outs: Fields }>;
  delete(id: string, properties: Fields): Promise<void>;
}

/** The provider of one kind of resource. */
export function provider(kind: string): Calls {
  const definition = resources[kind];
  if (definition === undefined)
    throw new Error(
      `pulumi-vmbackup has no resource ${kind}: this state was made by another version of the package. Install that one, or a newer one.`,
    );
  let configured: string | undefined;
  const engine = new Engine(definition, (host) => hostOf(host, configured));
  return {
    // Synchronous and never throwing: Pulumi caches the provider before it awaits this (facts: a second call would run unconfigured).
    configure({ config }) {
      configured = config.get("vmbackup:connection");
    },
    check: async (_olds, news) => check(definition, news),
    async diff(id, olds, news) {
      const { changes, replaces } = diff(definition, olds, news, id);
      return { replaces, ...(changes === undefined ? {} : { changes }) };
    },
    create: counted((inputs) => engine.create(inputs)),
    read: counted((id, properties) => engine.read(id, properties)),
    update: counted((id, olds, news) => engine.update(id, olds, news)),
    delete: counted((id, properties) => engine.remove(id, properties)),
  };
}

/** `.get` hands over what the program says without a check before it. */
function hostOf(host: unknown, configured: string | undefined): Host {
  const parsed = hostSchema.safeParse(host);
  if (parsed.success) return connect(parsed.data, connectionOf(configured));
  const reasons = parsed.error.issues.map((issue) => `${["host", ...issue.path].join(".")}: ${issue.message}`);
  throw new Refused({ what: reasons.join("\n"), next: "Name the host as you would type it after `ssh`." });
}

/** `vmbackup:connection` of the stack's configuration: one JSON object shaped like a Connection, without `host`. */
function connectionOf(text: string | undefined): ConnectionDefaults | undefined {
  if (text === undefined) return undefined;
  // The text may hold a key: it is never shown, only the names of its fields are.
  const refused = (why: string) =>
    new Refused({
      what: `The stack's configuration vmbackup:connection ${why}.`,
      next: `Set it as e.g. pulumi config set --secret vmbackup:connection '{"user":"root","privateKey":"..."}'.`,
    });
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw refused("is no JSON");
  }
  const parsed = connectionDefaultsSchema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw refused(parsed.error.issues.map((issue) => `${issue.path.join(".") || "it"}: ${issue.message}`).join("; "));
}
