// The acceptance programs (test/programs) as users compile them: strict, as CommonJS and as ESM, against the packed tarball.
import { cp, mkdir, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { execa } from "execa";
import { root } from "./cache.mts";

/** Unpacks the tarball in `folder`, as npm would, and puts the programs beside it: the arguments for tsc. */
export async function acceptancePrograms(tarball: string, folder: string): Promise<string[]> {
  const modules = join(folder, "node_modules");
  const unpacked = join(modules, "pulumi-vmbackup");
  await mkdir(unpacked, { recursive: true });
  await execa("tar", ["-xzf", tarball, "-C", unpacked, "--strip-components=1"]);
  for (const dependency of ["@pulumi", "@types", "yaml"])
    await symlink(join(root, "node_modules", dependency), join(modules, dependency));
  for (const [form, type] of [
    ["cjs", "commonjs"],
    ["esm", "module"],
  ] as const) {
    await cp(join(root, "test/programs"), join(folder, form), { recursive: true });
    await writeFile(join(folder, form, "package.json"), JSON.stringify({ type }));
  }
  const compilerOptions = { strict: true, target: "es2022", module: "nodenext", types: ["node"], noEmit: true };
  await writeFile(
    join(folder, "tsconfig.json"),
    JSON.stringify({ compilerOptions: { ...compilerOptions, skipLibCheck: true }, include: ["cjs", "esm"] }),
  );
  return ["-p", folder];
}
