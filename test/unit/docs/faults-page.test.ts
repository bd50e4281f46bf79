import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { faultNotes, faults, parts, phases, testedCells } from '../../support/fault-matrix.ts';
import { projectRoot } from '../../support/paths.ts';

const page = readFileSync(join(projectRoot, 'docs', 'faults.md'), 'utf8');

/** The section of a part. */
function sectionOf(part: string): string {
  const from = page.indexOf(`\n## ${part}\n`);
  return from < 0 ? '' : page.slice(from, page.indexOf('\n## ', from + 1));
}

it('docs/faults.md has one row for each case of the matrix', () => {
  const lacking = testedCells().filter(({ part, fault, phase }) => {
    const rows = sectionOf(part)
      .split('\n')
      .filter((line) => line.replaceAll(/ +/g, ' ').startsWith(`| ${fault} | ${phase} |`));
    return rows.length !== 1;
  });
  expect(lacking).toEqual([]);
});

it('every cell of the matrix has a case or a reason', () => {
  const noted = faultNotes.reduce((sum, note) => sum + note.phases.length, 0);
  expect(testedCells().length + noted).toBe(parts.length * faults.length * phases.length);
  for (const { part, why } of faultNotes) expect(sectionOf(part)).toContain(why);
});
