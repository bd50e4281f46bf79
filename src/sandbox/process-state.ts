import { KilnError } from '../errors.ts';

/** How a process ended. */
export interface Exit {
  /** 0 to 255; 128 + n when signal n ended it. */
  readonly status: number;
  readonly at: Date;
}

/**
 * The life of a process, be it a container's init or one that was exec'd:
 *
 *   created ──start──▶ starting ──▶ running ──exit──▶ stopped ──delete──▶ deleted
 *     │ ▲───failed───────┘                                ▲
 *     └──────────────────exit (killed)────────────────────┘
 *
 * `starting` is a state of its own so that a second Start is refused while the first is under way; the exit of a program
 * that ends at once waits for the end of its start. An action that a state forbids is refused here and nowhere else; the
 * message names both.
 */
export type ProcessState =
  | { readonly kind: 'created' }
  | { readonly kind: 'starting' }
  | { readonly kind: 'running' }
  | { readonly kind: 'stopped'; readonly exit: Exit }
  | { readonly kind: 'deleted'; readonly exit: Exit };

/** @param name of the process, as in "container c1" */
function refuse(name: string, action: string, state: ProcessState): KilnError {
  return new KilnError('failed-precondition', `cannot ${action} ${name}: it is ${state.kind}`);
}

export function requireStartable(name: string, state: ProcessState): void {
  if (state.kind !== 'created') throw refuse(name, 'start', state);
}

/** containerd's contract: a signal to a process that has ended is NotFound, not FailedPrecondition. */
export function requireSignalable(name: string, state: ProcessState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw alreadyFinished(name);
}

/** An exec'd process does not exist before its start; a container's init does, and takes signals. */
export function requireStarted(name: string, state: ProcessState): void {
  if (state.kind === 'created' || state.kind === 'starting') throw refuse(name, 'signal', state);
}

export function alreadyFinished(name: string): KilnError {
  return new KilnError('not-found', `${name}: process already finished`);
}

export function requireDeletable(name: string, state: ProcessState): void {
  if (state.kind !== 'created' && state.kind !== 'stopped') throw refuse(name, 'delete', state);
}

/** A container takes more processes as long as it has not ended. */
export function requireExecable(name: string, state: ProcessState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw refuse(name, 'run a process in', state);
}

/** The state after the process ended; an exit that is already known stays. */
export function afterExit(state: ProcessState, exit: Exit): ProcessState {
  return state.kind === 'stopped' || state.kind === 'deleted' ? state : { kind: 'stopped', exit };
}
