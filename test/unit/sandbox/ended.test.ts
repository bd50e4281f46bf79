import { describe, expect, it } from 'vitest';
import type { KilnError } from '../../../src/errors.ts';
import { EndedContainer, EndedProcess } from '../../../src/sandbox/ended.ts';

const exit = { status: 3, at: new Date(1_700_000_000_000) };

async function errorOf(action: () => unknown): Promise<string> {
  try {
    await action();
    return 'no error';
  } catch (error) {
    const { code, message } = error as KilnError;
    return `${code}: ${message}`;
  }
}

function container(release: () => Promise<void> = async () => {}) {
  const disposal = new AsyncDisposableStack();
  disposal.defer(release);
  return new EndedContainer('c1', 42, exit, disposal);
}

describe('a process that ended while no kilnd was there', () => {
  it('has its exit, and is deleted as any other', async () => {
    const process = new EndedProcess('exec e1', 42, exit);
    expect([process.pid, process.state]).toEqual([42, { kind: 'stopped', exit }]);
    expect(await process.exit.wait()).toBe(exit);
    expect(await process.delete()).toBe(exit);
    expect(process.state).toEqual({ kind: 'deleted', exit });
  });

  it('is neither started nor signalled', async () => {
    const process = new EndedProcess('exec e1', 42, exit);
    expect(await errorOf(() => process.start())).toBe('failed-precondition: cannot start exec e1: it is stopped');
    expect(await errorOf(() => process.kill())).toBe('not-found: exec e1: process already finished');
  });
});

describe('a container whose VM is gone', () => {
  it('refuses what needs processes in the words of one that has stopped', async () => {
    const ended = container();
    const stopped = (action: string) => `failed-precondition: cannot ${action} container c1: it is stopped`;
    expect(await ended.processes()).toEqual([]);
    expect(await errorOf(() => ended.exec())).toBe(stopped('run a process in'));
    expect(await errorOf(() => ended.pause())).toBe(stopped('pause'));
    expect(await errorOf(() => ended.resume())).toBe(stopped('resume'));
    expect(await errorOf(() => ended.update())).toBe(stopped('update'));
    expect(await errorOf(() => ended.kill())).toBe('not-found: container c1: process already finished');
    expect(await errorOf(() => ended.stats())).toBe('not-found: container c1 has ended, and nobody knows what it used');
  });

  it('gives what is left of it back when it is deleted or destroyed, once', async () => {
    let releases = 0;
    const ended = container(async () => {
      releases += 1;
    });
    expect(releases).toBe(0);
    await ended.destroy();
    expect(await ended.delete()).toBe(exit);
    await ended.destroy();
    expect(releases).toBe(1);
    expect(ended.state.kind).toBe('deleted');
  });

  it('that cannot be released is not deleted', async () => {
    const ended = container(() => Promise.reject(new Error('EBUSY')));
    await expect(ended.delete()).rejects.toThrow('EBUSY');
    expect(ended.state.kind).toBe('stopped');
  });
});
