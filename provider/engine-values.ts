// Values as Pulumi hands them over: unknowns, and what may be written into a state.

/** What stands for an unknown value in check and diff, at any depth (sdk/go/common/resource/plugin/rpc.go). */
const UNKNOWNS: ReadonlySet<unknown> = new Set([
  "04da6b54-80e4-46f7-96ec-b56ff0331ba9", // a string, or untyped
  "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7", // a boolean
  "3eeb2bf0-c639-47a8-9e75-3b44932eb421", // a number
  "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2", // an array
  "030794c1-ac77-496b-92df-f27374a8bd58", // an asset
  "e48ece36-62e2-4504-bad9-02848725956a", // an archive
  "dd056dcd-154b-4c76-9bd3-c8f88648b5ff", // an object
]);

export type Fields = Record<string, unknown>;

/** Whether anything in the value is unknown yet. */
export function hasUnknown(value: unknown): boolean {
  if (typeof value !== "object" || value === null) return UNKNOWNS.has(value);
  return Object.values(value).some(hasUnknown);
}

/** Plain JSON without `undefined`: anything else makes Pulumi's server fail after the remote work, or hang. */
export function plain<T>(value: T): T {
  return JSON.parse(JSON.stringify(value ?? null));
}

/** Deep equality of plain values; the order of an object's keys does not count. */
export function same(a: unknown, b: unknown): boolean {
  if (Object.is(a, b)) return true;
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return false;
  if (Array.isArray(a) !== Array.isArray(b)) return false;
  const keys = new Set([...Object.keys(a), ...Object.keys(b)]);
  return [...keys].every((key) => same((a as Fields)[key], (b as Fields)[key]));
}
