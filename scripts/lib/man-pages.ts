/** Writes the manual pages: `man-pages.ts DIRECTORY`, which is emptied first. */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { treeOf } from '../../src/cli/command-tree.ts';
import { manPages } from '../../src/cli/man-page.ts';
import { verbHelp } from '../../src/cli/oci/help.ts';
import { makeProgram } from '../../src/cli/program.ts';
import { kilnVersion } from '../../src/version.ts';

const [directory] = process.argv.slice(2);
if (directory === undefined) throw new Error('usage: man-pages.ts DIRECTORY');
rmSync(directory, { recursive: true, force: true });
mkdirSync(directory, { recursive: true });
// The defaults are those of an environment without Kiln's variables.
for (const name of Object.keys(process.env)) if (name.startsWith('KILN_')) delete process.env[name];
for (const [name, text] of manPages(treeOf(makeProgram()), { version: kilnVersion, help: verbHelp })) {
  writeFileSync(join(directory, name), text);
}
