// The rules of a block of guest ids, for the program's side (index.ts) and the provider's alike: no schema, no import.

/** Decimal, 100 to 999999999 (pve-common, JSONSchema.pm: pve_verify_vmid). */
export const LOWEST = 100;
export const HIGHEST = 999_999_999;

export interface Range {
  lower: number;
  upper: number;
}

export const overlap = (a: Range, b: Range): boolean => a.lower <= b.upper && b.lower <= a.upper;

export const contains = ({ lower, upper }: Range, id: number): boolean => id >= lower && id <= upper;

/** The property that is wrong in a range, and why. */
export function rangeTrouble(lower: unknown, upper: unknown): { property: string; reason: string } | undefined {
  for (const [property, value] of Object.entries({ lower, upper })) {
    if (typeof value === "number" && Number.isInteger(value) && value >= LOWEST && value <= HIGHEST) continue;
    return {
      property,
      reason: `${JSON.stringify(value)} is no guest id: a plain whole number from ${LOWEST} to ${HIGHEST}`,
    };
  }
  if (Number(lower) <= Number(upper)) return undefined;
  return { property: "upper", reason: `${upper} is below \`lower\` (${lower}): the two are the first and the last id` };
}
