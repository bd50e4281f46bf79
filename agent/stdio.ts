/**
 * A process's stdin, stdout and stderr: a pipe each, or one terminal for all three.
 *
 * The pipes are real ones: programs open /dev/stdout again, which no socket allows. A terminal is made by crun inside the
 * container, so that it has a name there (`tty`, /dev/console); crun sends its master to a socket of ours.
 */
import { closeSync, rmSync } from 'node:fs';
import { type Pipe, pipe2 } from '../src/sys/pipe.ts';
import { duplicate, setWindowSize } from '../src/sys/terminal.ts';
import { listenForPeers, receiveFd } from '../src/sys/unix-fd.ts';
import { AgentError } from './errors.ts';
import { Input } from './input.ts';
import { Output } from './output.ts';

export interface WantedStdio {
  readonly stdin: boolean;
  readonly stdout: boolean;
  readonly stderr: boolean;
  readonly terminal: boolean;
  /** Characters; 0 leaves the terminal as the spec has it. */
  readonly width: number;
  readonly height: number;
}

/** File descriptors; null is /dev/null. */
export type ProgramStdio = readonly [number | null, number | null, number | null];

export interface ProcessStdio extends Disposable {
  readonly stdin: Input | undefined;
  readonly stdout: Output | undefined;
  readonly stderr: Output | undefined;
  /** What crun is started with, and the program inherits. */
  readonly forProgram: ProgramStdio;
  /** Where crun sends the terminal's master; undefined without a terminal. */
  readonly consoleSocket: string | undefined;
  /** To be called once the program exists, or at least its place: takes the terminal, and closes the program's ends. */
  connect(): void;
  /** @throws AgentError failed-precondition without a terminal */
  resize(width: number, height: number): void;
}

export function makeStdio(wanted: WantedStdio, consoleSocket: string): ProcessStdio {
  return wanted.terminal ? new TerminalStdio(wanted, consoleSocket) : new PipeStdio(wanted);
}

class PipeStdio implements ProcessStdio {
  readonly stdin: Input | undefined;
  readonly stdout: Output | undefined;
  readonly stderr: Output | undefined;
  readonly forProgram: ProgramStdio;
  readonly consoleSocket = undefined;
  readonly #programEnds: number[];

  constructor(wanted: WantedStdio) {
    using undo = new DisposableStack();
    const pipe = (want: boolean): Pipe | undefined => {
      if (!want) return undefined;
      const made = pipe2();
      undo.defer(() => {
        closeSync(made.read);
        closeSync(made.write);
      });
      return made;
    };
    const stdin = pipe(wanted.stdin);
    const stdout = pipe(wanted.stdout);
    const stderr = pipe(wanted.stderr);
    this.stdin = stdin === undefined ? undefined : new Input(stdin.write);
    this.stdout = stdout === undefined ? undefined : new Output(stdout.read, 'stdout');
    this.stderr = stderr === undefined ? undefined : new Output(stderr.read, 'stderr');
    this.forProgram = [stdin?.read ?? null, stdout?.write ?? null, stderr?.write ?? null];
    this.#programEnds = this.forProgram.filter((end) => end !== null);
    undo.move();
  }

  /** Without closing our copies of the program's ends, its output would never end. */
  connect(): void {
    for (const fd of this.#programEnds.splice(0)) closeSync(fd);
  }

  resize(): void {
    throw new AgentError('failed-precondition', 'it has no terminal');
  }

  [Symbol.dispose](): void {
    this.connect();
    this.stdin?.[Symbol.dispose]();
    this.stdout?.[Symbol.dispose]();
    this.stderr?.[Symbol.dispose]();
  }
}

class TerminalStdio implements ProcessStdio {
  readonly forProgram: ProgramStdio = [null, null, null];
  readonly consoleSocket: string;
  readonly stderr = undefined;
  readonly #wanted: WantedStdio;
  #listener: number | undefined;
  /** A descriptor of the master that lives as long as this: for the size, and so that the terminal outlives its users. */
  #master: number | undefined;
  #stdin: Input | undefined;
  #stdout: Output | undefined;

  constructor(wanted: WantedStdio, consoleSocket: string) {
    this.#wanted = wanted;
    this.consoleSocket = consoleSocket;
    this.#listener = listenForPeers(consoleSocket);
  }

  get stdin(): Input | undefined {
    return this.#stdin;
  }

  get stdout(): Output | undefined {
    return this.#stdout;
  }

  connect(): void {
    if (this.#listener === undefined) return;
    this.#master = receiveFd(this.#listener);
    this.#stopListening();
    const { width, height, stdin } = this.#wanted;
    if (width > 0 && height > 0) setWindowSize(this.#master, width, height);
    this.#stdin = stdin ? new Input(duplicate(this.#master), 'terminal') : undefined;
    this.#stdout = new Output(duplicate(this.#master), 'the terminal', 'terminal');
  }

  resize(width: number, height: number): void {
    if (this.#master === undefined) throw new AgentError('failed-precondition', 'its terminal is not there yet');
    setWindowSize(this.#master, width, height);
  }

  #stopListening(): void {
    if (this.#listener === undefined) return;
    closeSync(this.#listener);
    this.#listener = undefined;
    rmSync(this.consoleSocket, { force: true });
  }

  [Symbol.dispose](): void {
    this.#stopListening();
    this.#stdin?.[Symbol.dispose]();
    this.#stdout?.[Symbol.dispose]();
    if (this.#master !== undefined) closeSync(this.#master);
    this.#master = undefined;
  }
}
