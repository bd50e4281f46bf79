import { consoleBufferBytes } from './command-line.ts';
import type { QmpClient } from './qmp.ts';

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
    try {
      const news = await this.#qmp.execute('ringbuf-read', { device: 'console', size: consoleBufferBytes });
      this.#text = `${this.#text}${printable(String(news))}`.slice(-consoleBufferBytes);
    } catch {
      // The VM is ending; its last words have been read, or cannot be.
    }
    return this.#text.trim().slice(-maxChars).trim();
  }
}

/** Without escape sequences and control characters: the guest's words end up on the user's terminal. */
function printable(text: string): string {
  return (
    text
      // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is removed. ECMA-48: CSI … final byte.
      .replace(/\u001b\[[0-?]*[ -/]*[@-~]/g, '')
      .replace(/\r\n?/g, '\n')
      // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is removed.
      .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, '')
  );
}
