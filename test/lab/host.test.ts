// The host layer against real sshds: logins that fail say why and what to do; connections are few, end with us, and are noticed
// when they die.
import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import * as ts from "typescript";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import * as z from "zod";
import { closeAll, connect, type Host } from "../../provider/host.js";
import { fenced, hooks, type Line } from "../../provider/host-ledger.js";
import { suffix, useHosts } from "./lab.js";

const { near, far } = useHosts({ near: {}, far: {} });
let folder: string;
let files = 0;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "host-"));
});
afterEach(() => {
  closeAll();
  delete hooks.argv;
});
afterAll(() => rmSync(folder, { recursive: true }));

/** An ssh_config with a known_hosts of its own, so that nothing of this machine's counts. */
function configFile(text = "", known = ""): { configFile: string; knownHosts: string } {
  const knownHosts = join(folder, `known${++files}`);
  writeFileSync(knownHosts, known);
  const file = join(folder, `config${files}`);
  writeFileSync(
    file,
    `Host *\n  UserKnownHostsFile ${knownHosts}\n  IdentityFile /nonexistent\n  IdentityAgent none\n${text}`,
  );
  return { configFile: file, knownHosts };
}

/** A new key pair: the private text and the public line. */
function newKey(passphrase = "", type = "ed25519"): { privateKey: string; publicKey: string; print: string } {
  const file = join(folder, `key${++files}`);
  execFileSync("ssh-keygen", ["-q", "-t", type, "-N", passphrase, "-C", "test", "-f", file]);
  const print = execFileSync("ssh-keygen", ["-lf", `${file}.pub`], { encoding: "utf8" }).split(" ")[1] ?? "";
  return { privateKey: readFileSync(file, "utf8"), publicKey: readFileSync(`${file}.pub`, "utf8").trim(), print };
}
const allow = (publicKey: string) => near.ssh(`echo '${publicKey}' >>~/.ssh/authorized_keys`);

const whoami = { why: "look who we are", argv: ["sh", "-c", 'echo "$(id -un) $(hostname) $SSH_CONNECTION"'] } as const;
const who = async (host: Host) => (await host.run(whoami)).stdout.trim();
async function failure(host: Host): Promise<Error> {
  const error: unknown = await host.run(whoami).catch((e) => e);
  if (!(error instanceof Error)) throw new Error("it did not fail");
  expect(error.name).toBe("HostUnreachable");
  expect(error.message).toMatch(/^Unable to look who we are: /);
  return error;
}
const print = (publicKey: string) =>
  execFileSync("ssh-keygen", ["-lf", "-"], { input: publicKey, encoding: "utf8" }).split(" ")[1] ?? "?";

/** Pinned and with the lab's key: right in every way. */
const good = () => ({
  host: near.address,
  hostKey: near.hostKey,
  privateKey: near.privateKey,
  configFile: configFile().configFile,
});

describe("the host key", () => {
  it("that is not known is refused, with the fingerprint and the line to add; with that line it works", async () => {
    const { configFile: file, knownHosts } = configFile();
    const { hostKey: _, ...unpinned } = good();
    const connection = { ...unpinned, configFile: file };
    const { message } = await failure(connect(connection));
    expect(message).toContain(`the host key of ${near.address} is not known`);
    expect(message).toContain(print(near.hostKey));
    expect(message).toContain(knownHosts);
    const line = message.split("\n").at(-1) ?? "";
    expect(line).toBe(`${near.address} ${near.hostKey}`);
    writeFileSync(knownHosts, `${line}\n`);
    expect(await who(connect(connection))).toMatch(`root ${near.name}`);
  });

  it("that has changed is refused, with both fingerprints' places and what to do", async () => {
    const { configFile: file, knownHosts } = configFile("", `${near.address} ${far.hostKey}\n`);
    const { hostKey: _, ...unpinned } = good();
    const { message } = await failure(connect({ ...unpinned, configFile: file }));
    expect(message).toContain(`${near.address} shows the key ${print(near.hostKey)}`);
    expect(message).toContain(`${knownHosts}:1`);
    expect(message).toContain(`ssh-keygen -R '${near.address}'`);
    expect(message.split("\n").at(-1)).toBe(`${near.address} ${near.hostKey}`); // the line to add
  });

  it("that is pinned needs no known_hosts, and no other is taken", async () => {
    expect(await who(connect(good()))).toMatch(`root ${near.name}`);
    const { message } = await failure(connect({ ...good(), hostKey: far.hostKey }));
    expect(message).toContain(`shows the key ${print(near.hostKey)}`);
    expect(message).toContain(`not the pinned one, ${print(far.hostKey)}`);
    expect(message).toContain(near.hostKey);
  });
});

describe("the login", () => {
  it("with a key that the host does not take says which keys were offered", async () => {
    const { privateKey, print } = newKey();
    const { message } = await failure(connect({ ...good(), privateKey }));
    expect(message).toMatch(
      new RegExp(
        `root@${near.address} refuses the login \\(keys offered: [^;]*${print.replaceAll("+", "\\+")}[^;]*; it takes publickey`,
      ),
    );
    expect(message).toContain(`authorized_keys of root@${near.address}`);
    expect(message).not.toContain("PRIVATE");
  });

  it("without any key says so", async () => {
    const { privateKey: _, ...keyless } = good();
    expect((await failure(connect(keyless))).message).toMatch(/no key was offered.*\nSet `privateKey`/s);
  });

  it.each(["ed25519", "rsa"])("with an encrypted %s key", async (type) => {
    const { privateKey, publicKey } = newKey("it's a $secret phrase", type);
    await allow(publicKey);
    const right = {
      ...good(),
      privateKey: privateKey.trim().replaceAll("\n", "\r\n"),
      privateKeyPassword: "it's a $secret phrase",
    };
    expect(await who(connect(right))).toMatch(`root ${near.name}`);
    const wrong = await failure(connect({ ...right, privateKeyPassword: "wrong" }));
    expect(wrong.message).toMatch(/`privateKey` cannot be used: it is damaged, or the passphrase is wrong/);
    const { privateKeyPassword: _, ...without } = right;
    expect((await failure(connect(without))).message).toMatch(/it is damaged, or it has a passphrase/);
    for (const secret of ["it's a $secret", "PRIVATE", privateKey.split("\n")[1] ?? "?"])
      expect(wrong.message).not.toContain(secret);
  });

  it("with a key as text leaves it in no argv and in no file", async () => {
    const { privateKey, publicKey } = newKey("a passphrase");
    await allow(publicKey);
    await who(connect({ ...good(), privateKey, privateKeyPassword: "a passphrase" }));
    const body = privateKey.split("\n")[2] ?? "?";
    const argv = execFileSync("ps", ["-eo", "args"], { encoding: "utf8" });
    expect(argv).toContain("ControlMaster=yes"); // the connection is there
    for (const secret of [body, "a passphrase"]) {
      expect(argv).not.toContain(secret);
      for (const place of ["/tmp", `/run/user/${process.getuid?.()}`, process.env.XDG_RUNTIME_DIR ?? "/tmp"]) {
        const ours = (() => {
          try {
            return readdirSync(place).filter((n) => n.startsWith("vmbackup-"));
          } catch {
            return [];
          }
        })();
        for (const dir of ours)
          for (const entry of readdirSync(join(place, dir), { withFileTypes: true }))
            if (entry.isFile()) expect(readFileSync(join(place, dir, entry.name), "utf8")).not.toContain(secret);
      }
    }
  });

  it("offers the key of one host to no other", async () => {
    const one = newKey();
    const other = newKey();
    await allow(one.publicKey);
    await who(connect({ ...good(), privateKey: one.privateKey }));
    const { message } = await failure(
      connect({ ...good(), host: far.address, hostKey: far.hostKey, privateKey: other.privateKey }),
    );
    expect(message).toContain(other.print);
    expect(message).not.toContain(one.print);
  });

  it("as another user with sudo; a sudo that asks is an error of its own", async () => {
    const deploy = { ...good(), user: "deploy" };
    expect(await who(connect(deploy))).toMatch(/^deploy /);
    expect(await who(connect({ ...deploy, sudo: true }))).toMatch(/^root /);
    await near.ssh("mv /etc/sudoers.d/deploy /root/deploy");
    const error: Error = await connect({ ...deploy, sudo: true })
      .run(whoami)
      .catch((e) => e);
    await near.ssh("mv /root/deploy /etc/sudoers.d/deploy");
    expect(error.name).toBe("CommandFailed");
    expect(error.message).toMatch(/sudo on deploy@.* wants a password/);
    expect(error.message).toMatch(/NOPASSWD/);
  });
});

describe("a host that does not answer", () => {
  it("has a closed port", async () => {
    // A hundred at once share the attempts.
    const start = Date.now();
    const host = connect({ ...good(), port: 2, dialErrorLimit: 2 });
    for (const { message } of await Promise.all(Array.from({ length: 100 }, () => failure(host))))
      expect(message).toContain(`nothing listens on port 2 of ${near.address}`);
    expect(Date.now() - start).toBeLessThan(5000);
  });
  it("has no name", async () => {
    const { message } = await failure(connect({ ...good(), host: "no-such-host.invalid" }));
    expect(message).toContain("the name no-such-host.invalid does not resolve");
    expect(message).toMatch(/ssh_config/);
  });
  it("has no machine", async () => {
    const start = Date.now();
    const { message } = await failure(
      connect({ ...good(), host: near.address.replace(/\d+$/, "250"), dialErrorLimit: 1, perDialTimeout: 1 }),
    );
    expect(message).toMatch(/250 does not answer on port 22 \((connection timed out|no route to host)\)/);
    expect(Date.now() - start).toBeLessThan(5000);
  });
  it("is no ssh server", async () => {
    await near.ssh(
      "systemd-run --quiet --collect --unit=mute python3 -c 'import socket,time; s=socket.create_server((\"\",77)); time.sleep(60)'",
    );
    await sleep(500);
    const { message } = await failure(connect({ ...good(), port: 77, dialErrorLimit: 1, perDialTimeout: 1 }));
    expect(message).toMatch(/does not answer as an ssh server|did not finish the login/);
    await near.ssh("systemctl stop mute");
  });
  it("has a configFile that is not there", async () => {
    expect((await failure(connect({ ...good(), configFile: "not/there" }))).message).toMatch(
      /`configFile` .*not\/there is not there/,
    );
  });
});

describe("ssh_config", () => {
  beforeAll(() => near.ssh("/usr/sbin/sshd -p 2222"));
  it("wins over our defaults, and what is declared wins over it", async () => {
    const key = join(folder, "labkey");
    writeFileSync(key, near.privateKey, { mode: 0o600 });
    const text = `Host n4\n  HostName ${near.address}\n  User deploy\n  Port 2222\n  IdentityFile ${key}\nHost plain\n  HostName ${near.address}\n  IdentityFile ${key}\n`;
    const { configFile: file } = configFile(
      text,
      `${near.address} ${near.hostKey}\n[${near.address}]:2222 ${near.hostKey}\n`,
    );
    const config = { configFile: file };
    expect(await who(connect("n4", config))).toMatch(new RegExp(`^deploy ${near.name} .* 2222$`));
    expect(await who(connect("root@n4:22", config))).toMatch(new RegExp(`^root ${near.name} .* 22$`));
    expect(await who(connect("plain", config))).toMatch(new RegExp(`^root ${near.name} .* 22$`));
    // Relative to the folder of the project.
    const relative = { configFile: file.slice(folder.length + 1) };
    expect(await who(connect("n4", relative, folder))).toMatch(/^deploy /);
  });
});

describe("a bastion of ssh_config", () => {
  it("is reached as by hand: our defaults are not its", async () => {
    const key = join(folder, "jumpkey");
    writeFileSync(key, near.privateKey, { mode: 0o600 });
    const text = `Host jump\n  HostName ${near.address}\nHost inner\n  HostName ${far.address}\n  ProxyJump jump\nHost *\n  IdentityFile ${key}\n  IdentitiesOnly yes\nMatch final originalhost jump\n  User deploy\n`;
    const { configFile: file } = configFile(text, `${near.address} ${near.hostKey}\n${far.address} ${far.hostKey}\n`);
    expect(await who(connect("inner", { configFile: file }))).toMatch(new RegExp(`^root ${far.name} ${near.address} `));
    // Without a `User` it is this machine's login name, as `ssh jump` has it.
    const plain = configFile(text.split("Match final")[0], `${near.address} ${near.hostKey}\n`).configFile;
    const config = ["-F", plain, "-T", "-G", "jump"];
    expect(execFileSync("ssh", config, { encoding: "utf8" })).toContain(`user ${userInfo().username}\n`);
  });
});

describe("a proxy", () => {
  const through = () => ({
    host: far.address,
    hostKey: far.hostKey,
    privateKey: far.privateKey,
    configFile: configFile().configFile,
    proxy: { host: near.address, user: "deploy", hostKey: near.hostKey, privateKey: near.privateKey },
  });
  it("stands in front, with a key, a user and a pinned host key of its own", async () => {
    expect(await who(connect(through()))).toMatch(new RegExp(`^root ${far.name} ${near.address} `));
  });
  it("whose key is another is refused, and named", async () => {
    const made = through();
    const { message } = await failure(connect({ ...made, proxy: { ...made.proxy, hostKey: far.hostKey } }));
    expect(message).toContain(`deploy@${near.address} shows`);
    expect(message).toContain("`proxy.hostKey`");
  });
  it("that refuses the login is named", async () => {
    const made = through();
    const { message } = await failure(connect({ ...made, proxy: { ...made.proxy, privateKey: newKey().privateKey } }));
    expect(message).toMatch(/its proxy deploy@\S+ refuses the login/);
  });
  it("is not blamed for the host behind it", async () => {
    const { message } = await failure(connect({ ...through(), hostKey: near.hostKey }));
    expect(message).toContain(`${far.address} shows the key ${print(far.hostKey)}`);
  });
});

describe("connections", () => {
  const logins = async () =>
    Number(
      (await near.ssh("journalctl -q --no-pager -t sshd | grep -c 'Accepted publickey for deploy' || true")).stdout,
    );
  const deploy = () => ({ ...good(), user: "deploy" });

  it("a burst of 200 callers opens one", async () => {
    const before = await logins();
    const one = deploy();
    const spellings = [connect(one), connect({ ...one, port: 22 })];
    await Promise.all(
      Array.from({ length: 200 }, (_, i) => spellings[i % 2]?.run({ why: "x", argv: ["echo", String(i)] })),
    );
    expect((await logins()) - before).toBe(1);
  });

  it("questions of a burst are one command", async () => {
    let commands = 0;
    hooks.argv = () => void commands++;
    const host = connect(deploy());
    const report = { why: "ask", argv: ["echo", "7"] as const, answer: z.number() };
    expect(await Promise.all(Array.from({ length: 200 }, () => host.ask(report)))).toEqual(Array(200).fill(7));
    expect(commands).toBe(1);
  });

  it("that is cut while a command runs: nobody knows how it ended; the next command opens another", async () => {
    const host = connect(deploy());
    await who(host);
    const running = host.run({ why: "wait", argv: ["sleep", "30"] }).catch((e) => e);
    await sleep(1000);
    await near.ssh("pkill -KILL -u deploy sshd");
    const error: Error = await running;
    expect(error.name).toBe("HostUnreachable");
    expect(error.message).toMatch(
      /the connection to deploy@\S+ was lost while the command ran; how it ended is not known/,
    );
    expect(await who(host)).toMatch(/^deploy/);
  });

  it("that is cut while nothing runs is not noticed by the next command", async () => {
    const host = connect(deploy());
    await who(host);
    await near.ssh("pkill -KILL -u deploy sshd");
    expect(await who(host)).toMatch(/^deploy/);
  });

  it("exit 255 of the remote tool is the tool's", async () => {
    const error = await connect(good())
      .run({ why: "restore", argv: ["sh", "-c", "echo bad >&2; exit 255"] })
      .catch((e) => e);
    expect(error.name).toBe("CommandFailed");
    expect(error).toMatchObject({ exit: 255, stderr: "bad\n" });
  });

  it("the local deadline counts; commands that hang there do not use up the connection", async () => {
    const host = connect(good());
    await who(host);
    const start = Date.now();
    const hang = { why: "probe the mount", argv: ["sh", "-c", "trap '' HUP TERM PIPE; sleep 71"], timeout: 1 } as const;
    const errors = await Promise.all(Array.from({ length: 20 }, () => host.run(hang).catch((e) => e)));
    expect(Date.now() - start).toBeLessThan(12_000);
    for (const error of errors) {
      expect(error.name).toBe("HostUnreachable");
      expect(error.message).toMatch(/did not answer within 1 s/);
    }
    expect(Number((await near.ssh("pgrep -cf 'sleep 71'")).stdout)).toBeGreaterThanOrEqual(8);
    expect(await who(host)).toMatch(/^root/);
    await near.ssh("pkill -x sleep || true");
  });

  it("a step whose connection is lost goes on and keeps its lock", async () => {
    const host = connect({ ...deploy(), sudo: true });
    const line: Line = {
      v: 1,
      kind: "LvSnapshot",
      identity: "vg0/x",
      owner: "o/p/s/k/n",
      incarnation: "aaaa",
      finished: false,
      kept: [],
    };
    const step = (word: string, seconds: number, timeout = 60) => ({
      why: `do ${word}`,
      argv: ["sh", "-c", `sleep ${seconds}; echo said; echo ${word} >>/tmp/steps`] as const,
      timeout,
    });
    const lost = fenced(host, line, "", step("one", 5)).catch((e) => e);
    await sleep(1500);
    await near.ssh("pkill -KILL -u deploy sshd");
    expect((await lost).name).toBe("HostUnreachable");
    const early = await fenced(host, line, "aaaa", step("two", 0, 1)).catch((e) => e);
    expect(early.name).toBe("Conflict");
    expect(early.message).toMatch(/o\/p\/s\/k\/n \(to do one\) is at work on LvSnapshot vg0\/x/);
    await fenced(host, { ...line, incarnation: "bbbb" }, "aaaa", step("three", 0));
    expect((await near.ssh("cat /tmp/steps")).stdout).toBe("one\nthree");
    expect(
      (
        await near.ssh(
          "cat /var/lib/pulumi-vmbackup/LvSnapshot/vg0%2Fx.json; stat -c %a /var/lib/pulumi-vmbackup /var/lib/pulumi-vmbackup/LvSnapshot/*",
        )
      ).stdout,
    ).toMatch(/"bbbb".*\n700\n600$/);
  });

  it("says which machine it leads to", async () => {
    const one = await connect(good()).identity();
    expect(one.machineId).toBe((await near.ssh("cat /etc/machine-id")).stdout);
    const other = await connect({ ...good(), host: far.address, hostKey: far.hostKey }).identity();
    expect(other.machineId).toBe((await far.ssh("cat /etc/machine-id")).stdout);
    // The same name, now of another machine: learnt by the next connection.
    const { configFile: file } = configFile(
      `Host n4\n  HostName ${near.address}\n  HostKeyAlias n4\n`,
      `n4 ${near.hostKey}\nn4 ${far.hostKey}\n`,
    );
    const n4 = { host: "n4", privateKey: near.privateKey, configFile: file };
    expect((await connect(n4).identity()).machineId).toBe(one.machineId);
    closeAll();
    writeFileSync(file, readFileSync(file, "utf8").replace(near.address, far.address));
    expect((await connect(n4).identity()).machineId).toBe(other.machineId);
  });

  it("end with us, even when we are killed, and need no short TMPDIR", async () => {
    const dist = join(folder, "dist");
    const root = join(__dirname, "../..");
    mkdirSync(dist);
    for (const name of readdirSync(join(root, "provider")).filter((n) => /^(host.*|errors)\.ts$/.test(n))) {
      const text = readFileSync(join(root, "provider", name), "utf8");
      const compilerOptions = { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2023 };
      writeFileSync(join(dist, name.replace(/ts$/, "js")), ts.transpileModule(text, { compilerOptions }).outputText);
    }
    symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
    const long = join(folder, "x".repeat(150));
    mkdirSync(long);
    const connection = JSON.stringify({ ...good(), user: "deploy" });
    const program = `const { connect } = require(${JSON.stringify(join(dist, "host.js"))});
      connect(JSON.parse(process.argv[1])).run({ why: "x", argv: ["id", "-un"] }).then(({ stdout }) => { console.log(stdout.trim()); if (process.argv[2] === "stay") setInterval(() => {}, 1000); });`;
    const env = { ...process.env, TMPDIR: long };
    // A program that has nothing more to do ends by itself: the connection does not keep it.
    expect(
      execFileSync(process.execPath, ["-e", program, connection], { env, encoding: "utf8", timeout: 20_000 }),
    ).toBe("deploy\n");
    const sessions = async () => Number((await near.ssh("pgrep -c -u deploy sshd || true")).stdout);
    await sleep(500);
    expect(await sessions()).toBe(0);
    for (const signal of ["SIGTERM", "SIGKILL"] as const) {
      const child = spawn(process.execPath, ["-e", program, connection, "stay"], { env });
      await new Promise((resolve) => child.stdout.once("data", resolve));
      expect(await sessions()).toBeGreaterThan(0);
      const ended = new Promise((resolve) => child.once("exit", (_, by) => resolve(by)));
      child.kill(signal);
      expect(await ended).toBe(signal);
      await sleep(1000);
      expect(await sessions()).toBe(0);
      const left = execFileSync("ps", ["-eo", "args"], { encoding: "utf8" })
        .split("\n")
        .filter((l) => l.includes("ControlMaster=yes") && l.includes("User=deploy"));
      expect(left).toEqual([]);
    }
  });

  it("whose host dies silently is given up after some seconds", async () => {
    const host = connect({ ...good(), host: far.address, hostKey: far.hostKey });
    await who(host);
    const running = host.run({ why: "wait", argv: ["sleep", "300"], timeout: 300 }).catch((e) => e);
    await sleep(500);
    const start = Date.now();
    // No more packets, not even a goodbye.
    execFileSync("ip", ["-n", `lab${suffix}`, "link", "set", `c${far.address.split(".").at(-1)}`, "down"]);
    expect((await running).name).toBe("HostUnreachable");
    expect(Date.now() - start).toBeGreaterThan(10_000);
    expect(Date.now() - start).toBeLessThan(40_000);
  });
});
