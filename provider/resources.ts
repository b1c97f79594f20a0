// The resources by kind: a new one is its own file and a line here.

import { backupSchedule } from "./backup-schedule.js";
import type { AnyDefinition } from "./engine.js";
import { lvSnapshot } from "./lv-snapshot.js";
import { nfsDumpStorage } from "./nfs-dump-storage.js";
import { restoredTemplate } from "./restored-template.js";
import { vmIdRange } from "./vm-id-range.js";

export const resources: Readonly<Record<string, AnyDefinition>> = {
  BackupSchedule: backupSchedule,
  LvSnapshot: lvSnapshot,
  NfsDumpStorage: nfsDumpStorage,
  RestoredTemplate: restoredTemplate,
  VmIdRange: vmIdRange,
};
