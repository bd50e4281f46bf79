import { access, mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { faultPoints } from '../../src/sandbox/faults.ts';
import { failure, hasKvm } from '../support/failure.ts';
import { busyboxLayer, type Image, importImage, type LayerEntry } from '../support/images.ts';
import { containerdBin, containerdVersions, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { mustRun, run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { signal } from '../support/wait-for-end.ts';

/** Processes of the scene's kilnd by their program's name. */
async function helpers(scene: Scene, program: string): Promise<number[]> {
  const found: number[] = [];
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const commandLine = await readFile(`/proc/${entry}/cmdline`, 'utf8').catch(() => '');
    if (commandLine.includes(program) && commandLine.includes(scene.stateDir)) found.push(Number(entry));
  }
  return found;
}

describe.runIf(underKiln)('a bad root filesystem is told through ctr', () => {
  const scene = useScene({ version: '2.1' });

  it('a layer that is missing, by its path', async () => {
    const snapshots = join(scene.containerd.dir, 'root', 'io.containerd.snapshotter.v1.overlayfs', 'snapshots');
    const layer = join(snapshots, '1', 'fs');
    await rename(layer, `${layer}.away`);
    try {
      expect(await failure(scene)).toContain(layer);
    } finally {
      await rename(`${layer}.away`, layer);
    }
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
  });

  it('a layer that is no folder, by its path', async () => {
    const snapshots = join(scene.containerd.dir, 'root', 'io.containerd.snapshotter.v1.overlayfs', 'snapshots');
    const layer = join(snapshots, '1', 'fs');
    await rename(layer, `${layer}.away`);
    await writeFile(layer, 'no folder');
    try {
      expect(await failure(scene)).toContain(layer);
    } finally {
      await rm(layer);
      await rename(`${layer}.away`, layer);
    }
  });

  it('no space in the cache while the image is converted', async () => {
    const small = join(scene.dir, 'small');
    await mkdir(small);
    await mustRun('mount', ['-t', 'tmpfs', '-o', 'size=512k', 'kt-small', small]);
    try {
      await scene.restartWith({ KILN_CACHE_DIR: small });
      const message = await failure(scene);
      expect(message).toMatch(/no space left|disk is full|is full/i);
      expect(message).toContain(small);
      const { stdout } = await run('find', [join(small, 'layers'), join(small, 'writable'), '-type', 'f']);
      expect(stdout.toString()).toBe('');
    } finally {
      await scene.stopKilnd();
      await mustRun('umount', [small]);
      await scene.restartWith({});
    }
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
  });

  it('a state folder that cannot be written', async () => {
    const file = join(scene.dir, 'a-file');
    await writeFile(file, '');
    await scene.restartWith({ KILN_STATE_DIR: join(file, 'state') });
    expect(await failure(scene)).toContain(file);
    await scene.restartWith({});
  });
});

/** Layers that try to leave the root filesystem when they are unpacked or read. */
function escapingImages(outside: string): Record<string, Image> {
  const image = (name: string, ...layers: LayerEntry[][]): Image => ({
    name: `docker.io/kiln/${name}:test`,
    layers: [busyboxLayer(), ...layers],
  });
  const written: LayerEntry = { kind: 'file', path: 'way-out/written', content: 'escaped' };
  return {
    'a path with ..': image('dots', [
      { kind: 'file', path: `../../../../../../../..${outside}/written`, content: 'x' },
    ]),
    'an absolute path': image('absolute', [{ kind: 'file', path: `${outside}/written`, content: 'x' }]),
    'a file through an absolute link of the same layer': image('link', [
      { kind: 'symlink', path: 'way-out', target: outside },
      written,
    ]),
    'a file through an absolute link of a lower layer': image(
      'lower-link',
      [{ kind: 'symlink', path: 'way-out', target: outside }],
      [written],
    ),
    'a file through a link full of ..': image('relative-link', [
      { kind: 'symlink', path: 'way-out', target: `../../../../../../../../../..${outside}` },
      written,
    ]),
    'a hard link to a file outside': image('hard', [
      { kind: 'link', path: 'stolen', target: `../../../../../../../../..${outside}/secret` },
    ]),
    'a whiteout of a file outside': image('whiteout', [
      { kind: 'file', path: `../../../../../../../..${outside}/.wh.secret`, content: '' },
    ]),
  };
}

describe('a layer that tries to escape', () => {
  const scene = useScene({ version: '2.1' });
  const outside = join(scene.dir, 'outside');

  it.each(Object.keys(escapingImages('')))('by %s changes and reads nothing outside', async (how) => {
    const image = escapingImages(outside)[how];
    if (image === undefined) throw new Error(how);
    await mkdir(outside, { recursive: true });
    await writeFile(join(outside, 'secret'), 'a secret of the host');
    const imported = await importImage(scene.containerd, image).then(
      () => true,
      () => false,
    );
    // containerd refuses some, and keeps the rest inside: either is right.
    if (imported) {
      const script = 'cat /stolen /way-out/secret 2>/dev/null; echo end';
      const result = await scene.run(scene.id(), ['sh', '-c', script], { image: image.name });
      if (result.code === 0) expect(result.stdout.toString()).toBe('end\n');
      else expect(result.stderr).not.toBe('');
    }
    expect(await readdir(outside)).toEqual(['secret']);
    expect(await readFile(join(outside, 'secret'), 'utf8')).toBe('a secret of the host');
  });
});

describe.runIf(underKiln)('a virtual machine that fails', () => {
  // It boots, and has a backend; see templates.test.ts for those that are restored.
  const config = '[vm]\nchannel = "hybrid-vsock"\n';
  const scene = useScene({ version: '2.1', config });

  it.each([
    ['qemu-system', [137]],
    ['vhost-device-vsock', [137, 255]],
  ] as const)('because %s is killed: the task exits, with events, and all is cleaned', async (program, codes) => {
    const id = scene.id();
    await using events = await scene.events();
    await using attached = scene.runStream(id, ['sleep', '1000'], { timeout: 60_000 });
    attached.stdout.resume();
    attached.stderr.resume();
    await events.waitFor('/tasks/start', id);
    const pids = await helpers(scene, program);
    expect(pids.length).toBeGreaterThan(0);
    for (const pid of pids) signal(pid, 'SIGKILL');
    expect(codes).toContain(await attached.exit);
    await events.waitFor('/tasks/delete', id);
    const seen = events.of(id).filter(({ topic }) => topic.startsWith('/tasks/'));
    expect(seen.map(({ topic }) => topic)).toEqual(['/tasks/create', '/tasks/start', '/tasks/exit', '/tasks/delete']);
    expect(codes).toContain(seen[2]?.event.exit_status);
    await scene.assertNothingLeft();
  });

  it('killed in the middle of a flood of output ends the task too', async () => {
    const id = scene.id();
    await using attached = scene.runStream(id, ['cat', '/dev/zero'], { timeout: 60_000 });
    attached.stderr.resume();
    await new Promise((resolve) => attached.stdout.once('data', resolve));
    attached.stdout.resume();
    for (const pid of await helpers(scene, 'qemu-system')) signal(pid, 'SIGKILL');
    expect([137, 255]).toContain(await attached.exit);
    await scene.assertNothingLeft();
  });

  it('does not take another one with it', async () => {
    const [victim, survivor] = [scene.id(), scene.id()];
    await using events = await scene.events();
    await scene.start(victim, ['sleep', '1000']);
    const mine = await helpers(scene, 'qemu-system');
    await scene.start(survivor, ['sleep', '1000']);
    for (const pid of mine) signal(pid, 'SIGKILL');
    await events.waitFor('/tasks/exit', victim);
    const tasks = await scene.tasks();
    expect(tasks.find(({ id }) => id === survivor)?.status).toBe('RUNNING');
    expect(tasks.find(({ id }) => id === victim)?.status).toBe('STOPPED');
    await scene.remove(victim);
    await scene.remove(survivor);
  });

  it('killed while it boots: Create fails and nothing stays', async () => {
    const id = scene.id();
    const result = scene.run(id, ['true']);
    let ended = false;
    result.finally(() => {
      ended = true;
    });
    // Another program's process appears without an event for us.
    for (let pids: number[] = []; pids.length === 0 && !ended; pids = await helpers(scene, 'qemu-system')) {
      for (const pid of await helpers(scene, 'qemu-system')) signal(pid, 'SIGKILL');
      await sleep(5);
    }
    for (const pid of await helpers(scene, 'qemu-system')) signal(pid, 'SIGKILL');
    const { code, stderr } = await result;
    expect(code).toBe(1);
    expect(stderr).toMatch(/QEMU|VM/);
    await scene.assertNothingLeft();
  });

  it('because its kernel panics: Create fails with the last lines of the console', async () => {
    const initrd = join(scene.dir, 'empty-initrd');
    await writeFile(initrd, '');
    await scene.configure(`${config}initrd = ${JSON.stringify(initrd)}\n`);
    expect(await failure(scene, { timeout: 90_000 })).toMatch(/Kernel panic|VFS: Unable to mount root/);
    await scene.configure(config);
  });

  it.skipIf(hasKvm)(
    'because the agent does not call in time: Create fails with the last lines of the console',
    async () => {
      await scene.configure(`${config}boot_timeout_s = 1\n`);
      const started = performance.now();
      const message = await failure(scene);
      expect(message).toContain('1 s');
      expect(message).toContain('vm.boot_timeout_s');
      expect(performance.now() - started).toBeLessThan(10_000);
      await scene.configure(config);
    },
  );

  it('because ctr gives up: Create is undone', async () => {
    const id = scene.id();
    await using program = scene.runStream(id, ['true']);
    while ((await helpers(scene, 'qemu-system')).length === 0) await sleep(5);
    program.kill('SIGKILL');
    await program.exit;
    await scene.purge();
    await scene.assertNothingLeft({ within: 60_000 });
  });
});

describe.runIf(underKiln)('a failure right after the acquisition of', () => {
  const scene = useScene({ version: '2.1' });

  it.each(faultPoints)('%s leaves nothing behind', async (point) => {
    await scene.restartWith({ KILN_FAULT: point });
    expect(await failure(scene)).toContain(`injected failure at ${point}`);
    await scene.stopKilnd();
    await scene.assertNothingLeft({ daemonMayRun: false });
  });

  it('nothing leaves a working Kiln', async () => {
    await scene.restartWith({});
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
  });
});

describe.runIf(underKiln)('what Kiln cannot do yet', () => {
  const scene = useScene({ version: '2.1' });

  it('a checkpoint is an error that says so, and the task runs on', async () => {
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    const result = await scene.containerd.ctr(['task', 'checkpoint', id]);
    expect(result.code).not.toBe(0);
    expect(result.stderr).toMatch(/not supported|not implemented|method Checkpoint/i);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    await scene.remove(id);
  });

  it.each([
    // ctr also binds the host's /etc/hosts and /etc/resolv.conf then; either may be the reason that is given.
    ['the network of the host', ['--net-host'], /network|bind/],
  ] as const)('%s is an error that names it', async (_what, flags, named) => {
    expect(await failure(scene, { flags: ['--rm', ...flags] })).toMatch(named);
  });
});

describe('the tests themselves', () => {
  it('run on the real containerds', async () => {
    for (const version of containerdVersions) await access(join(containerdBin(version), 'containerd'));
  });
});
