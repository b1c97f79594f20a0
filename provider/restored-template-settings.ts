// What a RestoredTemplate sets on the guest after qmrestore: the declared name, tags, description and pool; that a copy does not wake
// up as a twin (no start at boot, no devices of the host, no firewall file); and the template.
import type { Step } from "./engine.js";
import { Refused } from "./errors.js";
import type { Argv } from "./host.js";
import type { Line } from "./host-ledger.js";
import * as pve from "./pve.js";
import * as files from "./pve-guests.js";
import type { Want } from "./restored-template.js";
import type { Mine, Pinned } from "./restored-template-look.js";

// ---------------------------------------------------------------- the owner's mark: the end of the description

/** Proxmox shows a description as Markdown, where a comment is not seen. */
export function marked(text: string | undefined, owner: string): string {
  const name = encodeURIComponent(owner).replaceAll("%2F", "/");
  return `${text ? `${text.trimEnd()}\n\n` : ""}<!-- pulumi-vmbackup ${name} -->`;
}

export function unmarked(found: string | undefined): { text: string; owner: string | undefined } {
  const [, text = found ?? "", name] =
    /^([\s\S]*?)\n*<!-- pulumi-vmbackup (\S+) -->$/.exec((found ?? "").trimEnd()) ?? [];
  return { text: text.trimEnd(), owner: name === undefined ? undefined : pve.ownerIn(name) };
}

// ---------------------------------------------------------------- settings

/** A field that adoption found, and that the program does not declare. */
const isLeft = (field: keyof Want & string, want: Want, line: Pick<Line, "kept">) =>
  want[field] === undefined && line.kept.includes(field);

/** The first thing after a restore, before the guest counts as what was restored. */
function twinSettings({ settings, adopted }: Pinned, file: files.GuestFile): { set: string[]; drop: string[] } {
  if (settings !== undefined || adopted) return { set: [], drop: [] };
  return {
    set: file.values.onboot === "1" ? ["--onboot", "0"] : [],
    drop: files.hostDevices(file.values),
  };
}

/** Whether nothing of the first work is left. */
export function isSettled(want: Want, { pinned, file, unconverted }: Mine): boolean {
  const { set, drop } = twinSettings(pinned, file);
  if (set.length + drop.length > 0 || file.firewall || unconverted.length > 0) return false;
  return files.isTemplate(file) === (want.template ?? true);
}

/** The steps to what is declared, without a look between them: each look costs the listing of a storage. [] = it is so. */
export function changes(want: Want, mine: Mine, line: Line): Step[] {
  const { file, pinned } = mine;
  const id = String(file.vmid);
  const hasPool = want.pool !== undefined || (!isLeft("pool", want, line) && !pinned.adopted);
  const brought = file.firewall && pinned.settings === undefined && !pinned.adopted;
  return [
    ...setSteps(want, mine, line),
    ...(brought
      ? [
          {
            why: `remove the firewall rules that guest ${id} brought with it`,
            argv: ["rm", "--", `/etc/pve/firewall/${id}.fw`] as const,
          },
        ]
      : []),
    ...(hasPool && file.pool !== want.pool ? poolSteps(id, file.pool, want.pool) : []),
    ...templateSteps(want, mine, line),
  ];
}

function setSteps(want: Want, { file, pinned }: Mine, line: Line): Step[] {
  const { values } = file;
  const { set, drop } = twinSettings(pinned, file);
  const name = want.name ?? pinned.archived?.name;
  if (name !== undefined && name !== values.name && !isLeft("name", want, line)) set.push("--name", name);
  const tags =
    want.tags ?? (isLeft("tags", want, line) || pinned.adopted ? undefined : pve.setOf(pinned.archived?.tags));
  if (tags !== undefined && tags.join() !== pve.setOf(values.tags).join()) {
    if (tags.length > 0) set.push("--tags", tags.join(";"));
    else drop.push("tags");
  }
  const text = want.description ?? (isLeft("description", want, line) ? undefined : pinned.archived?.description);
  const description = marked(text ?? unmarked(values.description).text, line.owner);
  if (description !== (values.description ?? "").trimEnd()) set.push("--description", description);
  if (set.length + drop.length === 0) return [];
  const id = String(file.vmid);
  const changed = [...set.filter((word) => word.startsWith("--")).map((word) => word.slice(2)), ...drop].join(", ");
  // The digest: whoever changed the guest since our look makes this fail instead of being overwritten.
  const argv: Argv = [
    "qm",
    "set",
    id,
    "--digest",
    files.digestOf(file),
    ...set,
    ...(drop.length > 0 ? ["--delete", drop.join(",")] : []),
  ];
  return [{ why: `set ${changed} of guest ${id}`, argv }];
}

/** A guest is in one pool at most: it leaves the one before it enters the other. */
function poolSteps(id: string, from: string | undefined, to: string | undefined): Step[] {
  const change = (pool: string, ...more: string[]): Argv => ["pvesh", "set", `/pools/${pool}`, "--vms", id, ...more];
  return [
    ...(from === undefined
      ? []
      : [{ why: `take guest ${id} out of the pool ${from}`, argv: change(from, "--delete", "1") }]),
    ...(to === undefined ? [] : [{ why: `put guest ${id} into the pool ${to}`, argv: change(to) }]),
  ];
}

function templateSteps(want: Want, { file, pinned, unconverted }: Mine, line: Line): Step[] {
  const is = files.isTemplate(file);
  const wanted = want.template ?? (isLeft("template", want, line) || pinned.adopted ? is : true);
  const id = String(file.vmid);
  if (is && wanted && pinned.settings === undefined)
    // The guest is marked before its disks are converted, one by one: a conversion may have stopped between them.
    return unconverted.map((disk) => ({
      why: `make the disk ${disk} of guest ${id} a template's`,
      argv: ["qm", "template", id, "--disk", disk],
      timeout: 1800,
      look: true,
    }));
  if (wanted === is) return [];
  if (!wanted)
    throw new Refused({
      what: `template: guest ${id} is a template, and Proxmox turns no template back into a guest.`,
      next: "Clone it, or make it anew with `pulumi up --replace URN`. Nothing was changed.",
    });
  if (file.running)
    throw new Refused({
      what: `template: guest ${id} runs, and only a stopped guest can become a template.`,
      next: "Stop it, or declare `template: false`. Nothing was changed.",
    });
  // `qm template` exits 0 also when it failed: whether it is one is read back.
  return [{ why: `make guest ${id} a template`, argv: ["qm", "template", id], timeout: 1800, look: true }];
}
