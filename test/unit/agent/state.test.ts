import { expect, it } from 'vitest';
import { explain } from '../../../agent/crun.ts';
import { AgentError, describe, grpcStatusOf } from '../../../agent/errors.ts';
import { ContainerState } from '../../../agent/state.ts';

const exit = { status: 0, atNs: 1n, stdoutBytes: undefined, stderrBytes: undefined };

it('takes a container through its life', () => {
  const state = new ContainerState('a');
  state.become({ kind: 'created', pid: 7 });
  expect(state.expect('start', 'created').pid).toBe(7);
  state.become({ kind: 'running', pid: 7 });
  state.become({ kind: 'stopped', pid: 7, exit });
  expect(state.expect('wait for', 'running', 'stopped')).toMatchObject({ exit });
  state.become({ kind: 'removing' });
});

it('names both states when a step is not allowed', () => {
  const state = new ContainerState('a');
  expect(() => state.become({ kind: 'running', pid: 7 })).toThrow(
    'cannot become running container "a": it is creating',
  );
  state.become({ kind: 'created', pid: 7 });
  state.become({ kind: 'stopped', pid: 7, exit });
  expect(() => state.become({ kind: 'running', pid: 7 })).toThrow('it is stopped');
});

it('answers an action in the wrong state with FAILED_PRECONDITION', () => {
  const state = new ContainerState('a');
  try {
    state.expect('start', 'created');
    expect.unreachable();
  } catch (error) {
    expect(grpcStatusOf(error)).toEqual({ code: 9, details: 'cannot start container "a": it is creating' });
  }
});

it('answers what nobody expected with INTERNAL and its text', () => {
  expect(grpcStatusOf(new Error('disk on fire'))).toEqual({ code: 13, details: 'disk on fire' });
  expect(grpcStatusOf('odd')).toEqual({ code: 13, details: 'odd' });
});

it('keeps the first error when cleaning up fails, too, and its code', () => {
  const both = new SuppressedError(new Error('cannot unmount'), new AgentError('invalid-argument', 'no such program'));
  expect(describe(both)).toBe('no such program; and then: cannot unmount');
  expect(grpcStatusOf(both)).toEqual({ code: 3, details: 'no such program; and then: cannot unmount' });
});

it("says crun's reasons in runc's words", () => {
  expect(explain('executable file `nosuch` not found in $PATH: No such file or directory', 'nosuch')).toBe(
    'exec: "nosuch": executable file not found in $PATH',
  );
  expect(explain('executable file `/no/such` not found: No such file or directory', '/no/such')).toBe(
    'exec: "/no/such": stat /no/such: no such file or directory',
  );
  expect(explain('open executable: Permission denied', 'data')).toBe('exec: "data": permission denied');
  expect(explain('invalid rlimit `RLIMIT_X`', 'sh')).toBe('invalid rlimit `RLIMIT_X`');
});
