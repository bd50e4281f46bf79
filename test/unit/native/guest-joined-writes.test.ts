import { spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { compile, hasGcc, temporaryFolder } from './harness.ts';

describe.skipIf(!hasGcc)('kiln-joined-writes.so', () => {
  const folder = temporaryFolder();
  const library = join(folder, 'kiln-joined-writes.so');

  beforeAll(() => compile(['guest-joined-writes.c'], library));
  afterAll(() => rmSync(folder, { recursive: true }));

  /** What a Node writes to stdout and stderr that runs this, with the library or without. */
  function written(script: string, preload = library): readonly string[] {
    const env = { ...process.env, LD_PRELOAD: preload };
    const { output } = spawnSync(process.execPath, ['-e', `const fs = require('node:fs');${script}`], { env });
    return output.slice(1).map(String);
  }

  // Linux gives writev(2) to the file of a process's name piece by piece, too, and the last write is its name.
  const rename = `const file = fs.openSync('/proc/self/comm', 'w');
    fs.writevSync(file, ['ab', 'cd', 'ef'].map((piece) => Buffer.from(piece)));
    fs.writeSync(1, fs.readFileSync('/proc/self/comm'));`;

  it('has a file that takes no pieces take them at once', () => {
    expect(written(rename, '')).toEqual(['ef\n', '']);
    expect(written(rename)).toEqual(['abcdef\n', '']);
  });

  it.each([[[0, 1, 0]], [[1, 16_383]], [[1, 16_384]], [[16_384, 1, 5]], [[9, 60_000, 7]]])(
    'writes pieces of %j bytes as they are, and says how many',
    (lengths) => {
      const pieces = `${JSON.stringify(lengths)}.map((length, index) => Buffer.alloc(length, 97 + index))`;
      const all = lengths.map((length, index) => String.fromCharCode(97 + index).repeat(length)).join('');
      expect(written(`fs.writeSync(2, String(fs.writevSync(1, ${pieces})));`)).toEqual([all, String(all.length)]);
    },
  );

  it('fails as the write does', () => {
    const script = `try { fs.writevSync(fs.openSync('/dev/full', 'w'), [Buffer.from('a'), Buffer.from('b')]); }
      catch (error) { fs.writeSync(1, error.code); }`;
    expect(written(script)).toEqual(['ENOSPC', '']);
  });
});
