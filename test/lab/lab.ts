// The hosts of test/lab/lab, for tests. What tests assert they look up here, out of band, never through the provider's own eyes.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { afterAll, beforeAll, expect } from "vitest";

const root = join(__dirname, "../..");
const script = join(__dirname, "lab");
const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "pulumi-vmbackup");

/**
 * The number of this clone's lab (network 10.77.N.0/24). Each clone has its own, so that their tests can run side by side; the
 * demo has the lab without a number.
 */
export const suffix = process.env.LAB_SUFFIX || claimSuffix();
process.env.LAB_SUFFIX = suffix;
export const folder = process.env.LAB_DIR || join(cache, `hosts-${suffix}`);

/** ssh_config of this lab: names, keys, strict host keys. For a connection's `configFile`. */
export const sshConfig = join(folder, "ssh_config");

function claimSuffix(): string {
  const first = createHash("sha256").update(root).digest().readUInt16BE(0);
  for (let i = 0; i < 254; i++) {
    const n = String(1 + ((first + i) % 254));
    const claim = join(cache, `hosts-${n}`, "clone");
    mkdirSync(join(cache, `hosts-${n}`), { recursive: true });
    try {
      writeFileSync(claim, root, { flag: "wx" });
      return n;
    } catch {
      const owner = readFileSync(claim, "utf8");
      if (owner === root) return n;
      if (owner && !existsSync(owner)) {
        writeFileSync(claim, root);
        return n;
      }
    }
  }
  throw new Error(`254 clones have their labs in ${cache}: delete some`);
}

export interface HostOptions {
  /** A kernel of its own: LVM, NFS, kernel NBD. About 12 s, where a container takes one. */
  uml?: boolean;
  /** With the stand-ins for Proxmox's commands. */
  pve?: boolean;
  /** Folders of this machine shown in a container, from → to. */
  bind?: Record<string, string>;
  /** The same, writable. One folder in several containers is what an NFS export looks like. */
  bindRw?: Record<string, string>;
}

async function lab(argv: string[], env: Record<string, string> = {}): Promise<string> {
  const { stdout } = await execa(script, argv, { stdin: "ignore", env });
  return stdout;
}

/** The hosts that exist. */
export async function list(): Promise<{ name: string; kind: string; address: string; up: boolean }[]> {
  const lines = (await lab(["list"])).split("\n").filter(Boolean);
  return lines.map((line) => {
    const [name = "", kind = "", address = "", state] = line.split(" ");
    return { name, kind, address, up: state === "up" };
  });
}

const bindList = (binds: Record<string, string> = {}) =>
  Object.entries(binds)
    .map(([from, to]) => `${from}:${to}`)
    .join(",");

/** Starts hosts, or starts crashed ones again from their disks; does nothing for those that run. */
export async function up(names: string[], options: HostOptions = {}): Promise<void> {
  const kind = options.uml ? ["--uml"] : options.pve ? ["--pve"] : [];
  await lab(["up", ...kind, ...names], { LAB_BIND: bindList(options.bind), LAB_BIND_RW: bindList(options.bindRw) });
}

/** Removes hosts with their disks; all of this clone's when none is named. */
export async function down(...names: string[]): Promise<void> {
  const going = names.length > 0 ? names : (await list()).map(({ name }) => name);
  await Promise.all(going.map(hangUp));
  await lab(["down", ...names]);
}

/** Pulls the plug. The disks stay; `up` starts the host again. */
export async function crash(name: string): Promise<void> {
  await hangUp(name);
  await lab(["crash", name]);
}

/** One word for a remote POSIX shell. */
const quote = (word: string) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// A connection of our own, kept open: a new one costs 0.1 s in a container, and up to 2 s under uml.
const master = (name: string) => [
  "-F",
  sshConfig,
  "-o",
  `ControlPath=/tmp/lab${suffix}-${name}-%r`,
  "-o",
  "ControlMaster=auto",
  "-o",
  "ControlPersist=60",
  "-o",
  "ServerAliveInterval=5",
];

const hangUp = async (name: string) => {
  for (const user of ["root", "deploy"])
    await execa("ssh", [...master(name), "-l", user, "-O", "exit", name], { reject: false });
};

export interface SshOptions {
  input?: string;
  /** Default root. */
  user?: "root" | "deploy";
  /** False: a failing command is an answer, too. Default true. */
  reject?: boolean;
  /** Milliseconds; default none. */
  timeout?: number;
}

export interface SshResult {
  stdout: string;
  stderr: string;
  exitCode: number | undefined;
}

/** Runs a command on a host: words, or one text for its shell. */
export async function ssh(name: string, command: string[] | string, options: SshOptions = {}): Promise<SshResult> {
  const { input = "", user = "root", reject = true, timeout } = options;
  const remote = typeof command === "string" ? command : command.map(quote).join(" ");
  const result = await execa("ssh", [...master(name), "-l", user, name, "--", remote], { input, reject, timeout });
  return { stdout: result.stdout, stderr: result.stderr, exitCode: result.exitCode };
}

export class LabHost {
  readonly name: string;
  readonly options: HostOptions;

  constructor(name: string, options: HostOptions = {}) {
    this.name = name;
    this.options = options;
  }

  /** `host` of a resource, as an ssh connection of the lab: names and keys from its ssh_config. */
  get connection() {
    return { host: this.name, configFile: sshConfig };
  }

  /** The address on the lab's network. */
  get address(): string {
    return `10.77.${suffix}.${readFileSync(join(folder, "hosts", this.name, "number"), "utf8").trim()}`;
  }

  /** The public host key, `ssh-ed25519 AAAA…`. */
  get hostKey(): string {
    const key = readFileSync(join(folder, "hosts", this.name, "own/etc/ssh/ssh_host_ed25519_key.pub"), "utf8");
    return key.split(" ", 2).join(" ");
  }

  /** The text of the private key that opens root and deploy of every host. */
  get privateKey(): string {
    const file = /IdentityFile "(.*)"/.exec(readFileSync(sshConfig, "utf8"))?.[1];
    if (!file) throw new Error(`no IdentityFile in ${sshConfig}`);
    return readFileSync(file, "utf8");
  }

  ssh(command: string[] | string, options?: SshOptions): Promise<SshResult> {
    return ssh(this.name, command, options);
  }

  up(): Promise<void> {
    return up([this.name], this.options);
  }

  crash(): Promise<void> {
    return crash(this.name);
  }
}

/** A host name for this test file alone: what it is for, and the file's mark. At most 10 characters, as all of the lab's. */
export function hostName(purpose: string): string {
  const file = expect.getState().testPath ?? String(process.pid);
  const mark = createHash("sha256").update(file).digest("hex").slice(0, 4);
  return `${purpose
    .toLowerCase()
    .replaceAll(/[^a-z0-9]/g, "")
    .slice(0, 6)}${mark}`;
}

/** Hosts for one test file, there from its beforeAll to its afterAll: `const { node } = useHosts({ node: { pve: true } })`. */
export function useHosts<K extends string>(wanted: Record<K, HostOptions>): Record<K, LabHost> {
  const hosts = Object.fromEntries(
    Object.entries<HostOptions>(wanted).map(([purpose, options]) => [purpose, new LabHost(hostName(purpose), options)]),
  ) as Record<K, LabHost>;
  const all = Object.values<LabHost>(hosts);
  beforeAll(async () => {
    await Promise.all(all.map((host) => host.up()));
  }, 300_000);
  afterAll(async () => {
    await down(...all.map((host) => host.name));
  }, 60_000);
  return hosts;
}

/**
 * The uml host that all test files share, because starting one takes 12 s and more. Each file keeps to volume groups, exports and
 * units of its own. The first user starts it; it goes when the whole run ends (setup.ts), unless LAB_KEEP is set.
 */
export function useStore(): LabHost {
  const store = new LabHost("store", { uml: true });
  beforeAll(() => store.up(), 300_000);
  return store;
}

/**
 * A volume group of this test file alone on a uml host, on a sparse loop device; there from beforeAll to afterAll. Thick and thin
 * volumes are the file's own to make.
 */
export function useVolumeGroup(host: LabHost, name: string, sizeMiB = 512): string {
  const image = `/var/tmp/${name}.img`;
  const release = `vgremove -ff -y ${name}; losetup -j ${image} | cut -d: -f1 | xargs -r losetup -d; rm -f ${image}`;
  beforeAll(async () => {
    await host.ssh(
      `${release}; set -e; truncate -s ${sizeMiB}M ${image}; dev=$(losetup --find --show ${image}); vgcreate -y ${name} "$dev"`,
    );
  }, 120_000);
  afterAll(async () => {
    await host.ssh(release, { reject: false });
  }, 120_000);
  return name;
}
