import { existsSync } from 'node:fs';
import { mkdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { failure, hasKvm } from '../support/failure.ts';
import { distBin, underKiln } from '../support/paths.ts';
import type { EditableSpec } from '../support/scene.ts';
import { run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

describe.runIf(underKiln)('a wrong configuration is told through ctr', () => {
  const scene = useScene({ version: '2.1' });

  it.each([
    ['an unknown key', '[vm]\nmemroy_mib = 256\n', ['memroy_mib', 'memory_mib']],
    ['an unknown section', '[vmm]\nmemory_mib = 256\n', ['vmm']],
    ['a wrong type', '[vm]\nmemory_mib = "lots"\n', ['vm.memory_mib', '"lots"', 'integer', '128']],
    ['a value out of range', '[vm]\nvcpus = 0\n', ['vm.vcpus', '0', '1 to 255']],
    ['a word that is not allowed', '[vm]\naccelerator = "warp"\n', ['vm.accelerator', '"warp"', '"kvm"', '"tcg"']],
    ['text that is not TOML', '[vm\nmemory_mib = 256\n', ['kiln.toml', '1']],
    ['a missing QEMU', '[vm]\nqemu = "/no/such/qemu"\n', ['/no/such/qemu', 'vm.qemu']],
    ['a QEMU that is not on PATH', '[vm]\nqemu = "no-such-qemu"\n', ['no-such-qemu', 'vm.qemu']],
    ['a QEMU that is none', '[vm]\nqemu = "/bin/false"\n', ['QEMU ended at start']],
    ['a missing kernel', '[vm]\nkernel = "/no/such/vmlinux"\n', ['/no/such/vmlinux', 'kernel']],
    ['a kernel that is none', '[vm]\nkernel = "/etc/passwd"\n', ['QEMU']],
    ['a missing initrd', '[vm]\ninitrd = "/no/such/initrd"\n', ['/no/such/initrd', 'initrd']],
  ])('%s', async (_what, toml, named) => {
    await scene.configure(toml);
    const message = await failure(scene);
    for (const word of named) expect(message).toContain(word);
  });

  it('a config file that is not there', async () => {
    await scene.restartWith({ KILN_CONFIG: '/no/such/kiln.toml' });
    expect(await failure(scene)).toContain('/no/such/kiln.toml');
  });

  it('a state folder that is not an absolute path', async () => {
    await scene.restartWith({ KILN_STATE_DIR: 'state' });
    expect(await failure(scene)).toContain('KILN_STATE_DIR');
  });

  it('a missing guest image', async () => {
    const empty = join(scene.dir, 'no-guest');
    await mkdir(empty, { recursive: true });
    await scene.configure('');
    await scene.restartWith({ KILN_GUEST_DIR: empty });
    const message = await failure(scene);
    expect(message).toContain(empty);
    expect(message).toContain('npm run setup');
  });

  it.skipIf(hasKvm)('a demand for KVM where there is none', async () => {
    await scene.configure('[vm]\naccelerator = "kvm"\n');
    await scene.restartWith({});
    const message = await failure(scene);
    expect(message).toContain('vm.accelerator is "kvm"');
    expect(message).toContain('kvm_intel');
  });

  it.skipIf(hasKvm)('a demand for Firecracker where there is no KVM', async () => {
    await scene.configure('[vm]\nvmm = "firecracker"\n');
    expect(await failure(scene)).toContain('Firecracker needs hardware KVM, but none of the kernel modules kvm_intel');
  });

  it.skipIf(hasKvm)('no /dev/kvm at all is no error: it runs under emulation, and the log says so once', async () => {
    await rm(scene.kilndLog, { force: true });
    await scene.configure('');
    await scene.restartWith({});
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
    expect((await readFile(scene.kilndLog, 'utf8')).match(/software emulation/g)?.length).toBe(1);
  });

  it('works again when the configuration is right again', async () => {
    await scene.configure('[vm]\nmemory_mib = 384\n');
    await scene.restartWith({});
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
  });
});

describe.runIf(underKiln)('whoever is not root', () => {
  it('is told so by kilnd', async () => {
    const bundle = join(distBin, '..', 'lib');
    const asNobody = ['--reuid', '65534', '--regid', '65534', '--clear-groups'];
    const readable = await run('setpriv', [...asNobody, 'test', '-r', join(bundle, 'kilnd.mjs')]);
    expect(readable.code, 'the project must lie where other users may read').toBe(0);
    const env = { PATH: process.env.PATH, KILN_STATE_DIR: '/tmp/kt-nobody-must-not-make-this' };
    const result = await run('setpriv', [...asNobody, join(distBin, 'kilnd')], { env });
    expect(result.code).not.toBe(0);
    expect(result.stderr).toContain('root');
    expect(existsSync(env.KILN_STATE_DIR)).toBe(false);
  });
});

describe('a bad bundle is told through ctr', () => {
  const scene = useScene({ version: '2.1' });
  const message = async (edit: (spec: EditableSpec) => string | null | undefined): Promise<string> => {
    const result = await scene.runWithSpec(scene.id('bundle'), ['true'], edit);
    expect(result.code).toBe(1);
    await scene.assertNothingLeft();
    return result.stderr;
  };

  it('config.json that is cut off', async () => {
    const text = await message((spec) => JSON.stringify(spec).slice(0, 500));
    if (underKiln) expect(text).toContain('config.json');
  });

  it('config.json that is missing', async () => expect(await message(() => null)).toContain('config.json'));

  it.runIf(underKiln).each([
    ['that is a list', '[]', 'config.json'],
    ['without a process', '{"ociVersion":"1.0.2","root":{"path":"rootfs"}}', 'process'],
    [
      'of a version from the future',
      '{"ociVersion":"9.0.0","root":{"path":"rootfs"},"process":{"args":["true"],"cwd":"/"}}',
      '9.0.0',
    ],
  ])('config.json %s', async (_what, text, named) => expect(await message(() => text)).toContain(named));

  it.runIf(underKiln)('a field of the wrong type, by its path', async () => {
    const text = await message((spec) => JSON.stringify({ ...spec, process: { ...spec.process, args: 'true' } }));
    expect(text).toContain('process.args');
  });

  it('a working directory that is no folder', async () => {
    const text = await message((spec) => {
      spec.process.cwd = '/etc/passwd';
      return undefined;
    });
    expect(text).toContain('/etc/passwd');
  });

  it('a capability that does not exist is not silently dropped or is not given', async () => {
    const result = await scene.runWithSpec(scene.id('caps'), ['grep', 'CapEff', '/proc/self/status'], (spec) => {
      spec.process.capabilities = { bounding: ['CAP_NONSENSE'], effective: [], permitted: [], inheritable: [] };
      return undefined;
    });
    if (result.code === 0) expect(result.stdout.toString()).toContain('0000000000000000');
    else expect(result.stderr).toContain('CAP_NONSENSE');
  });
});
