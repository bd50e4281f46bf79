/** Where the host's kernel shows what a VMM can use. Another set makes another host, for tests. */
export interface HostDevices {
  /** As `process.arch`. */
  readonly arch: string;
  /** Has a directory per loaded kernel module. */
  readonly modules: string;
  readonly kvm: string;
  readonly vhostVsock: string;
  /** proc_cpuinfo(5). */
  readonly cpuinfo: string;
  /** How many pages of 2 MiB the pool has left: admin-guide/mm/hugetlbpage.rst. */
  readonly freeHugePages: string;
}

export const hostDevices: HostDevices = {
  arch: process.arch,
  modules: '/sys/module',
  kvm: '/dev/kvm',
  vhostVsock: '/dev/vhost-vsock',
  cpuinfo: '/proc/cpuinfo',
  freeHugePages: '/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages',
};
