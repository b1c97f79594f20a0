// What is made once per machine and shared by every clone: folders in the cache, made under a lock, never half made.
import { mkdir, open, rename, rm, stat } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

export const root = join(import.meta.dirname, "..");
export const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "pulumi-vmbackup");

export const exists = (path: string) =>
  stat(path).then(
    () => true,
    () => false,
  );

function running(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

async function holder(lock: string): Promise<number | undefined> {
  const file = await open(lock, "r").catch(() => undefined);
  if (!file) return undefined;
  const pid = Number((await file.readFile("utf8")).trim());
  await file.close();
  return pid || undefined;
}

/** Runs `work` while nobody else on this machine runs under the same lock file. A lock whose holder has died is taken over. */
export async function locked<T>(lock: string, work: () => Promise<T>, waiting?: (pid: number) => void): Promise<T> {
  await mkdir(dirname(lock), { recursive: true });
  let told = false;
  for (;;) {
    const file = await open(lock, "wx").catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "EEXIST") throw error;
      return undefined;
    });
    if (file) {
      await file.writeFile(`${process.pid}\n`);
      await file.close();
      // Whoever found the same dead holder may remove ours in the belief that it is the dead one's: look again.
      await sleep(300);
      if ((await holder(lock)) === process.pid) break;
      continue;
    }
    const pid = await holder(lock);
    // An empty file is a lock being taken this moment, unless it stays empty.
    const age = Date.now() - (await stat(lock).catch(() => ({ mtimeMs: Date.now() }))).mtimeMs;
    if (pid ? !running(pid) : age > 5000) await rm(lock, { force: true });
    else {
      if (pid && !told) waiting?.(pid);
      told = true;
      await sleep(200);
    }
  }
  try {
    return await work();
  } finally {
    await rm(lock, { force: true });
  }
}

/** The folder `<cache>/<name>`, made by `make` in a temporary place and renamed when it is complete. */
export async function cachedFolder(
  name: string,
  make: (folder: string) => Promise<void>,
  waiting?: (pid: number) => void,
): Promise<string> {
  const folder = join(cache, name);
  if (await exists(folder)) return folder;
  return locked(
    `${folder}.lock`,
    async () => {
      if (await exists(folder)) return folder;
      const half = `${folder}.new`;
      await rm(half, { recursive: true, force: true });
      await mkdir(half, { recursive: true });
      await make(half);
      await rename(half, folder);
      return folder;
    },
    waiting,
  );
}
