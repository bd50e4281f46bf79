import type { Command } from 'commander';
import { features } from '../../oci/features.ts';
import { kilnVersion } from '../../version.ts';

/** `features`: runtime-spec, features.md. */
export function addFeatures(program: Command): void {
  program
    .command('features')
    .description('print what of the OCI runtime-spec is implemented, as JSON')
    .action(() => {
      process.stdout.write(`${JSON.stringify(features(kilnVersion), null, 4)}\n`);
    });
}
