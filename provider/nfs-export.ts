// What lives on an NFS export and at its mount: the normal form of sources, the guarded unmount, the write probe, and the registry
// of claims that keeps the guest ids of unrelated nodes apart on one store. Everything that may touch a dead server is a constant
// script here, with positional arguments.
import * as z from "zod";
import type { Report } from "./host.js";
import { WRITER } from "./pve.js";

// ---------------------------------------------------------------- sources

/** As `mount` and findmnt write it: an IPv6 address in brackets. */
export function sourceOf(server: string, exported: string): string {
  return `${server.includes(":") ? `[${server}]` : server}:${exported}`;
}

/** "[fd00::1]:/a//b/" -> { server: "fd00::1", export: "/a/b" }; undefined for what is no NFS source. */
export function parsedSource(source: string): { server: string; export: string } | undefined {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\/.*)$/.exec(source);
  if (match === null) return undefined;
  return { server: normalServer(match[1] ?? match[2] ?? ""), export: normalPath(match[3] ?? "/") };
}

/** Names are compared without case, addresses without brackets. */
export function normalServer(server: string): string {
  return server.replace(/^\[(.*)\]$/, "$1").toLowerCase();
}

/** One slash where there are several, none at the end. */
export function normalPath(path: string): string {
  return path.replace(/\/{2,}/g, "/").replace(/(?<=.)\/$/, "");
}

/** The addresses of server names, as the node resolves them; a name that cannot be resolved has none. */
export function addressesOf(...servers: string[]): Report<Record<string, string[]>> {
  return {
    why: "resolve the names of NFS servers",
    argv: [
      "sh",
      "-c",
      'for name do timeout 15 getent ahosts "$name" | while read -r address rest; do echo "$name $address"; done; done; exit 0',
      "resolve",
      ...servers,
    ],
    parse: (stdout) => {
      const found: Record<string, string[]> = Object.fromEntries(servers.map((server) => [server, [server]]));
      for (const line of stdout.split("\n")) {
        const [name = "", address] = line.split(" ");
        if (address !== undefined) found[name]?.push(normalServer(address));
      }
      return found;
    },
    answer: z.record(z.string(), z.array(z.string())),
  };
}

// ---------------------------------------------------------------- the mount

// A path of ours holds nothing that a pattern or a word list would take apart (checked by the inputs).
const MOUNT = `
say() { echo "$*" >&2; }

# The source that is on top at a path; nothing when nothing is mounted there. Reads the mount table only: safe with dead servers.
source_at() { findmnt --noheadings --raw --output TARGET,SOURCE | awk -v at="$1" '$1 == at { s = $2 } END { if (s != "") print s }'; }

# Who has something open at or below a path, at most five.
busy() {
  find /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/fd -maxdepth 1 '(' -lname "$1" -o -lname "$1/*" ')' 2>/dev/null |
    cut -d/ -f3 | sort -un | head -n 5 | while read -r pid; do
      printf 'process %s (%s)\\n' "$pid" "$(tr '\\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | cut -c 1-80)"
    done
}

# Nobody has; looks of ours at the mount take moments, so a moment is waited for.
idle() {
  for again in 1 2 3 4 5 6 7 8 9 10; do
    users=$(busy "$1")
    [ -n "$users" ] || return 0
    sleep 0.5
  done
  say "$1 is in use:"; say "$users"; return 1
}

# Unmounts exactly what is mounted from our source at our path, never by force.
unmount() {
  while :; do
    top=$(source_at "$1")
    [ -n "$top" ] || return 0
    if [ "$top" != "$2" ]; then say "at $1 is mounted $top, not $2: it was left"; return 1; fi
    idle "$1" || return 1
    # Without canonicalizing: that would look at the path, and hang where the server is dead.
    timeout -s KILL 60 umount --no-canonicalize "$1" || return 1
  done
}

# Goes into the mount and makes sure that it is the declared one: below a lost mount there is the node's own disk.
enter() {
  cd "$1" 2>/dev/null || { say "there is no $1"; return 1; }
  top=$(source_at "$1")
  if [ "$top" != "$2" ] || ! [ . -ef "$1" ]; then say "at $1 is mounted \${top:-nothing}, not $2"; return 1; fi
}

# One write probe. What the export refuses (read-only, a squashed root, no room) shows here and not in the night.
writable() (
  enter "$1" "$2" || exit 1
  probe=.pulumi-vmbackup.probe.$(cat /proc/sys/kernel/random/uuid)
  if head -c 4096 /dev/zero >"$probe" && sync "$probe"; then rm -f "$probe"; exit; fi
  rm -f "$probe" 2>/dev/null
  say "root of this node cannot write to $2: the export must be writable, with room, and without root_squash"
  exit 1
)
`;

// ---------------------------------------------------------------- the registry

/** At the root of the export, beside the content directories. */
export const REGISTRY = ".pulumi-vmbackup";

// One file that only grows, since two nodes must see the same: opening a file asks the server (close-to-open), while the list of a
// directory may be a minute old. Each line ends with a dot of its own, so that one that was cut off does not count:
//   claim LOWER UPPER MACHINE LEDGER STORAGE TIME NODE OWNER .      of the storage of a machine; the last one counts
//   release MACHINE LEDGER STORAGE TIME .
//   used ID .                                                       a guest had this id: it is not given away again
// A machine is its machine id and the uuid of its ledger: standalone nodes are all called pve, and clones share machine ids.
//
// The lock is a link: link(2) is atomic on NFS, also where an answer was lost (then the link count says so). A holder that died is
// known by the age of its link on the server's clock; only who holds lock.break may remove it, and looks again first.
const CLAIMS = `
now() { date -u +%Y-%m-%dT%H:%M:%SZ; }

# Takes the lock of the registry in the current directory; $ticket is ours.
lock() {
  ticket=.ticket.$(uname -n).$$.$(od -An -N6 -tx1 /dev/urandom | tr -d ' ')
  printf '%s on %s, %s\\n' "$1" "$(uname -n)" "$(now)" >"$ticket" || return 1
  trap 'rm -f "$ticket"' EXIT
  give_up=$(($(date +%s) + 60))
  while ! ln "$ticket" lock 2>/dev/null && [ "$(stat -c %h "$ticket")" != 2 ]; do
    if [ "$(date +%s)" -ge "$give_up" ]; then
      say "the registry of ids on the export is locked by $(cat lock 2>/dev/null); if that run is dead, remove $PWD/lock and $PWD/lock.break"; return 1
    fi
    # The link's time is its ctime, both by the server's clock.
    touch "$ticket" && held=$(stat -c %Z lock 2>/dev/null) && old=$(($(stat -c %Y "$ticket") - held)) || old=0
    if [ "$old" -gt 120 ] && ln "$ticket" lock.break 2>/dev/null; then
      [ "$(stat -c %Z lock 2>/dev/null)" != "$held" ] || rm -f lock
      rm -f lock.break
    else
      sleep 0.1
    fi
  done
}

unlock() { if [ lock -ef "$ticket" ]; then rm -f lock; fi; rm -f "$ticket"; }

# Appends what awk found to be written, when the lock is still ours.
record() {
  [ -n "$1" ] || return 0
  [ lock -ef "$ticket" ] || { say "the lock of the registry was lost; nothing was written"; return 1; }
  [ ! -s claims ] || [ -z "$(tail -c 1 claims)" ] || set -- "
$1"
  printf '%s\\n' "$1" >>claims && sync claims
}

# Goes to the registry of the mount and makes it when it is not there.
registry() {
  enter "$1" "$2" || return 1
  mkdir -p -m 700 ${REGISTRY} && cd ${REGISTRY} || return 1
  if [ ! -s uuid ]; then
    # Two nodes can have the same process number and the same name: only chance tells their files apart.
    new=.uuid.$(cat /proc/sys/kernel/random/uuid)
    cat /proc/sys/kernel/random/uuid >"$new" && sync "$new" && { ln "$new" uuid 2>/dev/null || [ -s uuid ]; }; made=$?
    rm -f "$new"
    [ "$made" -eq 0 ] || return 1
  fi
}

# claim PATH SOURCE MACHINE-FILE LEDGER-FILE STORAGE OWNER LOWER UPPER ADOPT USED: LOWER 0 gives the claim back.
claim() (
  path=$1 source=$2; machine=$(cat "$3") && ledger=$(cat "$4") || exit 1
  storage=$5 owner=$6 lower=$7 upper=$8 adopt=$9; shift 9; used=$1
  registry "$path" "$source" && lock "$owner" || exit 1
  touch claims || { unlock; exit 1; }
  verdict=$(awk -v machine="$machine" -v ledger="$ledger" -v storage="$storage" -v owner="$owner" -v lower="$lower" -v upper="$upper" \\
    -v adopt="$adopt" -v used="$used" -v now="$(now)" -v node="$(uname -n)" '
    $NF != "." { next }
    $1 == "claim" && NF == 10 { key = $4 " " $5 " " $6; from[key] = $2; to[key] = $3; since[key] = $7; where[key] = $8; who[key] = $9 }
    $1 == "release" && NF == 6 { delete from[$2 " " $3 " " $4] }
    $1 == "used" { known[$2] = 1 }
    END {
      mine = machine " " ledger " " storage
      for (key in from) {
        split(key, part, " ")
        # The same machine; or the same owner on it, whose ledger was lost.
        same = part[1] == machine && (part[2] == ledger || who[key] == owner)
        if (same && part[3] == storage && key != mine) out = out "release " key " " now " .\\n"
        if (same || lower == 0 || from[key] + 0 > upper + 0 || to[key] + 0 < lower + 0) continue
        if (adopt != 1) { printf "taken %s %s %s %s %s %s\\n", from[key], to[key], who[key], where[key], part[1], since[key]; exit }
        out = out "release " key " " now " .\\n"
      }
      n = split(used, ids, ",")
      for (i = 1; i <= n; i++) if (ids[i] != "" && !(ids[i] in known)) out = out "used " ids[i] " .\\n"
      if (lower == 0) { if (mine in from) out = out "release " mine " " now " .\\n" }
      else if (!(mine in from) || from[mine] != lower || to[mine] != upper || who[mine] != owner)
        out = out "claim " lower " " upper " " mine " " now " " node " " owner " .\\n"
      printf "%s", out
    }' claims) || { unlock; exit 1; }
  case $verdict in
    "taken "*)
      unlock
      set -- $verdict
      say "vmIds: the ids $lower to $upper are not free on this export: $2 to $3 are claimed by $(printf '%b' "$(printf '%s' "$4" | sed 's/%/\\\\0/g')") on node $5 (machine $6) since $7"
      exit 3 ;;
  esac
  record "$verdict"; ended=$?
  unlock
  exit "$ended"
)

# remember PATH SOURCE OWNER ID: a guest has this id, also when nobody has it any more.
remember() (
  registry "$1" "$2" && lock "$3" || exit 1
  touch claims && new=$(awk -v id="$4" '
    $NF == "." && $1 == "used" && $2 == id { known = 1 }
    END { if (!known) print "used " id " ." }' claims) && record "$new"
  ended=$?
  unlock
  exit "$ended"
)
`;

/** Functions of the scripts that work on a mount. */
export const ON_MOUNT = `${WRITER}${MOUNT}${CLAIMS}`;

/** Where a node keeps what it is: its machine id, and the uuid of its ledger. */
export const IDENTITY_FILES = ["/etc/machine-id", "/var/lib/pulumi-vmbackup/uuid"] as const;

/** An owner as one word of the registry: what is no plain character becomes % and three octal digits, which every printf can undo. */
export function encodedOwner(owner: string): string {
  const octal = (byte: number) => `%${byte.toString(8).padStart(3, "0")}`;
  const plainly = (char: string) => /[A-Za-z0-9_.:/-]/.test(char);
  return Array.from(Buffer.from(owner), (byte) => {
    const char = String.fromCharCode(byte);
    return plainly(char) ? char : octal(byte);
  }).join("");
}

function decodedOwner(word: string): string {
  return Buffer.from(
    word.replace(/%([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8))),
    "latin1",
  ).toString();
}

export interface Claim {
  lower: number;
  upper: number;
  machine: string;
  ledger: string;
  storage: string;
  owner: string;
}

/** What stands in the registry: the claims that hold, and the ids that are known as used. */
export function registered(text: string): { claims: Claim[]; used: number[] } {
  const claims = new Map<string, Claim>();
  const used = new Set<number>();
  for (const line of text.split("\n")) {
    const words = line.split(" ");
    if (words.pop() !== ".") continue; // cut off
    const [verb, ...rest] = words;
    if (verb === "claim" && rest.length === 8) {
      const [lower = "", upper = "", machine = "", ledger = "", storage = "", , , owner = ""] = rest;
      const claim = { lower: Number(lower), upper: Number(upper), machine, ledger, storage };
      claims.set(`${machine} ${ledger} ${storage}`, { ...claim, owner: decodedOwner(owner) });
    }
    if (verb === "release" && rest.length === 4) claims.delete(rest.slice(0, 3).join(" "));
    if (verb === "used" && rest[0] !== undefined) used.add(Number(rest[0]));
  }
  return { claims: [...claims.values()], used: [...used].sort((a, b) => a - b) };
}

// ---------------------------------------------------------------- what is on the mounts

/** What to look at: a mount, and which directory holds which content ("backup=dump,iso=template/iso"). */
export interface Looked {
  path: string;
  source: string;
  dirs: Readonly<Record<string, string>>;
}

export interface OnExport {
  /** False: it did not answer in time, or an earlier look at it is still stuck. */
  answers: boolean;
  dumps: number;
  /** Seconds since the epoch, from the newest archive's name in the node's time. */
  newestDump?: number | undefined;
  /** Content types whose directory holds something. */
  holds: string[];
  /** Guests whose dumps lie there. */
  dumpedIds: number[];
  registryId?: string | undefined;
  claims: Claim[];
  used: number[];
}

const ONE = `${MOUNT}
enter "$1" "$2" || exit
for pair in $(echo "$3" | tr , ' '); do
  dir=\${pair#*=}
  if [ -n "$(find "./$dir" -mindepth 1 ! -type d -print -quit 2>/dev/null)" ]; then echo "holds \${pair%%=*}"; fi
  [ "\${pair%%=*}" = backup ] || continue
  names=$(ls "./$dir" 2>/dev/null | grep -E '^vzdump-(qemu|lxc)-[0-9]+-.*\\.(vma|tar|tgz)(\\.(gz|lzo|zst|bz2))?$')
  [ -n "$names" ] || continue
  echo "dumps $(echo "$names" | wc -l)"
  echo "$names" | cut -d- -f3 | sort -un | sed 's/^/dumped /'
  stamp=$(echo "$names" | sed -nE 's/^vzdump-[a-z]+-[0-9]+-([0-9]{4})_([0-9]{2})_([0-9]{2})-([0-9]{2})_([0-9]{2})_([0-9]{2})\\..*/\\1-\\2-\\3 \\4:\\5:\\6/p' | sort | tail -n 1)
  [ -z "$stamp" ] || echo "newest $(date -d "$stamp" +%s)"
done
if [ -e ${REGISTRY}/uuid ]; then echo "registry $(cat ${REGISTRY}/uuid)"; sed 's/^/line /' ${REGISTRY}/claims; fi 2>/dev/null
echo answers`;

// A look at a dead hard mount cannot be killed. So each runs beside us with its own lock, which it keeps while it is stuck: a later
// look finds the lock taken and goes on without an answer, and there is never more than one stuck process per mount. Nothing of it
// holds our own output, or the connection would stay open for it.
const PROBE = `one=$1; shift
d=/run/pulumi-vmbackup/probes
mkdir -p "$d" && t=$(mktemp -d "$d/XXXXXX") || exit
i=0
for words do
  i=$((i + 1))
  set -- $words
  key=$(printf %s "$1" | tr / .)
  ( if flock -n 8; then sh -c "$one" look "$@" >"$t/$i.new"; fi
    mv "$t/$i.new" "$t/$i" || : >"$t/$i" ) 8>"$d/$key.lock" >/dev/null 2>&1 </dev/null &
done
waited=0 n=0
while [ "$n" -lt "$i" ] && [ "$waited" -lt 100 ]; do
  sleep 0.1; waited=$((waited + 1))
  n=0; for file in "$t"/[0-9] "$t"/[0-9]*[0-9]; do [ ! -e "$file" ] || n=$((n + 1)); done
done
k=0
while [ "$k" -lt "$i" ]; do
  k=$((k + 1))
  printf '\\036%s\\n' "$k"
  cat "$t/$k" 2>/dev/null
done
rm -f "$t"/*; rmdir "$t" 2>/dev/null
exit 0`;

/** Looks at all these mounts at once, and never longer than ten seconds. */
export function probe(looked: readonly Looked[]): Report<OnExport[]> {
  const words = looked.map(({ path, source, dirs }) => {
    const list = Object.entries(dirs).map(([content, dir]) => `${content}=${dir}`);
    return `${path} ${source} ${list.join(",")}`;
  });
  return {
    why: "look at what is on the NFS mounts",
    argv: ["sh", "-c", PROBE, "probe", ONE, ...words],
    shown: ["probe", ...looked.map(({ path }) => path)],
    parse: (stdout) => stdout.split("\u001e").slice(1).map(parseOne),
    answer: z.array(z.custom<OnExport>()),
  };
}

function parseOne(part: string): OnExport {
  const lines = part.split("\n").slice(1);
  const of = (key: string) => lines.flatMap((line) => (line.startsWith(`${key} `) ? [line.slice(key.length + 1)] : []));
  const newest = of("newest")[0];
  return {
    answers: lines.includes("answers"),
    dumps: Number(of("dumps")[0] ?? 0),
    ...(newest === undefined ? {} : { newestDump: Number(newest) }),
    holds: of("holds"),
    dumpedIds: of("dumped").map(Number),
    registryId: of("registry")[0],
    ...registered(of("line").join("\n")),
  };
}
