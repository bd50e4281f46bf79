import { Writable } from 'node:stream';
import { expect, it } from 'vitest';
import type { Guest } from '../../../src/guest/guest.ts';
import type { Positions } from '../../../src/sandbox/positions.ts';
import { ProcessIo } from '../../../src/sandbox/process-io.ts';
import type { ContainerStdio } from '../../../src/sandbox/stdio.ts';

it('output goes on when nobody can write down how far it is, which is told once', async () => {
  const delivered: number[] = [];
  const guest: Pick<Guest, 'pipeOutputs'> = {
    pipeOutputs(_ref, targets) {
      for (const offset of [5, 10]) {
        for (const { onDelivered } of targets) onDelivered(offset);
        delivered.push(offset);
      }
      return targets.map((target) => ({ ...target, ended: Promise.resolve() }));
    },
  };
  const stdout = new Writable({ write: (_chunk, _encoding, done) => done() });
  const stdio: Pick<ContainerStdio, 'stdin' | 'stdout' | 'stderr' | 'finish' | 'dispose'> = {
    ...{ stdin: null, stdout, stderr: null },
    finish: async () => {},
    dispose: async () => {},
  };
  const positions: Pick<Positions, 'read' | 'write'> = {
    read: () => ({ stdout: 0, stderr: 0 }),
    write: () => {
      throw new Error('ENOSPC');
    },
  };
  const reports: string[] = [];
  const io = new ProcessIo({
    guest: guest as Guest,
    process: { id: 'c1', execId: '' },
    stdio: stdio as ContainerStdio,
    terminal: false,
    positions: positions as Positions,
    report: (error, message) => reports.push(`${message}: ${(error as Error).message}`),
  });
  await io.drained;
  expect(delivered).toEqual([5, 10]);
  expect(reports).toEqual(['cannot write down how far the output is: the next kilnd would begin before: ENOSPC']);
});
