/** What a container writes, seen by the host's tools: docs/rootfs.md, "On the host". */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { Lines, mustRun } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

/** The upper directory of a container's snapshot. */
async function upperOf(scene: Scene, id: string): Promise<string> {
  const mounts = await scene.ctr(['snapshots', 'mounts', '/target', id]);
  return /upperdir=([^,\s]+)/.exec(mounts)?.[1] ?? '';
}

/** What containerd finds different from the image, as `tar -tv` lists it, without times. */
async function diffOf(scene: Scene, id: string): Promise<string[]> {
  const args = ['snapshots', 'diff', '--media-type', 'application/vnd.oci.image.layer.v1.tar', id];
  const { stdout, stderr, code } = await scene.containerd.ctr(args);
  expect(`${code} ${stderr}`).toBe('0 ');
  const listed = await mustRun('tar', ['--numeric-owner', '-tvf', '-'], { stdin: stdout });
  const rows = listed.stdout.toString().trim().split('\n');
  return rows.map((row) => row.replace(/^(\S+) +(\S+) +(\d+) \S+ \S+ /, '$1 $2 $3 ')).sort();
}

/** Writes, changes, removes, and then lets the test look: it ends when its input does. */
const script = `
  set -e
  echo new > /etc/new; chown 70000:5 /etc/new; chmod 4755 /etc/new
  echo more >> /etc/passwd; rm /etc/group
  mkdir -p /opt/d; ln /etc/new /opt/d/hard; ln -s ../new /opt/d/soft; mkfifo /opt/d/fifo
  touch -d @981173106 /opt/d/old
  truncate -s 64M /opt/d/holes; echo end >> /opt/d/holes
  rm -r /home; mkdir /home; echo b > /home/b
  echo done
  read -r _
  echo again > /etc/again; rm /opt/d/soft
  [ -e /from-host ] && cat /from-host
  exit 0
`;

describe.runIf(underKiln)('what a container has written', () => {
  const scene = useScene({ version: '2.1' });

  it('is in its snapshot while it is paused and after its end, and comes back when it is started again', async () => {
    const id = scene.id('kept');
    const flags = ['--annotation', 'io.kiln.changes=keep'];
    const program = scene.runStream(id, ['sh', '-c', script], { flags, interactive: true });
    const lines = new Lines(program.stdout);
    await lines.waitFor((line) => line === 'done', 'the first writes');
    const upper = await upperOf(scene, id);
    expect(readdirSync(upper)).toEqual([]);

    await scene.ctr(['task', 'pause', id]);
    const first = await diffOf(scene, id);
    expect(first).toEqual(
      expect.arrayContaining([
        '-rwsr-xr-x 70000/5 4 etc/new',
        'hrwsr-xr-x 70000/5 0 opt/d/hard link to etc/new',
        'lrwxrwxrwx 0/0 0 opt/d/soft -> ../new',
        'prw-r--r-- 0/0 0 opt/d/fifo',
        '---------- 0/0 0 etc/.wh.group',
        '-rw-r--r-- 0/0 67108868 opt/d/holes',
        '-rw-r--r-- 0/0 2 home/b',
      ]),
    );
    const { stdout } = await mustRun('stat', ['-c', '%n %Y %b', 'opt/d/old', 'opt/d/holes'], { cwd: upper });
    expect(stdout.toString()).toMatch(/^opt\/d\/old 981173106 \d+\nopt\/d\/holes \d+ \d{1,3}\n$/);

    // What the host puts there while it rests is there when it goes on.
    writeFileSync(join(upper, 'from-host'), 'from the host\n');
    await scene.ctr(['task', 'resume', id]);
    program.stdin.end('go\n');
    expect(await program.exit).toBe(0);
    expect(lines.all).toEqual(['done', 'from the host']);

    const second = await diffOf(scene, id);
    expect(second).toContain('-rw-r--r-- 0/0 6 etc/again');
    expect(second).toContain('-rwsr-xr-x 70000/5 4 etc/new');
    expect(second.join('\n')).not.toContain('soft');
    await scene.ctr(['container', 'rm', id]);
  });

  it('is there after a second start, and what the host changed in between wins', async () => {
    const id = scene.id('again');
    const flags = ['--annotation', 'io.kiln.changes=keep'];
    const twice =
      'cat /mine /host 2>/dev/null; cat /etc/shared; echo guest > /mine; echo guest > /etc/shared; rm -f /host';
    await scene.run(id, ['sh', '-c', twice], { flags });
    const upper = await upperOf(scene, id);
    expect(readFileSync(join(upper, 'etc/shared'), 'utf8')).toBe('guest\n');
    writeFileSync(join(upper, 'host'), 'host\n');
    writeFileSync(join(upper, 'etc/shared'), 'host, too\n');
    const start = () => scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, id]);
    expect((await start()).stdout.toString()).toBe('guest\nhost\nhost, too\n');
    expect((await start()).stdout.toString()).toBe('guest\nguest\n');
    expect(readFileSync(join(upper, 'etc/shared'), 'utf8')).toBe('guest\n');
    expect(readdirSync(upper)).not.toContain('host');
    await scene.ctr(['container', 'rm', id]);
  });

  it('stays in the guest where that is asked for, and after the end of what was not', async () => {
    const flags = ['--annotation', 'io.kiln.changes=discard'];
    const [discarded, automatic] = [scene.id('discarded'), scene.id('automatic')];
    const write = ['sh', '-c', 'echo x > /x'];
    await Promise.all([scene.run(discarded, write, { flags }), scene.run(automatic, write, { flags: [] })]);
    for (const id of [discarded, automatic]) {
      expect(readdirSync(await upperOf(scene, id))).toEqual([]);
      await scene.ctr(['container', 'rm', id]);
    }
    const flagsOfKeep = ['--rm', '--annotation', 'io.kiln.changes=keep'];
    const refused = await scene.run(scene.id('native'), ['true'], { flags: flagsOfKeep, snapshotter: 'native' });
    expect(refused.stderr).toContain('cannot be kept on the host with this snapshotter (use the overlayfs snapshotter');
  });
});
