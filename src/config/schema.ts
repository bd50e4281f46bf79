/**
 * The settings of config.toml: for each key its type, its default and, in words, what is allowed. The words are what an
 * error message says, so they stand next to the rule that they describe. `config/kiln.toml` documents the same keys for
 * users; a test compares the two.
 */
import { z } from 'zod';

/** The sparse placeholder behind a drive slot has this size, and a guest never sees a disk grow beyond it. */
const maxDiskGib = 1024;

/** The greatest user id: (uid_t) -1 means none, and programs of the 32-bit age fear the sign. systemd's UIDS-GIDS.md. */
const maxUid = 2 ** 31 - 1;

const program = (name: string) =>
  z
    .string()
    .regex(/^(\/[^\0]*|[^/\0]+)$/)
    .default(name)
    .describe('the name of a program on PATH or an absolute path');

const absolutePath = z.string().regex(/^\/[^\0]*$/);

/** Settings that an annotation may override, shared by both so that they can never drift apart. */
export const memoryMib = z
  .int()
  .min(128)
  .max(16 * 1024 * 1024);
/** 0 is as much as it has from its start. */
export const memoryMaxMib = z.union([z.literal(0), memoryMib]);
export const vmm = z.enum(['auto', 'qemu', 'firecracker']);
export const vcpus = z.int().min(1).max(255);
/** Rates of each of a container's disks; 0 is none. The upper ends only tell a rate from a typing error. */
export const diskMibPerS = z.int().min(0).max(1_000_000);
export const diskOpsPerS = z.int().min(0).max(100_000_000);
/** Rate of each network card and direction; 0 is none. */
export const networkMibPerS = z.int().min(0).max(1_000_000);
/** What guests keep of the host's files: docs/volumes.md. */
export const volumeCache = z.enum(['mmap', 'none', 'loose']);
export const changes = z.enum(['auto', 'keep', 'discard']);
export const writableSizeGib = z.int().min(1).max(maxDiskGib);

export const allowed = {
  memoryMib: 'an integer from 128 to 16777216 (MiB)',
  memoryMaxMib: '0 (no growth) or an integer from 128 to 16777216 (MiB)',
  vcpus: 'an integer from 1 to 255',
  vmm: '"auto", "qemu" or "firecracker"',
  diskMibPerS: 'an integer from 0 (no limit) to 1000000 (MiB per second)',
  diskOpsPerS: 'an integer from 0 (no limit) to 100000000 (requests per second)',
  networkMibPerS: 'an integer from 0 (no limit) to 1000000 (MiB per second)',
  volumeCache: '"mmap", "none" or "loose"',
  changes: '"auto", "keep" or "discard"',
  writableSizeGib: `an integer from 1 to ${maxDiskGib} (GiB)`,
} as const;

const vm = z.strictObject({
  vmm: vmm.default('auto').describe(allowed.vmm),
  memory_mib: memoryMib.default(512).describe(allowed.memoryMib),
  memory_max_mib: memoryMaxMib.default(0).describe(allowed.memoryMaxMib),
  vcpus: vcpus.default(1).describe(allowed.vcpus),
  kernel: z
    .union([z.enum(['default', 'minimal']), absolutePath])
    .default('default')
    .describe('"default", "minimal" or the absolute path of a kernel'),
  initrd: absolutePath.optional().describe('an absolute path'),
  network_cards: z.int().min(0).max(4).default(2).describe('an integer from 0 to 4'),
  network_mib_per_s: networkMibPerS.default(0).describe(allowed.networkMibPerS),
  boot_timeout_s: z.int().min(1).max(3600).default(60).describe('an integer from 1 to 3600 (seconds)'),
  accelerator: z.enum(['auto', 'kvm', 'tcg']).default('auto').describe('"auto", "kvm" or "tcg"'),
  translation_mib: z
    .union([z.literal(0), z.int().min(4).max(1024)])
    .default(0)
    .describe('0 (as QEMU chooses) or an integer from 4 to 1024 (MiB)'),
  translation_idle_s: z.int().min(0).max(86_400).default(60).describe('0 (never) or an integer up to 86400 (seconds)'),
  qemu: program('qemu-system-x86_64'),
  firecracker: program('firecracker'),
  jail: z.enum(['auto', 'on', 'off']).default('auto').describe('"auto", "on" or "off"'),
  jailer: program('jailer'),
  jail_uid_first: z.int().min(1).max(maxUid).default(1_900_000_000).describe(`an integer from 1 to ${maxUid}`),
  jail_uids: z.int().min(1).max(1_000_000).default(65_536).describe('an integer from 1 to 1000000'),
  huge_pages: z.boolean().default(false).describe('true or false'),
  boot_timer: z.boolean().default(false).describe('true or false'),
  channel: z
    .enum(['auto', 'hybrid-vsock', 'kernel-vsock', 'virtio-serial'])
    .default('auto')
    .describe('"auto", "hybrid-vsock", "kernel-vsock" or "virtio-serial"'),
});

const template = z.strictObject({
  enabled: z.boolean().default(true).describe('true or false'),
  keep_days: z.int().min(1).max(3650).default(7).describe('an integer from 1 to 3650 (days)'),
  max_total_mib: z
    .int()
    .min(1)
    .max(2 ** 30)
    .default(4096)
    .describe('an integer from 1 to 1073741824 (MiB)'),
});

const pool = z
  .strictObject({
    min: z.int().min(0).max(1000).default(0).describe('an integer from 0 to 1000'),
    max: z
      .int()
      .min(0)
      .max(1000)
      .default(0)
      .describe('an integer from 0 (no pool) to 1000, and not less than pool.min'),
  })
  .refine(({ min, max }) => min <= max, { path: ['max'] });

const storage = z.strictObject({
  writable_size_gib: writableSizeGib.default(10).describe(allowed.writableSizeGib),
  changes: changes.default('auto').describe(allowed.changes),
  disk_mib_per_s: diskMibPerS.default(0).describe(allowed.diskMibPerS),
  disk_ops_per_s: diskOpsPerS.default(0).describe(allowed.diskOpsPerS),
  volume_cache: volumeCache.default('mmap').describe(allowed.volumeCache),
});

const daemon = z.strictObject({
  idle_timeout_s: z
    .int()
    .min(0)
    .max(7 * 24 * 3600)
    .default(300)
    .describe('an integer from 0 (never) to 604800 (seconds)'),
  metrics_address: z
    .string()
    .regex(/^$|^(\[[0-9A-Fa-f:.]+\]|[^\s:[\]]+):([1-9]\d{0,4})$/)
    .refine((address) => Number(address.split(':').at(-1)) <= 65_535)
    .default('')
    .describe('"host:port", or "" for none'),
  log_level: z
    .enum(['trace', 'debug', 'info', 'warn', 'error'])
    .default('info')
    .describe('"trace", "debug", "info", "warn" or "error"'),
});

/** The sections of the file. A missing section is a section of defaults. */
export const sections = { vm, template, pool, storage, daemon } as const;

export const configFile = z.strictObject({
  vm: vm.prefault({}).describe('a table'),
  template: template.prefault({}).describe('a table'),
  pool: pool.prefault({}).describe('a table'),
  storage: storage.prefault({}).describe('a table'),
  daemon: daemon.prefault({}).describe('a table'),
});

export type ConfigFile = z.output<typeof configFile>;
