// The registry of claims under races: the script itself, in parallel processes over one folder that stands for the export. No host
// is needed for it; through whole resources on two nodes it is raced in nfs-dump-storage.test.ts.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { afterAll, expect, it } from "vitest";
import { encodedOwner, ON_MOUNT, REGISTRY, registered } from "../../provider/nfs-export.js";

const root = mkdtempSync(join(tmpdir(), "claims-"));
afterAll(() => rmSync(root, { recursive: true }));

// Overlapping, not equal: a has the lower part, b the upper one. Both machines have the same name, as standalone nodes do.
const RACE = `${ON_MOUNT}source_at() { echo s:/e; }
root=$1 folder=$2 n=$3 a=$4 b=$5 i=0
try() { ( claim "$folder" s:/e "$root/$1.machine" "$root/$1.ledger" "st$i" "$2" "$3" "$4" 0 "" 2>"$folder/$1.$i.said"; echo $? >"$folder/$1.$i" ); }
while [ "$i" -lt "$n" ]; do
  i=$((i + 1)); from=$((i * 100))
  try a "$a" "$from" "$((from + 60))" & try b "$b" "$((from + 30))" "$((from + 90))" &
  wait
done`;

it("1,000 races of two stacks for overlapping ranges: one winner each, and the loser is told who", async () => {
  const owner = { a: "organization/p/one/NfsDumpStorage/my dumps", b: "organization/p/two/NfsDumpStorage/dümps" };
  for (const who of ["a", "b"]) {
    writeFileSync(join(root, `${who}.machine`), `${who.repeat(32)}\n`);
    writeFileSync(join(root, `${who}.ledger`), `ledger-of-${who}\n`);
  }
  // Four exports side by side: most of a race is waiting for the disk.
  const lanes = [0, 1, 2, 3].map((lane) => join(root, `export${lane}`));
  const n = 1000 / lanes.length;
  await Promise.all(
    lanes.map(async (folder) => {
      mkdirSync(folder);
      await execa("sh", ["-c", RACE, "race", root, folder, String(n), encodedOwner(owner.a), encodedOwner(owner.b)]);
    }),
  );
  const won = { a: 0, b: 0 };
  for (const folder of lanes) {
    for (let i = 1; i <= n; i++) {
      const status = (who: string) => readFileSync(join(folder, `${who}.${i}`), "utf8").trim();
      expect([status("a"), status("b")].sort(), `race ${i}`).toEqual(["0", "3"]);
      const [winner, loser] = status("a") === "0" ? (["a", "b"] as const) : (["b", "a"] as const);
      won[winner]++;
      expect(readFileSync(join(folder, `${loser}.${i}.said`), "utf8")).toContain(
        `are claimed by ${owner[winner]} on node`,
      );
    }
    expect(registered(readFileSync(join(folder, REGISTRY, "claims"), "utf8")).claims).toHaveLength(n);
  }
  expect(won.a + won.b).toBe(1000);
  expect(Math.min(won.a, won.b)).toBeGreaterThan(0); // they did meet
}, 900_000);
