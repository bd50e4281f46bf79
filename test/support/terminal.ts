/**
 * A real terminal for tests: tmux in its control mode, tmux(1). A program runs in it as on somebody's screen; the test
 * types, looks at the screen as it is drawn, and changes the window's size.
 *
 * In control mode tmux reads commands on its stdin, answers each between `%begin` and `%end`, and says `%output` whenever
 * the program has written: that is when the screen is looked at again.
 */
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { Lines, type RunningProgram, stream } from './spawn.ts';

export interface TerminalOptions {
  readonly columns?: number;
  readonly rows?: number;
  readonly env?: NodeJS.ProcessEnv;
  /** A folder for tmux's socket. */
  readonly directory: string;
}

export class Terminal implements AsyncDisposable {
  readonly #tmux: RunningProgram;
  readonly #lines: Lines;
  /** Where in the lines the answers to our commands begin. */
  #asked = 0;
  #queue: Promise<unknown> = Promise.resolve();

  /** Runs a program; its end ends the terminal. */
  constructor(command: readonly string[], options: TerminalOptions) {
    const { columns = 80, rows = 24, env, directory } = options;
    const socket = join(directory, `tmux-${randomBytes(3).toString('hex')}`);
    const size = ['-x', String(columns), '-y', String(rows)];
    const args = ['-C', '-S', socket, '-f', '/dev/null', 'new-session', ...size, '--', ...command];
    this.#tmux = stream('tmux', args, {
      env: { PATH: process.env.PATH, TERM: 'xterm', LANG: 'C.UTF-8', ...env },
      interactive: true,
      timeout: 170_000,
    });
    this.#tmux.stderr.resume();
    this.#lines = new Lines(this.#tmux.stdout);
    // The answer to new-session itself.
    this.#asked = 1;
  }

  /** Types text as it is. */
  async type(text: string): Promise<void> {
    const bytes = Array.from(Buffer.from(text), (byte) => byte.toString(16).padStart(2, '0'));
    await this.#ask(`send-keys -H ${bytes.join(' ')}`);
  }

  /** Presses a key by tmux's name: Enter, C-c, Up. */
  async press(key: string): Promise<void> {
    await this.#ask(`send-keys ${key}`);
  }

  async resize(columns: number, rows: number): Promise<void> {
    await this.#ask(`resize-window -x ${columns} -y ${rows}`);
  }

  /** What is on the screen now, without trailing blanks. */
  async screen(): Promise<string> {
    const lines = await this.#ask('capture-pane -p');
    return lines.map((line) => line.trimEnd()).join('\n');
  }

  /** Waits until the screen shows this; returns the screen. */
  async waitFor(wanted: RegExp | ((screen: string) => boolean), timeout = 60_000): Promise<string> {
    const isThere = typeof wanted === 'function' ? wanted : (screen: string) => wanted.test(screen);
    const deadline = Date.now() + timeout;
    for (;;) {
      const seen = this.#outputs();
      const screen = await this.screen();
      if (isThere(screen)) return screen;
      const what = `${wanted} on the screen, which is:\n${screen}\n`;
      await this.#lines.waitFor(() => this.#outputs() > seen, what, deadline - Date.now());
    }
  }

  /** Resolves when the program has ended. */
  get ended(): Promise<number> {
    return this.#tmux.exit;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#tmux.stdin.end('kill-server\n');
    await this.#tmux.exit.catch(() => undefined);
    await this.#tmux[Symbol.asyncDispose]();
  }

  #outputs(): number {
    return this.#lines.all.filter((line) => line.startsWith('%output') || line.startsWith('%layout-change')).length;
  }

  /** One command after the other: answers carry no name. */
  #ask(command: string): Promise<string[]> {
    const answer = this.#queue.then(() => this.#command(command));
    this.#queue = answer.catch(() => undefined);
    return answer;
  }

  async #command(command: string): Promise<string[]> {
    await this.#lines.waitFor(() => this.#answers().length >= this.#asked, 'the answer before', 30_000);
    const index = this.#asked;
    this.#asked += 1;
    this.#tmux.stdin.write(`${command}\n`);
    await this.#lines.waitFor(() => this.#answers().length > index, `tmux's answer to ${command}`, 30_000);
    const answer = this.#answers()[index];
    if (answer === undefined || answer.failed) throw new Error(`tmux refused ${command}: ${answer?.lines.join(' ')}`);
    return answer.lines;
  }

  #answers(): { failed: boolean; lines: string[] }[] {
    const answers: { failed: boolean; lines: string[] }[] = [];
    let open: string[] | undefined;
    for (const line of this.#lines.all) {
      if (open === undefined) {
        if (line.startsWith('%begin ')) open = [];
      } else if (line.startsWith('%end ') || line.startsWith('%error ')) {
        answers.push({ failed: line.startsWith('%error '), lines: open });
        open = undefined;
      } else open.push(line);
    }
    return answers;
  }
}
