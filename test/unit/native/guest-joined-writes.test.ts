import { spawn, spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { compile, hasGcc, temporaryFolder } from './harness.ts';

const require = createRequire(import.meta.url);

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

  describe("of which one file's writes are held", () => {
    const hold = (fd: string) => `const koffi = require(${JSON.stringify(require.resolve('koffi'))});
      const hold = koffi.load(${JSON.stringify(library)}).func('void kiln_hold_writes_to(int fd)');
      hold(${fd});`;
    const name = "fs.readFileSync('/proc/self/comm', 'utf8').trim()";

    it('has them go out in one when the event loop waits, with what is written a turn later', () => {
      const script = `const file = fs.openSync('/proc/self/comm', 'w');
        ${hold('file')}
        fs.writeSync(file, 'ab');
        setImmediate(() => {
          const before = ${name};
          fs.writevSync(file, [Buffer.from('cd'), Buffer.from('ef')]);
          setTimeout(() => fs.writeSync(1, before + ' ' + ${name}), 5);
        });`;
      expect(written(script)).toEqual([expect.stringMatching(/^(?!abcdef).* abcdef$/), '']);
    });

    it('has them go out although the event loop never waits', () => {
      const script = `${hold('1')}
        fs.writeSync(1, 'out');
        let turns = 0;
        const turn = () => (turns++ < 3 ? setImmediate(turn) : process.reallyExit(0));
        turn();`;
      expect(written(script)).toEqual(['out', '']);
    });

    it.each([[[1, 16_384]], [[1, 60_000, 1]], [[16_383, 1, 1]], [[9000, 9000, 9000]]])(
      'keeps the order of writes of %j bytes',
      (lengths) => {
        const all = lengths.map((length, index) => String.fromCharCode(97 + index).repeat(length)).join('');
        const script = `${hold('1')}
          ${JSON.stringify(lengths)}.forEach((length, index) => fs.writeSync(1, Buffer.alloc(length, 97 + index)));`;
        expect(written(script)).toEqual([all, '']);
      },
    );

    it('has them go out before the end of a connection', () => {
      const script = `${hold('1')}
        new (require('node:net').Socket)({ fd: 1, readable: false, writable: true }).end('bye');`;
      expect(written(script)).toEqual(['bye', '']);
    });

    it('loses nothing where the reader is slow', async () => {
      const script = `const fs = require('node:fs');
        ${hold('1')}
        const out = new (require('node:net').Socket)({ fd: 1, readable: false, writable: true });
        for (let n = 0; n < 3000; n += 1) out.write(String(n).padStart(100) + '\\n');`;
      const child = spawn(process.execPath, ['-e', script], {
        stdio: ['ignore', 'pipe', 'inherit'],
        env: { ...process.env, LD_PRELOAD: library },
      });
      let text = '';
      for await (const chunk of child.stdout) {
        text += chunk;
        if (text.endsWith(' 2999\n')) child.kill();
        await delay(5);
      }
      expect(text.split('\n').map(Number).slice(0, -1)).toEqual(Array.from({ length: 3000 }, (_, n) => n));
    });

    it('drops what is held for a file that is closed, and writes nothing of it to the next one of its number', () => {
      const script = `const file = fs.openSync('/proc/self/comm', 'w');
        const before = ${name};
        ${hold('file')}
        fs.writeSync(file, 'lost');
        fs.closeSync(file);
        const same = fs.openSync('/proc/self/comm', 'r') === file;
        setTimeout(() => fs.writeSync(1, JSON.stringify([same, before === ${name}])), 5);`;
      expect(written(script)).toEqual(['[true,true]', '']);
    });
  });

  it('fails as the write does', () => {
    const script = `try { fs.writevSync(fs.openSync('/dev/full', 'w'), [Buffer.from('a'), Buffer.from('b')]); }
      catch (error) { fs.writeSync(1, error.code); }`;
    expect(written(script)).toEqual(['ENOSPC', '']);
  });
});
