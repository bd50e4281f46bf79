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

/**
 * A container is its init process, and can be frozen:
 *
 *   running ──pause──▶ pausing ──▶ paused ──resume──▶ running; the exit (killed) comes from any of them
 */
export type ContainerState =
  | ProcessState
  /** Its processes are being frozen, and its filesystems flushed. */
  | { readonly kind: 'pausing' }
  | { readonly kind: 'paused' };

/** @param name of the process, as in "container c1" */
function refuse(name: string, action: string, state: ContainerState): KilnError {
  return new KilnError('failed-precondition', `cannot ${action} ${name}: it is ${state.kind}`);
}

export function requireStartable(name: string, state: ContainerState): void {
  if (state.kind !== 'created') throw refuse(name, 'start', state);
}

/** containerd's contract: a signal to a process that has ended is NotFound, not FailedPrecondition. */
export function requireSignalable(name: string, state: ContainerState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw alreadyFinished(name);
}

/** An exec'd process does not exist before its start; a container's init does, and takes signals. */
export function requireStarted(name: string, state: ContainerState): void {
  if (state.kind === 'created' || state.kind === 'starting') throw refuse(name, 'signal', state);
}

export function alreadyFinished(name: string): KilnError {
  return new KilnError('not-found', `${name}: process already finished`);
}

export function requireDeletable(name: string, state: ContainerState): void {
  if (state.kind !== 'created' && state.kind !== 'stopped') throw refuse(name, 'delete', state);
}

/**
 * A container takes more processes as long as it has not ended. As in runc's shim not while it is frozen: the process would
 * be frozen before it had begun.
 */
export function requireExecable(name: string, state: ContainerState): void {
  if (state.kind === 'created' || state.kind === 'starting' || state.kind === 'running') return;
  throw refuse(name, 'run a process in', state);
}

export function requirePausable(name: string, state: ContainerState): void {
  if (state.kind !== 'running') throw refuse(name, 'pause', state);
}

export function requireResumable(name: string, state: ContainerState): void {
  if (state.kind !== 'paused') throw refuse(name, 'resume', state);
}

/** There must be processes, or an init that waits to become one. */
export function requireUpdatable(name: string, state: ContainerState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw refuse(name, 'update', state);
}

/** The state after the process ended; an exit that is already known stays. */
export function afterExit<S extends ContainerState>(
  state: S,
  exit: Exit,
): S | { readonly kind: 'stopped'; readonly exit: Exit } {
  return state.kind === 'stopped' || state.kind === 'deleted' ? state : { kind: 'stopped', exit };
}
