import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Status } from '../../../gen/containerd/task_types.ts';
import { type ErrorCode, forLog, grpcStatus, KilnError } from '../../../src/errors.ts';
import { statusCode, statusName } from '../../../src/rpc/ttrpc/index.ts';
import { toTaskStatus, toTimestamp, toTtrpcStatus } from '../../../src/shim/status.ts';

const codes = Object.keys(grpcStatus) as ErrorCode[];

/** `failed-precondition` as ttrpc's table calls it: `FailedPrecondition`. */
function pascal(code: string): string {
  return code.replaceAll(/(?:^|-)(\w)/g, (_all, letter: string) => letter.toUpperCase());
}

describe('every error code', () => {
  it.each(codes)('%s is the ttrpc status of the same name', (code) => {
    const { code: status, message } = toTtrpcStatus(new KilnError(code, 'what is wrong', { hint: 'what to do' }));
    expect(statusName(status)).toBe(pascal(code));
    expect(message).toBe('what is wrong (what to do)');
    expect(KilnError.codeOfStatus(status)).toBe(code);
  });

  it('stands in docs/errors.md with its number, and nothing else does', () => {
    const page = readFileSync(join(import.meta.dirname, '../../../docs/errors.md'), 'utf8');
    const rows = page.matchAll(/^\| `([a-z-]+)` +\| (\w+) \((\d+)\) +\| \S.* \|$/gm);
    const documented = Array.from(rows, ([, code, name, number]) => [code, name, Number(number)]);
    expect(documented).toEqual(codes.map((code) => [code, pascal(code), grpcStatus[code]]));
  });
});

describe('any other error', () => {
  it('is internal, with its message', () => {
    expect(toTtrpcStatus(new TypeError('x is undefined'))).toEqual({
      code: statusCode.Internal,
      message: 'x is undefined',
    });
    expect(toTtrpcStatus('a string')).toEqual({ code: statusCode.Internal, message: 'a string' });
    expect(toTtrpcStatus(undefined)).toEqual({ code: statusCode.Internal, message: 'undefined' });
  });

  it('of a status that has no name here is unknown', () => {
    expect(KilnError.codeOfStatus(15)).toBe('unknown');
    expect(KilnError.codeOfStatus(99)).toBe('unknown');
  });
});

describe('an error whose clean-up failed as well', () => {
  const first = new KilnError('not-found', 'no such layer', { hint: 'pull again' });
  const both = new SuppressedError(new Error('EBUSY'), first);

  it("has the first one's code and hint, and both messages", () => {
    expect(toTtrpcStatus(both)).toEqual({
      code: statusCode.NotFound,
      message: 'no such layer; and then: EBUSY (pull again)',
    });
  });

  it('is whole in the log; any other error is itself there', () => {
    expect(forLog(both).message).toBe('no such layer; and then: EBUSY');
    expect(forLog(first)).toBe(first);
    expect(forLog('text').message).toBe('text');
  });
});

it('a time before and after the epoch is seconds and nanoseconds, never negative ones', () => {
  expect(toTimestamp(new Date(1_700_000_000_123))).toEqual({ seconds: 1_700_000_000n, nanos: 123_000_000 });
  expect(toTimestamp(new Date(-1))).toEqual({ seconds: -1n, nanos: 999_000_000 });
});

it('a container that starts is created to containerd until its program runs', () => {
  const exit = { status: 0, at: new Date(0) };
  expect(
    (
      [
        { kind: 'created' },
        { kind: 'starting' },
        { kind: 'running' },
        { kind: 'stopped', exit },
        { kind: 'deleted', exit },
      ] as const
    ).map(toTaskStatus),
  ).toEqual([Status.CREATED, Status.CREATED, Status.RUNNING, Status.STOPPED, Status.STOPPED]);
});
