import * as pulumi from "@pulumi/pulumi";
import { LvSnapshot } from "pulumi-vmbackup";

const config = new pulumi.Config();

const snapshot = new LvSnapshot("before-upgrade", {
  host: config.require("host"),
  volumeGroup: config.require("volumeGroup"),
  origin: config.require("origin"),
  size: config.require("size"),
});

export const path = snapshot.path;
export const takenAt = snapshot.takenAt;
export const status = snapshot.status;
