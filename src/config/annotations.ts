/**
 * Per-container settings: `io.kiln.*` annotations in the container's config.json.
 *
 * Whoever may start a container may set them, which on Kubernetes is anyone who may create a pod. So they can size a
 * virtual machine and choose among kernels that the host's owner installed, but never name a path on the host.
 */
import { KilnError } from '../errors.ts';
import type { KilnConfig } from './config.ts';
import {
  allowed,
  changes,
  diskMibPerS,
  diskOpsPerS,
  memoryMaxMib,
  memoryMib,
  networkMibPerS,
  vcpus,
  vmm,
  volumeCache,
  writableSizeGib,
} from './schema.ts';
import { closestMatch } from './suggest.ts';

export const annotationPrefix = 'io.kiln.';

export interface AnnotationOverrides {
  /** Guest memory in MiB. */
  readonly memoryMib?: number;
  /** MiB up to which it can grow; 0 for no growth. */
  readonly memoryMaxMib?: number;
  readonly vcpus?: number;
  readonly kernel?: 'default' | 'minimal';
  readonly vmm?: 'auto' | 'qemu' | 'firecracker';
  /** Size limit of the writable layer in GiB. */
  readonly writableSizeGib?: number;
  /** Whether what the container writes comes to its snapshot on the host. */
  readonly changes?: 'auto' | 'keep' | 'discard';
  /** Of each disk; 0 for no limit. */
  readonly diskMibPerS?: number;
  readonly diskOpsPerS?: number;
  /** What the guest keeps of the host's files. */
  readonly volumeCache?: 'mmap' | 'none' | 'loose';
  /** Of each network card and direction; 0 for no limit. */
  readonly networkMibPerS?: number;
}

type Reader = (value: string) => AnnotationOverrides | undefined;

/** A decimal integer, as people write it: no sign, no leading zero, no unit. */
const integer = (value: string): number => (/^(0|[1-9]\d{0,14})$/.test(value) ? Number(value) : Number.NaN);

const annotations: Readonly<Record<string, { readonly allowed: string; readonly read: Reader }>> = {
  'io.kiln.memory_mib': {
    allowed: allowed.memoryMib,
    read: (value) => {
      const { data } = memoryMib.safeParse(integer(value));
      return data === undefined ? undefined : { memoryMib: data };
    },
  },
  'io.kiln.memory_max_mib': {
    allowed: allowed.memoryMaxMib,
    read: (value) => {
      const { data } = memoryMaxMib.safeParse(integer(value));
      return data === undefined ? undefined : { memoryMaxMib: data };
    },
  },
  'io.kiln.vcpus': {
    allowed: allowed.vcpus,
    read: (value) => {
      const { data } = vcpus.safeParse(integer(value));
      return data === undefined ? undefined : { vcpus: data };
    },
  },
  'io.kiln.kernel': {
    allowed: '"default" or "minimal"; a path can only be set in the host\'s config.toml',
    read: (value) => (value === 'default' || value === 'minimal' ? { kernel: value } : undefined),
  },
  'io.kiln.vmm': {
    allowed: allowed.vmm,
    read: (value) => {
      const { data } = vmm.safeParse(value);
      return data === undefined ? undefined : { vmm: data };
    },
  },
  'io.kiln.writable_size_gib': {
    allowed: allowed.writableSizeGib,
    read: (value) => {
      const { data } = writableSizeGib.safeParse(integer(value));
      return data === undefined ? undefined : { writableSizeGib: data };
    },
  },
  'io.kiln.changes': {
    allowed: allowed.changes,
    read: (value) => {
      const { data } = changes.safeParse(value);
      return data === undefined ? undefined : { changes: data };
    },
  },
  'io.kiln.disk_mib_per_s': {
    allowed: allowed.diskMibPerS,
    read: (value) => {
      const { data } = diskMibPerS.safeParse(integer(value));
      return data === undefined ? undefined : { diskMibPerS: data };
    },
  },
  'io.kiln.disk_ops_per_s': {
    allowed: allowed.diskOpsPerS,
    read: (value) => {
      const { data } = diskOpsPerS.safeParse(integer(value));
      return data === undefined ? undefined : { diskOpsPerS: data };
    },
  },
  'io.kiln.volume_cache': {
    allowed: allowed.volumeCache,
    read: (value) => {
      const { data } = volumeCache.safeParse(value);
      return data === undefined ? undefined : { volumeCache: data };
    },
  },
  'io.kiln.network_mib_per_s': {
    allowed: allowed.networkMibPerS,
    read: (value) => {
      const { data } = networkMibPerS.safeParse(integer(value));
      return data === undefined ? undefined : { networkMibPerS: data };
    },
  },
};

/**
 * What the `io.kiln.*` annotations ask for. Other annotations are not looked at.
 *
 * @throws KilnError invalid-argument for an unknown `io.kiln.*` annotation or a bad value, naming what is allowed.
 */
export function parseAnnotations(given: Readonly<Record<string, string>> | undefined): AnnotationOverrides {
  let overrides: AnnotationOverrides = {};
  for (const [name, value] of Object.entries(given ?? {})) {
    if (!name.startsWith(annotationPrefix)) continue;
    if (!Object.hasOwn(annotations, name)) throw unknownAnnotation(name, value);
    const annotation = annotations[name];
    const parsed = annotation?.read(value);
    if (parsed === undefined) {
      throw new KilnError(
        'invalid-argument',
        `annotation ${name}=${JSON.stringify(value)}: must be ${annotation?.allowed}`,
      );
    }
    overrides = { ...overrides, ...parsed };
  }
  return overrides;
}

/** The host's configuration as this container's annotations change it. Throws what `parseAnnotations` throws. */
export function applyAnnotations(config: KilnConfig, given: Readonly<Record<string, string>> | undefined): KilnConfig {
  const overrides = parseAnnotations(given);
  return {
    ...config,
    vm: {
      ...config.vm,
      memoryMib: overrides.memoryMib ?? config.vm.memoryMib,
      memoryMaxMib: overrides.memoryMaxMib ?? config.vm.memoryMaxMib,
      vcpus: overrides.vcpus ?? config.vm.vcpus,
      networkMibPerS: overrides.networkMibPerS ?? config.vm.networkMibPerS,
      vmm: overrides.vmm ?? config.vm.vmm,
      kernel: overrides.kernel ?? config.vm.kernel,
      // An initrd belongs to the kernel that the host's owner paired it with.
      initrd: overrides.kernel === undefined ? config.vm.initrd : undefined,
    },
    storage: {
      writableSizeGib: overrides.writableSizeGib ?? config.storage.writableSizeGib,
      changes: overrides.changes ?? config.storage.changes,
      diskMibPerS: overrides.diskMibPerS ?? config.storage.diskMibPerS,
      diskOpsPerS: overrides.diskOpsPerS ?? config.storage.diskOpsPerS,
      volumeCache: overrides.volumeCache ?? config.storage.volumeCache,
    },
  };
}

function unknownAnnotation(name: string, value: string): KilnError {
  const known = Object.keys(annotations);
  const suggestion = closestMatch(name, known);
  const meant = suggestion === undefined ? '' : `, did you mean ${suggestion}?`;
  return new KilnError(
    'invalid-argument',
    `unknown annotation ${name}=${JSON.stringify(value)}${meant}; known are ${known.join(', ')}`,
  );
}
