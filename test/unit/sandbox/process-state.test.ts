import { describe, expect, it } from 'vitest';
import {
  afterExit,
  type ContainerState,
  type Exit,
  requireDeletable,
  requireExecable,
  requirePausable,
  requireResumable,
  requireSignalable,
  requireStartable,
  requireStarted,
  requireUpdatable,
} from '../../../src/sandbox/process-state.ts';

const exit: Exit = { status: 3, at: new Date(0) };
const states: readonly ContainerState[] = [
  { kind: 'created' },
  { kind: 'starting' },
  { kind: 'running' },
  { kind: 'pausing' },
  { kind: 'paused' },
  { kind: 'stopped', exit },
  { kind: 'deleted', exit },
];

/** For each state what an action is answered: nothing, or the error's code and message. */
function answers(action: (name: string, state: ContainerState) => void) {
  return Object.fromEntries(
    states.map((state) => {
      try {
        action('container web', state);
        return [state.kind, 'allowed'];
      } catch (error) {
        const { code, message } = error as { code: string; message: string };
        return [state.kind, `${code}: ${message}`];
      }
    }),
  );
}

describe('the states of a process', () => {
  it('only a created one can be started, and the refusal names both', () => {
    expect(answers(requireStartable)).toEqual({
      created: 'allowed',
      starting: 'failed-precondition: cannot start container web: it is starting',
      running: 'failed-precondition: cannot start container web: it is running',
      pausing: 'failed-precondition: cannot start container web: it is pausing',
      paused: 'failed-precondition: cannot start container web: it is paused',
      stopped: 'failed-precondition: cannot start container web: it is stopped',
      deleted: 'failed-precondition: cannot start container web: it is deleted',
    });
  });

  it('a signal to one that has ended finds no process', () => {
    expect(answers(requireSignalable)).toEqual({
      created: 'allowed',
      starting: 'allowed',
      running: 'allowed',
      pausing: 'allowed',
      paused: 'allowed',
      stopped: 'not-found: container web: process already finished',
      deleted: 'not-found: container web: process already finished',
    });
  });

  it('only one whose program does not run can be deleted', () => {
    expect(answers(requireDeletable)).toEqual({
      created: 'allowed',
      starting: 'failed-precondition: cannot delete container web: it is starting',
      running: 'failed-precondition: cannot delete container web: it is running',
      pausing: 'failed-precondition: cannot delete container web: it is pausing',
      paused: 'failed-precondition: cannot delete container web: it is paused',
      stopped: 'allowed',
      deleted: 'failed-precondition: cannot delete container web: it is deleted',
    });
  });

  it("one that was exec'd takes a signal only once it is there", () => {
    expect(answers(requireStarted)).toEqual({
      created: 'failed-precondition: cannot signal container web: it is created',
      starting: 'failed-precondition: cannot signal container web: it is starting',
      running: 'allowed',
      pausing: 'allowed',
      paused: 'allowed',
      stopped: 'allowed',
      deleted: 'allowed',
    });
  });

  it.each([
    ['pause', requirePausable, ['running']],
    ['resume', requireResumable, ['paused']],
    ['run a process in', requireExecable, ['created', 'starting', 'running']],
    ['update', requireUpdatable, ['created', 'starting', 'running', 'pausing', 'paused']],
  ] as const)('what one is in when it allows: %s', (action, require, allowed: readonly string[]) => {
    expect(answers(require)).toEqual(
      Object.fromEntries(
        states.map(({ kind }) => [
          kind,
          allowed.includes(kind) ? 'allowed' : `failed-precondition: cannot ${action} container web: it is ${kind}`,
        ]),
      ),
    );
  });

  it('an exit stops it, and the first exit stays', () => {
    const later: Exit = { status: 9, at: new Date(1) };
    expect(states.map((state) => afterExit(state, later))).toEqual([
      { kind: 'stopped', exit: later },
      { kind: 'stopped', exit: later },
      { kind: 'stopped', exit: later },
      { kind: 'stopped', exit: later },
      { kind: 'stopped', exit: later },
      { kind: 'stopped', exit },
      { kind: 'deleted', exit },
    ]);
  });
});
