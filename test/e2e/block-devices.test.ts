/** Block devices of the host in a container: drives of its virtual machine. */
import { execFileSync, spawnSync } from 'node:child_process';
import { closeSync, openSync, readSync, truncateSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { execIn } from '../support/fault-notes.ts';
import { type LoopDevice, loopDevice } from '../support/loop-device.ts';
import { underKiln } from '../support/paths.ts';
import type { EditableSpec, Scene } from '../support/scene.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

const mib = 2 ** 20;

interface DeviceNodes {
  devices?: {
    path: string;
    type: string;
    major: number;
    minor: number;
    fileMode?: number;
    uid?: number;
    gid?: number;
  }[];
  resources?: { devices?: { allow: boolean; type?: string; major?: number; minor?: number; access: string }[] };
}

/** As containerd writes it for `--device` and for CRI's volumeDevices. */
function give(spec: EditableSpec, loop: LoopDevice, path: string, access = 'rwm'): void {
  const { major, minor } = loop;
  const linux = spec.linux as DeviceNodes;
  linux.devices = [...(linux.devices ?? []), { path, type: 'b', major, minor, fileMode: 0o640, uid: 12, gid: 34 }];
  linux.resources ??= {};
  linux.resources.devices = [...(linux.resources.devices ?? []), { allow: true, type: 'b', major, minor, access }];
}

function loop(scene: Scene, name: string, bytes = 8 * mib): LoopDevice {
  return loopDevice(join(scene.dir, name), bytes);
}

/** What is in the file below a device, whatever the page caches above it have. */
function onDisk({ file }: LoopDevice, at: number, length: number): string {
  const fd = openSync(file, 'r');
  try {
    const buffer = Buffer.alloc(length);
    readSync(fd, buffer, 0, length, at);
    return buffer.toString();
  } finally {
    closeSync(fd);
  }
}

async function inside(scene: Scene, id: string, script: string): Promise<string> {
  const { stdout, stderr } = await execIn(scene, id, ['sh', '-c', script]);
  return `${stdout}${stderr}`;
}

async function killKilnd(scene: Scene): Promise<void> {
  for (const pid of scene.kilndPids()) {
    signal(pid, 'SIGKILL');
    await waitForEnd(pid, 20_000);
  }
}

const annotated = (type: string, podId: string) => ({
  'io.kubernetes.cri.container-type': type,
  'io.kubernetes.cri.sandbox-id': podId,
});
const annotationFlags = (type: string, podId: string) =>
  Object.entries(annotated(type, podId)).flatMap(([name, value]) => ['--annotation', `${name}=${value}`]);

/** A container that sleeps, with a spec that was edited. */
async function start(
  scene: Scene,
  id: string,
  edit: (spec: EditableSpec) => void,
  flags: string[] = [],
): Promise<void> {
  await scene.createWithSpec(id, ['sleep', '1000'], (spec) => void edit(spec), { flags });
  await scene.ctr(['task', 'start', '--detach', '--fifo-dir', scene.fifoDir, id]);
}

/** The error of a container that must not start; nothing of it is left. */
async function refusal(scene: Scene, edit: (spec: EditableSpec) => void, flags: string[] = []): Promise<string> {
  const { code, stderr } = await scene.runWithSpec(scene.id(), ['true'], (spec) => void edit(spec), { flags });
  expect(code).not.toBe(0);
  return stderr;
}

describe.runIf(underKiln)('block devices of the host', () => {
  const scene = useScene({ version: '2.1' });

  it('are there at the asked path, of their real size, with mode and owner, to read or to write', async () => {
    using written = loop(scene, 'written');
    using read = loop(scene, 'read', 3 * mib + 512);
    using mounted = loop(scene, 'mounted', 5 * mib);
    execFileSync('dd', [`of=${read.device}`, 'conv=fsync'], { input: 'only to read', stdio: 'pipe' });
    const id = scene.id();
    await start(scene, id, (spec) => {
      give(spec, written, '/dev/written');
      give(spec, read, '/mnt/deep/read', 'r');
      spec.mounts.push({ destination: '/dev/mounted', type: 'block', source: mounted.device });
    });
    const seen = await inside(
      scene,
      id,
      `for d in /dev/written /mnt/deep/read /dev/mounted; do stat -c '%F %a %u:%g' $d; blockdev --getsize64 $d; blockdev --getro $d; done
      head -c 12 /mnt/deep/read; echo
      echo x 2>&1 > /mnt/deep/read
      printf 'from the guest' | dd of=/dev/written bs=1M seek=7 conv=notrunc,fsync 2> /dev/null
      printf 'and this' > /dev/mounted`,
    );
    const [hostMode = '', mountedOwner = ''] = execFileSync('stat', ['-c', '%a %u:%g', mounted.device], {
      encoding: 'utf8',
    })
      .trim()
      .split(' ');
    expect(seen.split('\n')).toEqual([
      ...['block special file 640 12:34', `${8 * mib}`, '0'],
      ...['block special file 640 12:34', `${3 * mib + 512}`, '1'],
      ...[`block special file ${hostMode} ${mountedOwner}`, `${5 * mib}`, '0'],
      'only to read',
      expect.stringContaining('Operation not permitted'),
      '',
    ]);
    // What was flushed in the guest is below the host's own cache.
    expect(onDisk(written, 7 * mib, 14)).toBe('from the guest');

    // The device cgroup knows them by the guest's numbers, and lets nobody at the guest's own disks.
    const numbers = (await inside(scene, id, "stat -c '%t %T' /dev/written")).trim();
    const [major = 0, minor = 0] = numbers.split(' ').map((digits) => Number.parseInt(digits, 16));
    expect([major, minor]).not.toEqual([written.major, written.minor]);
    const made = await inside(
      scene,
      id,
      `mknod /again b ${major} ${minor}; mknod /guest b ${major} 0
      head -c 1 /again > /dev/null && echo opened; head -c 1 /guest`,
    );
    expect(made).toMatch(/^opened\n.*Operation not permitted/);

    // One virtual machine alone can write to a device, and nothing on the host can mount it meanwhile.
    expect(await refusal(scene, (spec) => give(spec, written, '/dev/w'))).toContain(`${written.device} is in use`);
    expect(spawnSync('mount', [written.device, '/mnt'], { encoding: 'utf8' }).stderr).toContain('already mounted');
    // Any number can read one.
    const other = await scene.runWithSpec(scene.id(), ['head', '-c', '12', '/r'], (spec) => {
      give(spec, read, '/r', 'r');
      return undefined;
    });
    expect(other).toMatchObject({ code: 0, stdout: Buffer.from('only to read') });

    await scene.remove(id);
    // What was not flushed, when the container is gone; and then the next one can have it.
    expect(onDisk(mounted, 0, 8)).toBe('and this');
    const last = ['dd', `if=${written.device}`, 'bs=1M', 'skip=7'];
    const next = await scene.run(scene.id(), last, { flags: ['--rm', '--device', written.device] });
    expect(next.stdout.subarray(0, 14).toString()).toBe('from the guest');
  });

  it('have filesystems that the guest mounts, and the host never', async () => {
    using data = loop(scene, 'data', 16 * mib);
    using other = loop(scene, 'other', 16 * mib);
    for (const { device } of [data, other]) execFileSync('mkfs.ext4', ['-q', device]);
    const edit = (spec: EditableSpec) => {
      spec.mounts.push({ destination: '/data', type: 'ext4', source: data.device, options: ['noatime', 'nosuid'] });
      spec.mounts.push({ destination: '/other', type: 'ext4', source: other.device, options: ['ro'] });
    };
    const script = `grep -o ' /data .*\\| /other .*' /proc/self/mountinfo | cut -d' ' -f2-3
      cat /data/kept 2> /dev/null; echo kept > /data/kept; echo x 2>&1 > /other/x; ls /dev/vd* 2>/dev/null`;
    for (const kept of ['', 'kept\n']) {
      const { stdout, stderr } = await scene.runWithSpec(scene.id(), ['sh', '-c', script], (spec) => void edit(spec));
      expect(stderr).toBe('');
      const [first, second, ...rest] = stdout.toString().split('\n');
      expect(first).toMatch(/^\/data rw,nosuid,noatime/);
      expect(second).toMatch(/^\/other ro/);
      expect(rest.join('\n')).toMatch(new RegExp(`^${kept}.*Read-only file system\n$`));
      // Whole and clean.
      execFileSync('e2fsck', ['-f', '-n', data.device], { stdio: 'pipe' });
    }
    const wrong = (type: string, source: string) =>
      refusal(scene, (spec) => void spec.mounts.push({ destination: '/data', type, source }));
    expect(await wrong('ext4', '/dev/none')).toContain('mounts of type "ext4" are not supported: /data');
    expect(await wrong('vfat', data.device)).toMatch(/cannot mount vfat .*: /);
    expect(await wrong('block', '/dev/null')).toContain('/dev/null is no block device of the host');
  });

  it('that are not there, have no medium, or are too many are refused by name', async () => {
    using full = loop(scene, 'full');
    const numbered = (major: number, minor: number) => (spec: EditableSpec) =>
      give(spec, { ...full, major, minor }, '/dev/x');
    expect(await refusal(scene, numbered(7, 9999))).toContain(
      'linux.devices[0]: /dev/x (b 7:9999): the host has no such block device',
    );
    const loops = Array.from({ length: 8 }, (_, index) => loop(scene, `many-${index}`));
    try {
      const many = (spec: EditableSpec) => {
        for (const [index, device] of loops.entries()) give(spec, device, `/dev/m${index}`);
      };
      expect(await refusal(scene, many)).toContain('the VM has no free writable drive slot for /dev/loop');
    } finally {
      for (const device of loops) device[Symbol.dispose]();
    }
  });

  it('that fail give I/O errors to the program, which can be ended', async () => {
    using device = loop(scene, 'failing');
    const id = scene.id();
    await start(scene, id, (spec) => give(spec, device, '/dev/x'));
    expect(await inside(scene, id, 'dd if=/dev/x of=/dev/null bs=4k count=1 2>&1 | grep -c 1+0.records.out')).toBe(
      '1\n',
    );
    truncateSync(device.file, 0);
    const failed = await inside(scene, id, 'dd if=/dev/x of=/dev/null bs=4k skip=512 count=1');
    expect(failed).toContain('Input/output error');
    await scene.remove(id);
  });

  it("of a pod's containers leave it with them, and outlive a kilnd that is killed", async () => {
    using device = loop(scene, 'of-pod', 6 * mib);
    const pod = scene.id('pod');
    await scene.start(pod, ['pause'], { flags: annotationFlags('sandbox', pod) });
    const member = (edit: (spec: EditableSpec) => void) => {
      const id = scene.id('member');
      return start(scene, id, edit, annotationFlags('container', pod)).then(() => id);
    };
    const one = await member((spec) => give(spec, device, '/dev/x'));
    const two = await member((spec) => give(spec, device, '/dev/y'));
    expect(await inside(scene, one, 'printf one > /dev/x; sync; head -c 3 /dev/x')).toBe('one');
    expect(await inside(scene, two, 'head -c 3 /dev/y')).toBe('one');
    await killKilnd(scene);
    await scene.remove(one);
    const elsewhere = () => refusal(scene, (spec) => give(spec, device, '/dev/z'));
    expect(await elsewhere()).toContain(`${device.device} is in use`);
    await scene.remove(two);
    // Its slot has room for a root filesystem again, and it is another's.
    const three = await member(() => {});
    const outside = await scene.runWithSpec(scene.id(), ['head', '-c', '3', '/z'], (spec) => {
      give(spec, device, '/z');
      return undefined;
    });
    expect(outside.stdout.toString()).toBe('one');
    const four = await member((spec) => give(spec, device, '/dev/x'));
    expect(await inside(scene, four, 'blockdev --getsize64 /dev/x')).toBe(`${6 * mib}\n`);
    for (const id of [three, four, pod]) await scene.remove(id);
  });
});
