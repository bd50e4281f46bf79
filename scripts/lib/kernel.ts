/**
 * Reading a distribution's kernel: the ELF image inside `vmlinuz`, and which modules need which.
 *
 * A `vmlinuz` (bzImage) is a small real-mode program followed by the compressed kernel. The setup header says where
 * the compressed part lies (Documentation/arch/x86/boot.rst, boot protocol 2.08 and later). A VMM that boots by the
 * PVH note, or Firecracker, wants the ELF file itself.
 *
 * What a module needs stands in its ELF section `.modinfo` as `key=value` strings; `depmod` reads the same ones. So
 * the order is found without installing the kernel package and without kmod.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { basename, join, relative } from 'node:path';
import { gunzipSync, zstdDecompressSync } from 'node:zlib';

/** Offsets into the setup header: boot.rst, "The Real-Mode Kernel Header". */
const SETUP_SECTS = 0x1f1;
const HEADER_MAGIC = 0x202;
const PAYLOAD_OFFSET = 0x248;
const PAYLOAD_LENGTH = 0x24c;

/** Unpacks the ELF kernel from a bzImage file. Throws when the file is none or its compression is not known. */
export function extractVmlinux(vmlinuz: string): Buffer {
  const image = readFileSync(vmlinuz);
  if (image.toString('latin1', HEADER_MAGIC, HEADER_MAGIC + 4) !== 'HdrS')
    throw new Error(`${vmlinuz}: not a Linux bzImage`);
  // 0 means 4 in the oldest format; one more sector is the boot sector itself.
  const setupBytes = ((image[SETUP_SECTS] || 4) + 1) * 512;
  const start = setupBytes + image.readUInt32LE(PAYLOAD_OFFSET);
  const kernel = decompress(image.subarray(start, start + image.readUInt32LE(PAYLOAD_LENGTH)), vmlinuz);
  if (kernel.toString('latin1', 0, 4) !== '\x7fELF') throw new Error(`${vmlinuz}: its payload is not an ELF kernel`);
  return kernel;
}

/** Decompresses xz, gzip or zstd, told apart by their first bytes. */
export function decompress(data: Buffer, name: string): Buffer {
  const magic = data.subarray(0, 6).toString('hex');
  if (magic.startsWith('fd377a585a00')) {
    // The kernel appends the unpacked size to the stream, which --single-stream leaves alone.
    const xz = spawnSync('xz', ['-dc', '--single-stream'], { input: data, maxBuffer: 1 << 30 });
    if (xz.error) throw new Error(`${name}: cannot run xz`, { cause: xz.error });
    if (xz.status !== 0) throw new Error(`${name}: xz: ${xz.stderr.toString().trim()}`);
    return xz.stdout;
  }
  if (magic.startsWith('1f8b')) return gunzipSync(data);
  if (magic.startsWith('28b52ffd')) return zstdDecompressSync(data);
  throw new Error(`${name}: unknown compression (first bytes ${magic})`);
}

export interface KernelModule {
  /** As the kernel calls it: with underscores. */
  name: string;
  /** Path below /lib/modules/<release>, without a compression suffix. */
  path: string;
  /** The module's bytes, uncompressed: finit_module(2) takes ELF. */
  data: Buffer;
  depends: string[];
  aliases: string[];
}

export class ModuleTree {
  readonly release: string;
  readonly #dir: string;
  /** Module name → file path below the tree. */
  readonly #files = new Map<string, string>();
  readonly #builtin = new Set<string>();
  readonly #loaded = new Map<string, KernelModule>();

  /** @param packageDir an unpacked linux-image package. */
  constructor(packageDir: string) {
    const parent = ['lib/modules', 'usr/lib/modules'].map((dir) => join(packageDir, dir)).find(existsSync);
    const release = parent === undefined ? undefined : readdirSync(parent)[0];
    if (parent === undefined || release === undefined) throw new Error(`${packageDir}: no kernel modules in it`);
    this.release = release;
    this.#dir = join(parent, release);
    for (const entry of readdirSync(this.#dir, { recursive: true, withFileTypes: true })) {
      if (/\.ko(\.(xz|zst|gz))?$/.test(entry.name))
        this.#files.set(moduleName(entry.name), join(entry.parentPath, entry.name));
    }
    for (const line of this.readIndex('modules.builtin').split('\n')) {
      if (line !== '') this.#builtin.add(moduleName(basename(line)));
    }
  }

  /** One of the index files that the package itself brings, such as modules.builtin. */
  readIndex(name: string): string {
    return readFileSync(join(this.#dir, name), 'utf8');
  }

  has(name: string): boolean {
    return this.#files.has(moduleName(name)) || this.#builtin.has(moduleName(name));
  }

  /** The modules and everything they depend on, in an order in which they can be loaded. Built-in ones are left out. */
  closure(names: readonly string[]): KernelModule[] {
    const ordered = new Map<string, KernelModule>();
    const visit = (name: string, wantedBy: string): void => {
      if (this.#builtin.has(name) || ordered.has(name)) return;
      const module = this.#load(name, wantedBy);
      for (const needed of module.depends) visit(needed, name);
      ordered.set(name, module);
    };
    for (const name of names) visit(moduleName(name), 'the guest');
    return [...ordered.values()];
  }

  #load(name: string, wantedBy: string): KernelModule {
    const known = this.#loaded.get(name);
    if (known) return known;
    const file = this.#files.get(name);
    if (file === undefined) throw new Error(`kernel ${this.release} has no module ${name}, which ${wantedBy} needs`);
    const raw = readFileSync(file);
    const data = file.endsWith('.ko') ? raw : decompress(raw, file);
    const info = modinfo(data, file);
    const module: KernelModule = {
      name,
      path: relative(this.#dir, file).replace(/\.(xz|zst|gz)$/, ''),
      data,
      depends: info.filter(([key]) => key === 'depends').flatMap(([, value]) => value.split(',').filter(Boolean)),
      aliases: info.filter(([key]) => key === 'alias').map(([, value]) => value),
    };
    module.depends = module.depends.map(moduleName);
    this.#loaded.set(name, module);
    return module;
  }
}

/** `virtio-rng.ko.xz` → `virtio_rng`: file names use both signs, the kernel only the underscore. */
function moduleName(file: string): string {
  return file.replace(/\.ko(\.\w+)?$/, '').replaceAll('-', '_');
}

/** The key=value pairs of the section `.modinfo` of a 64-bit little-endian ELF file (elf(5)). */
function modinfo(elf: Buffer, name: string): [string, string][] {
  if (elf.toString('latin1', 0, 4) !== '\x7fELF' || elf[4] !== 2) throw new Error(`${name}: not a 64-bit ELF file`);
  const tableOffset = Number(elf.readBigUInt64LE(0x28)); // e_shoff
  const entrySize = elf.readUInt16LE(0x3a); // e_shentsize
  const count = elf.readUInt16LE(0x3c); // e_shnum
  const section = (index: number) => {
    const header = tableOffset + index * entrySize;
    const offset = Number(elf.readBigUInt64LE(header + 0x18)); // sh_offset
    const size = Number(elf.readBigUInt64LE(header + 0x20)); // sh_size
    return { name: elf.readUInt32LE(header), bytes: elf.subarray(offset, offset + size) };
  };
  const names = section(elf.readUInt16LE(0x3e)).bytes; // e_shstrndx
  for (let index = 0; index < count; index++) {
    const { name: nameOffset, bytes } = section(index);
    if (names.toString('latin1', nameOffset, names.indexOf(0, nameOffset)) !== '.modinfo') continue;
    return bytes
      .toString('utf8')
      .split('\0')
      .filter((text) => text.includes('='))
      .map((text) => [text.slice(0, text.indexOf('=')), text.slice(text.indexOf('=') + 1)]);
  }
  throw new Error(`${name}: no .modinfo section`);
}
