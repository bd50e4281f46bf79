import { Command } from 'commander';
import type { ShelfStatus } from '../sandbox/pool.ts';
import type { TemplateCounts } from '../template/store.ts';
import { ask } from './ask.ts';

/** What `kiln pool` needs of kilnd's status. */
export interface PoolStatus {
  readonly templates: TemplateCounts;
  readonly pool: readonly ShelfStatus[];
}

/** `kiln pool`: virtual machines that wait for containers, and how those before came to theirs. */
export function poolCommand(): Command {
  return new Command('pool')
    .description('show the virtual machines that wait for containers, and how often there was one')
    .option('--json', 'as JSON')
    .action(async ({ json }: { json?: boolean }) => {
      const { templates, pool } = JSON.parse(Buffer.from(await ask({ kind: 'status' })).toString()) as PoolStatus;
      process.stdout.write(json ? `${JSON.stringify({ templates, pool })}\n` : drawPool({ templates, pool }));
    });
}

const columns = ['template', 'memory', 'cpus', 'waiting', 'wanted', 'hits', 'misses', 'hit rate', 'died'];

/** For a terminal. */
export function drawPool({ templates, pool }: PoolStatus): string {
  const rows = pool.map(({ template, memoryMib, vcpus, waiting, wanted, hits, misses, died }) => {
    const rate = hits + misses === 0 ? '-' : `${Math.round((100 * hits) / (hits + misses))} %`;
    return [template, `${memoryMib} MiB`, vcpus, waiting, wanted, hits, misses, rate, died].map(String);
  });
  const table = [columns, ...rows];
  const widths = columns.map((_, column) => Math.max(...table.map((row) => row[column]?.length ?? 0)));
  const lines = table.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join('  ')
      .trimEnd(),
  );
  const { restored, restoresFailed, built, buildsFailed, damaged } = templates;
  return [
    ...(pool.length === 0 ? ['no virtual machine waits'] : lines),
    `restored from templates: ${restored}, failed: ${restoresFailed}`,
    `templates made: ${built}, failed: ${buildsFailed}, found damaged: ${damaged}`,
    '',
  ].join('\n');
}
