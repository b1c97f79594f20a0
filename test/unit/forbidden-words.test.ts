// Words that never leave for a host (docs/architecture.md). Every argv is built from literals of these files and from checked
// values, so the files are searched; what really leaves is searched as well, in every test of the lab (test/lab/watch.ts).
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { forbidden } from "../forbidden.js";

const folder = join(__dirname, "../../provider");

describe("words that never leave for a host", () => {
  it.each([
    ["--force"],
    ["lvremove --force vg/x"],
    ["qm destroy 1 --purge"],
    ["qm destroy 1 --skiplock 1"],
    ["qm destroy 1 --destroy-unreferenced-disks 1"],
    ["umount -l /mnt"],
    ["umount -f /mnt"],
    ["umount --lazy /mnt"],
    ["rm -r /x"],
    ["rm -rf /x"],
    ["rm --recursive /x"],
    ["ssh -o StrictHostKeyChecking=no h"],
    ["ssh -o StrictHostKeyChecking=accept-new h"],
    ["sync; true"],
    ["sync"],
  ])("knows %s", (text) => expect(forbidden(text)).toBeDefined());

  it.each([
    ["sync /a/file"],
    ["sync --file-system -- /mnt"],
    ["rm -f /a"],
    ["ssh -o StrictHostKeyChecking=yes h"],
    ["umount -- /mnt"],
    ["fsync"],
  ])("lets pass %s", (text) => expect(forbidden(text)).toBeUndefined());

  it.each(readdirSync(folder).filter((file) => file.endsWith(".ts")))("are in no code of %s", (file) => {
    const code = readFileSync(join(folder, file), "utf8")
      .split("\n")
      .filter((line) => !/^\s*(\/\/|\*|\/\*)/.test(line)) // a comment may name them
      .map((line) => line.replace(/(what|next|reason|error|message): .*/, "")); // and so may an error's advice
    expect(code.flatMap((line) => forbidden(line) ?? [])).toEqual([]);
  });
});
