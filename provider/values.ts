// Values that several resources share: one schema each, in normal form, with the source of the rule.
import * as z from "zod";

const UNIT = { "": 1n, K: 1n << 10n, M: 1n << 20n, G: 1n << 30n, T: 1n << 40n } as const;
const MAX = BigInt(Number.MAX_SAFE_INTEGER);

const sizeForm = 'bytes as a whole number, or text with a binary unit: "512M", "20G", "1T"';

/** "20G" -> bytes; undefined for what is no size. Without a unit, text is bytes. */
export function bytesOf(text: string): number | undefined {
  const match = /^([0-9]{1,18})([KMGT]?)$/i.exec(text);
  if (match === null) return undefined;
  const unit = UNIT[(match[2] ?? "").toUpperCase() as keyof typeof UNIT];
  const bytes = BigInt(match[1] ?? "") * unit;
  return bytes > MAX ? undefined : Number(bytes);
}

/** A size, or a share of the origin: `"20%ORIGIN"` (lvcreate(8), --extents). */
export const sizeOrShare = z.union([z.number(), z.string()]).transform((value, context) => {
  if (typeof value === "string") {
    const share = /^([0-9]{1,4})%ORIGIN$/.exec(value);
    if (share !== null && Number(share[1]) > 0) return `${Number(share[1])}%ORIGIN`;
  }
  const bytes = typeof value === "number" ? value : bytesOf(value);
  if (bytes !== undefined && Number.isSafeInteger(bytes) && bytes > 0) return bytes;
  context.addIssue(
    `${JSON.stringify(value)} is no size: give ${sizeForm}, or a share of the origin as "20%ORIGIN", more than 0`,
  );
  return z.NEVER;
});

/** What LVM takes as the name of a volume group or logical volume (lvm(8), "Valid names"). */
export const lvmName = z
  .string()
  .refine((name) => /^[A-Za-z0-9_+.][A-Za-z0-9_+.-]*$/.test(name) && name !== "." && name !== "..", {
    error: "LVM names are letters, digits and + _ . -, not starting with a hyphen, and not . or ..",
  })
  .refine((name) => name.length <= 127, { error: "LVM names have at most 127 characters" });

/** Names that LVM keeps for itself: lib/misc/lvm-string.c, apply_lvname_restrictions. */
const RESERVED_START = ["pvmove", "snapshot"];
const RESERVED_PART = [
  "_cdata",
  "_cmeta",
  "_corig",
  "_cpool",
  "_cvol",
  "_mimage",
  "_mlog",
  "_pmspare",
  "_rimage",
  "_rmeta",
  "_tdata",
  "_tmeta",
  "_vdata",
  "_vorigin",
  "_wcorig",
  "_imeta",
  "_iorig",
];

/** A name for a new logical volume. */
export const newLvName = lvmName.refine(
  (name) => !RESERVED_START.some((s) => name.startsWith(s)) && !RESERVED_PART.some((p) => name.includes(p)),
  {
    error: `LVM keeps this name for itself: names starting ${RESERVED_START.join(", ")} or with _mlog, _tdata and the like`,
  },
);

/** What is designed and not yet there: refused in words, so that nobody believes it works. */
export function notYet(what: string): z.ZodType {
  return z.undefined({ error: `${what} is not there yet in this version` });
}
