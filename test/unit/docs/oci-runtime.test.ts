import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { treeOf } from '../../../src/cli/command-tree.ts';
import { makeProgram } from '../../../src/cli/program.ts';
import { projectRoot } from '../../support/paths.ts';

const page = readFileSync(join(projectRoot, 'docs', 'oci-runtime.md'), 'utf8');
const tree = treeOf(makeProgram());

/** By verb the flags that the page's table has; rows without a verb go on with the one above. */
function documented(): Map<string, Set<string>> {
  const flags = new Map<string, Set<string>>();
  let verbs: string[] = [];
  const start = page.indexOf('| verb ');
  for (const row of page.slice(start, page.indexOf('\n\n', start)).split('\n').slice(2)) {
    const [, first = '', second = ''] = row.split('|');
    const named = [...first.matchAll(/`(\w+)`/g)].map(([, name = '']) => name);
    if (named.length > 0) verbs = named;
    for (const verb of verbs) {
      const known = flags.get(verb) ?? new Set();
      flags.set(verb, known);
      for (const [, flag = ''] of second.matchAll(/`(-[\w-]+)/g)) known.add(flag);
    }
  }
  return flags;
}

it('docs/oci-runtime.md has every verb with every flag', () => {
  const flags = documented();
  expect([...flags.keys()].sort()).toEqual(tree.commands.map(({ name }) => name).sort());
  for (const { name, flags: known } of tree.commands) {
    const words = known.flatMap(({ long, short }) => [`--${long}`, ...(short === undefined ? [] : [`-${short}`])]);
    for (const word of words.filter((flag) => !['--help', '-h'].includes(flag))) {
      expect(flags.get(name), `${name} ${word}`).toContain(word);
    }
  }
});

it('docs/oci-runtime.md has every flag of kiln itself', () => {
  for (const { long } of tree.flags) expect(page).toContain(`\`--${long}`);
});
