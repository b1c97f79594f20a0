// Why a host cannot be reached, told by cause, each with its next step. Reads what ssh says at LogLevel DEBUG1.
import { createHash } from "node:crypto";
import type { Bastion, Connection } from "./host-connection.js";
import { hostLabel } from "./host-connection.js";
import { type Ended, finished } from "./host-process.js";
import type { Destination } from "./host-ssh.js";

/** Why there is no connection; becomes a HostUnreachable when it is known for what the host was wanted. */
export class Trouble extends Error {
  readonly next: string;
  readonly stderr: string | undefined;
  /** Trying again at once would end the same way. */
  readonly lasting: boolean;
  constructor(what: string, next: string, stderr?: string, lasting = true) {
    super(what);
    this.next = next;
    this.stderr = stderr;
    this.lasting = lasting;
  }
}

export function noSsh(): Trouble {
  return new Trouble(
    "there is no `ssh` on the machine that runs pulumi",
    "Install OpenSSH there (package openssh-client).",
  );
}

/** What ssh said, without its tracing. */
export function errorLines(stderr: string): string {
  return stderr
    .replace(/^debug\d: Sending command: [^\r]*\r\n/gm, "") // of many lines, when the command has many
    .split("\n")
    .filter(
      (line) => !/^(debug\d:|OpenSSH_|Authenticated to |Pseudo-terminal |Transferred: |Bytes per second: )/.test(line),
    )
    .join("\n")
    .trim();
}

/** What ssh's words mean. `$1`, `$2` are the host and the port that it names: of the host itself or of a bastion before it. */
const CAUSES: readonly [RegExp, (m: RegExpExecArray) => [what: string, next: string, lasting: boolean]][] = [
  [
    /Could not resolve hostname (\S+?): (.*)/,
    ([, name, why = ""]) => [
      `the name ${name} does not resolve`,
      "Check `host`; a short name needs a `Host` entry with `HostName` in ssh_config, or an entry in DNS or /etc/hosts.",
      !/Temporary failure/.test(why),
    ],
  ],
  [
    /connect to host (\S+) port (\d+): Connection refused/,
    ([, name, port]) => [
      `nothing listens on port ${port} of ${name}`,
      "Check that sshd runs there and that `port` is its port.",
      false,
    ],
  ],
  [
    /connect to host (\S+) port (\d+): (Connection timed out|Operation timed out|No route to host|Network is unreachable|Host is down)/,
    ([, name, port, why = ""]) => [
      `${name} does not answer on port ${port} (${why.toLowerCase()})`,
      "Check that the machine is on, and the network and firewall between it and the machine that runs pulumi.",
      false,
    ],
  ],
  [
    /Connection timed out during banner exchange|Connection to (\S+) port (\d+) timed out/,
    () => [
      "it accepts connections but does not answer as an ssh server",
      "Check that `port` is that of sshd, and that the machine is not overloaded.",
      false,
    ],
  ],
  [
    /kex_exchange_identification: |Connection (?:closed|reset) by (\S+) port (\d+)|Connection reset by peer/,
    () => [
      "it closed the connection before the login",
      "Check sshd's log there; it drops logins beyond MaxStartups, and those of addresses it does not want.",
      false,
    ],
  ],
];

export async function dialTrouble(ended: Ended, to: Destination): Promise<Trouble> {
  if (ended.missing) return noSsh();
  const told = errorLines(ended.stderr);
  if (ended.late)
    return new Trouble(
      "it did not finish the login in time",
      "Check the machine's load and its name service.",
      told,
      false,
    );
  const changed = /Host key for (\S+) has changed and you have requested strict checking/.exec(ended.stderr);
  if (changed !== null) return changedKey(changed[1] ?? "", ended.stderr, to);
  const unknown = /No (\S+) host key is known for (\S+) and you have requested strict checking/.exec(ended.stderr);
  if (unknown !== null) return unknownKey(unknown[2] ?? "", ended.stderr, to);
  if (/Permission denied \(|Too many authentication failures/.test(told)) return refused(told, ended.stderr, to);
  for (const [words, means] of CAUSES) {
    const match = words.exec(told);
    if (match === null) continue;
    const [what, next, lasting] = means(match);
    return new Trouble(what, next, told, lasting);
  }
  const next = `Try by hand: ssh ${hostLabel(to.connection)}`;
  return new Trouble(`ssh ended with ${ended.exit ?? "a signal"} before the host answered`, next, told);
}

/** Under which name a pinned key lies in its known_hosts: any address of the host, and nobody else. */
export function pinName(hostKey: string, hop: "host" | "proxy"): string {
  return `vmbackup-${hop}-${createHash("sha256").update(hostKey).digest("hex").slice(0, 16)}`;
}

interface Hop {
  /** As ssh connects to it. */
  name: string;
  port: string;
  /** As the program calls it. */
  label: string;
  /** Nothing stands in front of it, so that it can be asked for its keys. */
  direct: boolean;
  connection: Connection | Bastion;
  field: string;
}

/** Which hop ssh's words are about: the bastion, when they name it. */
function hop(named: string, { connection, settings }: Destination): Hop {
  const { proxy } = connection;
  const bare = named.replace(/^\[(.*)\](?::\d+)?$/, "$1");
  const own = settings.get("hostname");
  if (
    proxy !== undefined &&
    bare !== own &&
    bare === (proxy.hostKey === undefined ? proxy.host : pinName(proxy.hostKey, "proxy"))
  )
    return {
      name: bare,
      port: String(proxy.port ?? 22),
      label: hostLabel(proxy),
      direct: true,
      connection: proxy,
      field: "proxy.hostKey",
    };
  const direct = !settings.has("proxycommand") && !settings.has("proxyjump");
  const name = own ?? connection.host;
  return {
    name,
    port: settings.get("port") ?? "22",
    label: hostLabel(connection),
    direct,
    connection,
    field: "hostKey",
  };
}

const knownHosts = ({ settings }: Destination) =>
  settings.get("userknownhostsfile")?.split(" ")[0] ?? "~/.ssh/known_hosts";

const fingerprint = (base64: string) =>
  `SHA256:${createHash("sha256").update(Buffer.from(base64, "base64")).digest("base64").replace(/=+$/, "")}`;

/** `type base64` of the server's key, asked of the server: the login that failed tells the fingerprint only. */
async function serverKey({ name, port, direct }: Hop, stderr: string): Promise<{ print?: string; key?: string }> {
  const [, type, print] = /Server host key: (\S+) (SHA256:\S+)/.exec(stderr) ?? [];
  if (!direct) return print === undefined ? {} : { print: `${print} (${type})` };
  const sort =
    type
      ?.replace(/^ssh-/, "")
      .replace(/^ecdsa-.*/, "ecdsa")
      .replace(/^sk-.*/, "ed25519-sk") ?? "ed25519";
  const scan = await finished("ssh-keyscan", ["-T", "5", "-p", port, "-t", sort, "--", name], { seconds: 10 });
  const [, found, base64] = /^(?!#)\S+ (\S+) (\S+)$/m.exec(scan.stdout) ?? [];
  if (found === undefined || base64 === undefined) return print === undefined ? {} : { print: `${print} (${type})` };
  return { print: `${fingerprint(base64)} (${found})`, key: `${found} ${base64}` };
}

async function unknownKey(named: string, stderr: string, to: Destination): Promise<Trouble> {
  const at = hop(named, to);
  const { print, key } = await serverKey(at, stderr);
  const compare = "Compare the fingerprint on its own console (`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`)";
  const line = key === undefined ? undefined : `${named} ${key}`;
  const how =
    line === undefined
      ? `${compare}, then log in once by hand from the machine that runs pulumi, or set \`${at.field}\`.`
      : `${compare}, then add this line to ${knownHosts(to)}, or set \`${at.field}\` to all but its first word:\n${line}`;
  const shows = print === undefined ? "" : `; it shows the key ${print}`;
  return new Trouble(`the host key of ${at.label} is not known${shows}`, how);
}

async function changedKey(named: string, stderr: string, to: Destination): Promise<Trouble> {
  const at = hop(named, to);
  const { print, key } = await serverKey(at, stderr);
  const pinned = at.connection.hostKey;
  const shows = print === undefined ? "another key" : `the key ${print}`;
  if (pinned !== undefined) {
    const [type = "", base64 = ""] = pinned.split(" ");
    return new Trouble(
      `${at.label} shows ${shows}, not the pinned one, ${fingerprint(base64)} (${type})`,
      `This can be another machine under the same name, or somebody between. If the machine was installed anew, set \`${at.field}\`${key === undefined ? " to its new key." : `:\n${key}`}`,
    );
  }
  const where = /Offending .* key in (\S+)/.exec(stderr)?.[1];
  return new Trouble(
    `${at.label} shows ${shows}, not the one that is known${where === undefined ? "" : ` (${where})`}`,
    `This can be another machine under the same name, or somebody between. If the machine was installed anew: ssh-keygen -R '${named}'${key === undefined ? "" : `, and add to ${knownHosts(to)}:\n${named} ${key}`}`,
  );
}

function refused(told: string, stderr: string, to: Destination): Trouble {
  const [, login, methods] = /(\S+@\S+): Permission denied \(([^)]*)\)/.exec(told) ?? [];
  const tried = [...stderr.matchAll(/^debug1: Offering public key: (.*)$/gm)].map(([, key = ""]) => key.trim());
  const who = login ?? `${to.settings.get("user") ?? "root"}@${to.settings.get("hostname") ?? to.connection.host}`;
  const { proxy } = to.connection;
  // Only the last hop tells what it offered.
  if (proxy !== undefined && who.endsWith(`@${proxy.host}`))
    return new Trouble(
      `its proxy ${hostLabel(proxy)} refuses the login${methods === undefined ? "" : ` (it takes ${methods})`}`,
      `Check \`proxy.user\` and \`proxy.privateKey\`, or try by hand: ssh ${hostLabel(proxy)}`,
    );
  const keys = tried.length === 0 ? "no key was offered" : `keys offered: ${tried.join("; ")}`;
  const methodsTaken = methods === undefined ? "" : `; it takes ${methods}`;
  const next =
    tried.length === 0
      ? "Set `privateKey`, load a key into the ssh agent, or name an IdentityFile in ssh_config."
      : `Add one of these keys to ~/.ssh/authorized_keys of ${who}, or set \`privateKey\`, \`user\` or ssh_config so that the right key is offered.`;
  return new Trouble(`${who} refuses the login (${keys}${methodsTaken})`, next);
}
