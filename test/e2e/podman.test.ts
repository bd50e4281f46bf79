import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { useOciStage } from '../support/oci-stage.ts';
import { Podman } from '../support/podman.ts';

/** Ends with SIGTERM. */
const waiting = 'trap "exit 9" TERM; echo up; while :; do sleep 1000 & wait $!; done';

describe('podman', () => {
  const stage = useOciStage();
  const podman = new Podman(stage);
  beforeAll(() => podman.setUp());
  afterAll(() => podman.tearDown());

  it('runs a container attached, with a volume, and hands its exit code on', async () => {
    const volume = join(stage.dir, 'volume');
    mkdirSync(volume);
    writeFileSync(join(volume, 'from-host'), 'host\n');
    const script = 'cat /v/from-host; cat; echo guest > /v/from-guest; echo err >&2; exit 5';
    const flags = ['--rm', '-i', '--network', 'none', '-v', `${volume}:/v`];
    const result = await podman.run(['run', ...flags, podman.image, 'sh', '-c', script], { stdin: 'in\n' });
    expect(result).toEqual({ code: 5, stdout: Buffer.from('host\nin\n'), stderr: 'err\n' });
    expect(readFileSync(join(volume, 'from-guest'), 'utf8')).toBe('guest\n');
    expect(await podman.must(['ps', '--all', '--quiet'])).toBe('');
  });

  it('starts, looks at, changes, stops and starts again what runs detached', async () => {
    await podman.must(['run', '-d', '--name', 'one', '--network', 'none', podman.image, 'sh', '-c', waiting]);
    await expect.poll(() => podman.must(['logs', 'one']), { timeout: 20_000 }).toBe('up');
    const exec = await podman.run(['exec', 'one', 'sh', '-c', 'echo inside; uname -n > /made; exit 3']);
    expect(exec).toMatchObject({ code: 3, stdout: Buffer.from('inside\n') });
    const host = join(stage.dir, 'copied');
    await podman.must(['cp', 'one:/made', host]);
    expect(readFileSync(host, 'utf8')).not.toBe('');
    await podman.must(['cp', host, 'one:/copied-back']);
    expect(await podman.must(['exec', 'one', 'cat', '/copied-back'])).toBe(readFileSync(host, 'utf8').trimEnd());
    expect(await podman.must(['diff', 'one'])).toContain('A /made');
    expect(await podman.must(['top', 'one', '-o', 'args'])).toContain('sleep 1000');
    expect(await podman.must(['stats', '--no-stream', '--format', '{{.Name}} {{.PIDs}}', 'one'])).toMatch(/^one [1-9]/);
    await podman.must(['pause', 'one']);
    expect(await podman.must(['inspect', '--format', '{{.State.Status}}', 'one'])).toBe('paused');
    await podman.must(['unpause', 'one']);
    await podman.must(['stop', 'one']);
    expect(await podman.must(['inspect', '--format', '{{.State.ExitCode}}', 'one'])).toBe('9');
    await podman.must(['start', 'one']);
    expect(await podman.must(['exec', 'one', 'ls', '/made'])).toBe('/made');
    // As commit, which wants a policy in the host's /etc.
    const exported = join(stage.dir, 'exported.tar');
    await podman.must(['export', '--output', exported, 'one']);
    await podman.must(['import', '--change', 'ENV PATH=/bin', exported, 'localhost/changed:test']);
    await podman.must(['kill', '--signal', 'KILL', 'one']);
    expect(await podman.must(['wait', 'one'])).toBe('137');
    await podman.must(['rm', 'one']);
    const changed = ['run', '--rm', '--network', 'none', 'localhost/changed:test', 'ls', '/made'];
    expect(await podman.must(changed)).toBe('/made');
  });

  it('gives a container a terminal that follows the caller’s', async () => {
    await using terminal = podman.terminal(['--rm', '--network', 'none', podman.image, 'sh']);
    await terminal.waitFor(/#$/m);
    await terminal.resize(93, 31);
    await terminal.type('until [ "$(stty size)" = "31 93" ]; do sleep 1; done; tty; echo resized\r');
    await terminal.waitFor(/\/dev\/pts\/0\nresized/);
    await terminal.type('exit 0\r');
    await terminal.ended;
  });

  it('has the containers of a pod in one virtual machine', async () => {
    await podman.must([
      'pod',
      'create',
      '--name',
      'p',
      '--network',
      'none',
      '--infra-image',
      podman.image,
      '--infra-command',
      '/bin/true',
    ]);
    const serve = 'echo found > /tmp/f; while :; do nc -l -p 7 < /tmp/f; done';
    await podman.must(['run', '-d', '--pod', 'p', podman.image, 'sh', '-c', serve]);
    const ask = 'until nc 127.0.0.1 7; do :; done; cat /proc/sys/kernel/random/boot_id';
    const [found, bootId] = (await podman.must(['run', '--rm', '--pod', 'p', podman.image, 'sh', '-c', ask])).split(
      '\n',
    );
    expect(found).toBe('found');
    const again = ['run', '--rm', '--pod', 'p', podman.image, 'cat', '/proc/sys/kernel/random/boot_id'];
    expect(await podman.must(again)).toBe(bootId);
    await podman.must(['pod', 'rm', '--force', '--time', '0', 'p']);
    expect(await podman.must(['ps', '--all', '--quiet'])).toBe('');
  });

  it('tells of a container that has run out of memory', async () => {
    const hungry = ['dd', 'if=/dev/zero', 'of=/dev/null', 'bs=60M'];
    const flags = ['--name', 'hungry', '--network', 'none', '--memory', '20m'];
    expect(await podman.run(['run', ...flags, podman.image, ...hungry])).toMatchObject({ code: 137 });
    expect(await podman.must(['inspect', '--format', '{{.State.OOMKilled}}', 'hungry'])).toBe('true');
    await podman.must(['rm', 'hungry']);
  });

  it('is told why what cannot be is refused', async () => {
    const host = await podman.run(['run', '--rm', '--network', 'host', podman.image, 'true']);
    expect(host).toMatchObject({ code: 126, stderr: expect.stringContaining("cannot share the host's network") });
    const missing = await podman.run(['run', '--rm', '--network', 'none', podman.image, 'nothing-like-it']);
    expect(missing).toMatchObject({ code: 127, stderr: expect.stringContaining('executable file not found') });
    await podman.must(['rm', '--all', '--force']);
  });
});
