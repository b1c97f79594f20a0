// Processes on this machine: started in a group of their own, given up in time, gone when we are gone.
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { execa } from "execa";

export interface Ended {
  /** Absent when it was killed, given up, or could not be started. */
  exit?: number | undefined;
  stdout: string;
  stderr: string;
  /** The deadline passed first. */
  late: boolean;
  /** It said more than anybody wants to hold. */
  flood: boolean;
  /** There is no such program here. */
  missing: boolean;
}

interface Start {
  stdin?: string | undefined;
  env?: Record<string, string> | undefined;
  /** The local deadline. */
  seconds: number;
  /** Its appearance on stderr says that the work is done; a daemon that keeps the pipes open is not waited for. */
  trailer?: string | undefined;
}

const living = new Set<number>();
let folder: string | undefined;
let watching = false;
const GRACE = 2000;
const LIMIT = 64 * 1024 * 1024;

// Killing only ssh leaves a ProxyCommand that holds our pipes; the group takes all of them.
function kill(group: number): void {
  living.delete(group);
  try {
    process.kill(-group, "SIGKILL");
  } catch {
    // gone already
  }
}

/** A process that a child of ours started in a group of its own ends with us as well. */
export function also(group: number): void {
  if (group > 1) living.add(group);
}

/** Ends everything that we started and removes our folder. Synchronous, since exit handlers are. */
export function endAll(): void {
  for (const group of living) kill(group);
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
  folder = undefined;
}

function watch(): void {
  if (watching) return;
  watching = true;
  process.on("exit", endAll);
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const)
    process.once(signal, () => {
      endAll();
      // A listener keeps Node from dying of the signal: without others, die of it as if there were none.
      if (process.listenerCount(signal) === 0) process.kill(process.pid, signal);
    });
}

/**
 * Our private folder (0700). A control socket's path must stay under 104 bytes with the 17 that ssh appends while it
 * makes it, so a long TMPDIR is passed over.
 */
export function privateFolder(): string {
  if (folder !== undefined) return folder;
  watch();
  const { uid } = userInfo();
  const places = [process.env.XDG_RUNTIME_DIR, `/run/user/${uid}`, tmpdir(), "/tmp", "/var/tmp"];
  for (const place of places) {
    if (place === undefined || !place.startsWith("/") || place.length > 50 || /["\\$%\s*?[]/.test(place)) continue;
    try {
      if (!statSync(place).isDirectory()) continue;
      folder = mkdtempSync(join(place, "vmbackup-"));
      return folder;
    } catch {
      // not ours to write in: the next
    }
  }
  throw new Error(`no folder for control sockets could be made in any of ${places.filter(Boolean).join(", ")}`);
}

function start(
  file: string,
  args: readonly string[],
  input: { stdin: "ignore" | "pipe" } | { input: string },
  env = {},
) {
  watch();
  // detached: a group of its own, which ^C in a terminal does not reach: running steps end by themselves.
  const child = execa(file, args, {
    ...input,
    env,
    detached: true,
    cleanup: false,
    reject: false,
    buffer: false,
    stdout: "pipe",
    stderr: "pipe",
  });
  if (child.pid !== undefined) living.add(child.pid);
  return child;
}

/** Runs a program to its end or to the deadline, whichever is first: one that cannot be killed is left behind. */
export async function finished(file: string, args: readonly string[], s: Start): Promise<Ended> {
  const child = start(file, args, s.stdin === undefined ? { stdin: "ignore" } : { input: s.stdin }, s.env);
  const out: Buffer[] = [];
  const err: Buffer[] = [];
  let size = 0;
  let tail = "";
  let timer: NodeJS.Timeout | undefined;
  let late = false;
  const given = new Promise<"given up">((resolve) => {
    timer = setTimeout(() => {
      late = true;
      resolve("given up");
    }, s.seconds * 1000);
    const keep = (chunks: Buffer[]) => (chunk: Buffer) => {
      size += chunk.length;
      if (size <= LIMIT) chunks.push(chunk);
      else resolve("given up");
    };
    child.stdout.on("data", keep(out));
    child.stderr.on("data", keep(err));
    const { trailer } = s;
    if (trailer !== undefined)
      child.stderr.on("data", (chunk: Buffer) => {
        tail = (tail + chunk.toString("latin1")).slice(-4096);
        if (!tail.includes(trailer)) return;
        clearTimeout(timer);
        timer = setTimeout(() => resolve("given up"), GRACE);
      });
  });
  // Named plainly: the compiler would take a minute to work out what execa's generics come to in a race.
  const end: Promise<{ exitCode?: number; code?: string }> = child.then(({ exitCode, code }) => ({
    ...(exitCode !== undefined && { exitCode }),
    ...(code !== undefined && { code }),
  }));
  const ended = await Promise.race([end, given]);
  clearTimeout(timer);
  if (child.pid !== undefined) {
    if (ended === "given up") kill(child.pid);
    living.delete(child.pid);
  }
  if (ended === "given up") {
    for (const stream of [child.stdout, child.stderr, child.stdin]) stream?.destroy();
    child.nodeChildProcess.unref();
  }
  return {
    exit: ended === "given up" ? undefined : ended.exitCode,
    stdout: Buffer.concat(out).toString("utf8"),
    stderr: Buffer.concat(err).toString("utf8"),
    late,
    flood: size > LIMIT,
    missing: ended !== "given up" && ended.code === "ENOENT",
  };
}

/** A process that lives as long as we do: it reads a pipe from us, and that one ends with us even when we are killed. */
export interface Held {
  readonly alive: boolean;
  /** What it said on stdout until it was ready. */
  readonly heard: string;
  /** The end of what it said on stderr. */
  said(): string;
  close(): void;
}

/** Starts one and waits for the word on its stdout that says it is ready; how it ended when it never was. */
export async function held(
  file: string,
  args: readonly string[],
  ready: string,
  seconds: number,
  env?: Record<string, string>,
): Promise<Held | Ended> {
  const child = start(file, args, { stdin: "pipe" }, env);
  let alive = true;
  let stdout = "";
  let stderr = "";
  let timer: NodeJS.Timeout | undefined;
  child.stderr.on("data", (chunk: Buffer) => {
    stderr = (stderr + chunk.toString("utf8")).slice(-32768);
  });
  child.stdin?.on("error", () => {});
  const end = child.then((result) => {
    alive = false;
    if (child.pid !== undefined) living.delete(child.pid);
    return result;
  });
  const outcome = await Promise.race([
    end,
    new Promise<"ready">((resolve) => {
      child.stdout.on("data", (chunk: Buffer) => {
        stdout = (stdout + chunk.toString("utf8")).slice(-4096);
        if (stdout.includes(ready)) resolve("ready");
      });
    }),
    new Promise<"late">((resolve) => {
      timer = setTimeout(() => resolve("late"), seconds * 1000);
    }),
  ]);
  clearTimeout(timer);
  const close = () => {
    alive = false;
    if (child.pid !== undefined) kill(child.pid);
    for (const stream of [child.stdout, child.stderr, child.stdin]) stream?.destroy();
  };
  if (outcome !== "ready") {
    close();
    const late = outcome === "late";
    return {
      exit: late ? undefined : outcome.exitCode,
      stdout,
      stderr,
      late,
      flood: false,
      missing: !late && outcome.code === "ENOENT",
    };
  }
  // It must not keep us from ending.
  child.nodeChildProcess.unref();
  for (const stream of [child.stdout, child.stderr, child.stdin])
    if (stream && "unref" in stream && typeof stream.unref === "function") stream.unref();
  return {
    get alive() {
      return alive;
    },
    heard: stdout,
    said: () => stderr,
    close,
  };
}
