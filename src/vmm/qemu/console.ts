import { setTimeout as delay } from 'node:timers/promises';
import { printable } from '../../host/printable.ts';
import { consoleBufferBytes } from './command-line.ts';
import type { QmpClient } from './qmp.ts';

/** How long QEMU may take to tell the console: one that hangs must not hold up its own end. In ms. */
const answerLimitMs = 2000;

/**
 * The guest's console. QEMU keeps the newest output in a ring buffer, and reading takes it out of there; so what was read
 * is kept here, and every reader sees the same tail.
 */
export class GuestConsole {
  readonly #qmp: QmpClient;
  #text = '';

  constructor(qmp: QmpClient) {
    this.#qmp = qmp;
  }

  /** At most the last `maxChars` characters; only what was read before once QEMU no longer answers. */
  async tail(maxChars: number): Promise<string> {
    if (!this.#qmp.closed) await this.#read();
    return this.#text.trim().slice(-maxChars).trim();
  }

  async #read(): Promise<void> {
    try {
      const request = this.#qmp.execute('ringbuf-read', { device: 'console', size: consoleBufferBytes });
      const news = await Promise.race([request, delay(answerLimitMs, '', { ref: false })]);
      this.#text = `${this.#text}${printable(String(news))}`.slice(-consoleBufferBytes);
    } catch {
      // The VM is ending; its last words have been read, or cannot be.
    }
  }
}
