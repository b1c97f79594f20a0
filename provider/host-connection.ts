// How a program names a host: its schema and its normal form. Nothing is filled in here: what is not declared stays absent.
import { isIPv6 } from "node:net";
import * as z from "zod";

// ssh hands the name to shells (ProxyCommand, `Match exec`), and a leading "-" would be an option of ssh.
const NAME = /^[\p{L}\p{N}_][\p{L}\p{N}._+-]*$/u;
const ZONED = /%[A-Za-z0-9._-]+$/;

function nameTrouble(name: string): string | undefined {
  if (name === "") return "is empty: a host is a name as one types it after `ssh`";
  if (isIPv6(name.replace(ZONED, "")) || NAME.test(name)) return undefined;
  if (name.startsWith("-")) return "must not start with `-`: ssh would take it for an option";
  return "must be a name or an address as one types it after `ssh`, without blanks, newlines or shell characters";
}

const hostName = z.string().superRefine((name, ctx) => {
  const trouble = nameTrouble(name);
  if (trouble !== undefined) ctx.addIssue({ code: "custom", message: trouble });
});

const login = z
  .string()
  .regex(/^[A-Za-z0-9_][A-Za-z0-9._@+-]*\$?$/, "must be a login name, without blanks, newlines or shell characters");

const path = (what: string) =>
  z
    .string()
    .min(1, `must be the path of ${what}`)
    .regex(
      /^[^"\\$\u0000-\u001f\u007f-][^"\\$\u0000-\u001f\u007f]*$/,
      `must be the path of ${what}, without quotes, \`$\` or newlines`,
    );

const KEY_TEXT = "must be the text of a private key (-----BEGIN … PRIVATE KEY-----), not its path and not a public key";

const NO_PASSWORD =
  "password logins are not supported: a key can be pinned, limited and taken back. Use privateKey or the agent";

const reachable = {
  host: hostName,
  user: login.optional(),
  port: z
    .int("must be a port number")
    .min(1, "must be from 1 to 65535")
    .max(65535, "must be from 1 to 65535")
    .optional(),
  privateKey: z
    .string()
    .regex(/-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----/, KEY_TEXT)
    .optional(),
  privateKeyPassword: z.string().min(1, "must not be empty: leave it out for a key without passphrase").optional(),
  agentSocketPath: path("the ssh agent's socket").optional(),
  hostKey: z
    .string()
    .trim()
    .regex(
      /^[a-z][a-z0-9@.-]* [A-Za-z0-9+/]{40,}={0,3}( [^\n\r]*)?$/,
      "must be the server's public host key as in /etc/ssh/ssh_host_ed25519_key.pub: `ssh-ed25519 AAAA…`",
    )
    .optional(),
  // As in @pulumi/command: -1 attempts = no limit, 0 seconds = no limit.
  dialErrorLimit: z
    .int("must be a whole number")
    .min(-1, "must be a number of attempts, or -1 for no limit")
    .optional(),
  perDialTimeout: z.int("must be whole seconds").min(0, "must be a number of seconds, or 0 for no limit").optional(),
  // An object made for @pulumi/command may carry it; nothing else could tell the user why it is refused.
  password: z.never(NO_PASSWORD).optional(),
};

const proxySchema = z.strictObject(reachable).superRefine(passphraseHasKey);

const declared = z.strictObject({
  ...reachable,
  proxy: proxySchema.optional(),
  sudo: z.boolean().optional(),
  configFile: path("an ssh_config file").optional(),
});

function passphraseHasKey(
  c: { privateKey?: string | undefined; privateKeyPassword?: string | undefined },
  ctx: z.RefinementCtx,
) {
  if (c.privateKeyPassword !== undefined && c.privateKey === undefined)
    ctx.addIssue({
      code: "custom",
      path: ["privateKeyPassword"],
      message: "is the passphrase of `privateKey`, which is not given",
    });
}

/** An ssh connection, with the field names of @pulumi/command. */
export const connectionSchema = declared.superRefine(passphraseHasKey);
export type Connection = z.infer<typeof connectionSchema>;
export type Bastion = z.infer<typeof proxySchema>;

/** Stack config `vmbackup:connection`: the same shape; it names no host, and one that is named there is not used. */
export const connectionDefaultsSchema = declared.partial({ host: true }).superRefine(passphraseHasKey);
export type ConnectionDefaults = z.infer<typeof connectionDefaultsSchema>;

/** `root@[2001:db8::1]:22` as an object; a sentence when it is none. */
function parsed(text: string): Connection | string {
  const at = text.lastIndexOf("@");
  const user = at < 0 ? undefined : text.slice(0, at);
  const rest = text.slice(at + 1);
  // A bare IPv6 address is a host without a port; only brackets can say where it ends.
  const [, bracketed, plain, port] = isIPv6(rest.replace(ZONED, ""))
    ? [rest, undefined, rest, undefined]
    : (/^(?:\[([^\]]*)\]|([^:[\]]*))(?::(.*))?$/s.exec(rest) ?? []);
  const host = bracketed ?? plain;
  if (host === undefined) return nameTrouble(rest) ?? "must be `[user@]host[:port]`";
  if (bracketed !== undefined && !isIPv6(bracketed.replace(ZONED, "")))
    return "has no IPv6 address between its brackets";
  const trouble = nameTrouble(host);
  if (trouble !== undefined) return trouble;
  if (user !== undefined && !login.safeParse(user).success)
    return "has no login name before `@`: letters, digits and . _ + - only, not starting with `-`";
  if (port !== undefined && !(/^[0-9]{1,5}$/.test(port) && Number(port) >= 1 && Number(port) <= 65535))
    return "has no port after `:`: a number from 1 to 65535";
  return { host, ...(user !== undefined && { user }), ...(port !== undefined && { port: Number(port) }) };
}

/** A host as the program names it, in normal form: always an object, with only what was declared. */
export const hostSchema = z.preprocess((value, ctx) => {
  if (typeof value !== "string") return value;
  const made = parsed(value);
  if (typeof made === "object") return made;
  ctx.addIssue({ code: "custom", message: made, input: value });
  return z.NEVER;
}, connectionSchema);

/** The normal form as one types it after ssh; for messages. */
export function hostLabel({ host, user, port }: Pick<Connection, "host" | "user" | "port">): string {
  const address = host.includes(":") ? `[${host}]` : host;
  return `${user === undefined ? "" : `${user}@`}${address}${port === undefined ? "" : `:${port}`}`;
}

/** What the program declared, completed from stack config. A passphrase never leaves the key it belongs to. */
export function completed(c: Connection, config: ConnectionDefaults = {}): Connection {
  if (c.host === "local") return c;
  const { host: _, privateKeyPassword, ...defaults } = config;
  const passphrase = c.privateKey === undefined && privateKeyPassword !== undefined ? { privateKeyPassword } : {};
  return { ...defaults, ...passphrase, ...present(c), host: c.host };
}

function present<T extends object>(o: T): T {
  return Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined)) as T;
}
