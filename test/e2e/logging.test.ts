import { once } from 'node:events';
import { watch } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { containerdVersions, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

/** The first `size` bytes of `seq 1 …`: each place looks different. */
function counting(size: number): string {
  const lines: string[] = [];
  for (let length = 0, n = 1; length < size; n += 1) {
    const line = `${n}\n`;
    lines.push(line);
    length += line.length;
  }
  return lines.join('').slice(0, size);
}

/** Makes a logger of these lines, which finds the scene's folder in $OUT. Its path. */
async function makeLogger(scene: Scene, name: string, script: string, mode = 0o755): Promise<string> {
  const file = join(scene.dir, name);
  await writeFile(file, `#!/bin/sh\nOUT=${scene.dir}\n${script}\n`, { mode });
  return file;
}

/** Waits until the logger has written this text, as the last of the file. */
async function logged(file: string, end: string): Promise<void> {
  const watcher = watch(dirname(file));
  try {
    while (!(await readFile(file, 'utf8').catch(() => '')).endsWith(end)) await once(watcher, 'change');
  } finally {
    watcher.close();
  }
}

const toFiles = 'cat <&3 >$OUT/log.out & cat <&4 >$OUT/log.err; wait';

describe.each(containerdVersions)('a logger named by --log-uri, with containerd %s', (version) => {
  const scene = useScene({ version });
  const log = (name: string): Promise<string> => readFile(join(scene.dir, name), 'utf8');

  it('gets both outputs to the byte, its arguments and two variables, and has written all when the task is deleted', async () => {
    const about = "tr '\\0' '\\n' </proc/$$/environ >$OUT/environment; printf '<%s>' \"$@\" >$OUT/arguments";
    const file = await makeLogger(scene, 'logger', `${about}; exec 5>&-; ${toFiles}`);
    const size = 8 * 1024 * 1024;
    const id = scene.id();
    const script = `echo to stderr >&2; seq 1 1200000 | head -c ${size}; exit 3`;
    const flags = ['--rm', '--log-uri', `binary://${file}?key=a%20value`];
    const result = await scene.run(id, ['sh', '-c', script], { flags });
    expect(result).toMatchObject({ code: 3, stdout: Buffer.alloc(0) });
    expect((await log('log.out')) === counting(size)).toBe(true);
    expect(await log('log.err')).toBe('to stderr\n');
    expect(await log('arguments')).toBe('<key><a value>');
    expect((await log('environment')).trim().split('\n').sort()).toEqual([
      `CONTAINER_ID=${id}`,
      'CONTAINER_NAMESPACE=default',
    ]);
  });

  it.runIf(underKiln)('that cannot be used is an error which names it, and nothing stays', async () => {
    const failing = await makeLogger(scene, 'failing', 'echo no such bucket >&2; exit 9');
    const text = await makeLogger(scene, 'text', '', 0o644);
    const silent = await makeLogger(scene, 'silent', 'exec 5>&-; cat <&3');
    const cases = [
      ['binary:///no/such/logger', 'cannot run the logger "/no/such/logger": ENOENT'],
      [`binary://${text}`, `cannot run the logger "${text}": EACCES`],
      [`binary://${failing}`, `the logger "${failing}" ended (exit code 9) before it was ready: no such bucket`],
      [`binary-v2://${silent}`, `the logger "${silent}" closed descriptor 5 without a byte before it was ready`],
    ] as const;
    for (const [uri, message] of cases) {
      const id = scene.id();
      const result = await scene.run(id, ['true'], { flags: ['--rm', '--log-uri', uri] });
      expect(result.code).not.toBe(0);
      expect(result.stderr).toContain(message);
      // ctr before 2.0 leaves it.
      await scene.containerd.ctr(['container', 'rm', id]);
    }
    await scene.assertNothingLeft();
  });
});

describe.runIf(underKiln)('a logger', () => {
  const scene = useScene({ version: '2.1' });

  it('that dies does not disturb the container, and kilnd says what was lost', async () => {
    const file = await makeLogger(scene, 'dying', 'exec 5>&-; head -c 3 <&3 >$OUT/head; echo disk full >&2; exit 1');
    const flags = ['--rm', '--log-uri', `binary://${file}`];
    const result = await scene.run(scene.id(), ['sh', '-c', 'echo up; seq 1 200000; exit 7'], { flags });
    expect(result.code).toBe(7);
    expect(await readFile(join(scene.dir, 'head'), 'utf8')).toBe('up\n');
    const message = `the logger \\"${file}\\" ended (exit code 1) before the output did: disk full`;
    expect(await readFile(scene.kilndLog, 'utf8')).toContain(message);
  });

  it('outlives a kilnd that is killed, writes down what it was given, and does not stay', async () => {
    const file = await makeLogger(scene, 'lasting', `printf r >&5; exec 5>&-; ${toFiles}; echo done >$OUT/done`);
    const id = scene.id();
    const flags = ['-d', '--log-uri', `binary-v2://${file}`];
    await scene.run(id, ['sh', '-c', 'seq 1 1000; exec sleep 1000'], { flags });
    await logged(join(scene.dir, 'log.out'), '\n1000\n');
    const [pid = 0] = scene.kilndPids();
    signal(pid, 'SIGKILL');
    await waitForEnd(pid, 5_000);
    await scene.purge();
    await scene.assertNothingLeft();
    expect(await readFile(join(scene.dir, 'done'), 'utf8')).toBe('done\n');
    expect(await readFile(join(scene.dir, 'log.err'), 'utf8')).toBe('');
  });
});
