import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { distBin, runcBin } from '../support/paths.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

describe("kiln below containerd's shim for runc", () => {
  const scene = useScene({ version: '2.1', env: { PATH: `${process.env.PATH}:${runcBin()}` } });
  const runtime = 'io.containerd.runc.v2';
  const binary = ['--runc-binary', join(distBin, 'kiln')];

  it('runs a container in a virtual machine, with exec, signals, and its exit code', async () => {
    const id = scene.id();
    const script = 'trap "echo term; exit 9" TERM; echo up; uname -r; while :; do sleep 1000 & wait $!; done';
    const flags = ['--rm', ...binary];
    await using program = scene.runStream(id, ['sh', '-c', script], { runtime, flags });
    const lines = new Lines(program.stdout);
    program.stderr.resume();
    await lines.waitFor((line) => line === 'up', 'the program');
    const exec = await scene.containerd.ctr([
      ...['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'e', id, 'sh', '-c', 'cat /proc/uptime; exit 4'],
    ]);
    expect(exec.code).toBe(4);
    // The guest's kernel is younger than this test.
    expect(Number(exec.stdout.toString().split(' ')[0])).toBeLessThan(600);
    await scene.ctr(['task', 'kill', id]);
    expect(await program.exit).toBe(9);
    expect(lines.all.at(-1)).toBe('term');
  });

  it('tells containerd why a container cannot be', async () => {
    const result = await scene.run(scene.id(), ['nothing-like-it'], { runtime, flags: ['--rm', ...binary] });
    expect(result).toMatchObject({ code: 1, stderr: expect.stringContaining('executable file not found in $PATH') });
  });
});
