/**
 * Kiln's configuration: one TOML file for the host, overridden container by container with `io.kiln.*` annotations
 * (annotations.ts). Everything is checked when it is read: an unknown key or a wrong value is an error that names file,
 * key, value and what is allowed, because a setting that is silently ignored is worse than a start that fails.
 */
import { readFileSync } from 'node:fs';
import { parse, TomlError } from 'smol-toml';
import type { z } from 'zod';
import { KilnError } from '../errors.ts';
import { type KilnPaths, type PathsOptions, pathsFromEnv } from './paths.ts';
import { type ConfigFile, configFile, sections } from './schema.ts';
import { closestMatch } from './suggest.ts';

export interface KilnConfig {
  readonly vm: {
    /** The virtual machine monitor. */
    readonly vmm: 'auto' | 'qemu' | 'firecracker';
    /** Guest memory in MiB, unless an annotation or the container's memory limit asks for more. */
    readonly memoryMib: number;
    /** MiB up to which a running VM's memory can grow when its container's limit is raised; no more than it has is not at all. */
    readonly memoryMaxMib: number;
    /** Guest CPUs, unless an annotation or the container's CPU limit asks for more. */
    readonly vcpus: number;
    /** `default`, `minimal`, or the absolute path of a kernel. */
    readonly kernel: string;
    /** Absolute path of an initrd that replaces the one belonging to the kernel. */
    readonly initrd: string | undefined;
    /** Network cards that each virtual machine has: as many interfaces can a container have. */
    readonly networkCards: number;
    /** What each may send, and what it may get, in MiB per second; 0 for no limit. */
    readonly networkMibPerS: number;
    /** Seconds from spawning the VMM until the agent must have connected. */
    readonly bootTimeoutS: number;
    readonly accelerator: 'auto' | 'kvm' | 'tcg';
    /** MiB for the code that QEMU translates an emulated guest's to; 0 leaves it to QEMU. */
    readonly translationMib: number;
    /** Seconds without work after which an emulated guest's translated code is given back; 0 for never. */
    readonly translationIdleS: number;
    /** QEMU's program: a name on PATH or an absolute path. */
    readonly qemu: string;
    /** Firecracker's program: a name on PATH or an absolute path. */
    readonly firecracker: string;
    /** Whether Firecracker runs in a jail; "auto" where there is a jailer. */
    readonly jail: 'auto' | 'on' | 'off';
    /** Firecracker's jailer: a name on PATH or an absolute path. */
    readonly jailer: string;
    /** The user ids of jailed virtual machines, one each: from this on, so many. */
    readonly jailUidFirst: number;
    readonly jailUids: number;
    /** Guest memory in pages of 2 MiB, from the host's pool. */
    readonly hugePages: boolean;
    /** Have guests tell when their first program starts. */
    readonly bootTimer: boolean;
    readonly channel: 'auto' | 'hybrid-vsock' | 'kernel-vsock' | 'virtio-serial';
  };
  readonly template: {
    /** Restore virtual machines from templates, where the VMM can. */
    readonly enabled: boolean;
    /** Days after its last use for which a template is kept. */
    readonly keepDays: number;
    /** Room that all templates may take on the disk, in MiB. */
    readonly maxTotalMib: number;
  };
  readonly pool: {
    /** Virtual machines of each kind that wait for containers in any case. */
    readonly min: number;
    /** At most; 0 for no pool. */
    readonly max: number;
  };
  readonly storage: {
    /** Size limit of a container's writable layer in GiB. */
    readonly writableSizeGib: number;
    /** Whether what a container writes comes to its snapshot on the host; see src/sandbox/changes.ts. */
    readonly changes: 'auto' | 'keep' | 'discard';
    /** What each of a container's disks may transfer, in MiB per second; 0 for no limit. */
    readonly diskMibPerS: number;
    /** How many requests per second it may have; 0 for no limit. */
    readonly diskOpsPerS: number;
    /** What a guest keeps of the host's files in its volumes. */
    readonly volumeCache: 'mmap' | 'none' | 'loose';
  };
  readonly daemon: {
    /** Seconds without a container after which kilnd ends; 0 for never. */
    readonly idleTimeoutS: number;
    /** Where Prometheus finds /metrics, as host:port; empty for nowhere. */
    readonly metricsAddress: string;
    readonly logLevel: 'trace' | 'debug' | 'info' | 'warn' | 'error';
  };
}

export interface LoadedConfig {
  readonly config: KilnConfig;
  readonly paths: KilnPaths;
}

/** Every setting at its default. */
export const defaultConfig: KilnConfig = toConfig(configFile.parse({}));

/**
 * Reads the configuration that the environment points to.
 *
 * @throws KilnError not-found when KILN_CONFIG names a file that does not exist, permission-denied when the file cannot
 * be read, invalid-argument for everything that is wrong in it.
 */
export function loadConfig(options: PathsOptions): LoadedConfig {
  const paths = pathsFromEnv(options);
  const text = readConfigFile(paths);
  return { config: text === undefined ? defaultConfig : parseConfig(text, paths.configFile), paths };
}

/** The configuration in a TOML text; `file` is what error messages call it. */
export function parseConfig(text: string, file: string): KilnConfig {
  let table: Record<string, unknown>;
  try {
    table = parse(text);
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    // The first line is the reason; the rest repeats the place as a drawing of several lines.
    const reason = error.message.split('\n', 1)[0]?.replace(/^Invalid TOML document: /, '');
    throw new KilnError('invalid-argument', `${file}:${error.line}:${error.column}: not valid TOML: ${reason}`, {
      cause: error,
    });
  }
  const result = configFile.safeParse(table);
  if (result.success) return toConfig(result.data);
  throw new KilnError('invalid-argument', describeIssue(result.error.issues[0], table, file), { cause: result.error });
}

function readConfigFile({ configFile: file, configFileIsExplicit }: KilnPaths): string | undefined {
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'ENOENT' && !configFileIsExplicit) return undefined;
    if (code === 'ENOENT') {
      throw new KilnError('not-found', `${file}: no such configuration file`, {
        hint: 'KILN_CONFIG names it; unset the variable to use the default place',
        cause: error,
      });
    }
    if (code === 'EACCES') throw new KilnError('permission-denied', `${file}: permission denied`, { cause: error });
    throw new KilnError('invalid-argument', `${file}: cannot be read: ${String(code ?? error)}`, { cause: error });
  }
}

function describeIssue(issue: z.core.$ZodIssue | undefined, table: Record<string, unknown>, file: string): string {
  if (issue === undefined) return `${file}: not a valid configuration`;
  if (issue.code === 'unrecognized_keys') return unknownKey(issue.path.map(String), issue.keys[0] ?? '', table, file);
  const path = issue.path.map(String);
  const value = JSON.stringify(valueAt(table, path));
  return `${file}: ${path.join('.')} = ${value}: must be ${allowedAt(path)}`;
}

function unknownKey(path: readonly string[], key: string, table: Record<string, unknown>, file: string): string {
  const name = [...path, key].join('.');
  if (path.length === 0) {
    const known = Object.keys(sections);
    // A setting without its section is the likelier mistake than a section by another name.
    const home = Object.entries(sections).find(([, section]) => key in section.shape)?.[0];
    const suggestion = home === undefined ? closestMatch(key, known) : `${home}.${key}`;
    return `${file}: unknown ${isTable(table[key]) ? 'section' : 'key'} ${name}${didYouMean(suggestion)}; sections are ${known.join(', ')}`;
  }
  const known = Object.keys(sections[path[0] as keyof typeof sections].shape);
  const value = JSON.stringify(valueAt(table, [...path, key]));
  const suggestion = didYouMean(closestMatch(key, known));
  return `${file}: unknown key ${name} = ${value}${suggestion}; keys of [${path.join('.')}] are ${known.join(', ')}`;
}

function didYouMean(suggestion: string | undefined): string {
  return suggestion === undefined ? '' : `, did you mean ${suggestion}?`;
}

function allowedAt([section, key]: readonly string[]): string {
  if (key === undefined) return 'a table';
  const shape: Record<string, z.ZodType> = sections[section as keyof typeof sections].shape;
  return shape[key]?.description ?? 'something else';
}

function valueAt(table: unknown, path: readonly string[]): unknown {
  return path.reduce<unknown>((value, key) => (isTable(value) ? value[key] : undefined), table);
}

function isTable(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function toConfig({ vm, template, pool, storage, daemon }: ConfigFile): KilnConfig {
  return {
    vm: {
      vmm: vm.vmm,
      memoryMib: vm.memory_mib,
      memoryMaxMib: vm.memory_max_mib,
      vcpus: vm.vcpus,
      kernel: vm.kernel,
      initrd: vm.initrd,
      networkCards: vm.network_cards,
      networkMibPerS: vm.network_mib_per_s,
      bootTimeoutS: vm.boot_timeout_s,
      accelerator: vm.accelerator,
      translationMib: vm.translation_mib,
      translationIdleS: vm.translation_idle_s,
      qemu: vm.qemu,
      firecracker: vm.firecracker,
      jail: vm.jail,
      jailer: vm.jailer,
      jailUidFirst: vm.jail_uid_first,
      jailUids: vm.jail_uids,
      hugePages: vm.huge_pages,
      bootTimer: vm.boot_timer,
      channel: vm.channel,
    },
    template: { enabled: template.enabled, keepDays: template.keep_days, maxTotalMib: template.max_total_mib },
    pool,
    storage: {
      writableSizeGib: storage.writable_size_gib,
      changes: storage.changes,
      diskMibPerS: storage.disk_mib_per_s,
      diskOpsPerS: storage.disk_ops_per_s,
      volumeCache: storage.volume_cache,
    },
    daemon: {
      idleTimeoutS: daemon.idle_timeout_s,
      metricsAddress: daemon.metrics_address,
      logLevel: daemon.log_level,
    },
  };
}
