// What the five classes share on the program's side: the literal stub, the hidden inputs, secrets, and the check that one
// program does not name one object twice. The only file besides index.ts that imports @pulumi/pulumi.
import * as pulumi from "@pulumi/pulumi";
import type { Connection, Host } from "./index.js";

type Props = Record<string, unknown>;

/** What a class says of its properties. */
interface Shape {
  /** Names of what only the provider can tell. */
  outputs: readonly string[];
  /** Inputs that `.get` learns by reading. */
  read?: readonly string[];
  /** What names the object on its host, where the program gives it plainly. */
  identity: pulumi.Input<string | undefined>[];
}

export abstract class HostResource extends pulumi.CustomResource {
  /**
   * @param kind class name; part of the type token
   * @param args the inputs, as the program gives them; of a `.get` only the host
   */
  protected constructor(
    kind: string,
    name: string,
    args: Props,
    { outputs, read = [], identity }: Shape,
    opts: pulumi.CustomResourceOptions = {},
  ) {
    const isGet = opts.id !== undefined;
    if (!isGet) once(kind, name, args.host, identity);
    const host = withSecrets(args.host as pulumi.Input<Host>);
    const declared: Props = isGet ? { host } : { ...args, host };
    const hidden: Props = isGet ? {} : { __owner: owner(kind, name), __timeouts: timeouts(opts.customTimeouts) };
    super(
      `pulumi-nodejs:dynamic/vmbackup:${kind}`,
      name,
      {
        // Registered without a value, so that they become outputs.
        ...Object.fromEntries([...outputs, ...(isGet ? read : [])].map((output) => [output, undefined])),
        ...declared,
        ...hidden,
        // Literal and for ever: Pulumi runs this text to get the provider. See docs/architecture.md, "The door".
        __provider: `exports.handler=()=>require("pulumi-vmbackup/dynamic").provider("${kind}")`,
      },
      // A forced replacement (--replace, replacementTrigger) asks no diff: created first, it would find the old object and keep it.
      { deleteBeforeReplace: true, ...opts },
    );
  }
}

function owner(kind: string, name: string): string {
  return [organization(), pulumi.getProject(), pulumi.getStack(), kind, name].join("/");
}

/** Mocks, as unit tests of a program set them, have none unless it is named: then what a file backend says. */
function organization(): string {
  try {
    return pulumi.getOrganization();
  } catch {
    return "organization";
  }
}

/** Pulumi sends customTimeouts to a dynamic provider, which never sees them: as an input they can be kept. Seconds. */
function timeouts(custom: pulumi.CustomTimeouts | undefined): Record<string, number> | undefined {
  if (custom === undefined) return undefined;
  const given = Object.entries(custom).filter((entry): entry is [string, string] => typeof entry[1] === "string");
  return given.length === 0 ? undefined : Object.fromEntries(given.map(([call, text]) => [call, seconds(call, text)]));
}

/** "5m", "1h30m", "90s": Go's durations, as Pulumi documents customTimeouts. */
export function seconds(call: string, text: string): number {
  const units: Record<string, number> = { h: 3600, m: 60, s: 1, ms: 0.001 };
  const parts = [...text.matchAll(/([0-9]+(?:\.[0-9]+)?)(ms|h|m|s)/g)];
  if (parts.length === 0 || parts.map((part) => part[0]).join("") !== text)
    throw new Error(`customTimeouts.${call}: ${JSON.stringify(text)} is no duration; write e.g. "5m" or "1h30m"`);
  return parts.reduce((sum, [, n, unit]) => sum + Number(n) * (units[unit ?? ""] ?? 0), 0);
}

// ---------------------------------------------------------------- secrets

type Plainly<T> = Exclude<T, pulumi.Output<unknown> | Promise<unknown>>;

/** Keys and passphrases are secrets even when given in clear, on their own field only: the host's name stays readable. */
function withSecrets(host: pulumi.Input<Host>): pulumi.Input<Host> {
  if (typeof host === "string" || host === undefined || host === null) return host;
  if (pulumi.Output.isInstance(host) || host instanceof Promise)
    return pulumi.output(host).apply((later) => withSecrets(later as Host) as Host) as pulumi.Output<Host>;
  return { ...host, ...secretFields(host), ...proxied(host) };
}

const SECRET = ["privateKey", "privateKeyPassword"] as const;

function secretFields(connection: Pick<Connection, (typeof SECRET)[number]>): Partial<Connection> {
  return Object.fromEntries(
    SECRET.flatMap((field) => (connection[field] === undefined ? [] : [[field, pulumi.secret(connection[field])]])),
  );
}

function proxied(connection: Connection): Partial<Connection> {
  const { proxy } = connection;
  if (proxy === undefined) return {};
  if (pulumi.Output.isInstance(proxy) || proxy instanceof Promise)
    return { proxy: pulumi.output(proxy).apply((p) => ({ ...p, ...secretFields(p as Connection) })) as typeof proxy };
  return { proxy: { ...proxy, ...secretFields(proxy as Plainly<typeof proxy>) } };
}

// ---------------------------------------------------------------- one object, one resource

/** Per run: mocks of two tests and parallel Automation API stacks of one process have monitors of their own, and never meet. */
const seen = new WeakMap<object, Map<string, string>>();

/** What a run has named so far. */
export function perRun<T>(store: WeakMap<object, T>, make: () => T): T | undefined {
  const monitor: object | undefined = pulumi.runtime.getMonitor();
  if (monitor === undefined) return undefined;
  const kept = store.get(monitor) ?? make();
  store.set(monitor, kept);
  return kept;
}

function once(kind: string, name: string, host: unknown, identity: pulumi.Input<string | undefined>[]): void {
  const where = hostKey(host);
  if (where === undefined || !identity.every((part) => typeof part === "string")) return; // not known before the run
  const object = `${kind} ${identity.join("/")} on ${where}`;
  const names = perRun(seen, () => new Map<string, string>());
  const other = names?.get(object);
  if (other !== undefined)
    throw new Error(
      `"${name}" and "${other}" are the same object: ${object}. One object has one resource: remove one, or give it another name.`,
    );
  names?.set(object, name);
}

/** The machine that a host given plainly means; the login name does not count. */
export function hostKey(host: unknown): string | undefined {
  const { host: name, port } = typeof host === "string" ? { host, port: undefined } : ((host ?? {}) as Props);
  if (typeof name !== "string") return undefined;
  const match = /^(?:[^@]*@)?(\[[^\]]*\]|[^:]*)(?::([0-9]+))?$/.exec(name);
  if (match === null) return name;
  const at = port ?? match[2] ?? 22;
  return typeof at === "object" ? undefined : `${match[1]}${Number(at) === 22 ? "" : `:${at}`}`;
}
