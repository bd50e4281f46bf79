import { createHash } from 'node:crypto';
import { copyFile, mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { extract } from 'tar-stream';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  busyboxImage,
  busyboxLayer,
  type LayerEntry,
  opaque,
  tarToolCommand,
  tarToolLayer,
  whiteout,
} from '../support/images.ts';
import { busyboxBinary, runtime, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { mustRun } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

/** A file capability (cap_net_raw+ep) as the kernel stores it: VFS_CAP_REVISION_2 with the effective bit. */
const netRawCapability = '\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0';
// erofs-utils before 1.8.5 cannot store names of 255 bytes; there is a test of its own for that.
const longName = 'n'.repeat(254);
const deep = Array.from({ length: 40 }, (_, level) => `level${level}`);

const first: LayerEntry[] = [
  { kind: 'dir', path: 'data' },
  // What the upper layers remove, hide or replace.
  { kind: 'dir', path: 'data/whiteout' },
  { kind: 'file', path: 'data/whiteout/stays', content: 'stays' },
  { kind: 'file', path: 'data/whiteout/goes', content: 'goes' },
  { kind: 'dir', path: 'data/whiteout/folder-goes' },
  { kind: 'file', path: 'data/whiteout/folder-goes/inside', content: 'x' },
  { kind: 'file', path: 'data/whiteout/comes-back', content: 'old' },
  { kind: 'dir', path: 'data/opaque' },
  { kind: 'file', path: 'data/opaque/hidden', content: 'hidden' },
  { kind: 'dir', path: 'data/opaque/hidden-folder' },
  { kind: 'file', path: 'data/opaque/hidden-folder/hidden', content: 'hidden' },
  { kind: 'dir', path: 'data/merged', mode: 0o700, uid: 10, gid: 20 },
  { kind: 'file', path: 'data/merged/lower', content: 'lower' },
  { kind: 'file', path: 'data/merged/both', content: 'from the lower layer' },
  { kind: 'dir', path: 'data/dir-becomes-file' },
  { kind: 'file', path: 'data/dir-becomes-file/inside', content: 'x' },
  { kind: 'file', path: 'data/file-becomes-dir', content: 'x' },
  { kind: 'symlink', path: 'data/link-becomes-dir', target: 'whiteout' },
  // Hard links, also across folders, and one of the group changed above.
  { kind: 'file', path: 'data/hard-1', content: 'hard', mode: 0o640, uid: 1000, gid: 1000 },
  { kind: 'link', path: 'data/hard-2', target: 'data/hard-1' },
  { kind: 'dir', path: 'data/links' },
  { kind: 'link', path: 'data/links/hard-3', target: 'data/hard-1' },
  { kind: 'file', path: 'data/split-1', content: 'split' },
  { kind: 'link', path: 'data/split-2', target: 'data/split-1' },
  // Modes, owners, times.
  { kind: 'file', path: 'data/setuid', content: '#!', mode: 0o4755 },
  { kind: 'file', path: 'data/setgid', content: '#!', mode: 0o2755, gid: 42 },
  { kind: 'dir', path: 'data/sticky', mode: 0o1777 },
  { kind: 'dir', path: 'data/setgid-dir', mode: 0o2775, gid: 7 },
  { kind: 'file', path: 'data/setuid-other', content: '#!', mode: 0o6711, uid: 1234, gid: 5678 },
  { kind: 'file', path: 'data/no-rights', content: 'secret', mode: 0o001, uid: 65534, gid: 65534 },
  { kind: 'file', path: 'data/large-ids', content: 'x', uid: 4_000_000_000, gid: 3_000_000_000 },
  { kind: 'dir', path: 'data/large-ids-dir', uid: 2_000_000, gid: 2_000_001 },
  { kind: 'symlink', path: 'data/owned-link', target: 'hard-1', uid: 1000, gid: 1001, mode: 0o777 },
  { kind: 'file', path: 'data/ancient', content: 'x', mtime: new Date('1970-01-02T00:00:00Z') },
  { kind: 'file', path: 'data/future', content: 'x', mtime: new Date('2037-12-31T23:59:59Z') },
  { kind: 'dir', path: 'data/old-dir', mtime: new Date('1999-12-31T00:00:00Z') },
  // Extended attributes.
  {
    kind: 'file',
    path: 'data/xattr',
    content: 'x',
    xattrs: { 'user.kiln': 'warm', 'user.empty': '', 'user.long': 'v'.repeat(2000) },
  },
  { kind: 'dir', path: 'data/xattr-dir', xattrs: { 'user.kiln': 'folder', 'trusted.kiln': 'trusted' } },
  {
    kind: 'file',
    path: 'data/capability',
    content: '#!',
    mode: 0o755,
    xattrs: { 'security.capability': netRawCapability },
  },
  // Other kinds of files.
  { kind: 'char', path: 'data/null', major: 1, minor: 3, mode: 0o666 },
  { kind: 'block', path: 'data/block', major: 7, minor: 200, mode: 0o600 },
  { kind: 'char', path: 'data/large-numbers', major: 300, minor: 70_000, mode: 0o600 },
  { kind: 'fifo', path: 'data/fifo', mode: 0o622 },
  { kind: 'symlink', path: 'data/dangling', target: '/no/such/place' },
  { kind: 'symlink', path: 'data/absolute', target: '/etc/passwd' },
  { kind: 'symlink', path: 'data/loop', target: 'loop' },
  { kind: 'symlink', path: 'data/long-link', target: `${'d/'.repeat(400)}end` },
  { kind: 'symlink', path: 'data/up', target: '../../../../../../etc/passwd' },
  // Names.
  { kind: 'file', path: 'data/with space', content: 'x' },
  { kind: 'file', path: 'data/ünïcode-名前-🔥', content: 'x' },
  { kind: 'file', path: 'data/new\nline', content: 'x' },
  { kind: 'file', path: 'data/back\\slash"quote\'', content: 'x' },
  { kind: 'file', path: 'data/-dash', content: 'x' },
  { kind: 'file', path: 'data/...', content: 'x' },
  { kind: 'file', path: 'data/wh.not-a-whiteout', content: 'x' },
  { kind: 'file', path: `data/${longName}`, content: 'x' },
  ...deep.map((_, level): LayerEntry => ({ kind: 'dir', path: `data/${deep.slice(0, level + 1).join('/')}` })),
  { kind: 'file', path: `data/${deep.join('/')}/bottom`, content: 'deep' },
  // Contents.
  { kind: 'file', path: 'data/empty', content: '' },
  { kind: 'file', path: 'data/page', content: Buffer.alloc(4096, 'p') },
  { kind: 'file', path: 'data/page-and-one', content: Buffer.alloc(4097, 'q') },
  { kind: 'file', path: 'data/large', content: Buffer.alloc(3_000_001, 'a large file ') },
  { kind: 'file', path: 'data/zeros', content: Buffer.alloc(1_000_000) },
  { kind: 'dir', path: 'data/many' },
  ...Array.from({ length: 600 }, (_, n): LayerEntry => ({ kind: 'file', path: `data/many/${n}`, content: String(n) })),
];

const second: LayerEntry[] = [
  whiteout('data/whiteout/goes'),
  whiteout('data/whiteout/folder-goes'),
  whiteout('data/whiteout/comes-back'),
  { kind: 'dir', path: 'data/opaque', mode: 0o750, uid: 3 },
  opaque('data/opaque'),
  { kind: 'file', path: 'data/opaque/visible', content: 'visible' },
  { kind: 'dir', path: 'data/merged', mode: 0o711, uid: 11, gid: 21 },
  { kind: 'file', path: 'data/merged/both', content: 'from the middle layer' },
  { kind: 'file', path: 'data/merged/middle', content: 'middle' },
  { kind: 'file', path: 'data/dir-becomes-file', content: 'a file now' },
  { kind: 'dir', path: 'data/file-becomes-dir' },
  { kind: 'file', path: 'data/file-becomes-dir/inside', content: 'a folder now' },
  { kind: 'dir', path: 'data/link-becomes-dir' },
  { kind: 'file', path: 'data/link-becomes-dir/inside', content: 'not through the link' },
  { kind: 'file', path: 'data/split-2', content: 'no longer linked' },
  { kind: 'dir', path: 'data/added-by-second' },
  { kind: 'file', path: 'data/added-by-second/x', content: 'x' },
];

const third: LayerEntry[] = [
  { kind: 'file', path: 'data/whiteout/comes-back', content: 'new', uid: 5 },
  { kind: 'file', path: 'data/merged/both', content: 'from the upper layer' },
  { kind: 'file', path: 'data/setuid', content: 'replaced', mode: 0o755 },
  whiteout('data/added-by-second'),
  { kind: 'dir', path: 'data/opaque' },
  { kind: 'file', path: 'data/opaque/hidden', content: 'here again, from above' },
  // A file under a link of a lower layer lands where the link points, inside the image.
  { kind: 'symlink', path: 'data/etc', target: '/etc' },
];

const oddImage = {
  name: 'docker.io/kiln/odd:test',
  get layers() {
    return [[...busyboxLayer(), ...tarToolLayer()], first, second, third];
  },
};

const longestName = 'm'.repeat(255);
const longestNameImage = {
  name: 'docker.io/kiln/longest:test',
  get layers() {
    return [busyboxLayer(), [{ kind: 'file', path: `data/${longestName}`, content: 'x' } satisfies LayerEntry]];
  },
};

/** More layers than a guest has slots for read-only disks. */
const tallImage = {
  name: 'docker.io/kiln/tall:test',
  get layers() {
    return [
      busyboxLayer(),
      ...Array.from({ length: 30 }, (_, n): LayerEntry[] => [
        { kind: 'dir', path: 'tall' },
        { kind: 'file', path: `tall/${n}`, content: `layer ${n}` },
        { kind: 'file', path: 'tall/top', content: `layer ${n}` },
        ...(n > 0 && n % 3 === 0 ? [whiteout(`tall/${n - 1}`)] : []),
      ]),
    ];
  },
};

/**
 * One line per file of the tar that `tarToolCommand` writes: everything that a program inside could tell apart. The
 * native snapshotter makes every snapshot by copying, which gives each folder the time of the copy.
 */
async function listing(tar: Buffer, folderTimes: boolean): Promise<string[]> {
  const lines: string[] = [];
  const linkGroups = new Map<string, string[]>();
  const reader = extract();
  Readable.from([tar]).pipe(reader as unknown as NodeJS.WritableStream);
  for await (const entry of reader) {
    const { header } = entry;
    const hash = createHash('sha256');
    for await (const chunk of entry) hash.update(chunk as Buffer);
    if ((header.type as string) === 'link') {
      linkGroups.set(header.linkname, [...(linkGroups.get(header.linkname) ?? []), header.name]);
      continue;
    }
    const pax = (header.pax ?? {}) as Record<string, string>;
    const xattrs = Object.keys(pax)
      .filter((key) => key.startsWith('SCHILY.xattr.'))
      .sort()
      .map((key) => `${key.slice(13)}=${JSON.stringify(pax[key])}`);
    lines.push(
      [
        JSON.stringify(header.name),
        header.type,
        header.mode.toString(8),
        `${pax.uid ?? header.uid}:${pax.gid ?? header.gid}`,
        header.type === 'directory' && !folderTimes ? 'some time' : Math.floor(header.mtime.getTime() / 1000),
        header.type === 'symlink' ? `-> ${header.linkname}` : '',
        header.type.endsWith('device') ? `${header.devmajor}:${header.devminor}` : '',
        header.type === 'file' ? `${header.size} ${hash.digest('hex')}` : '',
        ...xattrs,
      ].join(' '),
    );
  }
  for (const [target, names] of linkGroups) lines.push(`hard links: ${[target, ...names].sort().join(' = ')}`);
  return lines.sort();
}

async function listInside(scene: Scene, runtimeType: string, snapshotter: string): Promise<string[]> {
  // The root's own folders differ by what a runtime creates in them (mount points), so the parts that are the image's.
  const command = tarToolCommand('/', ['./proc', './sys', './dev', './run']);
  const options = { image: oddImage.name, snapshotter, runtime: runtimeType };
  const result = await scene.run(scene.id(runtimeType.split('.')[2]), command, options);
  expect(result).toMatchObject({ code: 0, stderr: '' });
  return (await listing(result.stdout, snapshotter !== 'native')).filter((line) => !line.startsWith('"./" '));
}

/** What the containers that have ended have written is all on their disks, whose filesystems are marked as cleanly unmounted. */
async function expectCleanDisks(scene: Scene): Promise<void> {
  const { stdout } = await mustRun('find', [scene.dir, '-name', '*.ext4', '-not', '-path', '*/blank/*']);
  const disks = stdout.toString().trim().split('\n');
  expect(disks.length).toBeGreaterThan(0);
  for (const disk of disks) {
    const header = await mustRun('dumpe2fs', ['-h', disk]);
    expect(header.stdout.toString()).toMatch(/Filesystem state: +clean/);
    expect(header.stdout.toString()).not.toContain('needs_recovery');
    await mustRun('e2fsck', ['-fn', disk]);
  }
}

const snapshotters = ['overlayfs', 'native'] as const;

describe('the root filesystem', () => {
  const scene = useScene({ version: '2.1', images: [oddImage, tallImage, longestNameImage] });

  describe.each(snapshotters)('on the snapshotter %s', (snapshotter) => {
    it('looks inside as the same image does under runc', async () => {
      const expected = await listInside(scene, 'io.containerd.runc.v2', snapshotter);
      const actual = await listInside(scene, runtime, snapshotter);
      expect(actual).toEqual(expected);
      // And the yardstick itself is not empty, nor half of it.
      expect(expected.length).toBeGreaterThan(900);
      const all = expected.join('\n');
      expect(all).toContain('hard links: ./data/hard-1 = ./data/hard-2 = ./data/links/hard-3');
      expect(all).toContain('"./data/setuid-other" file 6711 1234:5678');
      expect(all).toContain('user.kiln="warm"');
      expect(all).toContain('security.capability=');
      expect(all).toMatch(/"\.\/data\/large-ids" file 644 4000000000:3000000000/);
      for (const gone of ['goes', 'folder-goes', 'hidden-folder', 'added-by-second', '.wh.']) {
        expect(all).not.toMatch(new RegExp(`/${gone.replaceAll('.', '\\.')}[/"]`));
      }
    });

    it('takes writes that are there when the container is started again, and in no other container', async () => {
      const id = scene.id('writes');
      const script = `
        if [ -e /data/written ]; then echo again; cat /data/written /data/merged/both; ls /data/many | wc -l; ls /data/whiteout; exit 0; fi
        echo first
        echo mine > /data/written
        echo changed > /data/merged/both
        rm -r /data/many /data/whiteout/stays
        mkdir /data/many; echo 1 > /data/many/only
        chown 77:88 /data/setuid
        ln /data/hard-1 /data/hard-4
      `;
      const run = await scene.run(id, ['sh', '-c', script], { image: oddImage.name, snapshotter, flags: [] });
      expect(run).toMatchObject({ code: 0, stderr: '', stdout: Buffer.from('first\n') });
      if (underKiln) await expectCleanDisks(scene);
      const again = await scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, id]);
      expect(again.stdout.toString()).toBe('again\nmine\nchanged\n1\ncomes-back\n');
      const other = await scene.run(
        scene.id('other'),
        ['sh', '-c', 'ls /data/written /data/hard-4; cat /data/merged/both; ls /data/many | wc -l'],
        { image: oddImage.name, snapshotter },
      );
      expect(other.stdout.toString()).toBe('from the upper layer600\n');
      expect(other.stderr).toContain('/data/written: No such file');
      await scene.ctr(['container', 'rm', id]);
      expect(await scene.ctr(['snapshot', '--snapshotter', snapshotter, 'ls'])).not.toContain(id);
    });

    it('stacks an image of 31 layers', async () => {
      const script = 'cat /tall/top; ls /tall | wc -l; cat /tall/0';
      const result = await scene.run(scene.id('tall'), ['sh', '-c', script], { image: tallImage.name, snapshotter });
      expect(result).toMatchObject({ code: 0, stdout: Buffer.from('layer 2922\nlayer 0') });
    });
  });

  it('is a filesystem on which a program can do what it does on Linux', async () => {
    const script = `
      set -e
      cd /tmp
      echo a > a; mv a b; ln b c; ln -s b d; mkdir e; mv e f; mkfifo p; chown 12:34 b; chmod 4711 b
      stat -c '%n %a %u:%g %h' b c; readlink d
      dd if=/dev/zero of=big bs=1M count=20 2>/dev/null; stat -c %s big; truncate -s 5 big; stat -c %s big
      mv /etc/passwd /etc/passwd.old; cat /etc/passwd.old | wc -l
      mv /home /home2; ls -d /home2
      sync
    `;
    const result = await scene.run(scene.id('posix'), ['sh', '-c', script]);
    expect(result).toMatchObject({ code: 0, stderr: '' });
    expect(result.stdout.toString()).toBe('b 4711 12:34 2\nc 4711 12:34 2\nb\n20971520\n5\n2\n/home2\n');
  });

  it('holds a name of 255 bytes, or is refused with the name by an old erofs-utils', async () => {
    const result = await scene.run(scene.id('longest'), ['ls', '/data'], { image: longestNameImage.name });
    if (result.code === 0) expect(result.stdout.toString()).toBe(`${longestName}\n`);
    else expect(result.stderr).toMatch(new RegExp(`${longestName}.*erofs-utils`));
  });

  it('is shared by containers of the same image, each with writes of its own', async () => {
    const script = 'echo $1 > /etc/who; read -r _; cat /etc/who';
    const names = ['a', 'b', 'c'];
    const programs = names.map((name) =>
      scene.runStream(scene.id('shared'), ['sh', '-c', script, 'sh', name], { stdin: '\n' }),
    );
    const outputs = await Promise.all(
      programs.map(async (program) => {
        program.stderr.resume();
        const chunks: Buffer[] = [];
        for await (const chunk of program.stdout) chunks.push(chunk as Buffer);
        await program.exit;
        return Buffer.concat(chunks).toString();
      }),
    );
    expect(outputs).toEqual(['a\n', 'b\n', 'c\n']);
  });
});

describe('the root filesystem under containerd 1.6', () => {
  const scene = useScene({ version: '1.6', images: [oddImage] });
  let expected: string[] = [];
  beforeAll(async () => {
    expected = await listInside(scene, 'io.containerd.runc.v2', 'overlayfs');
  });
  afterAll(() => {
    expected = [];
  });

  it('looks inside as the same image does under runc', async () => {
    expect(await listInside(scene, runtime, 'overlayfs')).toEqual(expected);
  });
});

describe('an image without a layer of its own above busybox', () => {
  const scene = useScene({ version: '2.1' });

  it('runs from a snapshot view of one layer', async () => {
    const result = await scene.run(scene.id(), ['ls', '/'], { image: busyboxImage.name });
    expect(result.stdout.toString()).toContain('bin\n');
  });
});

describe.runIf(underKiln)('a folder of the host as the root filesystem', () => {
  const scene = useScene({ version: '2.1' });

  it('is what the container sees, and has what the container writes', async () => {
    const folder = join(scene.dir, 'folder');
    await mkdir(join(folder, 'bin'), { recursive: true });
    await copyFile(busyboxBinary(), join(folder, 'bin/busybox'));
    await writeFile(join(folder, 'greeting'), 'hello');
    const script = 'cat /greeting; echo changed >/greeting; cat /greeting';
    const command = ['/bin/busybox', 'sh', '-c', script.replaceAll('cat', '/bin/busybox cat')];
    const flags = ['--runtime', runtime, '--fifo-dir', scene.fifoDir, '--rm', '--rootfs'];
    const { code, stdout, stderr } = await scene.containerd.ctr(['run', ...flags, folder, scene.id(), ...command]);
    expect({ code, stderr, stdout: stdout.toString() }).toEqual({ code: 0, stderr: '', stdout: 'hellochanged\n' });
    expect(await readFile(join(folder, 'greeting'), 'utf8')).toBe('changed\n');
  });

  it('that is not there is named', async () => {
    const folder = join(scene.dir, 'gone');
    const flags = ['--runtime', runtime, '--fifo-dir', scene.fifoDir, '--rm', '--rootfs'];
    const { code, stderr } = await scene.containerd.ctr(['run', ...flags, folder, scene.id(), 'true']);
    expect(code).not.toBe(0);
    expect(stderr).toContain(folder);
  });
});
