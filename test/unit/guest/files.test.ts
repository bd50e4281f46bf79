import { afterEach, describe, expect, it } from 'vitest';
import type { WriteFilesRequest } from '../../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../../../src/errors.ts';
import { connectGuest, failure, type Script } from './scripted-agent.ts';

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

const connect = async (script: Script) => (await connectGuest(script, cleanups)).guest;

async function* pieces(...texts: string[]) {
  for (const text of texts) yield Buffer.from(text);
}

async function textOf(stream: AsyncIterable<Buffer>): Promise<string> {
  let text = '';
  for await (const piece of stream) text += piece.toString();
  return text;
}

const stdio = { stdin: false, stdout: false, stderr: false, terminal: false, size: undefined };
const container = { id: 'c1', spec: '{}', mounts: [], stdio };

describe('what a container has written', () => {
  it('comes in pieces, with the time that may be asked for next', async () => {
    const guest = await connect({
      readChanges: (call) => {
        expect(call.request).toEqual({ id: 'c1', changedSinceNs: 7n });
        call.write({ data: Buffer.alloc(0), nowNs: 9n });
        for (const text of ['a', 'b']) call.write({ data: Buffer.from(text), nowNs: 0n });
        call.end();
      },
    });
    const { nowNs, pieces } = guest.readChanges('c1', 7n, 5000);
    expect(await textOf(pieces)).toBe('ab');
    expect(await nowNs).toBe(9n);
  });

  it('fails with the agent’s words, with the connection, and when it takes too long', async () => {
    const refusing = await connect({
      readChanges: (call) => call.emit('error', failure('FAILED_PRECONDITION', 'runs')),
    });
    const refused = refusing.readChanges('c1', 0n, 5000);
    await expect(textOf(refused.pieces)).rejects.toMatchObject({ code: 'failed-precondition', message: 'runs' });
    await expect(refused.nowNs).rejects.toThrow('runs');
    const silent = await connect({ readChanges: (call) => void call.write({ data: Buffer.from('x'), nowNs: 1n }) });
    await expect(textOf(silent.readChanges('c1', 0n, 50).pieces)).rejects.toMatchObject({ code: 'deadline-exceeded' });
  });
});

describe('files for a container', () => {
  /** An agent that has a creation wait for the files. */
  function awaiting(outcome: { create?: Script['createContainer']; write?: 'refuse' } = {}) {
    const taken = Promise.withResolvers<string>();
    taken.promise.catch(() => {});
    const messages: WriteFilesRequest[] = [];
    const script: Script = {
      createContainer:
        outcome.create ??
        ((call, done) => {
          expect(call.request.awaitFiles).toBe(true);
          taken.promise.then(
            () => done(null, { pid: 12 }),
            (error: Error) => done(failure('INTERNAL', error.message)),
          );
        }),
      writeFiles: (call, done) => {
        call.on('error', () => {});
        call.on('data', (message: WriteFilesRequest) => {
          messages.push(message);
          if (outcome.write === 'refuse') {
            done(failure('INVALID_ARGUMENT', 'what files'));
            taken.reject(new Error('the files have failed'));
          }
        });
        call.on('end', () => {
          done(null, {});
          taken.resolve('');
        });
      },
    };
    return { script, messages };
  }

  it('come before its program, while it is being created', async () => {
    const { script, messages } = awaiting();
    const guest = await connect(script);
    expect(await guest.createContainer({ ...container, files: pieces('one', 'two') })).toBe(12);
    expect(messages[0]).toMatchObject({ id: 'c1', keepOwners: true });
    expect(messages[0]?.path).toHaveLength(0);
    expect(messages.map(({ data }) => data.toString()).join('')).toBe('onetwo');
  });

  it('that the agent refuses fail the creation with its words', async () => {
    const guest = await connect(awaiting({ write: 'refuse' }).script);
    const created = guest.createContainer({ ...container, files: pieces('one') });
    await expect(created).rejects.toMatchObject({ code: 'invalid-argument', message: 'what files' });
  });

  it('that cannot be read on the host fail the creation with the reason', async () => {
    const gone = Promise.withResolvers<void>();
    const create: Script['createContainer'] = (_call, done) =>
      void gone.promise.then(() => done(failure('FAILED_PRECONDITION', 'the call was cancelled')));
    const { script } = awaiting({ create });
    const guest = await connect({
      ...script,
      writeFiles: (call) => {
        call.resume();
        call.on('error', () => {});
        call.on('cancelled', () => gone.resolve());
      },
    });
    const unreadable = async function* () {
      yield Buffer.from('x');
      throw new KilnError('permission-denied', 'cannot read it');
    };
    const created = guest.createContainer({ ...container, files: unreadable() });
    await expect(created).rejects.toMatchObject({ code: 'permission-denied', message: 'cannot read it' });
  });

  it('are given up when the creation fails without them', async () => {
    const cancelled = Promise.withResolvers<void>();
    const guest = await connect({
      createContainer: (_call, done) => done(failure('INTERNAL', 'no crun')),
      writeFiles: (call) => {
        call.resume();
        call.on('error', () => {});
        call.on('cancelled', () => cancelled.resolve());
      },
    });
    const created = guest.createContainer({ ...container, files: pieces('one') });
    await expect(created).rejects.toMatchObject({ code: 'internal', message: 'no crun' });
    await cancelled.promise;
  });
});
