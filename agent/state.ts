/**
 * The states of a container, and what each allows.
 *
 *   creating ──▶ created ──▶ running ──▶ stopped ──▶ removing ──▶ (gone)
 *                   └───────────────────────┴───▲
 *
 * Only this file changes a state. A call that a state forbids is FAILED_PRECONDITION, and the error names the container,
 * its state, and what was asked.
 */
import { AgentError } from './errors.ts';
import type { ProcessExit } from './process.ts';

export type State =
  | { readonly kind: 'creating' }
  | { readonly kind: 'created'; readonly pid: number }
  | { readonly kind: 'running'; readonly pid: number }
  | { readonly kind: 'stopped'; readonly pid: number; readonly exit: ProcessExit }
  | { readonly kind: 'removing' };

type Kind = State['kind'];

/** Which states may follow which. */
const next: Record<Kind, readonly Kind[]> = {
  creating: ['created'],
  created: ['running', 'stopped', 'removing'],
  running: ['stopped'],
  stopped: ['removing'],
  removing: [],
};

export class ContainerState {
  readonly #id: string;
  #state: State = { kind: 'creating' };

  constructor(id: string) {
    this.#id = id;
  }

  get current(): State {
    return this.#state;
  }

  /** Goes to the next state. @throws AgentError failed-precondition when the current one does not allow it */
  become(state: State): void {
    if (!next[this.#state.kind].includes(state.kind)) throw this.refusal(`become ${state.kind}`);
    this.#state = state;
  }

  /** The current state, if it is one of `kinds`. @throws AgentError failed-precondition otherwise */
  expect<K extends Kind>(action: string, ...kinds: K[]): Extract<State, { kind: K }> {
    if (!(kinds as Kind[]).includes(this.#state.kind)) throw this.refusal(action);
    return this.#state as Extract<State, { kind: K }>;
  }

  /** The error for an action that the current state forbids: `cannot start container "x": it is stopped`. */
  refusal(action: string): AgentError {
    return new AgentError('failed-precondition', `cannot ${action} container "${this.#id}": it is ${this.#state.kind}`);
  }
}
