import { closeSync, constants, existsSync, mkdtempSync, openSync, readSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { letGo } from '../../../agent/crun.ts';
import { mkfifo } from '../../../src/sys/fifo.ts';

let directory: string;
let fifo: string;
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'kiln-crun-'));
  fifo = path.join(directory, 'exec.fifo');
});
afterEach(() => rmSync(directory, { recursive: true }));

describe('an init that waits on its FIFO', () => {
  it('gets a byte, and the FIFO has no name any more', () => {
    mkfifo(fifo, 0o600);
    const init = openSync(fifo, constants.O_RDONLY | constants.O_NONBLOCK);
    try {
      expect(letGo(fifo)).toBe(true);
      expect(existsSync(fifo)).toBe(false);
      expect(readSync(init, Buffer.alloc(8))).toBe(1);
    } finally {
      closeSync(init);
    }
  });

  it('is left to crun when it has ended, and when its FIFO is not there', () => {
    mkfifo(fifo, 0o600);
    expect(letGo(fifo)).toBe(false);
    expect(existsSync(fifo)).toBe(true);
    expect(letGo(path.join(directory, 'none'))).toBe(false);
  });
});
