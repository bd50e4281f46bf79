/** Templates that all scenes of a test run share: to make one takes seconds. Called by vitest before and after the run. */
import { mkdtempSync, rmSync } from 'node:fs';

/** Names the folder to the tests. */
export const sharedTemplatesVariable = 'KILN_TEST_TEMPLATES';

export function setup(): () => void {
  const folder = mkdtempSync('/tmp/kt-templates-');
  process.env[sharedTemplatesVariable] = folder;
  return () => rmSync(folder, { recursive: true });
}
