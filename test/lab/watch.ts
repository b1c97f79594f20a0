// For every test of the lab: whatever leaves for a host is searched for words that never may.
import { beforeEach } from "vitest";
import { hooks } from "../../provider/host.js";
import { forbidden } from "../forbidden.js";

beforeEach(() => {
  hooks.argv = (host, argv, _deed, tool) => {
    const found = forbidden(argv.join(" ")) ?? forbidden(tool.join(" "));
    if (found !== undefined) throw new Error(`${JSON.stringify(found)} left for ${host}: ${argv.join(" ")}`);
  };
});
