import { KilnError } from '../../../src/errors.ts';
import type { Spec } from '../../../src/oci/spec.ts';

/** What `ctr run` of containerd 2.1 writes for a busybox image, shortened where lists are long. */
export function ctrSpec() {
  return {
    ociVersion: '1.2.1',
    process: {
      user: { uid: 0, gid: 0, additionalGids: [0, 10] },
      args: ['uname', '-a'],
      env: ['PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'],
      cwd: '/',
      capabilities: { bounding: ['CAP_CHOWN'], effective: ['CAP_CHOWN'], permitted: ['CAP_CHOWN'] },
      rlimits: [{ type: 'RLIMIT_NOFILE', hard: 1024, soft: 1024 }],
      noNewPrivileges: true,
    },
    root: { path: 'rootfs' },
    mounts: [
      { destination: '/proc', type: 'proc', source: 'proc', options: ['nosuid', 'noexec', 'nodev'] },
      { destination: '/dev', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'mode=755', 'size=65536k'] },
      { destination: '/dev/pts', type: 'devpts', source: 'devpts', options: ['nosuid', 'newinstance', 'gid=5'] },
      { destination: '/dev/shm', type: 'tmpfs', source: 'shm', options: ['nosuid', 'size=65536k'] },
      { destination: '/dev/mqueue', type: 'mqueue', source: 'mqueue', options: ['nosuid'] },
      { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['nosuid', 'ro'] },
      { destination: '/run', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'mode=755'] },
      { destination: '/sys/fs/cgroup', type: 'cgroup', source: 'cgroup', options: ['ro', 'nosuid'] },
    ],
    linux: {
      resources: { devices: [{ allow: false, access: 'rwm' }] },
      cgroupsPath: '/default/c1',
      namespaces: [
        { type: 'pid' },
        { type: 'ipc' },
        { type: 'uts' },
        { type: 'mount' },
        { type: 'network' },
        { type: 'cgroup' },
      ],
      maskedPaths: ['/proc/kcore', '/sys/firmware'],
      readonlyPaths: ['/proc/sys'],
    },
  };
}

/** ctr's spec with other values for some of linux's members. */
export function withLinux(linux: object): Spec {
  const spec = ctrSpec();
  return { ...spec, linux: { ...spec.linux, ...linux } };
}

export function withProcess(process: object): Spec {
  const spec = ctrSpec();
  return { ...spec, process: { ...spec.process, ...process } };
}

export function errorOf(action: () => unknown): KilnError {
  try {
    action();
  } catch (error) {
    if (error instanceof KilnError) return error;
    throw error;
  }
  throw new Error('no error was thrown');
}
