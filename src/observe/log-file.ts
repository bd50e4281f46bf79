/**
 * The file behind the log: synchronous appends, so that the last line before a crash is in it, and so that nothing
 * piles up in memory when the disk is full. A line that cannot be written is dropped and counted; the next one that can
 * be is preceded by the count. The log never takes the daemon down with it.
 */
import { closeSync, openSync, writeSync } from 'node:fs';

export class LogFile {
  readonly path: string;
  readonly #describeLoss: (dropped: number) => string;
  #fd: number | undefined;
  #dropped = 0;
  /** A part of a line is on disk: the next one must start on a line of its own. */
  #torn = false;

  /** @param describeLoss the line (without its line feed) that tells a reader how many lines are missing. */
  constructor(path: string, describeLoss: (dropped: number) => string) {
    this.path = path;
    this.#describeLoss = describeLoss;
    this.#fd = openAppending(path);
  }

  /** Lines lost since the last one that was written. */
  get dropped(): number {
    return this.#dropped;
  }

  /** Appends one line, its line feed included. Never throws. The name and form are those of a pino destination. */
  write(line: string): void {
    const lost = this.#dropped === 0 ? '' : `${this.#describeLoss(this.#dropped)}\n`;
    const bytes = Buffer.from(`${this.#torn ? '\n' : ''}${lost}${line}`);
    let written = 0;
    try {
      if (this.#fd === undefined) throw new Error('closed');
      // A write that ends half way is followed by one that tells why: ENOSPC, EDQUOT, EIO.
      while (written < bytes.length) written += writeSync(this.#fd, bytes, written);
      this.#dropped = 0;
      this.#torn = false;
    } catch {
      this.#dropped += 1;
      this.#torn ||= written > 0;
    }
  }

  /** Opens the file anew by its name: for after a rotation. Keeps the open one when that fails. */
  reopen(): void {
    const fd = openAppending(this.path);
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = fd;
    this.#torn = false;
  }

  close(): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = undefined;
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** 0640: a log may be shown to a group of administrators, but not to every user. */
function openAppending(path: string): number {
  return openSync(path, 'a', 0o640);
}
