import { closeSync, openSync, writeSync } from 'node:fs';
import { devNull } from 'node:os';
import { expect, it } from 'vitest';
import { bytesInPipe, growPipe, pipe2 } from '../../../src/sys/pipe.ts';

it('a pipe that was grown takes so many bytes without a reader', () => {
  const { read, write } = pipe2();
  try {
    expect(growPipe(read, 256 * 1024)).toBe(true);
    expect(writeSync(write, Buffer.alloc(256 * 1024))).toBe(256 * 1024);
    expect(bytesInPipe(read)).toBe(256 * 1024);
  } finally {
    closeSync(read);
    closeSync(write);
  }
});

it('growing what is no pipe fails with the system’s reason', () => {
  const fd = openSync(devNull, 'r');
  try {
    expect(() => growPipe(fd, 4096)).toThrow('EBADF');
  } finally {
    closeSync(fd);
  }
});
