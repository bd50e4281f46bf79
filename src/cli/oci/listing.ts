import { readFileSync } from 'node:fs';
import type { ContainerState } from './container-state.ts';
import type { OciRuntime } from './runtime.ts';

/** A container as `state` and `list` show it: runtime-spec, runtime.md "State", and what runc adds. */
export interface DescribedContainer {
  readonly ociVersion: string;
  readonly id: string;
  /** 0 for one that has ended. */
  readonly pid: number;
  readonly status: string;
  readonly bundle: string;
  readonly rootfs: string;
  readonly created: string;
  readonly annotations?: Readonly<Record<string, string>> | undefined;
  /** A user's name. */
  readonly owner: string;
}

export async function describe(runtime: OciRuntime, state: ContainerState): Promise<DescribedContainer> {
  const { address: _address, owner, ...told } = state;
  const status = await runtime.status(state);
  const { ociVersion, id, pid, bundle, rootfs, created, annotations } = told;
  return {
    ...{ ociVersion, id, pid: status === 'stopped' ? 0 : pid, status, bundle, rootfs, created },
    ...(annotations === undefined ? {} : { annotations }),
    owner: userName(owner),
  };
}

const columns = ['ID', 'PID', 'STATUS', 'BUNDLE', 'CREATED', 'OWNER'];

/** As Go's tabwriter makes it for runc: columns of 12 characters and more, 3 between them. */
export function table(containers: readonly DescribedContainer[]): string {
  const rows = containers.map(({ id, pid, status, bundle, created, owner }) => {
    return [id, String(pid), status, bundle, created, owner];
  });
  const lines = [columns, ...rows];
  const widths = columns.map((_, index) => Math.max(12, ...lines.map((line) => (line[index]?.length ?? 0) + 3)));
  const last = columns.length - 1;
  return lines
    .map((line) => `${line.map((cell, index) => (index === last ? cell : cell.padEnd(widths[index] ?? 0))).join('')}\n`)
    .join('');
}

function userName(uid: number): string {
  const line = readFileSync('/etc/passwd', 'utf8')
    .split('\n')
    .find((entry) => entry.split(':')[2] === String(uid));
  return line?.split(':')[0] ?? `#${uid}`;
}
