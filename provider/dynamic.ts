// The door of the provider process: Pulumi's calls in, engine calls out. FROZEN: every state refers to `provider(kind)` of
// "pulumi-vmbackup/dynamic" by name, so neither may ever be renamed or take other arguments.
import { Engine } from "./engine.js";
import { check, diff } from "./engine-check.js";
import type { Fields } from "./engine-values.js";
import { Refused } from "./errors.js";
import { connect } from "./host.js";
import { resources } from "./resources.js";

// When the CLI is killed this process goes on and finishes its work, with nobody to print to. Without a listener the failed
// print is an uncaught exception, which Pulumi's server answers by printing: it spins for ever (seen).
for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});

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
  const engine = new Engine(definition, (host) => connect(host, connectionOf(configured)));
  return {
    // Synchronous and never throwing: Pulumi caches the provider before it awaits this (facts: a second call would run unconfigured).
    configure({ config }) {
      configured = config.get("vmbackup:connection");
    },
    check: async (_olds, news) => check(definition, news),
    async diff(_id, olds, news) {
      const { changes, replaces } = diff(definition, olds, news);
      return { replaces, ...(changes === undefined ? {} : { changes }) };
    },
    create: (inputs) => engine.create(inputs),
    read: (id, properties) => engine.read(id, properties),
    update: (id, olds, news) => engine.update(id, olds, news),
    delete: (id, properties) => engine.remove(id, properties),
  };
}

/** `vmbackup:connection` of the stack's configuration: one JSON object shaped like a Connection, without `host`. */
function connectionOf(text: string | undefined): Fields | undefined {
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    value = undefined; // the text may hold a key: it is not shown
  }
  if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Fields;
  throw new Refused({
    what: "The stack's configuration vmbackup:connection is not a JSON object.",
    next: `Set it as e.g. pulumi config set --secret vmbackup:connection '{"user":"root","privateKey":"..."}'.`,
  });
}
