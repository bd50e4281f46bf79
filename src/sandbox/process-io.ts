import { Writable } from 'node:stream';
import { KilnError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import type { OutputName } from '../guest/streams.ts';
import type { GuestStdio, ProcessRef, TerminalSize } from '../guest/terms.ts';
import type { GuestExit } from '../guest/wait.ts';
import { outputGraceMs } from './limits.ts';
import type { Positions } from './positions.ts';
import type { ContainerStdio } from './stdio.ts';

/** What a process is given, in the guest's terms. */
export function guestStdio(
  { stdin, stdout, stderr }: ContainerStdio,
  terminal: boolean,
  size: TerminalSize | undefined,
): GuestStdio {
  return { stdin: stdin !== null, stdout: stdout !== null, stderr: stderr !== null, terminal, size };
}

/** Follows one output stream's progress. */
class Progress {
  #delivered: number;
  readonly #waiting: { readonly offset: number; readonly resolve: () => void }[] = [];

  constructor(from: number) {
    this.#delivered = from;
  }

  advance(offset: number): void {
    this.#delivered = offset;
    for (const { offset: wanted, resolve } of this.#waiting) if (offset >= wanted) resolve();
  }

  /** Resolves when so many bytes are delivered. */
  reached(offset: number): Promise<void> {
    if (this.#delivered >= offset) return Promise.resolve();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#waiting.push({ offset, resolve });
    return promise;
  }
}

/**
 * The streams of one process between the guest and the host's stdio. None of its promises rejects: a stream that breaks
 * is reported, and the others go on.
 */
export class ProcessIo {
  readonly #guest: Guest;
  readonly #process: ProcessRef;
  readonly #stdio: ContainerStdio;
  readonly #positions: Positions;
  readonly #report: (error: unknown, message: string) => void;
  readonly #outputs: readonly {
    readonly name: OutputName;
    readonly progress: Progress;
    readonly ended: Promise<void>;
  }[];
  #pipesStdin = false;
  /** Resolves when all outputs have ended and their readers see the end. */
  readonly drained: Promise<void>;

  /** Begins to relay the outputs; the process must exist in the guest. */
  constructor(options: {
    readonly guest: Guest;
    readonly process: ProcessRef;
    readonly stdio: ContainerStdio;
    readonly terminal: boolean;
    /** Where an earlier kilnd came to, and where we write down how far we are. */
    readonly positions: Positions;
    readonly report: (error: unknown, message: string) => void;
  }) {
    const { guest, process, stdio, terminal, positions, report } = options;
    const from = positions.read();
    this.#guest = guest;
    this.#process = process;
    this.#stdio = stdio;
    this.#positions = positions;
    this.#report = report;
    const broke = this.#broke;
    let told = false;
    const writeDown = (name: OutputName, offset: number) => {
      try {
        positions.write(name, offset);
      } catch (error) {
        // It is the next kilnd's loss, if there is to be one: the output itself goes on.
        if (!told) report(error, 'cannot write down how far the output is: the next kilnd would begin before');
        told = true;
      }
    };
    const target = (name: OutputName, sink: Writable | null) => {
      if (sink === null) return [];
      const progress = new Progress(from[name]);
      const onDelivered = (offset: number) => {
        writeDown(name, offset);
        progress.advance(offset);
      };
      return [{ stream: name, from: from[name], sink, onDelivered, progress }];
    };
    // A terminal that nobody reads would stop the program.
    const stdout = terminal ? (stdio.stdout ?? nowhere()) : stdio.stdout;
    const targets = [...target('stdout', stdout), ...target('stderr', stdio.stderr)];
    this.#outputs = guest.pipeOutputs(process, targets).map(({ stream, progress, ended }) => {
      return { name: stream, progress, ended: ended.catch(broke) };
    });
    this.drained = Promise.all(this.#outputs.map(({ ended }) => ended))
      .then(() => stdio.finish())
      .catch((error: unknown) => report(error, 'cannot finish the output'));
  }

  readonly #broke = (error: unknown): void => this.#report(error, 'a stdio stream ended early');

  /** Begins to relay stdin. Later calls do nothing. */
  pipeStdin(): void {
    const { stdin } = this.#stdio;
    if (stdin === null || this.#pipesStdin) return;
    this.#pipesStdin = true;
    this.#guest.pipeStdin(this.#process, stdin).catch(unlessClosed(this.#broke));
  }

  /**
   * Resolves when everything that the process itself has written is delivered; children that it left behind may hold
   * its pipes open and write on. A reader that stalls holds it back for a second and no longer.
   */
  async settled(written: GuestExit['written']): Promise<void> {
    const all = this.#outputs.map(({ name, progress, ended }) => {
      const offset = written[name];
      return offset === undefined ? ended : Promise.race([ended, progress.reached(offset)]);
    });
    let timer: NodeJS.Timeout | undefined;
    const grace = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, outputGraceMs).unref();
    });
    await Promise.race([Promise.all(all), grace]);
    clearTimeout(timer);
  }

  /** Ends all streams at once; unwritten bytes are lost. Never rejects. */
  async dispose(): Promise<void> {
    await this.#stdio.dispose().catch((error: unknown) => this.#report(error, 'cannot release the stdio'));
    this.#positions[Symbol.dispose]();
  }
}

/** stdin may have been closed before, under an earlier kilnd. */
function unlessClosed(report: (error: unknown) => void): (error: unknown) => void {
  return (error) => {
    if (!(error instanceof KilnError && error.code === 'failed-precondition')) report(error);
  };
}

function nowhere(): Writable {
  return new Writable({ write: (_chunk, _encoding, done) => done() });
}
