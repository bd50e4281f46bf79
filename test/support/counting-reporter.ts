/** Writes `passed failed skipped` of a run to the file KILN_TEST_COUNTS, for the last line of scripts/test. */
import { writeFileSync } from 'node:fs';
import type { Reporter, TestModule } from 'vitest/node';

export default class CountingReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandledErrors: readonly unknown[]): void {
    const file = process.env.KILN_TEST_COUNTS;
    if (file === undefined) return;
    const counts = { passed: 0, failed: unhandledErrors.length, skipped: 0 };
    for (const module of modules) {
      let failed = 0;
      for (const test of module.children.allTests()) {
        const { state } = test.result();
        if (state === 'passed') counts.passed += 1;
        else if (state === 'skipped') counts.skipped += 1;
        // A test that was collected and has no result was cut off.
        else failed += 1;
      }
      // A file that cannot be loaded, or a hook that failed outside of any test, must not pass unnoticed.
      if (!module.ok() && failed === 0) failed = 1;
      counts.failed += failed;
    }
    writeFileSync(file, `${counts.passed} ${counts.failed} ${counts.skipped}\n`);
  }
}
