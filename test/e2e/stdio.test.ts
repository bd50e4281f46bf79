import { createHash, randomBytes } from 'node:crypto';
import { Readable } from 'node:stream';
import { describe, expect, it } from 'vitest';
import { underKiln } from '../support/paths.ts';
import { bytes, digest, Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

const mebibyte = 1024 * 1024;

/** `size` bytes that no filter or text mode would let through unharmed, the same each time. */
function* noise(size: number): Generator<Buffer> {
  let state = Buffer.from('kiln');
  for (let left = size; left > 0; left -= mebibyte) {
    const parts: Buffer[] = [];
    for (let filled = 0; filled < mebibyte; filled += 64) {
      state = createHash('sha512').update(state).digest();
      parts.push(state);
    }
    yield Buffer.concat(parts).subarray(0, Math.min(left, mebibyte));
  }
}

function hashOf(chunks: Iterable<Buffer>): string {
  const hash = createHash('sha256');
  for (const chunk of chunks) hash.update(chunk);
  return hash.digest('hex');
}

describe('standard input and output', () => {
  const scene = useScene({ version: '2.1' });

  it('keeps stdout and stderr apart', async () => {
    const result = await scene.run(scene.id(), ['sh', '-c', 'echo out; echo err >&2; echo out2; echo err2 >&2']);
    expect(result).toEqual({ code: 0, stdout: Buffer.from('out\nout2\n'), stderr: 'err\nerr2\n' });
  });

  it('pipes stdin in and closes it', async () => {
    await using program = scene.runStream(scene.id(), ['sh', '-c', 'echo ready; cat; echo end'], { interactive: true });
    const lines = new Lines(program.stdout);
    await lines.waitFor((line) => line === 'ready', 'ready');
    program.stdin.end('one\ntwo');
    program.stderr.resume();
    expect(await program.exit).toBe(0);
    expect(lines.all).toEqual(['ready', 'one', 'twoend']);
  });

  // With runc these two wait for ever: ctr forgets to tell the shim of an end that comes before the task was created.
  it.runIf(underKiln)('pipes in what was already closed before the start', async () => {
    const result = await scene.run(scene.id(), ['sh', '-c', 'cat; echo end'], { stdin: 'one\ntwo' });
    expect(result.stdout.toString()).toBe('one\ntwoend\n');
  });

  it.runIf(underKiln)('gives a program without input the end of file at once', async () => {
    const result = await scene.run(scene.id(), ['sh', '-c', 'cat | wc -c']);
    expect(result.stdout.toString().trim()).toBe('0');
  });

  it('carries a conversation line by line', async () => {
    await using program = scene.runStream(scene.id(), ['sh', '-c', 'while read -r x; do echo "<$x>"; done; echo bye'], {
      interactive: true,
    });
    program.stderr.resume();
    const lines = new Lines(program.stdout);
    for (const word of ['alpha', 'beta', 'gamma']) {
      program.stdin.write(`${word}\n`);
      await lines.waitFor((line) => line === `<${word}>`, `<${word}>`);
    }
    program.stdin.end();
    expect(await program.exit).toBe(0);
    expect(lines.all.at(-1)).toBe('bye');
  });

  it('carries 64 MiB of binary output to the byte', async () => {
    // The program makes them itself: AES of zeros would need openssl, a seeded awk is too slow; so one MiB of noise
    // comes in and goes out 64 times, each time behind a different header.
    const [block = Buffer.alloc(0)] = noise(mebibyte);
    const script =
      'cat >/tmp/b; i=0; while [ $i -lt 64 ]; do printf "%08d" $i; tail -c 1048568 /tmp/b; i=$((i+1)); done';
    await using program = scene.runStream(scene.id(), ['sh', '-c', script], { stdin: block });
    const [received, stderr] = await Promise.all([digest(program.stdout), bytes(program.stderr)]);
    expect(stderr.toString()).toBe('');
    expect(await program.exit).toBe(0);
    const expected = hashOf(
      (function* () {
        for (let i = 0; i < 64; i += 1) yield* [Buffer.from(String(i).padStart(8, '0')), block.subarray(8)];
      })(),
    );
    expect(received).toEqual({ length: 64 * mebibyte, sha256: expected });
  });

  it('carries 16 MiB of input to the byte', async () => {
    const size = 16 * mebibyte;
    const result = await scene.run(scene.id(), ['sha256sum', '-'], { stdin: Readable.from(noise(size)) });
    expect(result.stdout.toString().split(' ')[0]).toBe(hashOf(noise(size)));
  });

  it('holds a program back while nobody reads, and loses nothing', async () => {
    const script = 'i=0; while [ $i -lt 200000 ]; do echo "line $i of a slow reader"; i=$((i+1)); done';
    await using program = scene.runStream(scene.id(), ['sh', '-c', `${script}; echo done >&2`]);
    const complained = new Lines(program.stderr);
    program.stdout.pause();
    // Only after the reader begins may the writer come to its end.
    expect(complained.all).toEqual([]);
    const all = (await bytes(program.stdout)).toString().split('\n');
    expect(all.length).toBe(200_001);
    expect(all[199_999]).toBe('line 199999 of a slow reader');
    expect(await program.exit).toBe(0);
    expect(complained.all).toEqual(['done']);
  });

  it('delivers what was written right before the exit', async () => {
    const secret = randomBytes(16).toString('hex');
    for (let i = 0; i < 3; i += 1) {
      const result = await scene.run(scene.id(), ['sh', '-c', `echo ${secret}; echo ${secret} >&2; exit 3`]);
      expect(result).toEqual({ code: 3, stdout: Buffer.from(`${secret}\n`), stderr: `${secret}\n` });
    }
  });

  it('does not stop when the input is larger than what the program reads', async () => {
    const result = await scene.run(scene.id(), ['head', '-c', '5'], { stdin: Readable.from(noise(4 * mebibyte)) });
    expect(result.stdout).toEqual([...noise(mebibyte)][0]?.subarray(0, 5));
    expect(result.code).toBe(0);
  });

  it('works with --null-io', async () => {
    const result = await scene.run(scene.id(), ['sh', '-c', 'echo unseen; cat; exit 4'], {
      flags: ['--rm', '--null-io'],
    });
    expect(result).toMatchObject({ code: 4, stdout: Buffer.alloc(0) });
  });

  it('appends both outputs to a file that --log-uri names', async () => {
    const file = `${scene.dir}/task.log`;
    const flags = ['-d', '--log-uri', `file://${file}`];
    const id = scene.id();
    await using events = await scene.events();
    expect((await scene.run(id, ['sh', '-c', 'echo out; echo err >&2'], { flags })).code).toBe(0);
    await events.waitFor('/tasks/exit', id);
    await scene.ctr(['task', 'rm', id]);
    await scene.ctr(['container', 'rm', id]);
    const { readFile } = await import('node:fs/promises');
    expect((await readFile(file, 'utf8')).split('\n').sort()).toEqual(['', 'err', 'out']);
  });
});
