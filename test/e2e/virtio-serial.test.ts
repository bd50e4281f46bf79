/** The channel that is not chosen by itself: what it carries, and that the next kilnd takes it over. */
import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { counting, execIn } from '../support/fault-notes.ts';
import { underKiln } from '../support/paths.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { helpersOf } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

const sha256 = (data: Buffer): string => createHash('sha256').update(data).digest('hex');

describe.runIf(underKiln)('a guest that talks by virtio-serial', () => {
  const scene = useScene({ version: '2.1', config: '[vm]\nchannel = "virtio-serial"\n' });

  it('needs no helper, and carries output, input and exit codes', async () => {
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    expect(await helpersOf(scene, id, 'vhost-device-vsock')).toEqual([]);
    expect(await execIn(scene, id, ['sh', '-c', 'echo out; echo err >&2; exit 3'])).toMatchObject({
      code: 3,
      stdout: Buffer.from('out\n'),
      stderr: 'err\n',
    });
    const input = Buffer.alloc(4 << 20, 'both ways at once');
    const copied = await scene.containerd.ctr(
      ['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'copy', id, 'cat'],
      { stdin: input },
    );
    expect([copied.code, sha256(copied.stdout)]).toEqual([0, sha256(input)]);
    await scene.remove(id);
  });

  it('is taken over when kilnd is killed, again and again: nothing of the output is missing', async () => {
    const id = scene.id();
    await using attached = scene.runStream(id, counting, { interactive: true });
    const lines = new Lines(attached.stdout);
    await lines.waitFor((line) => line === '5', 'the first lines');
    for (const round of [1, 2, 3]) {
      const [pid = 0] = scene.kilndPids();
      const seen = lines.all.length;
      signal(pid, 'SIGKILL');
      await waitForEnd(pid, 20_000);
      await lines.waitFor(() => lines.all.length > seen + 20, `more lines after kill ${round}`);
      expect(await execIn(scene, id, ['echo', `here ${round}`])).toMatchObject({
        code: 0,
        stdout: Buffer.from(`here ${round}\n`),
      });
    }
    attached.stdin.end();
    expect(await attached.exit).toBe(7);
    const numbers = lines.all.map(Number);
    // What was delivered when kilnd was killed may have come twice.
    expect(new Set(numbers).size).toBe(Math.max(...numbers));
  });

  it('that is killed from outside ends the container with 137', async () => {
    const id = scene.id();
    await using attached = scene.runStream(id, ['sh', '-c', 'echo up; sleep 1000']);
    await new Lines(attached.stdout).waitFor((line) => line === 'up', 'its first line');
    for (const pid of await helpersOf(scene, id, 'qemu-system')) signal(pid, 'SIGKILL');
    expect(await attached.exit).toBe(137);
  });
});
