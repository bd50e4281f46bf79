import { KilnError } from '../errors.ts';
import type { Translation } from './field-rules.ts';
import { podNamespace } from './pod.ts';
import type { Namespace } from './spec.ts';

/** Namespaces that crun 1.8 knows by these names. */
export const namespaceTypes = ['cgroup', 'ipc', 'mount', 'network', 'pid', 'time', 'user', 'uts'];
const known = new Set(namespaceTypes);

/**
 * Without these the container would share with the host what a virtual machine cannot share. `asked`: the words by which
 * most people will have asked for that, of Kubernetes and of nerdctl.
 */
const required: Readonly<Record<string, { readonly shared: string; readonly asked?: string }>> = {
  network: { shared: "the host's network", asked: 'hostNetwork or --network=host' },
  pid: { shared: "the host's processes", asked: 'hostPID or --pid=host' },
  ipc: { shared: "the host's IPC objects", asked: 'hostIPC or --ipc=host' },
  uts: { shared: "the host's hostname", asked: '--uts=host' },
  mount: { shared: "the host's mounts" },
};

/**
 * linux.namespaces: new ones are made in the guest, except the network's, which is the guest's own: it is where the
 * virtual machine's network card is. A cgroup namespace is always made, because outside of one the container would see
 * the agent's cgroups.
 *
 * A container of a pod joins the pod's, which the guest has under names of their own.
 *
 * @throws KilnError invalid-argument when a namespace is shared with the host, is unknown or comes twice; unimplemented
 * when another one is to be joined
 */
export function translateNamespaces(
  namespaces: readonly Namespace[],
  path: string,
  { setsNetwork, pod }: Translation,
): readonly Namespace[] {
  const types = new Set<string>();
  const ofPod = new Map<string, string>();
  for (const [index, { type, path: joined }] of namespaces.entries()) {
    const at = `${path}[${index}]`;
    if (!known.has(type)) throw new KilnError('invalid-argument', `${at}: unknown namespace "${type}"`);
    if (types.has(type)) throw new KilnError('invalid-argument', `${at}: namespace "${type}" is listed twice`);
    types.add(type);
    // The host's namespace that a network is made in is joined there.
    if (joined === undefined || joined === '' || type === 'network') continue;
    const guestPath = pod && podNamespace(type, joined, pod);
    if (guestPath !== undefined) ofPod.set(type, guestPath);
    else {
      throw new KilnError('unimplemented', `${at}.path: joining a ${type} namespace is not supported yet: ${joined}`);
    }
  }
  const time = namespaces.findIndex(({ type }) => type === 'time');
  if (time !== -1 && !types.has('user')) {
    // crun 1.8 forks once more for it. Without a user namespace that comes after the process namespace was made, whose
    // first process then ends, and everything in it.
    const reason = 'crun in the guest can make a time namespace only together with a user namespace';
    throw new KilnError('unimplemented', `${path}[${time}]: ${reason}`);
  }
  for (const [type, { shared, asked }] of Object.entries(required)) {
    if (types.has(type)) continue;
    throw new KilnError('invalid-argument', `${path}: a container in a virtual machine cannot share ${shared}`, {
      hint: `the spec has no ${type} namespace${asked === undefined ? '' : `, as ${asked} asks for`}`,
    });
  }
  const guestNamespaces = namespaces
    .filter(({ type }) => type !== 'network')
    .map((namespace) => {
      const guestPath = ofPod.get(namespace.type);
      return guestPath === undefined ? namespace : { ...namespace, path: guestPath };
    });
  // crun sets sysctls of the network only for a network namespace that the spec names; this is the one it is in.
  if (setsNetwork) guestNamespaces.push({ type: 'network', path: '/proc/self/ns/net' });
  return types.has('cgroup') ? guestNamespaces : [...guestNamespaces, { type: 'cgroup' }];
}
