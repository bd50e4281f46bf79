import { describe, expect, it } from 'vitest';
import { type CriPod, podFilesOf, sandboxSpecOf, withPodFiles } from '../../../src/oci/cri-pod.ts';
import { toGuestSpec } from '../../../src/oci/guest-spec.ts';
import { guestPodOf, networkNamespaceOf, withPodResources } from '../../../src/oci/pod-spec.ts';
import type { Spec } from '../../../src/oci/spec.ts';

function pod(fields: Partial<CriPod> = {}): CriPod {
  return {
    ...{ hostname: 'web-0', annotations: {}, sysctls: {}, cgroupParent: '' },
    namespaces: { network: 'pod', pid: 'container', ipc: 'pod' },
    userNamespace: false,
    ...fields,
  };
}

const specOf = (fields: Partial<CriPod> = {}) =>
  sandboxSpecOf(pod(fields), { id: 's1', networkNamespace: '/run/netns/n' });

describe("the spec of CRI's pod", () => {
  it("is one of a sandbox as containerd's podsandbox controller makes it", () => {
    const spec = specOf({ sysctls: { 'kernel.shm_rmid_forced': '1' } });
    expect(networkNamespaceOf(spec)).toBe('/run/netns/n');
    expect(guestPodOf(spec, 's1')).toEqual({
      ...{ hostname: 'web-0', domainname: '', shmBytes: 64 * 2 ** 20 },
      sysctl: {
        'net.ipv4.ip_unprivileged_port_start': '0',
        'net.ipv4.ping_group_range': '0 2147483647',
        'kernel.shm_rmid_forced': '1',
      },
    });
  });

  it('lets the pod say otherwise of what is set by default', () => {
    const name = 'net.ipv4.ip_unprivileged_port_start';
    expect(specOf({ sysctls: { [name]: '1024' } }).linux?.sysctl?.[name]).toBe('1024');
  });

  it('has the limits of all containers together, which no annotation of the pod can set', () => {
    const annotations = { 'io.kubernetes.cri.sandbox-memory': '1', 'io.kiln.vcpus': '2', 'example.com/x': 'y' };
    expect(specOf({ annotations }).annotations).toEqual({ 'io.kiln.vcpus': '2' });
    const resources = { memoryLimit: 2n ** 30n, cpuQuota: 250_000n, cpuPeriod: 100_000n, cpuShares: 512n };
    expect(withPodResources(specOf({ annotations, resources })).linux?.resources).toEqual({
      ...{ memory: { limit: 2 ** 30 }, cpu: { quota: 250_000, period: 100_000 } },
    });
  });

  it.each([
    ['/kubepods/burstable/pod1', '/kubepods/burstable/pod1/s1'],
    ['/kubepods/', '/kubepods/s1'],
    ['kubepods-burstable.slice', 'kubepods-burstable.slice:cri-containerd:s1'],
    ['/kubepods.slice/kubepods-pod1.slice', 'kubepods-pod1.slice:cri-containerd:s1'],
    ['', undefined],
  ])('below the control group "%s" names %s', (cgroupParent, path) => {
    expect(specOf({ cgroupParent }).linux?.cgroupsPath).toBe(path);
  });

  it.each([
    ['network', "a pod in a virtual machine cannot share the host's network"],
    ['pid', "a pod in a virtual machine cannot share the host's processes"],
    ['ipc', "a pod in a virtual machine cannot share the host's IPC objects"],
  ] as const)("that wants the host's %s is refused", (kind, message) => {
    const namespaces = { ...pod().namespaces, [kind]: 'node' };
    expect(() => specOf({ namespaces })).toThrow(expect.objectContaining({ code: 'invalid-argument', message }));
  });

  it('with a user namespace is refused', () => {
    expect(() => specOf({ userNamespace: true })).toThrow('hostUsers: false');
  });
});

describe("the pod's files", () => {
  const host = { hostname: 'node\n', hosts: '127.0.0.1 localhost\n', 'resolv.conf': 'nameserver 10.0.0.1\n' };

  it('are what CRI says of names', () => {
    const dns = { servers: ['10.0.0.53', '10.0.0.54'], searches: ['a.svc', 'svc'], options: ['ndots:5', 'edns0'] };
    expect(podFilesOf(pod({ dns }), host)).toEqual({
      hostname: 'web-0\n',
      hosts: host.hosts,
      'resolv.conf': 'search a.svc svc\nnameserver 10.0.0.53\nnameserver 10.0.0.54\noptions ndots:5 edns0\n',
    });
  });

  it("are the host's where it says nothing, and empty where it says that there is nothing", () => {
    expect(podFilesOf(pod({ hostname: '' }), host)).toEqual(host);
    expect(podFilesOf(pod({ dns: { servers: [], searches: [], options: [] } }), host)['resolv.conf']).toBe('');
  });

  it('have no lines that nobody asked for', () => {
    const dns = { servers: ['10.0.0.53\noptions debug'], searches: [], options: [] };
    expect(() => podFilesOf(pod({ dns }), host)).toThrow('has more than one line');
  });
});

describe("a container's spec with the pod's files", () => {
  const namespaces = ['pid', 'network', 'mount', 'uts'].map((type) => ({ type }));
  const shm = { destination: '/dev/shm', type: 'tmpfs', source: 'shm', options: ['nosuid', 'size=65536k'] };
  const spec = (fields: Partial<Spec> = {}): Spec => ({
    ...{ ociVersion: '1.2.0', process: { args: ['sh'], cwd: '/' }, root: { path: 'rootfs' }, mounts: [shm] },
    linux: { namespaces: [...namespaces, { type: 'ipc', path: '/proc/7/ns/ipc' }] },
    ...fields,
  });
  const bind = (name: string, access = 'rw') => ({
    ...{ destination: `/etc/${name}`, type: 'bind', source: `/p/${name}`, options: ['rbind', 'rprivate', access] },
  });
  const added = (given: Spec) => withPodFiles(given, '/p').mounts?.filter(({ source }) => source?.startsWith('/p/'));

  it('has them in /etc, read-only where all is', () => {
    const names = ['hostname', 'hosts', 'resolv.conf'];
    expect(added(spec())).toEqual(names.map((name) => bind(name)));
    expect(added(spec({ root: { path: 'r', readonly: true } }))).toEqual(names.map((name) => bind(name, 'ro')));
  });

  it('keeps what it has there already', () => {
    const own = { destination: '/etc/hosts', type: 'bind', source: '/kubelet/hosts', options: ['rbind'] };
    const { mounts } = withPodFiles(spec({ mounts: [own] }), '/p');
    expect(mounts).toEqual([own, bind('hostname'), bind('resolv.conf')]);
  });

  it("has the pod's /dev/shm where it has the pod's IPC, and nothing else there", () => {
    const shmOf = (given: Spec) => {
      const options = { id: 'c', rootfsPath: '/r', pod: { pid: 7 } };
      const { mounts } = toGuestSpec(withPodFiles(given, '/p'), options).spec;
      return mounts?.filter(({ destination }) => destination === '/dev/shm');
    };
    expect(shmOf(spec())).toMatchObject([{ type: 'bind', source: '/run/kiln/pod/shm' }]);
    expect(shmOf(spec({ linux: { namespaces: [...namespaces, { type: 'ipc' }] } }))).toEqual([shm]);
    const larger = { destination: '/dev/shm', type: 'bind', source: '/vol/shm', options: ['rbind'] };
    expect(shmOf(spec({ mounts: [larger] }))).toHaveLength(1);
    expect(shmOf(spec({ mounts: [] }))).toEqual([]);
  });
});
