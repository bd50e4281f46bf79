/**
 * A task's own log: lines for containerd, which copies them to its own log.
 *
 * containerd makes the FIFO `<bundle>/log` before it calls the shim and holds it open for reading and writing, so a
 * line written there shows up in `journalctl -u containerd` next to containerd's lines about the same task. The
 * customary form is that of Go's logrus text formatter:
 *
 *     time="2026-01-31T12:00:00.123Z" level=info msg="container started" id=web
 *
 * While containerd is down there is no reader (ENXIO on open, EPIPE on write), and when it is slow the pipe fills
 * (EAGAIN). A log must neither block nor fail the task, so such lines are dropped and counted.
 */
import { closeSync, constants, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';

export type TaskLogLevel = 'debug' | 'info' | 'warning' | 'error';

/** Up to PIPE_BUF bytes a write to a pipe is all or nothing, never mixed with another writer's. pipe(7). */
const pipeBuf = 4096;

export class TaskLog {
  readonly #path: string;
  readonly #id: string;
  #fd: number | undefined;
  #dropped = 0;
  #closed = false;

  /**
   * @param bundleDir the bundle whose `log` FIFO is written; it need not exist
   * @param id the container's id, on every line
   */
  constructor(bundleDir: string, id: string) {
    this.#path = join(bundleDir, 'log');
    this.#id = id;
  }

  /** Lines lost since the last one that was written. */
  get dropped(): number {
    return this.#dropped;
  }

  debug(message: string): void {
    this.#log('debug', message);
  }

  info(message: string): void {
    this.#log('info', message);
  }

  warn(message: string): void {
    this.#log('warning', message);
  }

  error(message: string): void {
    this.#log('error', message);
  }

  /** Later lines are dropped. */
  close(): void {
    this.#closed = true;
    this.#release();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #log(level: TaskLogLevel, message: string): void {
    if (this.#closed) return;
    const lost =
      this.#dropped === 0 ? '' : formatLine('warning', `${this.#dropped} lines before this one were lost`, this.#id);
    if (this.#write(lost + formatLine(level, message, this.#id))) this.#dropped = 0;
    else this.#dropped += 1;
  }

  #write(text: string): boolean {
    // The descriptor may belong to a containerd that is gone: open anew once.
    return this.#writeOnce(text) === 'written' || (this.#fd === undefined && this.#writeOnce(text) === 'written');
  }

  #writeOnce(text: string): 'written' | 'lost' {
    try {
      this.#fd ??= openSync(this.#path, constants.O_WRONLY | constants.O_NONBLOCK | constants.O_APPEND);
      writeSync(this.#fd, text);
      return 'written';
    } catch (error) {
      // A full pipe stays usable.
      if (!(error instanceof Error && 'code' in error && error.code === 'EAGAIN')) this.#release();
      return 'lost';
    }
  }

  #release(): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = undefined;
  }
}

/** One line as logrus would write it, cut so that two of them fit into PIPE_BUF. */
export function formatLine(level: TaskLogLevel, message: string, id: string, time = new Date()): string {
  const head = `time=${quote(time.toISOString())} level=${level} msg=`;
  const tail = ` id=${quote(id)}\n`;
  const room = pipeBuf / 2 - Buffer.byteLength(head) - Buffer.byteLength(tail);
  return `${head}${quoteWithin(message, room)}${tail}`;
}

function quoteWithin(text: string, room: number): string {
  let kept = text;
  let quoted = quote(text);
  while (Buffer.byteLength(quoted) > room) {
    // Each character gives at most six bytes quoted, so this ends in a few rounds.
    const over = Buffer.byteLength(quoted) - room;
    kept = kept.slice(0, Math.max(0, kept.length - Math.ceil(over / 6) - 1));
    quoted = quote(`${kept}…`);
  }
  return quoted;
}

/** logrus leaves words of these characters bare and writes everything else in Go's quotes, which JSON's come close to. */
function quote(text: string): string {
  return /^[A-Za-z0-9\-._/@^+]+$/.test(text) ? text : JSON.stringify(text);
}
