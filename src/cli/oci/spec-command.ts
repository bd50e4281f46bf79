import { writeFileSync } from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import { KilnError } from '../../errors.ts';
import { defaultSpec } from '../../oci/default-spec.ts';

/** `spec`: a config.json to begin with. runc(8) spec. */
export function addSpec(program: Command): void {
  program
    .command('spec')
    .description('write a config.json to begin a bundle with')
    .option('-b, --bundle <dir>', 'the folder to write it to', '.')
    .option('--rootless', 'refused: Kiln needs root')
    .action(({ bundle, rootless }: { bundle: string; rootless?: boolean }) => {
      if (rootless === true) {
        const message =
          '--rootless: there is no rootless Kiln: a virtual machine needs devices and networks of the host';
        throw new KilnError('unimplemented', message, {
          hint: 'a user namespace in the container works: linux.namespaces, uidMappings and gidMappings',
        });
      }
      writeSpec(path.join(bundle, 'config.json'));
    });
}

/** @throws KilnError already-exists, in runc's words, for a file that is there */
export function writeSpec(file: string): void {
  try {
    writeFileSync(file, JSON.stringify(defaultSpec, undefined, '\t'), { flag: 'wx', mode: 0o666 });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'EEXIST') throw new KilnError('already-exists', 'File config.json exists. Remove it first');
    throw new KilnError('invalid-argument', `cannot write ${file}: ${code}`, { cause: error });
  }
}
