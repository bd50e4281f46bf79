/**
 * The translation of the host's OCI spec into the one that crun gets in the guest. Pure: no file is read, nothing is
 * asked of the host.
 *
 * Three things change the meaning of a spec on its way into a virtual machine. The guest *is* a sandbox, so the
 * network namespace is the whole guest. Paths, device numbers and CPU numbers of the host name nothing there. And the
 * guest has cgroup v2 only. Each field's rule follows from these, and stands in docs/oci-spec.md; what cannot be honoured
 * is an error, so that no container runs with less than it asked for.
 */
import { KilnError } from '../errors.ts';
import type { VolumeMount } from './binds.ts';
import {
  type BlockDevice,
  BlockDevices,
  type DeviceNumber,
  type FilesystemMount,
  type NodeAt,
} from './block-devices.ts';
import { translateDevices } from './devices.ts';
import {
  applyRules,
  drop,
  keep,
  nested,
  partialTranslation,
  type Rules,
  refuse,
  type Translation,
  translate,
} from './field-rules.ts';
import { translateHooks } from './hooks.ts';
import type { Integer } from './json.ts';
import { translateMounts } from './mounts.ts';
import { translateNamespaces } from './namespaces.ts';
import type { PodOfSpec } from './pod.ts';
import {
  apparmorProfile,
  capabilityRules,
  ioPriority,
  requireOneOf,
  rlimits,
  scheduler,
  userRules,
} from './process.ts';
import { resourceRules, translateResources } from './resources.ts';
import { seccompRules } from './seccomp.ts';
import type { Process, Spec } from './spec.ts';
import { isOfNetwork, translateSysctl } from './sysctl.ts';

export interface GuestSpecOptions {
  /** The container's id: the last part of its cgroup. */
  readonly id: string;
  /** Absolute path of the container's root filesystem in the guest. */
  readonly rootfsPath: string;
  /** The container's hostname when the spec names none. */
  readonly hostname?: string;
  /** The bundle's directory; sources of bind mounts may be relative to it. */
  readonly bundle?: string;
  /** The guest's numbers of the volumes that an earlier translation of this spec has named; until then, their places. */
  readonly volumeNumbers?: readonly number[];
  /** Whether the host has something mounted below a path; where nobody can say, nothing. */
  readonly hasMountsBelow?: (source: string) => boolean;
  /** The host's directory that is the root filesystem itself, as the last of the volumes; without it, it is at `rootfsPath`. */
  readonly liveRoot?: string | undefined;
  /** Set for a container of a pod. */
  readonly pod?: PodOfSpec;
  /** Which paths of the host are block devices; of those that `possibleNodes` names. */
  readonly nodeAt?: NodeAt;
  /** The guest's numbers of the block devices that an earlier translation of this spec has named; until then, the host's. */
  readonly deviceNumbers?: readonly DeviceNumber[] | undefined;
}

export interface GuestSpec {
  /** For crun in the guest. Serialise it with `stringifyJson`. */
  readonly spec: Spec;
  /** What the container gets of the host's files, in the order of its mounts. */
  readonly volumes: readonly VolumeMount[];
  /** What it gets of the host's block devices, and the filesystems of these that it has mounted. */
  readonly blockDevices: readonly BlockDevice[];
  readonly filesystems: readonly FilesystemMount[];
  /** What was left out although someone may miss it, one sentence each. */
  readonly warnings: readonly string[];
}

/** Where the guest has the host's files, below their numbers. */
export const guestVolumesDirectory = '/run/kiln/volumes';

/** The parent of every container's cgroup in the guest. */
export const guestCgroupParent = '/kiln';

/** crun before 1.9 refuses every version but 1.0; it reads later versions' fields nevertheless. containerd 2 writes 1.2. */
const guestOciVersion = '1.0.2';

/**
 * Of all scores only -1000 means "never" (proc(5)), and in the guest that is the agent's alone: were nobody left to
 * choose when the virtual machine's memory runs out, its kernel would panic.
 */
const leastOomScore = -999;

const notLinux = refuse('Kiln runs Linux containers', 'invalid-argument');

const processRules: Rules = {
  terminal: keep,
  // The agent sets it too, when it has the terminal: a client may have changed it before the start (terminalSize).
  consoleSize: keep,
  user: nested(userRules),
  args: keep,
  commandLine: drop(),
  env: keep,
  cwd: keep,
  capabilities: nested(capabilityRules),
  rlimits,
  noNewPrivileges: keep,
  apparmorProfile,
  oomScoreAdj: translate<Integer>((score) => Math.max(Number(score), leastOomScore)),
  scheduler,
  selinuxLabel: drop('not applied: SELinux is not active in the guest'),
  ioPriority,
  execCPUAffinity: refuse("names CPUs of the host, which are not the guest's"),
};

const propagations = ['shared', 'slave', 'private', 'unbindable'];

/** They ask for what the guest does anyway, as it has one memory node. */
export const memoryPolicyModes = ['MPOL_DEFAULT', 'MPOL_LOCAL'];

const linuxRules: Rules = {
  uidMappings: keep,
  gidMappings: keep,
  sysctl: translate(translateSysctl),
  resources: translate(translateResources),
  cgroupsPath: translate((_path, _at, { id }) => `${guestCgroupParent}/${id}`),
  namespaces: translate(translateNamespaces),
  devices: translate(translateDevices),
  netDevices: translate<object>((netDevices, path) => {
    const [name] = Object.keys(netDevices);
    if (name === undefined) return undefined;
    throw new KilnError('unimplemented', `${path}: moving a network device of the host is not supported yet: ${name}`);
  }),
  seccomp: nested(seccompRules),
  rootfsPropagation: translate<string>((propagation, path) => {
    if (propagation === '') return undefined;
    requireOneOf(propagation.replace(/^r/, ''), propagations, path);
    return propagation;
  }),
  maskedPaths: keep,
  readonlyPaths: keep,
  mountLabel: drop('not applied: SELinux is not active in the guest'),
  intelRdt: refuse('cache and memory bandwidth are shared out by the host, not in the guest'),
  memoryPolicy: translate<{ readonly mode?: string }>((policy, path, translation) => {
    const { mode = '' } = policy;
    if (memoryPolicyModes.includes(mode)) return undefined;
    return refuse('names memory nodes of the host').apply(policy, path, translation);
  }),
  personality: translate<{ readonly domain?: unknown; readonly flags?: readonly string[] }>((personality, path) => {
    requireOneOf(personality.domain, ['LINUX', 'LINUX32'], `${path}.domain`);
    const [flag] = personality.flags ?? [];
    if (flag === undefined) return personality;
    throw new KilnError('invalid-argument', `${path}.flags[0]: ${flag} is not known; the spec has no flags yet`);
  }),
  timeOffsets: refuse('crun in the guest cannot set the clocks of a time namespace'),
};

const specRules: Rules = {
  ociVersion: translate<string>((version, path) => {
    if (!version.startsWith('1.')) throw new KilnError('invalid-argument', `${path}: version ${version} is not known`);
    return guestOciVersion;
  }),
  process: nested(processRules),
  root: translate<object>((root, _path, { rootfsPath }) => ({ ...root, path: rootfsPath })),
  hostname: translate<string>((name, _path, { hostname }) => (name === '' ? hostname : name)),
  domainname: keep,
  mounts: translate(translateMounts),
  hooks: translate(translateHooks),
  annotations: translate(translateAnnotations),
  linux: nested(linuxRules),
  solaris: notLinux,
  windows: notLinux,
  zos: notLinux,
  freebsd: notLinux,
  vm: refuse('the kernel is chosen by the annotation io.kiln.kernel', 'invalid-argument'),
};

/** Every field's rule by the JSON path of its object, for the documentation and its test. */
export const fieldRules: Readonly<Record<string, Rules>> = {
  '': specRules,
  process: processRules,
  'process.user': userRules,
  'process.capabilities': capabilityRules,
  linux: linuxRules,
  'linux.seccomp': seccompRules,
  ...resourceRules,
};

/**
 * What crun in the guest is told to run.
 *
 * @throws KilnError unimplemented for what Kiln cannot do yet, invalid-argument for what makes no sense in a microVM
 */
export function toGuestSpec(given: Spec, options: GuestSpecOptions): GuestSpec {
  const { id, rootfsPath, liveRoot, hostname, pod, bundle = '/', volumeNumbers = [] } = options;
  const { hasMountsBelow = () => false, nodeAt = () => undefined } = options;
  const blockDevices = new BlockDevices(given, nodeAt, options.deviceNumbers);
  const { spec } = blockDevices;
  // Fields whose rule makes something out of nothing must be there.
  const whole = {
    ...spec,
    hostname: spec.hostname ?? '',
    // crun refuses a spec without the list.
    mounts: spec.mounts ?? [],
    linux: { ...spec.linux, namespaces: spec.linux?.namespaces ?? [], cgroupsPath: '' },
  };
  const { domainname } = spec;
  const setsNetwork = Object.keys(spec.linux?.sysctl ?? {}).some(isOfNetwork);
  const mapsIds = whole.linux.namespaces.some(({ type }) => type === 'user');
  const warnings: string[] = [];
  const volumes: VolumeMount[] = [];
  const volumePath = (index: number) => `${guestVolumesDirectory}/${volumeNumbers[index] ?? index}`;
  const translation: Translation = {
    ...{ id, rootfsPath, hostname, domainname, setsNetwork, mapsIds, pod, warnings },
    ...{ bundle, volumes, volumePath, hasMountsBelow, blockDevices },
  };
  const translated = applyRules(specRules, whole, '', translation) as Spec;
  if (liveRoot !== undefined) {
    volumes.push({ source: liveRoot, destination: '/', readOnly: 'no', recursive: true, follows: false });
  }
  const root = liveRoot === undefined ? {} : { root: { ...translated.root, path: volumePath(volumes.length - 1) } };
  return {
    spec: { ...translated, ...root },
    volumes,
    blockDevices: blockDevices.list,
    filesystems: blockDevices.filesystems,
    warnings,
  };
}

/** Of a process that is exec'd: what the agent does for an init before it runs comes too late there. */
const execRules: Rules = {
  ...processRules,
  scheduler: refuse("a scheduling policy of an exec'd process is not supported"),
  ioPriority: refuse("an I/O priority of an exec'd process is not supported"),
};

export interface GuestProcessSpec {
  /** For crun in the guest. Serialise it with `stringifyJson`. */
  readonly process: Process;
  /** As of `GuestSpec`. */
  readonly warnings: readonly string[];
}

/** What crun in the guest is told to run in a container that exists. Throws what `toGuestSpec` throws. */
export function toGuestProcess(process: Process, { id, rootfsPath }: GuestSpecOptions): GuestProcessSpec {
  const translation = partialTranslation(id, rootfsPath);
  const translated = applyRules(execRules, process, 'process', translation) as Process;
  return { process: translated, warnings: translation.warnings };
}

/** The size that a process's terminal begins with; undefined where the spec does not say. */
export function terminalSize({ consoleSize }: Process): { width: number; height: number } | undefined {
  if (consoleSize === undefined) return undefined;
  const { width, height } = consoleSize;
  return { width: Number(width), height: Number(height) };
}

function translateAnnotations(annotations: Record<string, string>, _path: string, { warnings }: Translation): object {
  // They steer crun itself (handlers, files for its output): names of the host's things, or a way around the guest's.
  const [forCrun, others] = partition(Object.entries(annotations), ([name]) => name.startsWith('run.oci.'));
  for (const [name] of forCrun) warnings.push(`annotation ${name}: not passed to the guest's crun`);
  return Object.fromEntries(others);
}

function partition<T>(items: readonly T[], belongs: (item: T) => boolean): [T[], T[]] {
  return [items.filter(belongs), items.filter((item) => !belongs(item))];
}
