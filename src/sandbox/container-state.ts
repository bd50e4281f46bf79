import { KilnError } from '../errors.ts';

/** How a container's init process ended. */
export interface Exit {
  /** 0 to 255; 128 + n when signal n ended it. */
  readonly status: number;
  readonly at: Date;
}

/**
 * The life of a container:
 *
 *   created ──start──▶ starting ──▶ running ──exit──▶ stopped ──delete──▶ deleted
 *     │ ▲───failed───────┘           │   ▲                ▲
 *     │                            pause resume           │
 *     │                              ▼   │                │
 *     │                      pausing ──▶ paused           │
 *     └──────────────────exit (killed, in any state)──────┘
 *
 * `starting` is a state of its own so that a second Start is refused while the first is under way; the exit of a program
 * that ends at once waits for the end of its start. An action that a state forbids is refused here and nowhere else; the message names both.
 */
export type ContainerState =
  | { readonly kind: 'created' }
  | { readonly kind: 'starting' }
  | { readonly kind: 'running' }
  /** Its processes are being frozen, and its filesystems flushed. */
  | { readonly kind: 'pausing' }
  | { readonly kind: 'paused' }
  | { readonly kind: 'stopped'; readonly exit: Exit }
  | { readonly kind: 'deleted'; readonly exit: Exit };

function refuse(id: string, action: string, state: ContainerState): KilnError {
  return new KilnError('failed-precondition', `cannot ${action} container ${id}: it is ${state.kind}`);
}

export function requireStartable(id: string, state: ContainerState): void {
  if (state.kind !== 'created') throw refuse(id, 'start', state);
}

export function requirePausable(id: string, state: ContainerState): void {
  if (state.kind !== 'running') throw refuse(id, 'pause', state);
}

export function requireResumable(id: string, state: ContainerState): void {
  if (state.kind !== 'paused') throw refuse(id, 'resume', state);
}

/** As in runc's shim: a process that is added to a frozen container would be frozen before it had begun. */
export function requireExecable(id: string, state: ContainerState): void {
  if (state.kind !== 'created' && state.kind !== 'running') throw refuse(id, 'exec in', state);
}

/** There must be processes, or an init that waits to become one. */
export function requireUpdatable(id: string, state: ContainerState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw refuse(id, 'update', state);
}

/** containerd's contract: a signal to a process that has ended is NotFound, not FailedPrecondition. */
export function requireSignalable(id: string, state: ContainerState): void {
  if (state.kind === 'stopped' || state.kind === 'deleted') throw alreadyFinished(id);
}

export function alreadyFinished(id: string): KilnError {
  return new KilnError('not-found', `container ${id}: process already finished`);
}

export function requireDeletable(id: string, state: ContainerState): void {
  if (state.kind !== 'created' && state.kind !== 'stopped') throw refuse(id, 'delete', state);
}

/** The state after the init process ended; an exit that is already known stays. */
export function afterExit(state: ContainerState, exit: Exit): ContainerState {
  return state.kind === 'stopped' || state.kind === 'deleted' ? state : { kind: 'stopped', exit };
}
