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
import { translateDevices } from './devices.ts';
import { applyRules, drop, keep, nested, type Rules, refuse, type Translation, translate } from './field-rules.ts';
import type { Integer } from './json.ts';
import { translateMounts } from './mounts.ts';
import { translateNamespaces } from './namespaces.ts';
import { resourceRules, translateResources } from './resources.ts';
import type { Hook, Spec } from './spec.ts';

export interface GuestSpecOptions {
  /** The container's id: the last part of its cgroup. */
  readonly id: string;
  /** Absolute path of the container's root filesystem in the guest. */
  readonly rootfsPath: string;
  /** The container's hostname when the spec names none. */
  readonly hostname?: string;
}

export interface GuestSpec {
  /** For crun in the guest. Serialise it with `stringifyJson`. */
  readonly spec: Spec;
  /** What was left out although someone may miss it, one sentence each. */
  readonly warnings: readonly string[];
}

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

/** containerd's and CRI-O's way to say that a container is (a part of) a pod. */
const podAnnotations = ['io.kubernetes.cri.container-type', 'io.kubernetes.cri-o.ContainerType'];

const processRules: Rules = {
  terminal: translate<boolean>((terminal) => {
    if (terminal) throw new KilnError('unimplemented', 'terminals are not supported yet');
    return undefined;
  }),
  consoleSize: drop(),
  user: keep,
  args: keep,
  commandLine: drop(),
  env: keep,
  cwd: keep,
  capabilities: keep,
  rlimits: keep,
  noNewPrivileges: keep,
  apparmorProfile: translate<string>((profile, path, { warnings }) => {
    // "unconfined" is what the guest does anyway.
    if (profile !== '' && profile !== 'unconfined') {
      warnings.push(`${path}: "${profile}" is not applied: AppArmor is not active in the guest`);
    }
    return undefined;
  }),
  oomScoreAdj: translate<Integer>((score) => Math.max(Number(score), leastOomScore)),
  scheduler: refuse('a scheduling policy is not supported yet'),
  selinuxLabel: drop('not applied: SELinux is not active in the guest'),
  ioPriority: refuse('an I/O priority is not supported yet'),
  execCPUAffinity: refuse('a CPU affinity of exec processes is not supported yet'),
};

const seccompRules: Rules = {
  defaultAction: keep,
  defaultErrnoRet: keep,
  architectures: keep,
  flags: keep,
  listenerPath: refuse('a seccomp agent on the host cannot serve a container in a virtual machine'),
  listenerMetadata: drop(),
  syscalls: keep,
};

const linuxRules: Rules = {
  uidMappings: keep,
  gidMappings: keep,
  sysctl: translate<Record<string, string>>((sysctl, path) => {
    // crun refuses them without a network namespace of the container's own, and the guest's is shared with the agent.
    const name = Object.keys(sysctl).find((key) => /^net[./]/.test(key));
    if (name === undefined) return sysctl;
    throw new KilnError('unimplemented', `${path}["${name}"]: sysctls of the network are not supported yet`);
  }),
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
  rootfsPropagation: keep,
  maskedPaths: keep,
  readonlyPaths: keep,
  mountLabel: drop('not applied: SELinux is not active in the guest'),
  intelRdt: refuse('cache and memory bandwidth are shared out by the host, not in the guest'),
  memoryPolicy: refuse('a NUMA memory policy is not supported yet'),
  personality: keep,
  timeOffsets: refuse('offsets of a time namespace are not supported yet'),
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
  hooks: translate<Record<string, readonly Hook[]>>((hooks, path) => {
    for (const [moment, [hook]] of Object.entries(hooks)) {
      if (hook === undefined) continue;
      throw new KilnError('unimplemented', `${path}.${moment}: hooks are not supported yet: ${hook.path}`);
    }
    return undefined;
  }),
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
  linux: linuxRules,
  'linux.seccomp': seccompRules,
  ...resourceRules,
};

/**
 * What crun in the guest is told to run.
 *
 * @throws KilnError unimplemented for what Kiln cannot do yet, invalid-argument for what makes no sense in a microVM
 */
export function toGuestSpec(spec: Spec, { id, rootfsPath, hostname }: GuestSpecOptions): GuestSpec {
  const translation: Translation = { id, rootfsPath, hostname, warnings: [] };
  // Fields whose rule makes something out of nothing must be there.
  const whole = {
    ...spec,
    hostname: spec.hostname ?? '',
    // crun refuses a spec without the list.
    mounts: spec.mounts ?? [],
    linux: { ...spec.linux, namespaces: spec.linux?.namespaces ?? [], cgroupsPath: '' },
  };
  return { spec: applyRules(specRules, whole, '', translation) as Spec, warnings: translation.warnings };
}

function translateAnnotations(annotations: Record<string, string>, _path: string, { warnings }: Translation): object {
  for (const name of podAnnotations) {
    if (annotations[name] === undefined) continue;
    throw new KilnError('unimplemented', 'pods are not supported yet', {
      hint: `the spec has ${name}=${JSON.stringify(annotations[name])}`,
    });
  }
  // They steer crun itself (handlers, files for its output): names of the host's things, or a way around the guest's.
  const [forCrun, others] = partition(Object.entries(annotations), ([name]) => name.startsWith('run.oci.'));
  for (const [name] of forCrun) warnings.push(`annotation ${name}: not passed to the guest's crun`);
  return Object.fromEntries(others);
}

function partition<T>(items: readonly T[], belongs: (item: T) => boolean): [T[], T[]] {
  return [items.filter(belongs), items.filter((item) => !belongs(item))];
}
