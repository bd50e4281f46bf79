import { expect, test } from 'vitest';
import { drawPool } from '../../../src/cli/pool.ts';

const templates = { restored: 12, restoresFailed: 1, built: 2, buildsFailed: 0, damaged: 3 };

test('`kiln pool` draws a table of what waits, with the hit rates', () => {
  const shelf = { template: 'abcd', memoryMib: 512, vcpus: 1, waiting: 2, wanted: 3, hits: 3, misses: 1, died: 0 };
  const drawn = drawPool({ templates, pool: [shelf, { ...shelf, memoryMib: 16384, hits: 0, misses: 0 }] });
  expect(drawn).toBe(
    [
      'template  memory     cpus  waiting  wanted  hits  misses  hit rate  died',
      'abcd      512 MiB    1     2        3       3     1       75 %      0',
      'abcd      16384 MiB  1     2        3       0     0       -         0',
      'restored from templates: 12, failed: 1',
      'templates made: 2, failed: 0, found damaged: 3',
      '',
    ].join('\n'),
  );
});

test('`kiln pool` says so when nothing waits', () => {
  expect(drawPool({ templates, pool: [] })).toMatch(
    /^no virtual machine waits\nrestored from templates: 12, failed: 1\n/,
  );
});
