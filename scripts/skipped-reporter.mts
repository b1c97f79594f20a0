// Before vitest's closing lines: every test that was skipped, and why.
import type { Reporter, TestModule } from "vitest/node";

export default class SkippedReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const skipped = modules.flatMap((module) =>
      [...module.children.allTests("skipped")].map((test) => {
        const result = test.result();
        const why = result.state === "skipped" && result.note ? result.note : "no reason given";
        return `  ${module.relativeModuleId}: ${test.fullName}: ${why}`;
      }),
    );
    if (skipped.length > 0) console.log(`\nSkipped:\n${skipped.join("\n")}`);
  }
}
