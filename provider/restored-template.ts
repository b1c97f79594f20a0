// RestoredTemplate on Proxmox VE: a guest or template made from a vzdump archive (qmrestore, as a job), and kept.
//
// Read on: what is there and what is to be restored (restored-template-look.ts, -choice.ts), the steps from the one to the other
// (-plan.ts, -settings.ts).
import * as z from "zod";
import type { Definition } from "./engine.js";
import { same } from "./engine-values.js";
import { Refused } from "./errors.js";
import type { Host } from "./host.js";
import { hostSchema } from "./host.js";
import type { Line, Memory } from "./host-ledger.js";
import { contains } from "./id-range.js";
import * as pve from "./pve.js";
import * as files from "./pve-guests.js";
import type { Source } from "./restored-template-choice.js";
import { freeId, type Have, KIND, observe, type Pins } from "./restored-template-look.js";
import { left, plan, remove } from "./restored-template-plan.js";
import { unmarked } from "./restored-template-settings.js";
import { notYet } from "./values.js";

// ---------------------------------------------------------------- inputs

const LIBVIRT = "is for libvirt, which is not there yet in this version";

/** Which of the forms is meant shows by presence; one message says what is missing or too much. */
const from = z
  .strictObject({
    archive: z
      .string()
      .regex(/^[A-Za-z][\w.-]*:backup\/[^\s/]+$/, 'is the volume id of an archive: "storage:backup/vzdump-qemu-..."')
      .optional(),
    storage: pve.storageIdSchema.optional(),
    vmId: pve.vmidSchema.optional(),
    guest: z.string().min(1, "is a guest's name").optional(),
    at: z
      .string()
      .regex(
        /^(?:latest|\d{4}-\d\d-\d\dT\d\d:\d\d(?::\d\d(?:\.0+)?)?Z|\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d)$/,
        'is "latest", a time in UTC as 2023-07-26T02:23:55Z, or the stamp of an archive\'s name as 2023_07_26-02_23_55',
      )
      .optional(),
    directory: notYet("directory (a backup set of a libvirt host)").optional(),
    nbd: notYet("nbd (volumes offered over the network)").optional(),
    domainXml: z.undefined({ error: LIBVIRT }).optional(),
  })
  .transform(({ archive, storage, vmId, guest, at }, context): Source => {
    const rest = Object.entries({ storage, vmId, guest, at }).filter(([, value]) => value !== undefined);
    const issue = (path: string[], message: string): never => {
      context.addIssue({ code: "custom", path, message });
      return z.NEVER;
    };
    if (archive !== undefined)
      return rest.length === 0
        ? { archive }
        : issue([rest[0]?.[0] ?? ""], "cannot stand together with `archive`: the source is named by one of the two");
    if (storage === undefined)
      return issue([], "names no source: give `archive`, or `storage` and `vmId` of the guest that was backed up");
    if (vmId === undefined) return issue(["vmId"], "is required: the id of the guest that was backed up");
    return {
      storage,
      vmId,
      ...(guest === undefined ? {} : { guest }),
      ...(at === undefined || at === "latest" ? {} : { at }),
    };
  });

const place = z.strictObject({
  storage: pve.storageIdSchema,
  pool: z.undefined({ error: LIBVIRT }).optional(),
  volumeGroup: z.undefined({ error: LIBVIRT }).optional(),
});

const to = z
  .union([place, z.array(place).min(1, "names no storage")])
  .transform((value) => (Array.isArray(value) ? value : [value]).map(({ storage }) => ({ storage })));

const tag = z
  .string()
  .regex(/^[A-Za-z0-9_][A-Za-z0-9_+.-]*$/, "is a tag: letters, digits and _ + . -, not starting with + . -")
  .transform((text) => text.toLowerCase()); // as Proxmox stores it

const inputs = z.strictObject({
  host: hostSchema,
  adopt: z.boolean().optional(),
  from,
  to,
  vmId: z.union([pve.vmidSchema, pve.vmIdsSchema], {
    error: (issue) =>
      issue.input === undefined
        ? "is required on Proxmox VE (a restore without it is for libvirt, which is not there yet in this version)"
        : "is a guest id, or a range: { lower, upper }",
  }),
  name: z
    .string()
    .max(253, "has at most 253 characters")
    .regex(
      /^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$/,
      "is a guest's name as Proxmox takes it: letters, digits, inner hyphens, dots between",
    )
    .optional(),
  template: z.boolean().optional(),
  verify: z.boolean().optional(),
  onDelete: z.enum(["destroy", "keep"], { error: 'is "destroy" or "keep"' }).optional(),
  unique: z.boolean().optional(),
  pool: z
    .string()
    .regex(/^[A-Za-z0-9.\-_]+(\/[A-Za-z0-9.\-_]+){0,2}$/, "is a pool's name")
    .optional(),
  tags: z
    .array(tag)
    .transform((list) => [...new Set(list)].sort())
    .optional(),
  description: z.string().max(8000, "has at most 8000 characters").optional(),
  bwlimit: z
    .number("is KiB/s: a whole number")
    .int("is KiB/s: a whole number")
    .min(0, "is 0 (unlimited) or more")
    .optional(),
  disks: z.undefined({ error: LIBVIRT }).optional(),
  networks: z.undefined({ error: LIBVIRT }).optional(),
});
/** `.get` knows no source. */
export type Want = Omit<z.output<typeof inputs>, "from" | "to"> & {
  from?: Source | undefined;
  to?: { storage: string }[] | undefined;
};

// ---------------------------------------------------------------- outputs

function facts(_want: Want, have: Have, line: Line<Pins>): Record<string, unknown> {
  const pins = line.pins ?? { vmId: Number(line.identity) };
  const file = have.mine?.file;
  return {
    guestId: pins.vmId,
    guestName: file?.values.name ?? pins.archived?.name,
    place: { storage: pins.storage ?? placeOf(pins) },
    volumes: pins.volumes ?? {},
    source: pins.archive ?? (pins.asked !== undefined && "archive" in pins.asked ? pins.asked.archive : ""),
    sourceTime: pins.sourceTime,
    status: {
      asOf: new Date().toISOString(),
      isTemplate: file !== undefined && files.isTemplate(file),
      running: file?.running ?? false,
      clones: have.mine?.clones.slice(0, 20) ?? [],
      bytes: pins.bytes ?? 0,
      seconds: pins.seconds ?? 0,
      changed: pins.changed ?? [],
    },
  };
}

const placeOf = ({ volumes = {} }: Pins) => {
  const [first] = Object.values(volumes);
  return first === undefined ? undefined : files.storageOf(first);
};

function asFound(want: Want, have: Have, line: Line<Pins>): Want {
  const file = have.mine?.file;
  if (file === undefined) return want;
  const { values } = file;
  const pins = line.pins ?? { vmId: file.vmid };
  const found: Want = { ...want, ...(want.vmId === undefined ? { vmId: file.vmid } : {}) };
  const drifted = (field: keyof Want & string, wanted: unknown, is: unknown) =>
    !same(wanted, is) &&
    (want[field] !== undefined || !(line.kept.includes(field) || pins.adopted || want.from === undefined));
  if (drifted("name", want.name ?? pins.archived?.name, values.name)) found.name = values.name ?? "";
  if (drifted("tags", want.tags ?? pve.setOf(pins.archived?.tags), pve.setOf(values.tags)))
    found.tags = pve.setOf(values.tags);
  const { text } = unmarked(values.description);
  const described = want.description ?? pins.archived?.description;
  if (described !== undefined && drifted("description", described.trimEnd(), text)) found.description = text;
  if (drifted("template", want.template ?? true, files.isTemplate(file))) found.template = files.isTemplate(file);
  if (drifted("pool", want.pool, file.pool)) found.pool = file.pool;
  return found;
}

function warnings(_want: Want, have: Have): string[] {
  const { overcommitted, storage, vmId } = have.pins ?? {};
  if (overcommitted === undefined) return [];
  const { virtual, available, data, known } = overcommitted;
  const fits = known
    ? `The data, ${data} bytes, fits`
    : `The data is ${data} bytes at least, and how much more is not known before a compressed archive is read to its end`;
  return [
    `guest ${vmId}: its disks may grow to ${virtual} bytes, and ${storage} had ${available} free when it was chosen. ${fits}; when the storage is full, writes to the disks fail.`,
  ];
}

// ---------------------------------------------------------------- which id

/** Of a range: the one that an earlier run of ours has, or the lowest free one that no other run is about to take. */
async function chooseId(want: Want, host: Host, found: Memory, owner: string): Promise<string | undefined> {
  const range = want.vmId;
  if (typeof range === "number") return undefined;
  const lines = found.lines.filter(({ kind }) => kind === KIND) as Line<Pins>[];
  const ours = lines.find((line) => line.owner === owner && contains(range, line.pins?.vmId ?? Number(line.identity)));
  if (ours !== undefined) return ours.identity;
  return String(await freeId(range, host));
}

export const restoredTemplate: Definition<Want, Have, Pins> = {
  kind: KIND,
  version: 1,
  migrations: {},
  inputs,
  rules: [
    {
      needs: ["adopt", "vmId"],
      broken: ({ adopt, vmId }) =>
        adopt && typeof vmId !== "number"
          ? { property: "vmId", reason: "is a range, and `adopt` takes over one guest: give its id" }
          : undefined,
    },
  ],
  replaceOn: [], // a change is an update that acts or refuses: see `inPlace` and `beside`
  fromId: (id) => {
    if (/^[1-9]\d{2,8}$/.test(id)) return { vmId: Number(id) };
    throw new Refused({
      what: `${JSON.stringify(id)} is no id of a RestoredTemplate.`,
      next: "Give a guest's id: `14001`.",
    });
  },
  identify: ({ vmId }) => (typeof vmId === "number" ? String(vmId) : ""),
  choose: chooseId,
  observe,
  plan,
  remove,
  left,
  facts,
  asFound,
  warnings,
};
