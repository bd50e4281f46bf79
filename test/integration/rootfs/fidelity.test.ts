/** The image holds exactly what the kernel's overlayfs shows of the same layers. */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { planRootfs, RootfsStore } from '../../../src/rootfs/index.ts';
import { setXattr } from './listing.ts';
import { isRoot, listImage, listMounted, makeWorkspace, never, sh } from './workspace.ts';

const writableSizeBytes = 1024 ** 3;

/** vfs_cap_data of capabilities(7): revision 2 with the effective bit, permitted CAP_NET_BIND_SERVICE. */
const bindCapability = Buffer.from('0100000200040000000000000000000000000000', 'hex');

const everything = `
mkdir -p low/etc low/bin low/var/gone low/opaque low/merged/deep low/many low/links up/etc up/opaque up/merged/deep up/links
# content of every kind of length: none, one byte, below, at and above a block, with holes
: >low/etc/empty; printf x >low/etc/one; head -c 4095 /dev/urandom >low/etc/b4095
head -c 4096 /dev/urandom >low/etc/b4096; head -c 4097 /dev/urandom >low/etc/b4097
head -c 3000000 /dev/urandom >low/bin/big; truncate -s 8M low/etc/sparse; printf end >>low/etc/sparse
# overlay: replaced, removed, removed and made anew as another kind, opaque, merged
echo old >low/etc/replaced; echo new >up/etc/replaced
echo x >low/etc/removed; mknod up/etc/removed c 0 0; mkdir -p up/var; mknod up/var/gone c 0 0
echo x >low/var/gone/file; echo x >low/opaque/hidden; echo y >up/opaque/shown
echo a >low/merged/deep/from-low; echo b >up/merged/deep/from-up; mkdir low/kind; echo x >low/kind/x; ln -s etc up/kind
# hard links: in one layer, three in one layer with one removed and one replaced above
echo link >low/links/a; ln low/links/a low/links/b; ln low/links/a low/etc/c; ln low/links/a low/links/d
mknod up/links/b c 0 0; echo other >up/links/d; ln up/links/d up/links/e
ln -s nowhere low/links/s1; ln low/links/s1 low/links/s2; mkfifo low/links/p1; ln low/links/p1 low/links/p2
# special files and modes
mknod low/bin/null c 1 3; mknod low/bin/disk b 259 70000; mkfifo -m 640 low/bin/fifo
cp low/bin/big low/bin/setuid; chmod 4755 low/bin/setuid; cp low/etc/one low/bin/setgid; chmod 2711 low/bin/setgid
mkdir -m 1777 low/tmp; mkdir -m 2750 up/shared; mkdir -m 000 low/locked; : >low/noaccess; chmod 000 low/noaccess
# owners beyond 16 bits
echo o >low/owned; chown 100000:4294967294 low/owned; mkdir low/home; chown 65534:65536 low/home; chown -h 70000:1 low/links/s1
# symbolic links: absolute, upwards, dangling, to itself, long
ln -s /etc/passwd low/absolute; ln -s ../../../../../../etc/shadow low/upwards; ln -s self low/self
ln -s "$(printf 'd%.0s' $(seq 4000))" low/long-link
# names
touch "low/with space" "low/-dash" "low/col:on" 'low/back\\slash' 'low/quo"te' "low/apo'strophe" 'low/*' "low/new
line" "low/$(printf 'not\\377utf8')" "low/$(printf 'n%.0s' $(seq 254))" "low/ünïcödé" low/.hidden low/...
mkdir low/lost+found
# a directory of many blocks
i=0; while [ $i -lt 10000 ]; do : >"low/many/file-$i"; i=$((i+1)); done
# times with nanoseconds, at the epoch, after 2038
touch -d '2001-02-03 04:05:06.123456789 UTC' low/etc/one; touch -h -d '1999-12-31 23:59:59.999999999 UTC' low/absolute
touch -d '2039-01-01 00:00:00.000000001 UTC' low/etc/empty; touch -d '1970-01-01 00:00:00 UTC' low/etc/b4096
touch -d '2010-10-10 10:10:10.101010101 UTC' up/merged/deep up/merged low/opaque up/opaque low/home
touch -d '2011-11-11 11:11:11.111111111 UTC' low up
`;

function setXattrs(folder: string): void {
  const at = (path: string) => join(folder, path);
  setXattr(at('up/opaque'), 'trusted.overlay.opaque', Buffer.from('y'));
  setXattr(at('low/bin/setgid'), 'security.capability', bindCapability);
  setXattr(at('low/etc/one'), 'user.comment', Buffer.from('one'));
  setXattr(at('low/etc/one'), 'user.empty', Buffer.alloc(0));
  setXattr(at('low/etc/one'), 'trusted.mine', Buffer.from([0, 1, 2, 255]));
  setXattr(at('low/home'), 'user.dir', Buffer.from('d'.repeat(300)));
  setXattr(at('low/bin/null'), 'trusted.device', Buffer.from('null'));
  setXattr(at('low/links/s2'), 'trusted.link', Buffer.from('symlink'));
  // Shared by more files than mkfs.erofs keeps inline by default.
  for (let i = 0; i < 20; i++) setXattr(at(`low/many/file-${i}`), 'user.shared', Buffer.from('the same for all'));
}

describe.skipIf(!isRoot)('an image of layers', () => {
  let workspace: Awaited<ReturnType<typeof makeWorkspace>>;
  const folder = () => workspace.path;

  beforeAll(async () => {
    workspace = await makeWorkspace();
    await sh(folder(), everything);
    setXattrs(folder());
  });
  afterAll(() => workspace[Symbol.dispose]());

  async function convert(lowerdir: readonly string[], ...options: string[]) {
    const store = new RootfsStore({ cacheDir: join(folder(), 'cache') });
    const layers = lowerdir.map((layer) => join(folder(), layer).replaceAll(':', '\\:'));
    const plan = planRootfs([
      { type: 'overlay', source: 'overlay', options: [`lowerdir=${layers.join(':')}`, ...options] },
    ]);
    return store.prepare(plan, { signal: never, writableSizeBytes });
  }

  test('equals the merged overlay: content, whiteouts, links, xattrs, devices, modes, owners, times, names', async () => {
    await using rootfs = await convert(['up', 'low']);
    const expected = await listMounted(folder(), 'mkdir -p mnt; mount -t overlay -o ro,lowerdir=up:low overlay mnt');
    const actual = await listImage(folder(), rootfs.lower.file);
    // An empty directory of that name is all that mkfs.erofs before 1.6 may leave out.
    const relevant = (files: typeof expected) => files.filter(({ path }) => path !== '/lost+found');
    expect(relevant(actual)).toEqual(relevant(expected));
    const paths = new Set(actual.map(({ path }) => path));
    expect(paths.has('/etc/removed') || paths.has('/opaque/hidden') || paths.has('/var/gone')).toBe(false);
    expect(actual.find(({ path }) => path === '/links/a')?.sameAs).toBe('/etc/c');
    expect(actual.find(({ path }) => path === '/bin/setgid')?.xattrs).toHaveProperty('security.capability');
  });

  test('of one layer equals that layer without its marks', async () => {
    await using rootfs = await convert(['up']);
    const expected = await listMounted(
      folder(),
      'mkdir -p mnt none; mount -t overlay -o ro,lowerdir=up:none overlay mnt',
    );
    expect(await listImage(folder(), rootfs.lower.file)).toEqual(expected);
  });

  test('leaves out whiteouts in directories that only one layer has', async () => {
    await sh(folder(), 'mkdir -p base odd/only odd/both base/both; echo x >base/both/f; mknod odd/only/gone c 0 0');
    await sh(
      folder(),
      "echo x >odd/only/kept; mknod odd/only/device c 5 1; mknod 'odd/only/new\nline' c 0 0; mknod odd/top c 0 0",
    );
    await sh(folder(), 'mkdir odd/opaque base/opaque; echo x >base/opaque/f; mknod odd/opaque/f c 0 0');
    setXattr(join(folder(), 'odd/opaque'), 'trusted.overlay.opaque', Buffer.from('y'));
    await using rootfs = await convert(['odd', 'base']);
    const paths = (await listImage(folder(), rootfs.lower.file)).map(({ path }) => path);
    expect(paths).toEqual(['', '/both', '/both/f', '/only', '/only/device', '/only/kept', '/opaque']);
  });

  test('of 150 layers with long names, colons and commas is merged in their order', async () => {
    const name = (index: number) => `layers-${'x'.repeat(150)}/a:b,c "${index}"`;
    const names = Array.from({ length: 150 }, (_, index) => name(index));
    for (const [index, layer] of names.entries()) {
      await sh(folder(), `mkdir -p '${layer}'; echo ${index} >'${layer}/own-${index}'; echo ${index} >'${layer}/top'`);
    }
    await using rootfs = await convert(names);
    const files = await listImage(folder(), rootfs.lower.file);
    expect(files.filter(({ path }) => path.startsWith('/own-'))).toHaveLength(150);
    const first = await sh(folder(), `sha256sum '${names[0]}/top'`);
    expect(first).toContain(files.find(({ path }) => path === '/top')?.sha256);
  });

  test('reads opaque marks from user xattrs when the snapshotter says so', async () => {
    await sh(folder(), 'mkdir -p user-low/dir user-up/dir; echo x >user-low/dir/hidden; echo y >user-up/dir/shown');
    setXattr(join(folder(), 'user-up/dir'), 'user.overlay.opaque', Buffer.from('y'));
    const paths = async (...options: string[]) => {
      await using rootfs = await convert(['user-up', 'user-low'], ...options);
      return (await listImage(folder(), rootfs.lower.file)).map(({ path }) => path);
    };
    expect(await paths('userxattr')).toEqual(['', '/dir', '/dir/shown']);
    expect(await paths()).toEqual(['', '/dir', '/dir/hidden', '/dir/shown']);
  });

  test('of layers on two filesystems keeps files with the same inode number apart', async () => {
    await sh(folder(), 'mkdir -p other; mount -t tmpfs tmpfs other');
    try {
      await sh(folder(), 'mkdir other/layer; for i in $(seq 100); do echo other-$i >other/layer/o$i; done');
      await sh(folder(), 'ln other/layer/o1 other/layer/linked');
      await using rootfs = await convert(['other/layer', 'low']);
      const mountBoth = 'mkdir -p mnt; mount -t overlay -o ro,lowerdir=other/layer:low overlay mnt';
      const expected = await listMounted(folder(), mountBoth);
      const actual = await listImage(folder(), rootfs.lower.file);
      expect(actual).toEqual(
        expected.filter(({ path }) => path !== '/lost+found' || actual.some((f) => f.path === path)),
      );
    } finally {
      await sh(folder(), 'umount other');
    }
  });

  test('refuses a file that the installed mkfs.erofs would drop without a word', async () => {
    const version = await sh(folder(), 'mkfs.erofs -V 2>/dev/null || true');
    const isOld = /mkfs\.erofs\D* 1\.[0-5]\b/.test(version);
    await sh(folder(), 'mkdir -p full/lost+found; echo precious >full/lost+found/data');
    const conversion = convert(['full', 'up']);
    if (isOld) {
      await expect(conversion).rejects.toMatchObject({
        code: 'unimplemented',
        message: expect.stringContaining('/lost+found'),
      });
    } else {
      await using rootfs = await conversion;
      expect((await listImage(folder(), rootfs.lower.file)).map(({ path }) => path)).toContain('/lost+found/data');
    }
  });

  test('has the same UUID whenever it is made', async () => {
    const uuid = async () => {
      await using rootfs = await convert(['up', 'low']);
      const found = await sh(
        folder(),
        `dump.erofs -s '${rootfs.lower.file}' | grep -i uuid; rm '${rootfs.lower.file}'`,
      );
      return found.trim();
    };
    expect(await uuid()).toBe(await uuid());
  });
});
