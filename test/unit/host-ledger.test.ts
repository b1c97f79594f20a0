import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { connect } from "../../provider/host.js";
import { encoded, fenced, forget, hooks, type Line, memory, type Places } from "../../provider/host-ledger.js";

const local = connect("local");
let folder: string;
let places: Places;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "ledger-"));
  places = { ledger: join(folder, "var"), locks: join(folder, "run") };
});
afterEach(() => {
  rmSync(folder, { recursive: true });
  for (const name of ["argv", "beforeStep", "afterStep"] as const) delete hooks[name];
});

const line = (over: Partial<Line> = {}): Line => ({
  v: 1,
  kind: "LvSnapshot",
  identity: "vg0/dump",
  owner: "organization/p/dev/LvSnapshot/dump",
  incarnation: "aaaa",
  finished: false,
  kept: [],
  ...over,
});
const file = (identity = "vg0/dump") => join(places.ledger, "LvSnapshot", `${encoded(identity)}.json`);
const sh = (script: string, ...args: string[]) => ["sh", "-c", script, "sh", ...args] as const;
const touch = {
  why: "make it",
  get argv() {
    return sh('echo made >>"$1/made"', folder);
  },
};
const made = () =>
  existsSync(join(folder, "made")) ? readFileSync(join(folder, "made"), "utf8").split("\n").length - 1 : 0;
const recall = async () => (await memory(local, places)).lines;

describe("the ledger", () => {
  it("remembers nothing before the first write, and says which machine it is", async () => {
    const found = await memory(local, places);
    expect(found).toEqual({
      machineId: readFileSync("/etc/machine-id", "utf8").trim(),
      bootId: expect.any(String),
      lines: [],
    });
  });

  it("keeps a line as it was given, private, in a file named after the object", async () => {
    const pins = { text: `it's "quoted"\n$HOME \u2028 é`, n: 1 };
    const wanted = line({
      pins,
      before: { disable: true },
      job: { unit: "u", argvHash: "h", bootId: "b", startedAt: "t" },
    });
    await fenced(local, wanted, "", undefined, places);
    expect(await recall()).toEqual([wanted]);
    expect(readdirSync(join(places.ledger, "LvSnapshot"))).toEqual(["vg0%2Fdump.json"]);
    expect(statSync(file()).mode & 0o777).toBe(0o600);
    expect(statSync(places.ledger).mode & 0o777).toBe(0o700);
    expect((await memory(local, places)).ledgerId).toMatch(/^[0-9a-f-]{36}$/);
  });

  it("keeps its uuid, whoever comes first", async () => {
    const names = Array.from({ length: 12 }, (_, i) => `vg0/s${i}`);
    await Promise.all(names.map((identity) => fenced(local, line({ identity }), "", undefined, places)));
    const { ledgerId, lines } = await memory(local, places);
    expect(lines.map((l) => l.identity).sort()).toEqual([...names].sort());
    await fenced(local, line({ identity: "vg0/late" }), "", undefined, places);
    expect((await memory(local, places)).ledgerId).toBe(ledgerId);
    expect(readdirSync(places.ledger).sort()).toEqual(["LvSnapshot", "uuid"]);
  });

  it.each(["-n", ".hidden", "..", "*", "a b", "é", "it's", "x".repeat(240), "a%2Fb", "nl\nnl", "$(id)", "~"])(
    "%j is a name like any other",
    async (identity) => {
      await fenced(local, line({ identity }), "", touch, places);
      expect(await recall()).toMatchObject([{ identity }]);
      expect(encoded(identity)).toMatch(/^[A-Za-z0-9_%~-][A-Za-z0-9._%~-]*$/);
      await forget(local, line({ identity }), undefined, places);
      expect(await recall()).toEqual([]);
    },
  );

  it.each([
    ["empty", ""],
    ["no JSON", "{"],
    ["another shape", '{"v":1}'],
    ["of a later version", JSON.stringify(line()).replace('"v":1', '"v":2')],
    ["of another object", JSON.stringify(line({ identity: "vg0/other" }))],
  ])("a line that is %s is an unreadable report that names the file", async (_, content) => {
    await fenced(local, line({ identity: "vg0/good" }), "", undefined, places);
    writeFileSync(file(), content);
    const error = await memory(local, places).catch((e) => e);
    expect(error.name).toBe("UnreadableReport");
    expect(error.message).toContain(file());
  });

  it("a line that cannot be read is never passed over", async () => {
    await fenced(local, line(), "", undefined, places);
    const { mkdirSync } = await import("node:fs");
    mkdirSync(file("vg0/folder"));
    const error = await memory(local, places).catch((e) => e);
    expect(error.name).toBe("UnreadableReport");
    expect(error.message).toContain(file("vg0/folder"));
  });
});

describe("a fenced step", () => {
  it("writes the line before the command, and gives its answer", async () => {
    const command = { why: "look", argv: sh('cat; cat "$1"', file()), stdin: "secret\n" };
    const { stdout } = await fenced(local, line(), "", command, places);
    expect(stdout).toBe(`secret\n${JSON.stringify(line())}\n`);
  });

  it("leaves the line when the command fails, and the failure is the tool's own", async () => {
    const error = await fenced(
      local,
      line(),
      "",
      { why: "take it", argv: sh("echo no >&2; exit 75"), next: "Do." },
      places,
    ).catch((e) => e);
    expect(error.name).toBe("CommandFailed");
    expect(error.exit).toBe(75);
    expect(error.message).toBe("Unable to take it: sh exited 75 on local.\n$ sh -c 'echo no >&2; exit 75' sh\nno\nDo.");
    expect(await recall()).toEqual([line()]);
  });

  it("of an older incarnation changes nothing", async () => {
    await fenced(local, line(), "", touch, places);
    await fenced(local, line({ incarnation: "bbbb", owner: "o/p/s/k/new" }), "aaaa", undefined, places);
    const error = await fenced(local, line(), "aaaa", touch, places).catch((e) => e);
    expect(error.name).toBe("Conflict");
    expect(error.message).toMatch(/a newer run took over LvSnapshot vg0\/dump on local, of o\/p\/s\/k\/new/);
    expect(made()).toBe(1);
    expect(await recall()).toMatchObject([{ incarnation: "bbbb" }]);
  });

  it("that expects no line finds whose it is", async () => {
    await fenced(local, line(), "", touch, places);
    const error = await fenced(local, line({ incarnation: "bbbb" }), "", touch, places).catch((e) => e);
    expect(error.name).toBe("Conflict");
    expect(error.message).toMatch(/taken by organization\/p\/dev\/LvSnapshot\/dump/);
    expect(made()).toBe(1);
  });

  it("whose line is gone changes nothing", async () => {
    const error = await fenced(local, line(), "aaaa", touch, places).catch((e) => e);
    expect(error.name).toBe("Conflict");
    expect(error.message).toMatch(/no longer in the ledger/);
    expect(made()).toBe(0);
  });

  it("two at once: one wins, the other is told", async () => {
    const results = await Promise.allSettled(
      ["aaaa", "bbbb"].map((incarnation) => fenced(local, line({ incarnation }), "", touch, places)),
    );
    expect(results.map((r) => r.status).sort()).toEqual(["fulfilled", "rejected"]);
    expect(made()).toBe(1);
  });

  it("who does not get the lock is told who holds it, since when, and what to do", async () => {
    const slow = fenced(local, line(), "", { why: "take the snapshot", argv: ["sleep", "3"] }, places);
    await sleep(700);
    const error = await fenced(local, line(), "aaaa", { ...touch, argv: touch.argv, timeout: 1 }, places).catch(
      (e) => e,
    );
    expect(error.name).toBe("Conflict");
    expect(error.message).toMatch(
      /organization\/p\/dev\/LvSnapshot\/dump \(to take the snapshot\) is at work on LvSnapshot vg0\/dump on local since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ/,
    );
    expect(made()).toBe(0);
    await slow;
  });

  it("waits for the lock as long as it may", async () => {
    const slow = fenced(local, line(), "", { why: "wait", argv: ["sleep", "1"] }, places);
    await sleep(300);
    await fenced(local, line(), "aaaa", { ...touch, argv: touch.argv, timeout: 10 }, places);
    expect(made()).toBe(1);
    await slow;
  });

  it("other objects do not wait", async () => {
    const slow = fenced(local, line(), "", { why: "wait", argv: ["sleep", "2"] }, places);
    const start = Date.now();
    await fenced(local, line({ identity: "vg0/other" }), "", touch, places);
    expect(Date.now() - start).toBeLessThan(1500);
    await slow;
  });

  it("does not hand its lock to a daemon that the command starts", async () => {
    await fenced(local, line(), "", { why: "start", argv: sh("sleep 30 >/dev/null 2>&1 &") }, places);
    await fenced(local, line(), "aaaa", { ...touch, argv: touch.argv, timeout: 1 }, places);
    expect(made()).toBe(1);
  });

  it("keeps the lock when nobody waits for it any more, until the command has ended", async () => {
    // What a lost connection leaves behind: the shell of the step, without anybody at its pipes.
    const { spawn } = await import("node:child_process");
    let words: readonly string[] = [];
    hooks.argv = (_, argv) => {
      words = argv;
    };
    await fenced(
      local,
      line(),
      "",
      { why: "make it", argv: sh('sleep 2; echo x; echo made >>"$1/made"', folder) },
      places,
    );
    delete hooks.argv;
    expect(made()).toBe(1);
    const [program = "", ...args] = words.map((word) => (word === "" ? "aaaa" : word));
    const orphan = spawn(program, args, { detached: true, stdio: ["ignore", "pipe", "pipe"] });
    await sleep(500);
    for (const pipe of [orphan.stdout, orphan.stderr]) pipe?.destroy();
    if (orphan.pid !== undefined) process.kill(-orphan.pid, "SIGHUP");
    const early = await fenced(local, line(), "aaaa", { ...touch, argv: touch.argv, timeout: 1 }, places).catch(
      (e) => e,
    );
    expect(early.name).toBe("Conflict");
    await fenced(local, line(), "aaaa", { ...touch, argv: touch.argv, timeout: 10 }, places);
    expect(made()).toBe(3);
  });

  it("is seen by the hooks, which can stop there", async () => {
    const seen: string[] = [];
    hooks.beforeStep = (_, command) => void seen.push(`before ${command.why}`);
    hooks.afterStep = () => {
      throw new Error("stopped");
    };
    hooks.argv = (host, _, deed, tool) => void seen.push(`${host} ${deed} ${tool[0]}`);
    await expect(fenced(local, line(), "", touch, places)).rejects.toThrow("stopped");
    expect(seen).toEqual(["before make it", "local change sh"]);
    expect(made()).toBe(1);
    await fenced(local, line({ finished: true }), "aaaa", undefined, places);
    expect(seen.at(-1)).toBe("local ledger write");
  });

  it("that cannot be written down is not made", async () => {
    writeFileSync(places.ledger, "a file in its place");
    const error = await fenced(local, line(), "", touch, places).catch((e) => e);
    expect(error.name).toBe("CommandFailed");
    expect(error.message).toMatch(/the ledger of local cannot be written: .*var/);
    expect(made()).toBe(0);
  });
});

describe("forget", () => {
  it("removes the line, and again", async () => {
    await fenced(local, line(), "", undefined, places);
    await forget(local, line(), undefined, places);
    await forget(local, line(), undefined, places);
    expect(await recall()).toEqual([]);
  });
  it("after the last command of a removal, when that ended well", async () => {
    await fenced(local, line(), "", undefined, places);
    const failed = await forget(local, line(), { why: "remove it", argv: sh("echo busy >&2; exit 5") }, places).catch(
      (e) => e,
    );
    expect(failed).toMatchObject({ name: "CommandFailed", exit: 5, stderr: "busy\n" });
    expect(await recall()).toHaveLength(1);
    const seen: string[] = [];
    hooks.argv = (_host, _argv, deed) => void seen.push(deed);
    hooks.beforeStep = () => void seen.push("before");
    hooks.afterStep = () => void seen.push("after");
    await forget(local, line(), touch, places);
    expect(seen).toEqual(["before", "change", "after"]);
    expect(made()).toBe(1);
    expect(await recall()).toEqual([]);
    // Not again for what another run has removed, and never for what it made anew
    await forget(local, line(), touch, places);
    await fenced(local, line({ incarnation: "bbbb" }), "", undefined, places);
    expect((await forget(local, line(), touch, places).catch((e) => e)).name).toBe("Conflict");
    expect(made()).toBe(1);
  });
  it("leaves the line of a newer run", async () => {
    await fenced(local, line({ incarnation: "bbbb" }), "", undefined, places);
    expect((await forget(local, line(), undefined, places).catch((e) => e)).name).toBe("Conflict");
    expect(await recall()).toHaveLength(1);
  });
});
