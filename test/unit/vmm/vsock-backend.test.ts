import { afterEach, beforeEach, expect, test } from 'vitest';
import { socketIsServed } from '../../../src/host/unix-socket.ts';
import { startVsockBackend } from '../../../src/vmm/qemu/vsock-backend.ts';
import { Workspace } from './workspace.ts';

let workspace: Workspace;
beforeEach(() => {
  workspace = new Workspace();
});
afterEach(() => workspace[Symbol.dispose]());

const never = new AbortController().signal;

function start(program: string, signal = never) {
  return startVsockBackend({ program, directory: workspace.sandbox, udsPath: `${workspace.sandbox}/vsock` }, signal);
}

test('the backend is ready when it listens, and process and socket are gone when it is disposed', async () => {
  const backend = await start(workspace.backend());
  const { socket } = backend;
  expect(socket).toBe(`${workspace.sandbox}/vu.sock`);
  expect(await socketIsServed(socket)).toBe(true);
  expect(workspace.processes()).toEqual([String(backend.process.pid)]);
  await backend[Symbol.asyncDispose]();
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
});

test('a backend that is not there is named, with the package that has it', async () => {
  await expect(start('/no/vhost-device-vsock')).rejects.toMatchObject({
    code: 'failed-precondition',
    message: 'cannot run the vsock backend "/no/vhost-device-vsock": ENOENT',
    hint: expect.stringContaining('vhost-device-vsock'),
  });
});

test('a backend that ends at once is an error with its last words', async () => {
  const program = workspace.program('backend', '#!/bin/sh\necho "unexpected argument" >&2\nexit 2\n');
  await expect(start(program)).rejects.toMatchObject({
    code: 'internal',
    message: 'the vsock backend ended at start (exit code 2): unexpected argument',
  });
});

test('a backend that makes no socket is ended when the start is aborted', async () => {
  const program = workspace.program('backend', '#!/bin/sh\n: >"$(dirname "$0")/running"\nexec sleep 1000\n');
  const controller = new AbortController();
  const started = start(program, controller.signal);
  const reason = new Error('enough');
  await workspace.appears('running');
  controller.abort(reason);
  await expect(started).rejects.toBe(reason);
  expect(workspace.processes()).toEqual([]);
});

test('no backend is started after the abort', async () => {
  const program = workspace.program('backend', '#!/bin/sh\n: >"$(dirname "$0")/running"\n');
  await expect(start(program, AbortSignal.abort(new Error('enough')))).rejects.toThrow('enough');
  expect(workspace.has('running')).toBe(false);
});
