// Jobs on a real systemd: they outlive the connection and the host layer that began them, and their results stay.
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, describe, expect, it, vi } from "vitest";
import { type Argv, type Command, closeAll, connect } from "../../provider/host.js";
import { ended, forgetJob, inTurn, jobState, joins, started } from "../../provider/host-job.js";
import { fenced, type Line, memory } from "../../provider/host-ledger.js";
import { useHosts } from "./lab.js";

const { box } = useHosts({ box: {} });
const host = () => connect(box.connection);
const FOREVER = Number.POSITIVE_INFINITY;

let n = 0;
const newLine = (): Line => ({
  v: 1,
  kind: "Law",
  identity: `job/${++n}`,
  owner: "o/p/s/Law/job",
  incarnation: `i${n}`,
  finished: false,
  kept: [],
});
const work = (script: string, ...args: string[]): Command => ({
  why: "do long work",
  argv: ["sh", "-c", script, "work", ...args] as Argv,
  shown: ["work", ...args],
});

async function start(line: Line, command: Command): Promise<void> {
  const { bootId, lines } = await memory(host());
  const known = lines.some((l) => l.kind === line.kind && l.identity === line.identity);
  await fenced(host(), line, known ? line.incarnation : "", started(line, command, bootId));
}
const unit = (line: Line) => line.job?.unit ?? "none";
async function until(what: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 60_000; !(await what()); await sleep(200))
    if (Date.now() > end) throw new Error("it never came");
}
const isThere = async (file: string) => (await box.ssh(["test", "-e", file], { reject: false })).exitCode === 0;

afterEach(() => {
  closeAll();
  vi.restoreAllMocks();
});

describe("a job", () => {
  it("runs to its end, tells every tenth of its progress, and leaves log and result", async () => {
    const line = newLine();
    const said: string[] = [];
    vi.spyOn(console, "log").mockImplementation((text) => void said.push(String(text)));
    const command = work(
      'for i in 5 10 15 60; do echo "progress $i% (x)"; sleep 0.5; done; echo "made: one"; echo late >&2',
    );
    await start(line, command);
    await ended(host(), line, command, FOREVER);
    expect(line.job?.result).toBe("ok");
    expect(said.at(-1)).toContain(`Law ${line.identity} on ${box.name}: do long work: 60 %`);
    const now = await jobState(host(), line);
    expect(now).toMatchObject({ state: "ok", exit: 0, log: "made: one\nlate\n" });
    expect(await jobState(host(), line)).toEqual(now); // reading consumes nothing
  });

  it("fails with its exit status and its last words, which a collected unit would not tell", async () => {
    const line = newLine();
    const command = work("echo it is broken >&2; exit 3");
    await start(line, command);
    await expect(ended(host(), line, command, FOREVER)).rejects.toThrow(/exited 3 on box[\s\S]*it is broken/);
    expect(await jobState(host(), line)).toMatchObject({ state: "failed", exit: 3 });
    // The next attempt is not stopped by what systemd keeps of this one.
    const again = work("echo fine");
    await start(line, again);
    await ended(host(), line, again, FOREVER);
    expect(await jobState(host(), line)).toMatchObject({ state: "ok", log: "fine\n" });
    const { stdout } = await box.ssh("systemctl list-units --all --no-legend 'vmbackup-Law-*' --failed");
    expect(stdout).not.toContain(`${line.identity.replace("/", "_")}-`);
  });

  it("outlives the connection, and is joined by whoever wants the same", async () => {
    const line = newLine();
    const command = work("echo $$; sleep 4; echo end");
    await start(line, command);
    await box.ssh("pkill -9 -f 'sshd: root@notty' || true", { reject: false });
    closeAll();
    const now = await jobState(host(), line);
    expect(now.state).toBe("running");
    expect(joins(line, command, now)).toBe(true);
    await ended(host(), line, command, FOREVER);
    expect((await jobState(host(), line)).log).toMatch(/^\d+\nend\n$/); // one process, once
  });

  it("that ended while nobody looked is joined, once", async () => {
    const line = newLine();
    const command = work("true");
    await start(line, command);
    await until(async () => (await jobState(host(), line)).state === "ok");
    expect(joins(line, command, await jobState(host(), line))).toBe(true);
    await ended(host(), line, command, FOREVER);
    expect(joins(line, command, await jobState(host(), line))).toBe(false); // planned again, it is done again
  });

  it("with other words is a conflict while it runs, and names both", async () => {
    const line = newLine();
    await start(line, work("sleep 60", "A"));
    const now = await jobState(host(), line);
    expect(() => joins(line, work("sleep 60", "B"), now)).toThrow(new RegExp(`${unit(line)}.*work B`));
    await box.ssh(["systemctl", "stop", unit(line)]);
    expect(joins(line, work("sleep 60", "B"), await jobState(host(), line))).toBe(false);
  });

  it("that is killed has failed", async () => {
    const line = newLine();
    const command = work("echo begun; sleep 60");
    await start(line, command);
    const waiting = ended(host(), line, command, FOREVER);
    setTimeout(() => void box.ssh(["systemctl", "kill", "--signal=KILL", unit(line)]), 500);
    await expect(waiting).rejects.toThrow(/without a result: it was killed/);
    expect(await jobState(host(), line)).toMatchObject({ state: "failed", exit: undefined, log: "begun\n" });
  });

  it("has failed when the host went down, and its log is still there", async () => {
    const line = newLine();
    const command = work('echo "made: two"; sync /var/lib/pulumi-vmbackup/jobs/*; sleep 600');
    await start(line, command);
    await until(async () => (await jobState(host(), line)).log !== "");
    closeAll();
    await box.crash();
    await box.up();
    const remembered = (await memory(host())).lines.find((l) => l.identity === line.identity);
    const now = await jobState(host(), remembered);
    expect(now).toMatchObject({ state: "failed", rebooted: true, log: "made: two\n" });
    await expect(ended(host(), line, command, FOREVER)).rejects.toThrow(/the host was started anew/);
  });

  it("has its words written out to the disk while it runs, for a power cut takes what is not", async () => {
    const shim = "/usr/local/bin/sync";
    await box.ssh(
      `printf '#!/bin/sh\\necho "$*" >>/run/synced\\nexec /usr/bin/sync "$@"\\n' >${shim}; chmod 755 ${shim}`,
    );
    const line = newLine();
    const command = work('echo "made: three"; sleep 600');
    await start(line, command);
    const log = `/var/lib/pulumi-vmbackup/jobs/${unit(line)}.log`;
    await until(async () => (await box.ssh("cat /run/synced", { reject: false })).stdout.split("\n").includes(log));
    expect((await jobState(host(), line)).state).toBe("running");
    await box.ssh(["systemctl", "stop", unit(line)]);
    await box.ssh(`rm ${shim}`);
  });

  it("is not waited for longer than the program says, and goes on", async () => {
    const line = newLine();
    const command = work("sleep 5; echo end");
    await start(line, command);
    await expect(ended(host(), line, command, Date.now() + 1500)).rejects.toThrow(/customTimeouts.*still runs/);
    await ended(host(), line, command, FOREVER);
    expect((await jobState(host(), line)).log).toBe("end\n");
  });

  it("is gone with its object", async () => {
    const line = newLine();
    const command = work("exit 1");
    await start(line, command);
    await ended(host(), line, command, FOREVER).catch(() => {});
    const log = `/var/lib/pulumi-vmbackup/jobs/${unit(line)}.log`;
    expect(await isThere(log)).toBe(true);
    await forgetJob(host(), line);
    expect(await isThere(log)).toBe(false);
    expect((await jobState(host(), line)).state).toBe("failed");
  });
});

it("two at a time on one host", async () => {
  let now = 0;
  let most = 0;
  const one = async () => {
    most = Math.max(most, ++now);
    await sleep(20);
    now--;
  };
  await Promise.all([1, 2, 3, 4, 5].map(() => inTurn(host(), one)));
  expect(most).toBe(2);
});
