import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it, onTestFinished } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { TtrpcServer } from '../../../src/rpc/ttrpc/index.ts';
import { processTable } from '../../../src/shim/process-service.ts';
import { toTtrpcStatus } from '../../../src/shim/status.ts';
import { TaskClient } from '../../../src/shim/task-client.ts';
import { ScriptedContainer } from './scripted-container.ts';

it('Kiln’s own service tells of processes, and of a container that does not exist', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'kiln-ps-'));
  const container = new ScriptedContainer('c1');
  const find = async (id: string) => {
    if (id === 'c1') return container;
    throw new KilnError('not-found', `container ${id} does not exist`);
  };
  const server = new TtrpcServer(processTable(find), { toStatus: toTtrpcStatus });
  const listener = createServer((socket) => server.serve(socket)).listen(join(directory, 's'));
  onTestFinished(() => {
    listener.close();
    rmSync(directory, { recursive: true });
  });
  using client = new TaskClient(join(directory, 's'));
  expect(await client.processes('c1')).toEqual(await container.processTable());
  await expect(client.processes('c2')).rejects.toMatchObject({
    code: 'not-found',
    message: 'container c2 does not exist',
  });
});
