// OpenSSH: one multiplexed connection per destination, its options, and the private agent for keys given as text.
//
// Two kinds of ssh processes. The *master* reads the configuration, logs in, and holds one session that waits on a pipe
// from us: it ends when we end, even when we are killed. *Sessions* read no configuration and can do one thing: pass a
// command to the master.
import { createHash, randomUUID } from "node:crypto";
import { existsSync, writeFileSync } from "node:fs";
import { homedir, userInfo } from "node:os";
import { isAbsolute, join, resolve as resolvePath } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { Bastion, Connection } from "./host-connection.js";
import { also, type Ended, finished, type Held, held, privateFolder } from "./host-process.js";
import { quote } from "./host-quote.js";
import { dialTrouble, errorLines, noSsh, pinName, Trouble } from "./host-ssh-trouble.js";

/** What ssh makes of a destination (`ssh -G`), and how to reach it. */
export interface Destination {
  readonly connection: Connection;
  readonly options: readonly string[];
  /** The settings that count, as ssh resolved them: name, user, port ... */
  readonly settings: ReadonlyMap<string, string>;
  /** Equal for what is one connection, however the program spells it. */
  readonly key: string;
}

const hash = (text: string) => createHash("sha256").update(text).digest("hex").slice(0, 16);
let files = 0;

function privateFile(content: string, suffix = "", mode = 0o600): string {
  const file = join(privateFolder(), `f${++files}${suffix}`);
  writeFileSync(file, content, { mode, flag: "wx" });
  return file;
}

// Inside quotes of ssh_config; `Include` expands globs, IdentityAgent and IdentityFile expand `%`.
const globless = (path: string) => `"${path.replace(/[*?[]/g, "\\$&")}"`;
const percentless = (path: string) => `"${path.replaceAll("%", "%%")}"`;

const configs = new Map<string, string>();

// ssh's own idea of the home directory: the account's, whatever HOME says.
function home(): string {
  try {
    return userInfo().homedir;
  } catch {
    return homedir();
  }
}

/**
 * The configuration that ssh is given: the user's, the system's, and last our own defaults, so that nothing of ours
 * wins over ssh_config. `Match final`: also not over a `Match final` of the user's, which ssh reads in a second round.
 * `originalhost`: not for a bastion that only ssh_config names, which is reached as by hand.
 */
function configuration({ configFile, host, proxy }: Connection, cwd: string): string {
  const user = (configFile ?? "~/.ssh/config").replace(/^~(?=\/)/, home());
  const path = isAbsolute(user) ? user : resolvePath(cwd, user);
  // ssh passes over an Include that is not there; a file that the program names has to be there.
  if (configFile !== undefined && !existsSync(path))
    throw new Trouble(
      `its \`configFile\` ${path} is not there`,
      "A relative path starts at the folder of the project.",
    );
  const names = [...new Set([host, ...(proxy === undefined ? [] : [proxy.host])])].join(",");
  const text = [
    `Include ${globless(path)}`,
    'Include "/etc/ssh/ssh_config"',
    `Match final originalhost ${names}`,
    "  User root",
    "  ConnectTimeout 15",
    "",
  ].join("\n");
  const made = configs.get(text) ?? privateFile(text);
  configs.set(text, made);
  return made;
}

/** Options of ssh for one hop. First value wins: what must hold, then what is declared, then the configuration. */
async function options(c: Connection | Bastion, config: string, hop: "host" | "proxy"): Promise<string[]> {
  const set: [string, string | number][] = [
    ["BatchMode", "yes"],
    ["StrictHostKeyChecking", "yes"],
    ["UpdateHostKeys", "no"],
    ["VerifyHostKeyDNS", "no"],
    // Its tracing tells why a login fails. Two hops share one stderr: only the last one traces.
    ["LogLevel", hop === "host" ? "DEBUG1" : "ERROR"],
    // A dead peer is noticed after 15 s.
    ["ServerAliveInterval", 5],
    ["ServerAliveCountMax", 3],
    ["ControlMaster", "no"],
    ["ControlPath", "none"],
    ["ControlPersist", "no"],
    ["ClearAllForwardings", "yes"],
    ["ForwardAgent", "no"],
    ["ForwardX11", "no"],
    ["PermitLocalCommand", "no"],
    ["RequestTTY", "no"],
    ["RemoteCommand", "none"],
  ];
  if (c.user !== undefined) set.push(["User", c.user]);
  if (c.port !== undefined) set.push(["Port", c.port]);
  if (c.perDialTimeout !== undefined) set.push(["ConnectTimeout", c.perDialTimeout === 0 ? "none" : c.perDialTimeout]);
  if (c.hostKey !== undefined) {
    const alias = pinName(c.hostKey, hop);
    const pinned = pins.get(alias) ?? privateFile(`${alias} ${c.hostKey}\n`);
    pins.set(alias, pinned);
    set.push(["HostKeyAlias", alias], ["UserKnownHostsFile", `"${pinned}"`], ["GlobalKnownHostsFile", "/dev/null"]);
    set.push(["CheckHostIP", "no"]);
  }
  if (c.privateKey !== undefined) {
    // An agent that knows this one key, and the wish for this one key: it is offered first, and to this host only.
    const { socket, publicKey } = await agentFor(c.privateKey, c.privateKeyPassword);
    set.push(["IdentityAgent", `"${socket}"`], ["IdentitiesOnly", "yes"], ["IdentityFile", `"${publicKey}"`]);
  } else if (c.agentSocketPath !== undefined) set.push(["IdentityAgent", percentless(c.agentSocketPath)]);
  if ("proxy" in c && c.proxy !== undefined) {
    const words = ["ssh", ...(await options(c.proxy, config, "proxy")), "-T"];
    const hop = quote([...words, "--", c.proxy.host].map((word) => word.replaceAll("%", "%%")));
    set.push(["ProxyCommand", hop.replace(/ -T -- /, " -T -W '[%h]:%p' -- ")]);
  }
  return ["-F", config, ...set.flatMap(([name, value]) => ["-o", `${name}=${value}`])];
}

const pins = new Map<string, string>();
const agents = new Map<string, Promise<{ socket: string; publicKey: string }>>();

/** Our folder is about to go, and what is in it. */
export function forgetFiles(): void {
  for (const made of [configs, pins, agents]) made.clear();
}

function agentFor(key: string, passphrase: string | undefined): Promise<{ socket: string; publicKey: string }> {
  const id = hash(`${key}\0${passphrase ?? ""}`);
  const known = agents.get(id);
  if (known !== undefined) return known;
  const made = startAgent(key, passphrase);
  agents.set(id, made);
  made.catch(() => agents.delete(id));
  return made;
}

/** One ssh-agent per key: the key reaches it through a pipe, so it is in no file and in no argv. */
async function startAgent(key: string, passphrase: string | undefined) {
  const next = "Check `privateKey` and `privateKeyPassword`.";
  const socket = join(privateFolder(), `a${++files}`);
  const agent = await held(
    "ssh-agent",
    ["-a", socket, "sh", "-c", "echo ready $SSH_AGENT_PID.; exec cat >/dev/null"],
    ".\n",
    20,
  );
  if (!("close" in agent)) {
    if (agent.missing) throw noSsh();
    throw new Trouble(
      "the private ssh-agent for `privateKey` did not start",
      "Start it by hand: `ssh-agent`.",
      agent.stderr,
    );
  }
  // It leaves our group, and would notice our end only after some seconds.
  also(Number(/ready (\d+)/.exec(agent.heard)?.[1]));
  // ssh-add asks a program for the passphrase; that one reads it from ssh-add's environment, which only this user can see.
  // It answers once: ssh-add would ask for ever after a wrong one.
  const ask = privateFile(
    '#!/bin/sh\ncase $1 in Bad*) exit 1;; esac\nprintf "%s\\n" "$VMBACKUP_PASSPHRASE"\n',
    ".sh",
    0o700,
  );
  const env = {
    SSH_AUTH_SOCK: socket,
    SSH_ASKPASS: ask,
    SSH_ASKPASS_REQUIRE: "force",
    DISPLAY: "none",
    VMBACKUP_PASSPHRASE: passphrase ?? "",
  };
  // Without its last newline ssh-add reads no key ("error in libcrypto"); yaml and web forms lose it, or add a return.
  const text = `${key.replaceAll("\r\n", "\n").trim()}\n`;
  const added = await finished("ssh-add", ["-q", "-"], { stdin: text, env, seconds: 20 });
  const listed =
    added.exit === 0 ? await finished("ssh-add", ["-L"], { env: { SSH_AUTH_SOCK: socket }, seconds: 20 }) : added;
  if (listed.exit !== 0) {
    agent.close();
    const why =
      passphrase === undefined ? "it is damaged, or it has a passphrase" : "it is damaged, or the passphrase is wrong";
    throw new Trouble(`\`privateKey\` cannot be used: ${why}`, next, listed.stderr.replaceAll(key, "(the key)"));
  }
  return { socket, publicKey: privateFile(listed.stdout, ".pub") };
}

/** What ssh would do for this host, asked of ssh itself: aliases, users and ports of ssh_config are resolved by it alone. */
export async function destination(connection: Connection, cwd: string): Promise<Destination> {
  const made = await options(connection, configuration(connection, cwd), "host");
  const asked = await finished("ssh", [...made, "-G", "--", connection.host], { seconds: 20 });
  if (asked.missing) throw noSsh();
  if (asked.exit !== 0)
    throw new Trouble("ssh cannot read its configuration", "Correct the file that is named.", errorLines(asked.stderr));
  const lines = asked.stdout.split("\n").filter((line) => line !== "" && !/^(host|originalhost) /.test(line));
  const settings = new Map<string, string>();
  for (const line of lines) {
    const [, name, value] = /^(\S+) (.*)$/.exec(line) ?? [];
    if (name !== undefined && value !== undefined && !settings.has(name)) settings.set(name, value);
  }
  const key = hash([...lines, String(connection.dialErrorLimit), process.env.SSH_AUTH_SOCK].join("\n"));
  return { connection, options: made, settings, key };
}

const NO_MASTER = "vmbackup: the connection takes no session";

/** One connection, opened when it is first needed, and again when it was lost. */
export class Ssh {
  readonly #to: Destination;
  #master: Promise<{ held: Held; path: string }> | undefined;
  /** Counts the connections: what was learnt about the machine holds for one of them. */
  opened = 0;

  constructor(to: Destination) {
    this.#to = to;
  }

  /** There is a connection; whoever comes while one is being opened waits for that one. */
  async ready(): Promise<void> {
    await this.#open();
  }

  /** Runs one string in the login shell there. Only what certainly did not start is tried again. */
  async session(command: string, s: { stdin?: string | undefined; seconds: number; trailer: string }): Promise<Ended> {
    for (let round = 1; ; round++) {
      const { held, path } = await this.#open();
      const args = ["-F", "none", "-T", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ControlMaster=no"];
      // A session that the master does not take would connect by itself, past all our options: this stops it, and tells us.
      // (A shell around it: ssh kills a ProxyCommand as soon as its stdout closes, so that must come after the words.)
      args.push("-o", `ControlPath="${path}"`, "-o", `ProxyCommand=${quote(["sh", "-c", `echo "${NO_MASTER}" >&2`])}`);
      const ended = await finished("ssh", [...args, "--", this.#to.connection.host, command], s);
      // "read from master failed": the command was handed over before the master died; it may have started.
      const untaken = ended.stderr.includes(NO_MASTER) && !/read from master failed/.test(ended.stderr);
      if (!untaken) {
        const lost = ended.exit === 255 && !ended.stderr.includes(s.trailer);
        return lost ? { ...ended, stderr: [ended.stderr, errorLines(held.said())].join("\n").trim() } : ended;
      }
      this.#drop(held);
      if (round === 3)
        throw new Trouble(
          "the connection takes no more sessions",
          "Raise MaxSessions in its sshd_config (10 by default).",
          ended.stderr,
        );
    }
  }

  close(): void {
    this.#master?.then(({ held }) => held.close()).catch(() => {});
    this.#master = undefined;
  }

  #open(): Promise<{ held: Held; path: string }> {
    // A thousand resources of a host that is off must not each wait for it anew.
    if (this.#master === undefined && this.#failed !== undefined && Date.now() < this.#failed.until)
      return Promise.reject(this.#failed.trouble);
    const began = Date.now();
    const opening = this.#master ?? this.#dial();
    if (opening === this.#master)
      return opening.then((master) => {
        if (master.held.alive) return master;
        this.#drop(master.held);
        return this.#open();
      });
    this.#master = opening;
    opening.then(
      ({ held }) => {
        this.#current = held;
        this.opened++;
      },
      (trouble: unknown) => {
        this.#master = undefined;
        // What a person cures at once is asked anew at once; the rest counts as long as it took to learn, 5 s at most.
        const lasting = !(trouble instanceof Trouble) || trouble.lasting;
        const now = Date.now();
        this.#failed = lasting ? undefined : { trouble, until: now + Math.min(now - began, 5000) };
      },
    );
    return opening;
  }

  #current: Held | undefined;
  #failed: { trouble: Trouble; until: number } | undefined;

  // Not closed: sessions that are still running on it keep it, and it ends with the last of them or with us.
  #drop(held: Held): void {
    if (this.#current !== held) return;
    this.#current = undefined;
    this.#master = undefined;
  }

  async #dial(): Promise<{ held: Held; path: string }> {
    const { connection, options, settings } = this.#to;
    const limit = connection.dialErrorLimit ?? 3;
    const attempts = limit === -1 ? Number.POSITIVE_INFINITY : Math.max(limit, 1);
    const timeout = Number(settings.get("connecttimeout"));
    for (let attempt = 1; ; attempt++) {
      const path = join(privateFolder(), `c${++files}`);
      const ready = `vmbackup-${randomUUID()}`;
      const args = [
        ...options.map((o) =>
          o === "ControlMaster=no" ? "ControlMaster=yes" : o === "ControlPath=none" ? `ControlPath="${path}"` : o,
        ),
      ];
      const wait = `echo ${ready}; exec cat >/dev/null`;
      // ssh's own timeout ends with the key exchange; logging in may hang as well.
      const seconds = Number.isFinite(timeout) && timeout > 0 ? timeout + 15 : 24 * 3600;
      const made = await held("ssh", [...args, "-T", "--", connection.host, wait], ready, seconds);
      if ("close" in made) return { held: made, path };
      const trouble = await dialTrouble(made, this.#to);
      if (trouble.lasting || attempt >= attempts) throw trouble;
      await sleep(Math.min(attempt * 500, 5000));
    }
  }
}
