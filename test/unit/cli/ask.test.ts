import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import { ask } from '../../../src/cli/ask.ts';
import { KilnError } from '../../../src/errors.ts';
import { ControlServer } from '../../../src/shim/control/server.ts';

let stateDir: string;
beforeEach(() => {
  stateDir = mkdtempSync(join(tmpdir(), 'kiln-ask-'));
  vi.stubEnv('KILN_STATE_DIR', stateDir);
});
afterEach(() => {
  vi.unstubAllEnvs();
  rmSync(stateDir, { recursive: true, force: true });
});

it('the answer of kilnd is passed on as it is', async () => {
  await using _server = await ControlServer.listen(stateDir, async ({ kind }) => ({
    exitCode: 0,
    stdout: Buffer.from(`{"asked":"${kind}"}\n`),
  }));
  expect(Buffer.from(await ask({ kind: 'status' })).toString()).toBe('{"asked":"status"}\n');
});

it('what kilnd refuses is an error with its words, not output', async () => {
  await using _server = await ControlServer.listen(stateDir, async () => {
    throw new KilnError('internal', 'no');
  });
  await expect(ask({ kind: 'stop' })).rejects.toThrow('no');
});

it('a kilnd that is stopping and gives no answer is unavailable', async () => {
  await using _server = await ControlServer.listen(stateDir, async () => null);
  await expect(ask({ kind: 'status' })).rejects.toMatchObject({ code: 'unavailable' });
});
