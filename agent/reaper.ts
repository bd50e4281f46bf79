/**
 * Waiting for processes that Node did not start.
 *
 * The agent is a child subreaper (prctl(2)): a container's init, which crun has forked and left, becomes our child, and
 * so does any process whose parent has died. The kernel sends SIGCHLD when one of them ends, and keeps it as a zombie
 * until it is waited for. Two others wait in this process, too: libuv waits for the children that Node has spawned, each
 * by its id. So nobody here may wait for "any child": that would take a status from libuv, whose 'exit' event would
 * then never come. Instead we look (WNOWAIT) who has ended, and wait for those that are not libuv's.
 *
 * Signals of the same kind merge while they are pending, so one SIGCHLD can mean many ended children.
 */
import type { ChildProcess } from 'node:child_process';
import { type Exit, peekEndedChild, waitpid } from '../src/sys/process.ts';

export class Reaper implements Disposable {
  /** Processes that somebody waits for here. */
  readonly #watched = new Map<number, (exit: Exit) => void>();
  /** Node's own children, until libuv has waited for them. */
  readonly #nodes = new Set<number>();
  #holds = 0;
  readonly #onSignal = () => this.#reap();

  constructor() {
    process.on('SIGCHLD', this.#onSignal);
  }

  [Symbol.dispose](): void {
    process.off('SIGCHLD', this.#onSignal);
  }

  /** Leaves a child to Node. Call it in the same turn as `spawn`, before any signal can be handled. */
  leaveToNode(child: ChildProcess): void {
    const { pid } = child;
    if (pid === undefined) return;
    this.#nodes.add(pid);
    child.once('exit', () => {
      this.#nodes.delete(pid);
      // Its zombie may have hidden others from peekEndedChild.
      this.#reap();
    });
  }

  /**
   * Leaves ended processes that nobody watches yet alone, until disposed: between the moment that crun has made a
   * container's init and the moment that we know its id, its exit status must not be thrown away.
   */
  hold(): Disposable {
    this.#holds += 1;
    return {
      [Symbol.dispose]: () => {
        this.#holds -= 1;
        this.#reap();
      },
    };
  }

  /**
   * Calls `ended` once when the child ends, also if it has ended already (but then not before this returns).
   *
   * @throws SysError ECHILD when it is not our child
   */
  watch(pid: number, ended: (exit: Exit) => void): void {
    const exit = waitpid(pid);
    if (exit === null) this.#watched.set(pid, ended);
    else queueMicrotask(() => ended(exit));
  }

  #reap(): void {
    // Each by itself, as a zombie of Node's could hide it from peekEndedChild.
    for (const pid of this.#watched.keys()) this.#collect(pid);
    if (this.#holds > 0) return;
    for (let pid = peekEndedChild(); pid !== null && !this.#nodes.has(pid); pid = peekEndedChild()) this.#collect(pid);
  }

  #collect(pid: number): void {
    const exit = waitpid(pid);
    if (exit === null) return;
    const ended = this.#watched.get(pid);
    this.#watched.delete(pid);
    ended?.(exit);
  }
}
