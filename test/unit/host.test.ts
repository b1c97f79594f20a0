import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import * as z from "zod";
import { connect, connectionSchema, hooks, hostLabel, hostSchema, oneLook, quote } from "../../provider/host.js";

afterEach(() => {
  delete hooks.argv;
});

const NASTY = [
  "",
  " ",
  "a b",
  "\n",
  "two\nlines",
  "'",
  "''",
  '"',
  "\\",
  "$HOME",
  "$(id)",
  "`id`",
  "-n",
  "--",
  "*",
  "?",
  "[a]",
  "~",
  "#x",
  "a=b",
  "=",
  "!!",
  ";",
  "&",
  "|",
  "<",
  ">",
  "(",
  "{a,b}",
  "é ü 漢",
  "\t",
  "%s",
  "\\n",
  "a'b\"c",
]; // every word that a shell could make something else of

describe("quote", () => {
  it("brings nasty words through a real sh", () => {
    const out = execFileSync("sh", ["-c", `printf '%s\\0' ${quote(NASTY)}`], { encoding: "utf8" });
    expect(out.split("\0").slice(0, -1)).toEqual(NASTY);
  });
  it("brings them through two shells, as a ProxyCommand does", () => {
    const out = execFileSync("sh", ["-c", quote(["sh", "-c", `printf '%s\\0' ${quote(NASTY)}`])], { encoding: "utf8" });
    expect(out.split("\0").slice(0, -1)).toEqual(NASTY);
  });
  it("takes a first word with = for a command, not for an assignment", () => {
    expect(() => execFileSync("sh", ["-c", quote(["A=b"])], { stdio: "pipe" })).toThrow(/not found/);
  });
  it("leaves plain words as one types them", () => {
    expect(quote(["lvs", "--units", "b", "vg0/root"])).toBe("lvs --units b vg0/root");
  });
});

const KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
const HOST_KEY = `ssh-ed25519 ${"A".repeat(68)}`;

describe("a host", () => {
  it.each([
    ["skyserver4", { host: "skyserver4" }],
    ["sky.server-4.example", { host: "sky.server-4.example" }],
    ["root@skyserver4", { host: "skyserver4", user: "root" }],
    ["root@skyserver4:22", { host: "skyserver4", user: "root", port: 22 }],
    ["a.b@corp@skyserver4", { host: "skyserver4", user: "a.b@corp" }],
    ["root@[2001:db8::1]", { host: "2001:db8::1", user: "root" }],
    ["root@[2001:db8::1]:2222", { host: "2001:db8::1", user: "root", port: 2222 }],
    ["2001:db8::1", { host: "2001:db8::1" }],
    ["[fe80::1%eth0]", { host: "fe80::1%eth0" }],
    ["10.0.0.1:22", { host: "10.0.0.1", port: 22 }],
    ["local", { host: "local" }],
    ["hôte", { host: "hôte" }],
    [{ host: "n4" }, { host: "n4" }],
    [
      { host: "n4", user: "root", port: 22, sudo: true },
      { host: "n4", user: "root", port: 22, sudo: true },
    ],
  ])("%j is taken, and nothing is filled in", (given, normal) => {
    expect(hostSchema.parse(given)).toEqual(normal);
    expect(hostSchema.parse(hostLabel(hostSchema.parse(given)))).toMatchObject({ host: normal.host });
  });

  it.each([
    ["", /empty/],
    ["-oProxyCommand=id", /must not start with `-`/],
    ["root@-oProxyCommand=id", /must not start with `-`/],
    ["-l@host", /login name/],
    ["a b", /without blanks/],
    ["a\nb", /without blanks/],
    ["a\n", /without blanks/],
    ["$(id)", /without blanks/],
    ["n4;id", /without blanks/],
    ["`id`", /without blanks/],
    ["n4'", /without blanks/],
    ["root@n4:", /port/],
    ["root@n4:0", /port/],
    ["root@n4:65536", /port/],
    ["root@n4:22 ", /port/],
    ["root;id@n4", /login name/],
    ["@n4", /login name/],
    ["[n4]:22", /IPv6/],
    ["[2001:db8::1", /./],
    ["a:b:c", /./],
    [{ host: "-v" }, /must not start with `-`/],
    [{ host: "n4 " }, /without blanks/],
    [{ host: "n4", user: "-root" }, /login name/],
    [{ host: "n4", user: "ro ot" }, /login name/],
    [{ host: "n4", agentSocketPath: "/tmp/$(id)" }, /path/],
    [{ host: "n4", configFile: 'a"b' }, /path/],
    [null, /./],
    [7, /./],
  ])("%j is refused", (given, why) => {
    const { success, error } = hostSchema.safeParse(given);
    expect(success).toBe(false);
    expect(error?.issues[0]?.message).toMatch(why);
  });

  it.each([
    [
      { host: "n4", password: "hunter2" },
      ["password"],
      /password logins are not supported: .* use `?privateKey`? or the agent/i,
    ],
    [{ host: "n4", proxy: { host: "b", password: "hunter2" } }, ["proxy", "password"], /not supported/],
    [{ host: "n4", proxy: { host: "b", sudo: true } }, ["proxy"], /sudo/],
    [{ host: "n4", proxy: { host: "b", configFile: "x" } }, ["proxy"], /configFile/],
    [{ host: "n4", proxy: { host: "b", proxy: { host: "c" } } }, ["proxy"], /proxy/],
    [{ host: "n4", prot: 22 }, [], /prot/],
    [{ host: "n4", port: "22" }, ["port"], /port number/],
    [{ host: "n4", port: 22.5 }, ["port"], /port number/],
    [{ host: "n4", privateKey: "~/.ssh/id_ed25519" }, ["privateKey"], /not its path/],
    [{ host: "n4", privateKey: HOST_KEY }, ["privateKey"], /not a public key/],
    [{ host: "n4", privateKeyPassword: "hunter2" }, ["privateKeyPassword"], /not given/],
    [{ host: "n4", hostKey: "SHA256:abc" }, ["hostKey"], /ssh-ed25519 AAAA/],
    [{ host: "n4", hostKey: `${HOST_KEY}\n* ${HOST_KEY}` }, ["hostKey"], /ssh-ed25519 AAAA/],
    [{ host: "n4", sudo: "yes" }, ["sudo"], /./],
    [{ host: "n4", perDialTimeout: -1 }, ["perDialTimeout"], /seconds/],
  ])("%j is refused, naming the property", (given, path, why) => {
    const [issue] = connectionSchema.safeParse(given).error?.issues ?? [];
    expect(issue?.path).toEqual(path);
    expect(issue?.message).toMatch(why);
    expect(JSON.stringify(issue)).not.toMatch(/hunter2/);
  });

  it("takes every field of @pulumi/command's connection but the password", () => {
    const remote = {
      host: "h",
      user: "u",
      port: 22,
      privateKey: KEY,
      privateKeyPassword: "p",
      agentSocketPath: "/run/a",
      hostKey: HOST_KEY,
      dialErrorLimit: -1,
      perDialTimeout: 0,
    };
    expect(connectionSchema.parse({ ...remote, proxy: remote })).toEqual({ ...remote, proxy: remote });
  });

  it("is one object for one spelling, and called as the program calls it", () => {
    expect(connect("root@[2001:db8::1]:22").name).toBe("root@[2001:db8::1]:22");
    expect(connect("n4")).toBe(connect({ host: "n4" }));
    expect(connect("n4")).not.toBe(connect("n5"));
  });

  it("names the stack's configuration when that is wrong, without its values", () => {
    expect(() => connect("n4", { port: "hunter2" })).toThrow(/vmbackup:connection\.port must be a port number/);
    expect(() => connect("n4", { password: "hunter2" })).toThrow(
      /vmbackup:connection\.password password logins are not supported/,
    );
    expect(() => connect("n4", { password: "hunter2" })).not.toThrow(/hunter2/);
  });
});

const local = connect("local");
const sh = (script: string, ...args: string[]) => ["sh", "-c", script, "sh", ...args] as const;

describe("run", () => {
  it("brings words to the command as they are", async () => {
    const { stdout } = await local.run({ why: "echo", argv: ["printf", "%s\\0", ...NASTY] });
    expect(stdout.split("\0").slice(0, -1)).toEqual(NASTY);
  });

  it("fixes the locale and has sbin on PATH", async () => {
    const { stdout } = await local.run({ why: "look", argv: sh('echo "$LC_ALL $LVM_SUPPRESS_FD_WARNINGS $PATH"') });
    expect(stdout).toMatch(/^C\.UTF-8 1 .*:\/usr\/sbin:\/sbin$/m);
  });

  it("passes stdin, and gives stdout and stderr back untouched", async () => {
    const argv = sh("cat; printf err >&2");
    expect(await local.run({ why: "x", argv, stdin: "a\nb" })).toEqual({ stdout: "a\nb", stderr: "err" });
    expect(await local.run({ why: "x", argv: sh("cat; echo err >&2") })).toEqual({ stdout: "", stderr: "err\n" });
  });

  it.each([1, 5, 75, 126, 254, 255])("exit %d of the tool is the tool's failure", async (exit) => {
    const error = await local
      .run({ why: "take the snapshot vg0/dump", argv: sh(`echo out; echo no room >&2; exit ${exit}`) })
      .catch((e) => e);
    expect(error.name).toBe("CommandFailed");
    expect(error).toMatchObject({ exit, stderr: "no room\n", stdout: "out\n" });
  });

  it("says what was wanted, the command as typed, stderr and what to do next", async () => {
    const failing = {
      why: "take the snapshot vg0/dump",
      argv: sh("printf '\\033[31mno room\\n' >&2; exit 5", "a b"),
      next: "Free space in vg0.",
      stdin: "hunter2",
    };
    const error = await local.run(failing).catch((e) => e);
    expect(error.message.split("\n")).toEqual([
      "Unable to take the snapshot vg0/dump: sh exited 5 on local.",
      `$ sh -c 'printf '\\''\\033[31mno room\\n'\\'' >&2; exit 5' sh 'a b'`,
      "no room",
      "Free space in vg0.",
    ]);
  });

  it("names the package of a command that is not there", async () => {
    const error = await local.run({ why: "look", argv: ["nbdcopy-not-there", "x"] }).catch((e) => e);
    expect(error.name).toBe("CommandFailed");
    expect(error.message).toMatch(/local has no command nbdcopy-not-there/);
    const script = sh("exec env pvesh-x");
    expect((await local.run({ why: "look", argv: script }).catch((e) => e)).message).toMatch(/no command pvesh-x/);
  });

  it("does not wait longer than its timeout, also for what ignores signals or leaves children", async () => {
    for (const script of [
      "trap '' TERM INT HUP; sleep 30",
      "sleep 30 & sleep 30",
      "(trap '' HUP; exec sleep 30) & wait",
    ]) {
      const start = Date.now();
      const error = await local.run({ why: "wait", argv: sh(script), timeout: 0.3 }).catch((e) => e);
      expect(error.name).toBe("HostUnreachable");
      expect(error.message).toMatch(/Unable to wait: local did not answer within 0.3 s/);
      expect(Date.now() - start).toBeLessThan(3000);
    }
  });

  it("does not wait for a daemon that keeps the pipes open", async () => {
    const start = Date.now();
    expect(await local.run({ why: "start it", argv: sh("sleep 30 & echo done") })).toMatchObject({ stdout: "done\n" });
    expect(Date.now() - start).toBeLessThan(6000);
  });

  it("runs at most eight at a time", async () => {
    const log = join(mkdtempSync(join(tmpdir(), "eight-")), "log");
    const one = { why: "x", argv: sh('echo + >>"$1"; sleep 0.5; echo - >>"$1"', log) };
    await Promise.all(Array.from({ length: 20 }, () => local.run(one)));
    let now = 0;
    const running = readFileSync(log, "utf8")
      .trim()
      .split("\n")
      .map((sign) => (now += sign === "+" ? 1 : -1));
    expect(running).toHaveLength(40);
    expect(Math.max(...running)).toBeLessThanOrEqual(8);
    expect(Math.max(...running)).toBeGreaterThan(1);
  });
});

describe("ask", () => {
  const counted = (script: string) => {
    let times = 0;
    hooks.argv = (_, argv) => {
      if (argv.includes(script)) times++;
    };
    return () => times;
  };
  const answer = z.object({ n: z.number() });

  it("asks once for a burst", async () => {
    const script = 'echo "{\\"n\\": 1}" # burst';
    const times = counted(script);
    const all = await Promise.all(
      Array.from({ length: 200 }, () => local.ask({ why: "ask", argv: sh(script), answer })),
    );
    expect(all).toHaveLength(200);
    expect(times()).toBe(1);
  });

  it("nobody joins a question that has started: no answer is older than its question", async () => {
    const folder = execFileSync("mktemp", ["-d"], { encoding: "utf8" }).trim();
    const script = `cat "$1/v"; sleep 0.3`;
    const times = counted(script);
    const report = { why: "ask", argv: sh(script, folder), answer, timeout: 10 };
    const write = (n: number) => execFileSync("sh", ["-c", `echo '{"n": ${n}}' >"$0/v"`, folder]);
    write(1);
    const first = local.ask(report);
    await new Promise((r) => setTimeout(r, 150));
    write(2);
    const later = Array.from({ length: 50 }, () => local.ask(report));
    expect(await first).toEqual({ n: 1 });
    expect(await Promise.all(later)).toEqual(Array(50).fill({ n: 2 }));
    expect(times()).toBe(2);
  });

  it("within one look the same question has one answer, unless it is asked again on purpose", async () => {
    const folder = mkdtempSync(join(tmpdir(), "look-"));
    const report = { why: "count", argv: sh('echo >> "$1/asked"; wc -l < "$1/asked"', folder), answer: z.number() };
    const look = oneLook(local);
    expect(await look.ask(report)).toBe(1);
    expect(await Promise.all([look.ask(report), look.ask({ ...report })])).toEqual([1, 1]);
    expect(await look.ask(report, "again")).toBe(2);
    expect(await look.ask(report)).toBe(2);
    expect(await oneLook(local).ask(report)).toBe(3);
  });

  it("a failure is everybody's who asked, and is not kept", async () => {
    const script = "exit 3 # fails";
    const times = counted(script);
    const report = { why: "ask", argv: sh(script), answer };
    for (const error of await Promise.all([local.ask(report), local.ask(report)].map((p) => p.catch((e) => e))))
      expect(error.name).toBe("CommandFailed");
    await local.ask(report).catch(() => {});
    expect(times()).toBe(2);
  });

  it.each([
    ["no JSON", "echo nonsense", /It begins: "nonsense\\n"/],
    ["another shape", `echo '{"n": "x"}'`, /at n/],
    ["nothing", "true", /It begins: ""/],
  ])("%s is an unreadable report, never a default", async (_, script, says) => {
    const error = await local.ask({ why: "list it", argv: sh(script), answer }).catch((e) => e);
    expect(error.name).toBe("UnreadableReport");
    expect(error.message).toMatch(/^Unable to list it: local answered, but not what was asked/);
    expect(error.message).toMatch(says);
  });
});
