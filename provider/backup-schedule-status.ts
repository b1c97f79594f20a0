// BackupSchedule on Proxmox VE, what is told of a job: its next and last run, which guests it covers, whose backup is oldest.
import * as z from "zod";
import type { Host, Report } from "./host.js";
import * as pve from "./pve.js";

export interface Status {
  nextRun?: string;
  lastRun?: { startedAt: string; finishedAt?: string; result: "ok" | "failed" | "running"; message?: string };
  covered: number;
  uncovered: { guest: string; reason: string }[];
  stalest?: { guest: string; newestBackup?: string };
}

const MOST = 20;
const time = (seconds: number) => new Date(seconds * 1000).toISOString();

export async function askStatus(job: pve.BackupJob, host: Host): Promise<Status> {
  const [included, guests, runs, dumps] = await Promise.all([
    host.ask(pve.includedVolumes(job.id)),
    host.ask(pve.guests),
    host.ask(lastRuns),
    job.storage === undefined ? undefined : pve.contentIfAny(host, job.storage, "backup"),
  ]);
  const covered = included.filter((guest) => guest.type !== "unknown" && guest.children.every((v) => v.included));
  const status: Status = { covered: covered.length, uncovered: uncovered(job, included, guests).slice(0, MOST) };
  const next = job.enabled ? job["next-run"] : undefined;
  if (next) status.nextRun = time(next);
  const last = runs.get(job.id);
  if (last !== undefined) status.lastRun = last;
  const oldest = dumps && stalest(covered, dumps);
  if (oldest !== undefined) status.stalest = oldest;
  return status;
}

const called = (id: number, name: string | undefined) => (name ? `${id} (${name})` : String(id));

function uncovered(job: pve.BackupJob, included: pve.Included[], guests: pve.Guest[]): Status["uncovered"] {
  const dead = included
    .filter(({ type }) => type === "unknown")
    .map(({ id }) => ({ guest: String(id), reason: "does not exist: every run fails for it" }));
  const disks = included.flatMap(({ id, name, children }) =>
    children
      .filter((volume) => !volume.included)
      .map((volume) => ({ guest: `${called(id, name)} ${volume.id.replace(/^.*:/, "")}`, reason: volume.reason })),
  );
  const others = guests
    .filter(({ vmid, node }) => !included.some(({ id }) => id === vmid) && (job.node ?? node) === node)
    .sort((a, b) => a.vmid - b.vmid)
    .map(({ vmid, name }) => ({ guest: called(vmid, name), reason: "not among the guests of this schedule" }));
  return [...dead, ...disks, ...others];
}

function stalest(covered: pve.Included[], dumps: pve.Volume[]): Status["stalest"] {
  const newest = covered.map(({ id, name }) => {
    // An empty archive is listed like any other, and is no backup.
    const times = dumps.filter(({ vmid, size }) => vmid === id && size > 0).map(({ ctime }) => ctime ?? 0);
    return { guest: called(id, name), at: Math.max(0, ...times) };
  });
  const [oldest] = newest.sort((a, b) => a.at - b.at);
  if (oldest === undefined) return undefined;
  return { guest: oldest.guest, ...(oldest.at > 0 && { newestBackup: time(oldest.at) }) };
}

// pvescheduler keeps one file for each job (PVE/Jobs.pm), with the task of its last run on this node; the end of a task stands in
// the task's log. A run by hand ("Run now") is no run of the schedule, and is not there. A few processes for all jobs: one for
// each would be seconds where there are hundreds.
const RUNS = `cd /var/lib/pve-manager/jobs 2>/dev/null || exit 0
set -- vzdump-*.json; [ -e "$1" ] || exit 0
states=$(awk 'BEGIN { for (i = 1; i < ARGC; i++) { f = ARGV[i]; t = ""; while ((getline l < f) > 0) t = t l; close(f); print substr(f, 8, length(f) - 12), t } }' "$@")
printf '%s\\n' "$states" | sed 's/^/job /'
set -f; set --
for upid in $(printf '%s\\n' "$states" | grep -o 'UPID:[A-Za-z0-9:@!._-]*'); do
  rest=\${upid#UPID:*:}; pid=\${rest%%:*}; rest=\${rest#*:}; start=\${rest%%:*}; rest=\${rest#*:}; at=\${rest%%:*}
  if [ -e "/proc/$((0x$pid))/stat" ] && [ "$(awk '{ sub(/^.*\\) /, ""); print $20 }' "/proc/$((0x$pid))/stat")" = "$((0x$start))" ]; then
    printf 'running %s\\n' "$upid"
  else
    log=/var/log/pve/tasks/\${at#"\${at%?}"}/$upid
    [ ! -e "$log" ] || set -- "$@" "$log"
  fi
done
[ $# -gt 0 ] || exit 0
stat -c 'at %Y %n' "$@"
tail -v -n 1 "$@"
exit 0`;

const jobState = z.looseObject({
  state: z.string(),
  upid: z.string().optional(),
  msg: z.string().optional(),
  time: z.number().optional(),
});

/** The last run of each job, by job id. */
const lastRuns: Report<ReadonlyMap<string, NonNullable<Status["lastRun"]>>> = {
  why: "read the last runs of the backup jobs",
  argv: ["sh", "-c", RUNS],
  shown: ["cat", "/var/lib/pve-manager/jobs/vzdump-*.json"],
  parse: (stdout) => {
    const states: unknown[] = [];
    const running: string[] = [];
    const ended: Record<string, { at: number; last: string }> = {};
    let log = "";
    for (const row of stdout.split("\n")) {
      const [word, first = "", ...rest] = row.split(" ");
      const upid = (path: string) => path.slice(path.lastIndexOf("/") + 1);
      if (log !== "") {
        const end = ended[log];
        if (end !== undefined && row !== "") end.last = row;
        log = "";
      } else if (word === "job") states.push([first, JSON.parse(rest.join(" "))]);
      else if (word === "running") running.push(first);
      else if (word === "at") ended[upid(rest.join(" "))] = { at: Number(first), last: "" };
      else if (word === "==>") log = upid(first);
    }
    return { states, running, ended };
  },
  answer: z
    .object({
      states: z.array(z.tuple([z.string(), jobState])),
      running: z.array(z.string()),
      ended: z.record(z.string(), z.object({ at: z.number(), last: z.string() })),
    })
    .transform(({ states, running, ended }) => {
      const runs = new Map<string, NonNullable<Status["lastRun"]>>();
      for (const [id, state] of states) {
        const { upid, msg } = state;
        if (upid === undefined) {
          // Not even a task: vzdump refused, e.g. because of a missing storage.
          if (state.state === "stopped" && msg !== undefined && msg !== "OK" && state.time !== undefined)
            runs.set(id, { startedAt: time(state.time), result: "failed", message: msg.trim() });
          continue;
        }
        const startedAt = time(Number.parseInt(upid.split(":")[4] ?? "0", 16));
        const end = ended[upid];
        if (running.includes(upid)) runs.set(id, { startedAt, result: "running" });
        else runs.set(id, { startedAt, ...(end && { finishedAt: time(end.at) }), ...outcome(end?.last ?? msg) });
      }
      return runs;
    }),
};

function outcome(last: string | undefined): { result: "ok" | "failed"; message?: string } {
  const said = (last ?? "").replace(/^TASK (ERROR: )?/, "").trim();
  if (said === "OK") return { result: "ok" };
  if (said.startsWith("WARNINGS")) return { result: "ok", message: said };
  if (last?.startsWith("TASK ERROR")) return { result: "failed", message: said };
  return { result: "failed", message: "it ended without a result: it was killed, or the node went down" };
}
