import { describe, expect, it } from 'vitest';
import { toGuestSpec } from '../../../src/oci/guest-spec.ts';
import { podPlace } from '../../../src/oci/pod.ts';
import { guestPodOf, networkNamespaceOf, withPodResources } from '../../../src/oci/pod-spec.ts';
import type { Spec } from '../../../src/oci/spec.ts';

const pid = 4711;

function spec(fields: Partial<Spec> = {}): Spec {
  const namespaces = [
    { type: 'pid' },
    { type: 'ipc', path: `/proc/${pid}/ns/ipc` },
    { type: 'uts', path: `/proc/${pid}/ns/uts` },
    { type: 'mount' },
    { type: 'network', path: `/proc/${pid}/ns/net` },
  ];
  return {
    ...{ ociVersion: '1.2.0', process: { args: ['sh'], cwd: '/' }, root: { path: 'rootfs' }, mounts: [] },
    linux: { namespaces },
    ...fields,
  };
}

const containerAt = (at: number) => (at === 4712 ? 'web' : undefined);
const translate = (given: Spec) => toGuestSpec(given, { id: 'c', rootfsPath: '/r', pod: { pid, containerAt } }).spec;

describe("a container's place in a pod", () => {
  it.each([
    [{}, { kind: 'alone' }],
    [{ 'io.kubernetes.cri.container-type': 'sandbox', 'io.kubernetes.cri.sandbox-id': 's' }, { kind: 'sandbox' }],
    [
      { 'io.kubernetes.cri.container-type': 'container', 'io.kubernetes.cri.sandbox-id': 's' },
      { kind: 'member', sandboxId: 's' },
    ],
    [
      { 'io.kubernetes.cri-o.ContainerType': 'container', 'io.kubernetes.cri-o.SandboxID': 's' },
      { kind: 'member', sandboxId: 's' },
    ],
    // containerd 1.7 marks plain containers of a sandbox so, too: only the type counts.
    [{ 'io.kubernetes.cri.sandbox-id': 's' }, { kind: 'alone' }],
  ])('%o', (annotations, place) => {
    expect(podPlace({ annotations: annotations as Record<string, string> })).toEqual(place);
  });

  it("is told by CRI-O's words, whatever a pod's author has annotated beside them", () => {
    const ofAuthor = { 'io.kubernetes.cri.container-type': 'container', 'io.kubernetes.cri.sandbox-id': 'other' };
    expect(podPlace({ annotations: { ...ofAuthor, 'io.kubernetes.cri-o.ContainerType': 'sandbox' } })).toEqual({
      kind: 'sandbox',
    });
  });

  it('is told by the cgroup where podman says nothing: of what stands for its pod', () => {
    const [pod, id] = ['a'.repeat(64), 'b'.repeat(64)];
    const kindIn = (cgroupsPath: string, annotations: Record<string, string> = {}) => {
      return podPlace({
        annotations: { 'io.container.manager': 'libpod', ...annotations },
        linux: { cgroupsPath },
      }).kind;
    };
    expect(kindIn(`/libpod_parent/${pod}/libpod-${id}`)).toBe('sandbox');
    expect(kindIn(`machine-libpod_pod_${pod}.slice:libpod:${id}`)).toBe('sandbox');
    expect(kindIn(`/libpod_parent/libpod-${id}`)).toBe('alone');
    expect(kindIn(`machine.slice:libpod:${id}`)).toBe('alone');
    const member = { 'io.kubernetes.cri-o.ContainerType': 'container', 'io.kubernetes.cri-o.SandboxID': id };
    expect(kindIn(`/libpod_parent/${pod}/libpod-${id}`, member)).toBe('member');
    expect(podPlace({ linux: { cgroupsPath: `/libpod_parent/${pod}/libpod-${id}` } })).toEqual({ kind: 'alone' });
  });

  it('is refused when it makes no sense', () => {
    expect(() => podPlace({ annotations: { 'io.kubernetes.cri.container-type': 'pod' } })).toThrow(
      'annotation io.kubernetes.cri.container-type="pod": must be "sandbox" or "container"',
    );
    expect(() => podPlace({ annotations: { 'io.kubernetes.cri-o.ContainerType': 'container' } })).toThrow(
      'needs io.kubernetes.cri-o.SandboxID',
    );
  });
});

describe("a pod's container in the guest", () => {
  it("joins the pod's namespaces by the guest's names", () => {
    expect(translate(spec()).linux?.namespaces).toEqual([
      { type: 'pid' },
      { type: 'ipc', path: '/run/kiln/pod/ipc' },
      { type: 'uts', path: '/run/kiln/pod/uts' },
      { type: 'mount' },
      { type: 'cgroup' },
    ]);
  });

  it('shares the processes where the spec says so', () => {
    const [, ...others] = spec().linux?.namespaces ?? [];
    const given = spec({ linux: { namespaces: [{ type: 'pid', path: `/proc/${pid}/ns/pid` }, ...others] } });
    expect(translate(given).linux?.namespaces?.[0]).toEqual({ type: 'pid', path: '/run/kiln/pod/pid' });
  });

  it('sees the processes of another container of the pod where the spec says so, and joins nothing else of it', () => {
    const joining = (type: string) => {
      const namespaces = spec().linux?.namespaces?.map((namespace) =>
        namespace.type === type ? { type, path: `/proc/4712/ns/${type}` } : namespace,
      );
      return spec({ linux: { namespaces: namespaces ?? [] } });
    };
    expect(translate(joining('pid')).linux?.namespaces?.[0]).toEqual({ type: 'pid', path: '/run/kiln/pod/pid-of/web' });
    expect(() => translate(joining('ipc'))).toThrow('joining a ipc namespace is not supported yet: /proc/4712/ns/ipc');
  });

  it("joins the pod's namespaces by the names that CRI-O gives them, which has none for processes", () => {
    const named = (types: readonly string[]) => {
      const namespaces = (spec().linux?.namespaces ?? []).map((namespace) =>
        types.includes(namespace.type)
          ? { type: namespace.type, path: `/run/${namespace.type}ns/1` }
          : { ...namespace },
      );
      return spec({ linux: { namespaces } });
    };
    expect(translate(named(['ipc', 'uts', 'network'])).linux?.namespaces).toEqual(translate(spec()).linux?.namespaces);
    expect(() => translate(named(['pid']))).toThrow('joining a pid namespace is not supported yet: /run/pidns/1');
  });

  it("joins nobody else's", () => {
    const [, ...others] = spec().linux?.namespaces ?? [];
    const given = spec({ linux: { namespaces: [{ type: 'pid', path: '/proc/1/ns/pid' }, ...others] } });
    expect(() => translate(given)).toThrow('joining a pid namespace is not supported yet: /proc/1/ns/pid');
  });

  it("has the pod's /dev/shm", () => {
    const mount = {
      destination: '/dev/shm',
      type: 'bind',
      source: '/run/x/shm',
      options: ['rbind', 'ro', 'rw', 'nosuid'],
    };
    expect(translate(spec({ mounts: [mount] })).mounts).toEqual([
      { destination: '/dev/shm', type: 'bind', source: '/run/kiln/pod/shm', options: ['rbind', 'nosuid'] },
    ]);
  });
});

describe("a sandbox's spec", () => {
  const namespaces = ['pid', 'ipc', 'uts', 'mount'].map((type) => ({ type }));
  const network = { type: 'network', path: '/var/run/netns/cni-1' };
  const sandbox = (fields: Partial<Spec> = {}) => spec({ linux: { namespaces: [...namespaces, network] }, ...fields });

  it('says what the containers share', () => {
    const linux = { namespaces: [...namespaces, network], sysctl: { 'net.ipv4.ip_forward': '1' } };
    expect(guestPodOf(sandbox({ hostname: 'web', linux }), 's')).toEqual({
      ...{ hostname: 'web', domainname: '', sysctl: { 'net.ipv4.ip_forward': '1' }, shmBytes: 64 * 2 ** 20 },
    });
    expect(networkNamespaceOf(sandbox())).toBe('/var/run/netns/cni-1');
    expect(networkNamespaceOf(sandbox({ linux: { namespaces } }))).toBeUndefined();
  });

  it.each([
    ['network', "share the host's network"],
    ['pid', "share the host's processes"],
    ['ipc', "share the host's IPC objects"],
  ])('without a %s namespace is refused', (type, reason) => {
    const rest = [...namespaces, network].filter((namespace) => namespace.type !== type);
    expect(() => guestPodOf(sandbox({ linux: { namespaces: rest } }), 's')).toThrow(reason);
  });

  it("gets the limits of the pod's containers for its own", () => {
    const annotations = {
      'io.kubernetes.cri.sandbox-memory': '1073741824',
      'io.kubernetes.cri.sandbox-cpu-quota': '250000',
      'io.kubernetes.cri.sandbox-cpu-period': '100000',
    };
    const { resources } = withPodResources(sandbox({ annotations })).linux ?? {};
    expect(resources).toEqual({ memory: { limit: 2 ** 30 }, cpu: { quota: 250_000, period: 100_000 } });
    expect(withPodResources(sandbox()).linux?.resources?.memory?.limit).toBe(0);
    expect(() => withPodResources(sandbox({ annotations: { 'io.kubernetes.cri.sandbox-memory': '1Gi' } }))).toThrow(
      'annotation io.kubernetes.cri.sandbox-memory="1Gi": must be a number',
    );
  });

  it.each(['io.kubernetes.cri-o.PodLinuxResources', 'pod-linux-resources.crio.io'])(
    'gets them from CRI-O by the annotation %s',
    (name) => {
      const resourcesOf = (value: string) =>
        withPodResources(sandbox({ annotations: { [name]: value } })).linux?.resources;
      const value = '{"cpu_period":100000,"cpu_quota":250000,"memory_limit_in_bytes":1073741824}';
      expect(resourcesOf(value)).toEqual({ memory: { limit: 2 ** 30 }, cpu: { quota: 250_000, period: 100_000 } });
      for (const nothing of ['null', '{}']) expect(resourcesOf(nothing)?.memory?.limit).toBe(0);
      for (const bad of ['', '[]', '5', '{"memory_limit_in_bytes":']) {
        expect(() => resourcesOf(bad)).toThrow(`annotation ${name}=${JSON.stringify(bad)}: must be an object in JSON`);
      }
      expect(() => resourcesOf('{"memory_limit_in_bytes":"1Gi"}')).toThrow(
        `annotation ${name}: memory_limit_in_bytes="1Gi": must be a number`,
      );
    },
  );
});
