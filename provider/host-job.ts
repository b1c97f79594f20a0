// Jobs: long work on a host (a restore), as a transient systemd unit that outlives the connection and the pulumi that began it.
//
// The record is in the ledger line, written before the unit starts; the truth is on the host: whether the unit is active, and the
// exit status that the job itself leaves in a file beside its log. systemd is not asked for the result: it forgets a unit that
// ended well, and of a collected one that failed it says success (seen).
import { createHash, randomBytes } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import * as z from "zod";
import { CommandFailed, Conflict, HostUnreachable, Unfinished } from "./errors.js";
import { type Argv, type Command, type Host, type Report, shown } from "./host.js";
import type { Job, Line } from "./host-ledger.js";

const FOLDER = "/var/lib/pulumi-vmbackup/jobs";

export interface JobState {
  /** none: this line has no job. failed: also one that ended without leaving a result (killed, or the host went down). */
  state: "none" | "running" | "ok" | "failed";
  exit?: number | undefined;
  /** What it took, by the host's clock. */
  seconds?: number | undefined;
  /** In percent, of the last line `progress N%`. */
  progress?: number | undefined;
  /** What the job printed, without the lines of progress. What was done is read from here, never from the inputs. */
  log: string;
  /** The host was started anew since the job was. */
  rebooted: boolean;
}

export const argvHash = (argv: Argv): string =>
  createHash("sha256").update(JSON.stringify(argv)).digest("hex").slice(0, 32);

const baseOf = ({ unit }: Job) => `${FOLDER}/${unit}`;

// ---------------------------------------------------------------- how it is going

// The unit is looked at before the result: the other way round a job that ends in between would seem to have none.
// With seconds it waits until the job ends: the job holds the lock of its log, and the kernel lets go of it however it ends.
const LOOK = `unit=$1 base=$2 wait=$3
[ "$wait" = 0 ] || [ ! -e "$base.log" ] || flock --shared --timeout "$wait" "$base.log" true
active=$(systemctl show --property=ActiveState --value "$unit.service")
case $wait:$active in 0:*|*:inactive|*:failed) ;; *) sleep 0.2 ;; esac
code= took=; [ ! -e "$base.exit" ] || read -r code took <"$base.exit"
IFS= read -r boot </proc/sys/kernel/random/boot_id
percent=
[ ! -e "$base.log" ] || percent=$(tail -c 4096 "$base.log" | sed -n 's/^progress \\([0-9][0-9]*\\)%.*/\\1/p' | tail -n 1)
printf '%s\\n' "$active" "$code" "$took" "$boot" "$percent"
[ ! -e "$base.log" ] || grep -v '^progress [0-9]' "$base.log" | tail -c 60000
exit 0`;

const ACTIVE = ["active", "activating", "deactivating", "reloading", "refreshing"];

const looked = z.object({
  active: z.enum([...ACTIVE, "inactive", "failed", "maintenance"]),
  code: z.string().regex(/^[0-9]*$/),
  took: z.string().regex(/^[0-9-]*$/),
  boot: z.string().min(1),
  percent: z.string().regex(/^[0-9]*$/),
  log: z.string(),
});

function look(job: Job, seconds: number): Report<JobState> {
  return {
    why: `see how the job ${job.unit} is going`,
    argv: ["sh", "-c", LOOK, "vmbackup-job", job.unit, baseOf(job), String(seconds)],
    shown: ["systemctl", "status", `${job.unit}.service`],
    timeout: seconds + 60,
    parse: (stdout) => {
      const [active, code, took, boot, percent, ...log] = stdout.split("\n");
      return { active, code, took, boot, percent, log: log.join("\n") };
    },
    answer: looked.transform(({ active, code, took, boot, percent, log }): JobState => {
      const state = ACTIVE.includes(active) ? "running" : code === "0" ? "ok" : "failed";
      const rebooted = boot !== job.bootId;
      return { state, log, rebooted, exit: numberOf(code), seconds: numberOf(took), progress: numberOf(percent) };
    }),
  };
}

const numberOf = (text: string) => (text === "" ? undefined : Number(text));

/** Reading consumes nothing: a result stays until the object is removed or redone. */
export async function jobState(host: Host, line: Line | undefined): Promise<JobState> {
  if (line?.job === undefined) return { state: "none", log: "", rebooted: false };
  return await host.ask(look(line.job, 0));
}

// ---------------------------------------------------------------- start, join, wait

// A unit's name is never used again: systemd keeps a failed one until somebody resets it.
function unitOf({ kind, identity }: Line): string {
  return `vmbackup-${kind}-${identity.replace(/[^A-Za-z0-9_.-]/g, "_").slice(0, 80)}-${randomBytes(4).toString("hex")}`;
}

// The tool does not inherit the lock, or a helper that it leaves behind would hold it for ever. Its words are written out as they
// come: after a power cut they are all that tells what it had made.
const RUN = `base=$1; shift
exec 8>>"$base.log"; flock 8 || exit 70
begun=$(date +%s)
while sleep 2; do sync "$base.log"; done >/dev/null 2>&1 </dev/null 8>&- &
keeper=$!
"$@" >>"$base.log" 2>&1 </dev/null 8>&-
code=$?
kill "$keeper"
printf '%s %s\\n' "$code" "$(($(date +%s) - begun))" >"$base.exit.new" && sync "$base.log" "$base.exit.new" && mv "$base.exit.new" "$base.exit" && sync "\${base%/*}"
exit "$code"`;

const FORGET = `systemctl reset-failed "$1.service" 2>/dev/null; rm -f "$2.log" "$2.exit" "$2.exit.new"`;

const START = `unit=$1 base=$2 why=$3 run=$4 old=$5 oldbase=$6; shift 6
mkdir -p "\${base%/*}" || exit
if [ -n "$old" ]; then systemctl reset-failed "$old.service" 2>/dev/null; rm -f "$oldbase.log" "$oldbase.exit" "$oldbase.exit.new"; fi
: >"$base.log" || exit
exec systemd-run --quiet --unit="$unit" --description="$why" --service-type=exec --setenv=LC_ALL=C.UTF-8 --setenv=PATH="$PATH" -- sh -c "$run" vmbackup-job "$base" "$@"`;

/** systemd puts variables into the words of a unit's command: "$$" is a dollar. */
const asIs = (word: string) => word.replaceAll("$", "$$$$");

/**
 * Puts a new job into the line and returns the command that starts it, to be run as a fenced step (which writes the line first).
 * The earlier job of the line is forgotten with it.
 */
export function started(line: Line, step: Command, bootId: string): Command {
  const before = line.job;
  const job: Job = { unit: unitOf(line), argvHash: argvHash(step.argv), bootId, startedAt: new Date().toISOString() };
  line.job = job;
  const old = before === undefined ? ["", ""] : [before.unit, baseOf(before)];
  return {
    why: step.why,
    argv: [
      "sh",
      "-c",
      START,
      "vmbackup-start",
      job.unit,
      baseOf(job),
      step.why,
      asIs(RUN),
      ...old,
      ...step.argv.map(asIs),
    ],
    shown: step.shown ?? step.argv,
    timeout: 120,
    next: step.next,
  };
}

/** Whether the job of the line is the one that is wanted, running or ended and not yet told to anybody. */
export function joins(line: Line, step: Command, now: JobState): boolean {
  const { job } = line;
  if (job === undefined || now.state === "none") return false;
  const wanted = job.argvHash === argvHash(step.argv);
  if (now.state === "running" && !wanted)
    throw new Conflict({
      what: `Unable to ${step.why}: the job ${job.unit}, begun at ${job.startedAt}, is still at work on ${line.kind} ${line.identity} with other words than these: ${shown({ argv: step.shown ?? step.argv })}.`,
      next: "Let it end, then run `pulumi up` again. To give it up: `systemctl stop` the unit on the host; the next run clears up after it.",
    });
  return wanted && (now.state === "running" || (now.state === "ok" && job.result === undefined));
}

/** What failed when something was removed for it is Unfinished. */
type Work = Command & { halfway?: true | undefined };

const WAIT = 20;

/** Waits for the job of the line and records how it ended. A connection that is lost meanwhile does not harm the job. */
export async function ended(host: Host, line: Line, step: Work, deadline: number): Promise<void> {
  const { job } = line;
  if (job === undefined) throw new Error(`${line.kind} ${line.identity} has no job to wait for`);
  let told = 0;
  for (let lost = 0; ; ) {
    let now: JobState;
    try {
      const left = Math.floor((deadline - Date.now()) / 1000);
      now = await host.ask(look(job, Math.max(1, Math.min(WAIT, left))));
      lost = 0;
    } catch (error) {
      if (!(error instanceof HostUnreachable) || ++lost > 5) throw error;
      await sleep(3000 * lost);
      continue;
    }
    const tenth = Math.floor((now.progress ?? 0) / 10) * 10;
    if (tenth > told) console.log(`${line.kind} ${line.identity} on ${host.name}: ${step.why}: ${tenth} %`);
    told = Math.max(told, tenth);
    if (now.state === "running") {
      if (Date.now() < deadline) continue;
      throw new Unfinished({
        what: `${line.kind} ${line.identity} on ${host.name}: the time given by customTimeouts is over, and the job to ${step.why} still runs.`,
        command: shown({ argv: step.shown ?? step.argv }),
        next: `It goes on by itself as ${job.unit}. Run \`pulumi up\` again: it joins the job. Raise \`customTimeouts\` to wait longer.`,
      });
    }
    line.job = { ...job, result: now.state === "ok" ? "ok" : "failed" };
    if (now.state === "ok") return;
    throw failed(host, job, step, now);
  }
}

function failed(host: Host, job: Job, step: Work, { exit, rebooted, log }: JobState): CommandFailed | Unfinished {
  const tool = (step.shown ?? step.argv)[0];
  const how =
    exit !== undefined
      ? `${tool} exited ${exit} on ${host.name}`
      : `${tool} ended on ${host.name} without a result: ${rebooted ? "the host was started anew meanwhile" : "it was killed"}`;
  const told = {
    what: `Unable to ${step.why}: ${how}.`,
    command: shown({ argv: step.shown ?? step.argv }),
    stderr: log.trim().split("\n").slice(-12).join("\n"),
    next: `${step.next ?? "Run `pulumi up` again: it clears up what this attempt left, and begins anew."} The whole log is ${baseOf(job)}.log on the host.`,
  };
  return step.halfway ? new Unfinished(told) : new CommandFailed({ ...told, exit, stdout: log });
}

/** Removes what is left of a line's job on the host; for an object that goes. */
export async function forgetJob(host: Host, line: Line): Promise<void> {
  const { job } = line;
  if (job === undefined) return;
  await host.run({
    why: `remove the log of the job ${job.unit}`,
    argv: ["sh", "-c", FORGET, "vmbackup-job", job.unit, baseOf(job)],
    shown: ["rm", `${baseOf(job)}.log`],
    deed: "ledger",
  });
}

// ---------------------------------------------------------------- few at a time

/** Restores fill the disks of a host: more at once only wait for each other. */
const AT_ONCE = 2;
const busy = new Map<string, { running: number; queue: (() => void)[] }>();

/** Waits for a turn among the jobs of one host, as far as this process starts them. */
export async function inTurn<T>(host: Host, work: () => Promise<T>): Promise<T> {
  const turn = busy.get(host.name) ?? { running: 0, queue: [] };
  busy.set(host.name, turn);
  while (turn.running >= AT_ONCE) await new Promise<void>((resolve) => turn.queue.push(resolve));
  turn.running++;
  try {
    return await work();
  } finally {
    turn.running--;
    turn.queue.shift()?.();
  }
}
