/**
 * Which TCP ports have listeners at the guest's loopback addresses. A program of ours says it (native/guest-listeners.c), since
 * only BPF is told by the kernel; it runs from when it is asked for first, and sleeps while nothing changes.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { AgentError } from './errors.ts';
import type { Reaper } from './reaper.ts';

/** How long after its end the program is started again, in ms. Nothing ends it but a guest that runs out of memory. */
const restartMs = 1000;

export interface ListeningPorts {
  readonly ipv4Ports: number[];
  readonly ipv6Ports: number[];
}

export interface ListenersOptions {
  /** /usr/lib/kiln/kiln-listeners. */
  readonly program: string;
  /** Of whose sockets the kernel tells, with those below it; undefined where the program has to look by itself. */
  readonly cgroup: string | undefined;
  readonly reaper: Reaper;
}

export class Listeners {
  readonly #options: ListenersOptions;
  readonly #watchers = new Set<(ports: ListeningPorts) => void>();
  #child: ChildProcess | undefined;
  /** What the program has said last; undefined before its first word. */
  #ports: ListeningPorts | undefined;

  constructor(options: ListenersOptions) {
    this.#options = options;
  }

  /** Has the program run, if it does not yet. @throws AgentError internal when it cannot be run */
  start(): void {
    if (this.#child !== undefined) return;
    const { program, cgroup, reaper } = this.#options;
    const child = spawn(program, cgroup === undefined ? [] : [cgroup], { stdio: ['ignore', 'pipe', 'ignore'] });
    reaper.leaveToNode(child);
    child.on('error', () => {});
    if (child.pid === undefined) throw new AgentError('internal', `cannot run ${program}`);
    this.#child = child;
    // It ends with the agent, and keeps nobody waiting.
    child.unref();
    createInterface({ input: child.stdout }).on('line', (line) => this.#tell(parseListeners(line)));
    child.once('exit', () => {
      this.#child = undefined;
      if (this.#watchers.size > 0) this.#startAgain();
    });
  }

  #startAgain(): void {
    setTimeout(() => {
      try {
        this.start();
      } catch {
        this.#startAgain();
      }
    }, restartMs).unref();
  }

  /** Calls `onPorts` with the ports as soon as they are known, and whenever they have changed, until disposed. */
  watch(onPorts: (ports: ListeningPorts) => void): Disposable {
    this.start();
    this.#watchers.add(onPorts);
    if (this.#ports !== undefined) onPorts(this.#ports);
    return { [Symbol.dispose]: () => void this.#watchers.delete(onPorts) };
  }

  #tell(ports: ListeningPorts): void {
    this.#ports = ports;
    for (const onPorts of this.#watchers) onPorts(ports);
  }
}

/** A line of the program: "4:80 6:80 4:8080". */
export function parseListeners(line: string): ListeningPorts {
  const words = line.split(' ');
  const portsOf = (family: '4' | '6') =>
    words.filter((word) => word.startsWith(`${family}:`)).map((word) => Number(word.slice(2)));
  return { ipv4Ports: portsOf('4'), ipv6Ports: portsOf('6') };
}

/** Ports as the protocol has them. */
export function encodePorts(ports: readonly number[]): Buffer {
  const bytes = Buffer.alloc(2 * ports.length);
  for (const [index, port] of ports.entries()) bytes.writeUInt16BE(port, 2 * index);
  return bytes;
}
