import { readFileSync } from 'node:fs';
import { release } from 'node:os';
import { describe, expect, it } from 'vitest';
import { underKiln } from '../support/paths.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

const bootIdFile = '/proc/sys/kernel/random/boot_id';

describe('a container', () => {
  const scene = useScene({ version: '2.1' });

  it.runIf(underKiln)('has a kernel of its own', async () => {
    const script = `uname -r; cat ${bootIdFile}`;
    const result = await scene.run(scene.id(), ['sh', '-c', script]);
    const [kernel, bootId] = result.stdout.toString().trim().split('\n');
    expect(kernel).toMatch(/^\d+\.\d+/);
    expect(kernel).not.toBe(release());
    expect(bootId).toMatch(/^[0-9a-f-]{36}$/);
    expect(bootId).not.toBe(readFileSync(bootIdFile, 'utf8').trim());
  });
});

describe('several containers', () => {
  const scene = useScene({ version: '2.1' });

  it.runIf(underKiln)('at once are several virtual machines, with different boot ids', async () => {
    const script = `cat ${bootIdFile}; read -r _`;
    const programs = [1, 2].map(() => scene.runStream(scene.id(), ['sh', '-c', script], { interactive: true }));
    const bootIds = await Promise.all(
      programs.map((program) => {
        program.stderr.resume();
        return new Lines(program.stdout).waitFor((line) => /^[0-9a-f-]{36}$/.test(line), 'a boot id');
      }),
    );
    expect(new Set(bootIds).size).toBe(2);
    const tasks = await scene.tasks();
    expect(tasks.map(({ status }) => status)).toEqual(['RUNNING', 'RUNNING']);
    expect(new Set(tasks.map(({ pid }) => pid)).size).toBe(2);
    for (const program of programs) program.stdin.end('\n');
    expect(await Promise.all(programs.map((program) => program.exit))).toEqual([0, 0]);
  });

  it('do not see each other, nor what the other wrote', async () => {
    const script = 'ls /tmp; touch /tmp/$1; echo ready; read -r _; ls /tmp; ls /proc | grep -c "^[0-9]"';
    const programs = ['one', 'two'].map((name) =>
      scene.runStream(scene.id(), ['sh', '-c', script, 'sh', name], { interactive: true }),
    );
    const outputs = programs.map((program) => {
      program.stderr.resume();
      return new Lines(program.stdout);
    });
    for (const output of outputs) await output.waitFor((line) => line === 'ready', 'ready');
    for (const program of programs) program.stdin.end('\n');
    expect(await Promise.all(programs.map((program) => program.exit))).toEqual([0, 0]);
    expect(outputs.map((output) => output.all.slice(0, 2))).toEqual([
      ['ready', 'one'],
      ['ready', 'two'],
    ]);
  });

  it('ten in parallel start, run and stop cleanly', { timeout: 600_000 }, async () => {
    const results = await Promise.all(
      Array.from({ length: 10 }, (_, index) =>
        scene.run(scene.id('many'), ['sh', '-c', `echo ${index}; cat ${bootIdFile}; exit ${index}`], {
          timeout: 500_000,
        }),
      ),
    );
    const outputs = results.map((result) => result.stdout.toString().trim().split('\n'));
    expect(results.map(({ code, stderr }) => ({ code, stderr }))).toEqual(
      results.map((_, code) => ({ code, stderr: '' })),
    );
    expect(outputs.map(([index]) => Number(index))).toEqual(results.map((_, index) => index));
    if (underKiln) expect(new Set(outputs.map(([, bootId]) => bootId)).size).toBe(10);
  });
});
